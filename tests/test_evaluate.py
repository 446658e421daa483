"""Evaluation: what it measures, and that it says so when calibration problems leak in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calset
from calset import bundled
from calset.builder.model.info import inspect
from calset.demo.report import DemoSettings
from calset.demo.run import run_demo
from calset.errors import InputError
from calset.evaluation.evaluate import MIN_LOOP_TOKENS, is_looping

PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=4&max_digits=2&size=5&seed=400000"

tokens = st.lists(st.integers(0, 500), max_size=60)


@given(tokens, st.lists(st.integers(0, 500), min_size=1, max_size=40))
def test_any_cycle_repeated_often_enough_at_the_end_is_a_loop(start: list[int], cycle: list[int]) -> None:
    repeats = max(5, -(-MIN_LOOP_TOKENS // len(cycle)) + 1)
    assert is_looping(start + cycle * repeats)


@given(st.integers(0, 200))
def test_counting_up_is_no_loop(n: int) -> None:
    assert not is_looping(list(range(n)))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40))
def test_three_repeats_are_no_loop(cycle: list[int]) -> None:
    # Distinct tokens, so that the cycle has no shorter cycle inside.
    once = list(dict.fromkeys(cycle))
    assert not is_looping([1000, 1001, *once * 3]) or len(once) == 1


def test_zeros_at_the_end_of_a_sum_are_no_loop() -> None:
    assert not is_looping([5, 4, 3, *[0] * (MIN_LOOP_TOKENS - 1)])


def test_an_evaluation_counts_what_it_generated_and_resumes(tmp_path: Path, transformers_engine) -> None:
    catalog = calset.Catalog(tmp_path / "c.duckdb")
    ask = {"samples": 2, "catalog": catalog, "engine": transformers_engine, "max_tokens": 120}
    report = calset.evaluate(bundled.MODEL, PROBLEMS, **ask)
    rows = catalog.query("SELECT problem_id, verdict = 'correct', n_tokens, finish_reason FROM trace").rows
    assert len(rows) == report.n_traces == 10
    assert report.accuracy == pytest.approx(sum(bool(r[1]) for r in rows) / 10)
    assert report.mean_tokens == pytest.approx(sum(r[2] for r in rows) / 10)
    assert report.non_termination == pytest.approx(sum(r[3] == "length" for r in rows) / 10)
    again = calset.evaluate(bundled.MODEL, PROBLEMS, **ask)
    assert again.tokens_per_second is None  # nothing was generated
    assert (again.accuracy, again.mean_tokens) == (report.accuracy, report.mean_tokens)
    assert len(catalog.evaluations()) == 2


def test_another_seed_or_limit_is_another_evaluation(tmp_path: Path, scripted_engine) -> None:
    """Both are outside a build's key; an evaluation that reused the traces would report what it did not run."""
    catalog = calset.Catalog(tmp_path / "c.duckdb")
    for seed, limit in ((0, 50), (1, 50), (1, 80), (0, 50)):
        engine = scripted_engine(inspect(bundled.MODEL).revision)
        calset.evaluate(bundled.MODEL, PROBLEMS, catalog=catalog, engine=engine, seed=seed, max_tokens=limit)
        assert len(engine.requests) == (0 if catalog.evaluations()[3:] else 5)
    assert catalog.query("SELECT count(*) FROM traces").rows == [(15,)]


def test_what_could_not_be_judged_is_counted_apart(tmp_path: Path, scripted_engine) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in [("1+1?", "2"), ("why?", "\\frac{")])
    )
    said = inspect(bundled.MODEL).tokenizer.encode("\\boxed{2}", add_special_tokens=False)
    engine = scripted_engine(inspect(bundled.MODEL).revision, token_ids=tuple(said))
    report = calset.evaluate(bundled.MODEL, str(file), catalog=tmp_path / "c.duckdb", engine=engine, max_tokens=50)
    assert report.verdicts == {"correct": 1, "gold_unparsable": 1}
    assert (report.accuracy, report.n_problems) == (1.0, 1)
    assert any("1 of 2 traces were not judged" in warning for warning in report.warnings)


def test_calibration_questions_are_recognised_in_another_file(tmp_path: Path, scripted_engine) -> None:
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
    for name, part in (("train", rows[:3]), ("held-out", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    catalog = calset.Catalog(tmp_path / "c.duckdb")
    engine = scripted_engine(inspect(bundled.MODEL).revision, token_ids=(31, 32, 33))
    calset.build(bundled.MODEL, str(tmp_path / "train.jsonl"), samples=1, catalog=catalog, engine=engine)
    subset = calset.select(catalog, "train", "rac", tokens=2000)
    calset.prune(bundled.MODEL, subset, tmp_path / "pruned", method="wanda", sparsity=0.5)
    calset.prune(bundled.MODEL, subset, tmp_path / "by-magnitude", method="magnitude", sparsity=0.5)
    ask = {"engine": engine, "max_tokens": 50}
    report = calset.evaluate(tmp_path / "pruned", str(tmp_path / "held-out.jsonl"), catalog=catalog, **ask)
    assert any(warning.startswith("1 of the evaluated problems") for warning in report.warnings)
    unseen = calset.evaluate(tmp_path / "by-magnitude", str(tmp_path / "held-out.jsonl"), catalog=catalog, **ask)
    assert not any("of the evaluated problems" in warning for warning in unseen.warnings)  # it used no calibration
    elsewhere = tmp_path / "other.duckdb"
    report = calset.evaluate(tmp_path / "pruned", str(tmp_path / "held-out.jsonl"), catalog=elsewhere, **ask)
    assert any("were not compared" in warning for warning in report.warnings)


@pytest.mark.slow
def test_the_demo_runs_from_traces_to_table_and_keeps_what_is_there(tmp_path: Path) -> None:
    settings = DemoSettings(
        samples=2, budget=700, build_limit=24, evaluation_limit=4, max_tokens=120, recipes=("rac", "prompts", "text"),
        methods=("wanda",), shown="rac",
    )  # fmt: skip
    out = tmp_path / "demo"
    report = run_demo(out, engine="transformers", settings=settings)
    assert [(a.method, a.calibration) for a in report.arms] == [
        ("dense", "-"), ("wanda", "rac"), ("wanda", "prompts"), ("wanda", "text"),
    ]  # fmt: skip
    assert all(arm.n_tokens <= 700 for arm in report.arms)
    assert (out / "demo.png").stat().st_size > 10_000
    assert (out / "report.json").exists()
    again = run_demo(out, engine="transformers", settings=settings)
    assert [a.evaluation.accuracy for a in again.arms] == [a.evaluation.accuracy for a in report.arms]
    with pytest.raises(InputError, match="other settings"):
        run_demo(out, engine="transformers", settings=DemoSettings(**{**_fields(settings), "sparsity": 0.3}))


def _fields(settings: DemoSettings) -> dict:
    return {name: getattr(settings, name) for name in DemoSettings.__slots__}


def test_the_demo_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="something else"):
        run_demo(tmp_path, engine="transformers")

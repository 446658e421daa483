"""Evaluation: what it measures, and that it says so when calibration problems leak in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calset
from calset import demo
from calset.demo.run import DemoSettings, run_demo
from calset.errors import InputError
from calset.pruning.evaluate import MIN_LOOP_TOKENS, is_looping

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
    ask = {"samples": 2, "catalog": catalog, "engine": transformers_engine, "max_tokens": 200}
    report = calset.evaluate(demo.MODEL, PROBLEMS, **ask)
    rows = catalog.query("SELECT problem_id, verdict = 'correct', n_tokens, finish_reason FROM trace").rows
    assert len(rows) == report.n_traces == 10
    assert report.accuracy == pytest.approx(sum(bool(r[1]) for r in rows) / 10)
    assert report.mean_tokens == pytest.approx(sum(r[2] for r in rows) / 10)
    assert report.non_termination == pytest.approx(sum(r[3] == "length" for r in rows) / 10)
    again = calset.evaluate(demo.MODEL, PROBLEMS, **ask)
    assert again.tokens_per_second is None  # nothing was generated
    assert (again.accuracy, again.mean_tokens) == (report.accuracy, report.mean_tokens)
    assert len(catalog.evaluations()) == 2


def test_the_demo_runs_from_traces_to_table_and_keeps_what_is_there(tmp_path: Path) -> None:
    settings = DemoSettings(
        samples=2, budget=1500, build_limit=60, evaluation_limit=4, max_tokens=160, recipes=("rac", "prompts", "text"),
        methods=("wanda",), shown="rac",
    )  # fmt: skip
    out = tmp_path / "demo"
    report = run_demo(out, engine="transformers", settings=settings)
    assert [(a.method, a.calibration) for a in report.arms] == [
        ("dense", "-"), ("wanda", "rac"), ("wanda", "prompts"), ("wanda", "text"),
    ]  # fmt: skip
    assert all(arm.n_tokens <= 1500 for arm in report.arms)
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

"""Adaptive builds: they end with what the recipe needs, spend less than fixed K, and say what they decided."""

from __future__ import annotations

import gc
import json
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import make_problem, make_run, make_trace

from calset.builder.build import build, dry_run
from calset.builder.engines import Completion, Request, Sampling
from calset.builder.model.info import ModelInfo, inspect
from calset.builder.schedule.adaptive import AdaptiveSchedule, Target
from calset.builder.schedule.fixed import FixedSchedule, Opened, Retry
from calset.catalog.catalog import Catalog
from calset.catalog.records import Attempt, Problem
from calset.catalog.select import select
from calset.catalog.subsets.recipes import Recipe
from calset.errors import BuildWarning, EngineError, InputError

SAMPLES = 8
SETTLED = [0]  # how many samples schedules have been told the verdict of
INSIDE = Recipe("inside", correct=True, finished=True, difficulty=(0.2, 0.8))  # without a length band, which moves
Fails = Callable[[Request], bool]


class Population:
    """An engine double that answers each problem rightly at the problem's own rate, by the request's seed alone."""

    name, version, max_model_len = "population", "1", 2048

    def __init__(
        self,
        info: ModelInfo,
        path: Path,
        n: int,
        *,
        fail_after: int | None = None,
        fails: Fails = lambda request: False,
    ) -> None:
        self.info, self.loaded, self.fail_after, self.fails = info, info.revision, fail_after, fails
        self.requests: list[Request] = []
        self.cancelled = False
        rates = [(0.0, 0.02, 0.3, 0.55, 0.9, 1.0, 1.0)[i % 7] for i in range(n)]
        rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(n)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.problems = str(path)
        self.rate = {
            info.prompt_ids(row["question"]): (rate, row["answer"]) for row, rate in zip(rows, rates, strict=True)
        }

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        settled = SETTLED[0]
        for n, request in enumerate(requests):
            if n == self.fail_after:
                raise EngineError("the engine died; run the same command again to continue")
            self.requests.append(request)
            # One at a time, and not far ahead of its verdicts, however long a grader takes to start.
            while len(self.requests) - (SETTLED[0] - settled) > 20 and not self.cancelled:
                time.sleep(0.001)
            time.sleep(0.005)
            draw = random.Random(request.seed)
            rate, answer = self.rate[request.prompt_ids]
            said = answer if draw.random() < rate else "-1"
            text = "<think>\n" + "1" * draw.randint(1, 60) + f"\n</think>\n\\boxed{{{said}}}"
            tokens = self.info.tokenizer(text, add_special_tokens=False).input_ids
            whole = (*tokens, self.info.eos_token_ids[0])
            if self.fails(request):
                yield Completion(request.key, (), "error", 0.01)
            elif len(whole) > request.max_tokens:
                yield Completion(request.key, whole[: request.max_tokens], "length", 0.01)
            else:
                yield Completion(request.key, whole, "stop", 0.01)

    def cancel(self) -> None:
        self.cancelled = True

    def load_weights(self, model: Path, revision: str) -> None: ...
    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _count_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (AdaptiveSchedule, FixedSchedule):

        def settle(self: Any, *args: Any, own: Callable[..., None] = kind.settle) -> None:
            own(self, *args)
            SETTLED[0] += 1

        monkeypatch.setattr(kind, "settle", settle)


@pytest.fixture
def info(tiny_model: Path) -> ModelInfo:
    return inspect(tiny_model)


def run(model: Path, engine: Population, path: Path, **options):
    options = {"target": "ssgr", "need": 15, "samples": SAMPLES} | options
    return build(model, engine.problems, engine=engine, catalog=path, graders=1, **options)


def test_it_ends_with_what_the_recipe_needs_and_spends_less_than_fixed_k(tiny_model: Path, info, tmp_path: Path):
    path = tmp_path / "c.duckdb"
    engine = Population(info, tmp_path / "p.jsonl", 400)
    report = run(tiny_model, engine, path)
    assert report.target is not None
    assert report.target["met"] >= report.target["need"] == 15
    assert not report.warnings
    subset = select(path, "s", "ssgr", samples=15, min_k=SAMPLES)
    assert (subset.n_samples, subset.warnings) == (15, [])
    # Fixed K on the problems that it opened would have cost so many.
    opened = report.target["complete"] + report.target["stopped"] + report.target["open"]
    assert report.n_new == len(engine.requests) < 0.85 * SAMPLES * opened
    assert opened < 400  # the rest was not needed
    counts = dict(Catalog(path).query("SELECT k, count(*) FROM problem GROUP BY k").rows)
    assert counts[SAMPLES] >= report.target["complete"]
    assert max(counts) == SAMPLES


def test_every_decision_is_kept_with_what_it_rested_on(tiny_model: Path, info, tmp_path: Path):
    path = tmp_path / "c.duckdb"
    report = run(tiny_model, Population(info, tmp_path / "p.jsonl", 400), path, confidence=0.9)
    rows = Catalog(path).query("SELECT action, k, n_correct, samples, probability, confidence, run_id FROM decisions")
    found: dict[str, list[tuple]] = {}
    for action, *rest in rows.rows:
        found.setdefault(action, []).append(tuple(rest))
    assert report.target is not None
    assert (len(found["complete"]), len(found["stop"])) == (report.target["complete"], report.target["stopped"])
    assert all(k == SAMPLES and p in (0, 1) for k, _, _, p, _, _ in found["complete"])
    assert all(p <= 0.1 and k < SAMPLES for k, _, _, p, _, _ in found["stop"])
    assert all(p > 0.1 for _, _, _, p, _, _ in found["continue"])
    assert {run for rows in found.values() for *_, run in rows} == {report.run_id}


def test_the_samples_are_those_of_a_build_with_fixed_k(tiny_model: Path, info, tmp_path: Path):
    adaptive, fixed = tmp_path / "a.duckdb", tmp_path / "f.duckdb"
    run(tiny_model, Population(info, tmp_path / "p.jsonl", 60), adaptive, need=5)
    engine = Population(info, tmp_path / "p.jsonl", 60)
    build(tiny_model, engine.problems, engine=engine, catalog=fixed, samples=SAMPLES, graders=1)
    wanted = dict(Catalog(fixed).query("SELECT trace_id, text FROM trace").rows)
    drawn = Catalog(adaptive).query("SELECT trace_id, text FROM trace").rows
    assert drawn
    assert all(wanted[trace] == text for trace, text in drawn)


def test_a_build_that_died_goes_on_where_it_was(tiny_model: Path, info, tmp_path: Path):
    path = tmp_path / "c.duckdb"
    with pytest.raises(EngineError, match="run the same command again"):
        run(tiny_model, Population(info, tmp_path / "p.jsonl", 400, fail_after=70), path)
    saved = Catalog(path).query("SELECT count(*) FROM traces").rows[0][0]
    assert saved == 70
    engine = Population(info, tmp_path / "p.jsonl", 400)
    report = run(tiny_model, engine, path)
    assert report.n_existing == 70
    assert not {r.key for r in engine.requests} & {
        t for (t,) in Catalog(path).query("SELECT trace_id FROM traces ORDER BY created_at LIMIT 70").rows
    }
    assert select(path, "s", "ssgr", samples=15, min_k=SAMPLES).n_samples == 15
    again = Population(info, tmp_path / "p.jsonl", 400)
    assert run(tiny_model, again, path).run_id is None  # the need is met: no engine, nothing drawn
    assert not again.requests


def test_problems_that_run_out_are_said(tiny_model: Path, info, tmp_path: Path):
    report = run(tiny_model, Population(info, tmp_path / "p.jsonl", 21), tmp_path / "c.duckdb", need=500)
    assert len(report.warnings) == 1
    assert "the problems ran out: ssgr can take" in report.warnings[0]
    assert report.target is not None
    assert report.target["open"] == 0


def test_a_need_in_tokens_and_a_recipe_without_a_band(tiny_model: Path, info, tmp_path: Path):
    path = tmp_path / "c.duckdb"
    recipe = Recipe("right", correct=True, finished=True, per_problem=None)
    report = run(
        tiny_model, Population(info, tmp_path / "p.jsonl", 400), path, target=recipe, need=None, need_tokens=4000
    )
    assert report.target is not None
    assert report.target["unit"] == "tokens"
    subset = select(path, "s", recipe, tokens=4000)
    assert 3800 < subset.n_tokens <= 4000
    assert report.target["stopped"] == 0  # nothing to be outside of


class Prompt(tuple[int, ...]):
    """Token ids that a garbage collector can count."""


def test_problems_that_are_put_off_hold_no_prompt_and_come_back_with_the_same_one():
    problems = [make_problem(n) for n in range(120)]

    def render(problem: Problem) -> tuple[int, ...]:
        return Prompt(range(int(problem.source_row), int(problem.source_row) + 40))

    fresh = (Opened(problem, render(problem), {}) for problem in problems)
    schedule = AdaptiveSchedule(fresh, "key", SAMPLES, Target.of("ssgr", need=10_000), render=render)
    draw, run = random.Random(1), make_run()
    prompts: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    put_off = alive = 0
    while (unit := schedule.take()) is not None:
        name = unit.problem.problem_id
        prompts[name].add(tuple(unit.prompt_ids))
        right = draw.random() < (0.0, 0.1, 0.5, 0.9)[int(unit.problem.source_row) % 4]
        schedule.settle(unit, make_trace(unit.problem, run, unit.sample_index), "correct" if right else "incorrect")
        if len(prompts) == 100 and not put_off:
            put_off = schedule.facts()["open"]
            alive = sum(type(thing) is Prompt for thing in gc.get_objects())
    assert put_off > 5  # while fresh problems are cheaper
    assert alive <= 3  # of the problem under way, and of those that the loop and the generator have in hand
    assert {name: len(seen) for name, seen in prompts.items()} == {problem.problem_id: 1 for problem in problems}
    facts = schedule.facts()
    assert (facts["complete"] + facts["stopped"], facts["open"]) == (120, 0)


def one_in_ten(request: Request) -> bool:
    return request.seed % 10 == 0


def ids_of(path: Path, verdict: str) -> set[str]:
    return {t for (t,) in Catalog(path).query("SELECT trace_id FROM trace WHERE verdict = ?", [verdict]).rows}


def assert_as_fixed_k(model: Path, info: ModelInfo, path: Path, n: int, tmp_path: Path, **options) -> None:
    """Each sample is the one of fixed K, and what was last decided rests on these."""
    engine, fixed = Population(info, tmp_path / "p.jsonl", n), tmp_path / "fixed.duckdb"
    build(model, engine.problems, engine=engine, catalog=fixed, samples=SAMPLES, graders=1, **options)
    sql = "SELECT trace_id, text, verdict FROM trace"
    drawn = set(Catalog(path).query(sql).rows)
    assert drawn < set(Catalog(fixed).query(sql).rows)
    last = "SELECT * FROM decisions QUALIFY row_number() OVER (PARTITION BY problem_id ORDER BY decided_at DESC) = 1"
    sql = (
        f"SELECT (d.k, d.n_correct) = (p.k, p.n_correct) FROM ({last}) d JOIN problem p USING (problem_id) "
        "WHERE d.action <> 'continue'"
    )
    assert set(Catalog(path).query(sql).rows) == {(True,)}


def test_what_the_engine_failed_on_is_run_again_first_and_then_the_build_goes_on(
    tiny_model: Path, info, tmp_path: Path
):
    path = tmp_path / "c.duckdb"
    first = run(tiny_model, Population(info, tmp_path / "p.jsonl", 80, fails=one_in_ten), path, target=INSIDE, need=5)
    assert "the same command with --retry error" in " ".join(first.warnings)
    broken = ids_of(path, "error")
    engine = Population(info, tmp_path / "p.jsonl", 80)
    report = run(tiny_model, engine, path, target=INSIDE, need=12, retry=["error"])
    asked = [request.key for request in engine.requests]
    assert set(asked[: len(broken)]) == broken
    assert len(set(asked)) == len(asked) > len(broken) > 2
    assert report.target is not None
    assert report.target["met"] >= 12
    assert not report.warnings
    rows = Catalog(path).query("SELECT attempt, count(*) FROM trace GROUP BY attempt ORDER BY attempt").rows
    assert rows[1:] == [(1, len(broken))]
    # What an adaptive build saves stays saved: no other sample of the problems that it stopped, none of those unopened.
    sql = "SELECT count(*) FILTER (WHERE n_traces > 0), count(*) FILTER (WHERE n_traces = 8) FROM problem"
    begun, complete = Catalog(path).query(sql).rows[0]
    assert complete < begun < 80
    assert_as_fixed_k(tiny_model, info, path, 80, tmp_path)


def test_retries_do_not_ask_whether_the_need_is_met_and_go_on_where_they_died(tiny_model: Path, info, tmp_path: Path):
    path, aim = tmp_path / "c.duckdb", {"target": INSIDE, "need": 5, "retry": ["error"]}
    run(tiny_model, Population(info, tmp_path / "p.jsonl", 80, fails=one_in_ten), path, **aim)
    broken = ids_of(path, "error")
    with pytest.raises(EngineError):
        run(tiny_model, Population(info, tmp_path / "p.jsonl", 80, fail_after=2), path, **aim)
    left = ids_of(path, "error")
    assert len(left) == len(broken) - 2 > 0
    engine = Population(info, tmp_path / "p.jsonl", 80)
    run(tiny_model, engine, path, **aim)
    assert sorted(request.key for request in engine.requests) == sorted(left)
    assert run(tiny_model, Population(info, tmp_path / "p.jsonl", 80), path, **aim).run_id is None


def test_truncated_traces_run_again_count_as_a_build_with_the_larger_limit_has_them(
    tiny_model: Path, info, tmp_path: Path
):
    path = tmp_path / "c.duckdb"
    run(tiny_model, Population(info, tmp_path / "p.jsonl", 80), path, target=INSIDE, need=5, max_tokens=40)
    cut = ids_of(path, "truncated")
    engine = Population(info, tmp_path / "p.jsonl", 80)
    again = {"target": INSIDE, "need": 10, "max_tokens": 200, "retry": ["truncated"]}
    assert dry_run(tiny_model, engine.problems, catalog=path, samples=SAMPLES, tokens_per_second=1e3, **again).n_todo
    report = run(tiny_model, engine, path, **again)
    assert {request.key for request in engine.requests[: len(cut)]} == cut
    assert len(cut) > 20
    assert report.target is not None
    assert report.target["met"] >= 10
    assert_as_fixed_k(tiny_model, info, path, 80, tmp_path, max_tokens=200)


def existing(problem: Problem, verdicts: str) -> dict[int, Attempt]:
    """Attempts at the first samples: "c"orrect, "i"ncorrect, "e"rror."""
    names = {"c": ("stop", "correct"), "i": ("stop", "incorrect"), "e": ("error", "error")}
    return {
        i: Attempt(f"{problem.problem_id}-{i}", 0, names[v][0], 64, 3, 10, names[v][1]) for i, v in enumerate(verdicts)
    }


def make_schedule(opened: Iterable[Opened], **options) -> AdaptiveSchedule:
    target = Target.of(INSIDE, need=10_000)
    return AdaptiveSchedule(iter(opened), "key", SAMPLES, target, render=lambda problem: (1, 2, 3), **options)


def test_nothing_else_is_sent_or_decided_until_what_is_run_again_is_back():
    problems, was_run = [make_problem(n) for n in range(6)], make_run()
    verdicts = ["cei", "ii", "iieii", "", "ee", ""]
    opened = [
        Opened(problem, (1, 2, 3), existing(problem, found)) for problem, found in zip(problems, verdicts, strict=True)
    ]
    schedule = make_schedule(opened, retry=Retry(frozenset({"error"})))
    units = [schedule.take(), schedule.take()]
    assert [(u.problem, u.sample_index, u.attempt) for u in units if u] == [(problems[0], 1, 1), (problems[2], 2, 1)]
    for unit in units:
        assert schedule.take() is None
        assert (schedule.finished, schedule.satisfied, schedule.decisions()) == (False, False, [])
        assert unit is not None
        schedule.settle(unit, make_trace(unit.problem, was_run, unit.sample_index, attempt=1), "correct")
    decided = {decision.problem_id: (decision.k, decision.n_correct) for decision in schedule.decisions()}
    assert decided == {
        problem.problem_id: counts for problem, counts in zip(problems[:3], [(3, 2), (2, 0), (5, 1)], strict=True)
    }
    again = []
    while (unit := schedule.take()) is not None:
        again += [unit] if unit.attempt else []
        schedule.settle(unit, make_trace(unit.problem, was_run, unit.sample_index, attempt=unit.attempt), "correct")
    # Of a problem behind the first fresh one as well, when its turn comes.
    assert [(unit.problem, unit.sample_index) for unit in again] == [(problems[4], 0), (problems[4], 1)]
    assert schedule.finished


def test_a_problem_that_was_put_off_is_decided_again_when_its_turn_comes():
    problems, was_run = [make_problem(n) for n in range(150)], make_run()
    schedule = make_schedule(Opened(problem, (1, 2, 3), {}) for problem in problems)
    drawn: dict[str, int] = defaultdict(int)
    put_off = set()
    while (unit := schedule.take()) is not None:
        name = unit.problem.problem_id
        drawn[name] += 1
        schedule.settle(unit, make_trace(unit.problem, was_run, unit.sample_index), "incorrect")
        put_off |= {d.problem_id for d in schedule.decisions() if d.action == "continue" and d.k == 2}
    # By the time that the problems ran out it was plain that none is inside.
    assert put_off
    assert {drawn[name] for name in put_off} == {2}
    assert (schedule.facts()["stopped"], schedule.facts()["open"]) == (150, 0)


def test_a_build_that_goes_on_decides_by_the_prior_of_all_that_is_there():
    verdicts = ["ii", *["i" * SAMPLES] * 150]
    problems = [make_problem(n) for n in range(len(verdicts))]
    schedule = make_schedule(
        Opened(problem, (1, 2, 3), existing(problem, found)) for problem, found in zip(problems, verdicts, strict=True)
    )
    assert schedule.take() is None
    assert schedule.finished
    of_first = [d.action for d in schedule.decisions() if d.problem_id == problems[0].problem_id]
    assert of_first == ["stop"]


def test_a_decision_is_kept_again_when_the_recipe_or_the_confidence_is_another(tiny_model: Path, info, tmp_path: Path):
    path = tmp_path / "c.duckdb"

    def decide(**aim) -> tuple[int, int]:
        """How many decisions there are after such a build, and of how many problems with that aim."""
        run(tiny_model, Population(info, tmp_path / "p.jsonl", 21), path, need=500, **aim)
        recipe = aim["target"].name
        sql = "SELECT count(*), count(DISTINCT problem_id) FILTER (WHERE recipe = ? AND confidence = ?) FROM decisions"
        return Catalog(path).query(sql, [recipe, aim["confidence"]]).rows[0]

    other = Recipe("other", correct=True, finished=True, difficulty=(0.2, 0.8))
    before = 0
    for aim in ({"target": INSIDE, "confidence": c} for c in (0.95, 0.8)):
        n, of_aim = decide(**aim)
        assert (n >= before + 21, of_aim) == (True, 21)
        before = n
    assert decide(target=INSIDE, confidence=0.8) == (before, 21)
    assert decide(target=other, confidence=0.8) == (before + 21, 21)


def test_other_traces_that_a_selection_counts_are_said_before_the_engine_starts(tiny_model: Path, info, tmp_path: Path):
    path, engine = tmp_path / "c.duckdb", Population(info, tmp_path / "p.jsonl", 7)
    asked = {"catalog": path, "target": "ssgr", "need": 3, "tokens_per_second": 1e3}
    build(tiny_model, engine.problems, engine=engine, catalog=path, samples=1, kind="evaluate", graders=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BuildWarning)
        run(tiny_model, engine, path, need=500)
        run(tiny_model, engine, path, need=500)
    with pytest.warns(BuildWarning, match=r"\(\d+ beyond --samples 4\)"):
        dry_run(tiny_model, engine.problems, samples=4, **asked)
    build(tiny_model, engine.problems, engine=engine, catalog=path, samples=2, temperature=0.5, graders=1)
    engine = Population(info, tmp_path / "p.jsonl", 7, fail_after=0)
    with pytest.warns(BuildWarning) as warned, pytest.raises(EngineError):
        run(tiny_model, engine, path, temperature=1.0)
    text = str(warned[0].message)
    assert "14 with temperature 0.5" in text
    assert "with temperature 0.8" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"need": 5}, "pass a target recipe"),
        ({"target": "ssgr"}, "one of need .* not neither"),
        ({"target": "ssgr", "need": 5, "need_tokens": 5}, "one of need .* not both"),
        ({"target": "prompts", "need": 5}, "takes no traces"),
        ({"target": "sgrr", "need": 5}, "no recipe 'sgrr'"),
        ({"target": "ssgr", "need": 0}, "need must be at least 1"),
        ({"target": "ssgr", "need": 5, "confidence": 1.5}, "confidence must be"),
        ({"target": "ssgr", "need": 5, "graded": False}, "cannot run ungraded"),
    ],
)
def test_targets_that_make_no_sense_are_refused(tiny_model: Path, tmp_path: Path, options: dict, says: str):
    for call in (build, dry_run):
        with pytest.raises(InputError, match=says):
            call(tiny_model, "demo", catalog=tmp_path / "c.duckdb", **options)
    assert not (tmp_path / "c.duckdb").exists()


def test_a_target_counts_samples_or_tokens():
    assert Target.of("ssgr", need=3).unit == "samples"
    assert Target.of("ssgr", need_tokens=3).wanted == 3

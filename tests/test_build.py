"""build(): k samples a problem whatever happens, saved means saved, stored ids are the served ones."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import HAS_VLLM
from processes import heeding, holding

from calset.builder import build as generate
from calset.builder.build import dry_run
from calset.builder.engines import Completion, Request, Sampling
from calset.builder.grade import grade
from calset.builder.model.info import inspect
from calset.builder.progress import Rate
from calset.catalog.catalog import Catalog
from calset.cli import cli
from calset.errors import BuildWarning, CatalogLocked, EngineError, InputError
from calset.io.progress import Progress

NAMED = list(enumerate(("Ann", "Ben", "Cleo", "Dan", "Eve", "Fay")))
SUMS = "gym:chain_sum?min_terms=2&max_terms=3&size=12&seed=3"


def build(*asked, **options):
    """Graded by ``exact`` unless asked otherwise: its workers start in a tenth of the others' time."""
    return generate.build(*asked, **{"grader": "exact", **options})


def traces(catalog: Catalog) -> list[tuple[str, int]]:
    return catalog.query("SELECT problem_id, sample_index FROM traces ORDER BY ALL").rows


def count(path: Path) -> int:
    return Catalog(path).query("SELECT count(*) FROM traces").rows[0][0] if path.exists() else 0


def assert_complete(path: Path, n_problems: int, samples: int) -> None:
    """Exactly ``samples`` traces a problem, each once, each with its tokens and one verdict."""
    catalog = Catalog(path)
    rows = traces(catalog)
    assert len(rows) == len(set(rows)) == n_problems * samples
    assert len({problem for problem, _ in rows}) == n_problems
    assert {index for _, index in rows} == set(range(samples))
    assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM trace_tokens").rows == [(len(rows),) * 2]
    assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM grades").rows == [(len(rows),) * 2]


class Recording:
    """Passes everything on to a real engine and keeps what it served."""

    def __init__(self, engine) -> None:
        self.engine, self.requests, self.served = engine, {}, {}
        self.name, self.version, self.max_model_len = engine.name, engine.version, engine.max_model_len

    @property
    def loaded(self) -> str:
        return self.engine.loaded

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        def seen() -> Iterator[Request]:
            for request in requests:
                self.requests[request.key] = request
                yield request

        for completion in self.engine.stream(seen(), sampling):
            self.served[completion.key] = completion
            yield completion

    def cancel(self) -> None:
        self.engine.cancel()

    def load_weights(self, model: Path, revision: str) -> None:
        self.engine.load_weights(model, revision)

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_stored_ids_are_the_served_ones(engine: str, request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path):
    recording = Recording(request.getfixturevalue(f"{engine}_engine"))
    catalog = Catalog(tmp_path / "c.duckdb")
    report = build(tiny_model, SUMS, samples=3, catalog=catalog, engine=recording, max_tokens=60)
    assert (report.n_new, report.n_requested, report.engine, report.stopped) == (36, 36, engine, False)
    assert_complete(tmp_path / "c.duckdb", 12, 3)
    info = inspect(tiny_model)
    for trace_id, prompt, completion in catalog.query(
        "SELECT trace_id, prompt_ids, completion_ids FROM trace_tokens"
    ).rows:
        assert tuple(prompt) == recording.requests[trace_id].prompt_ids
        assert tuple(completion) == recording.served[trace_id].token_ids
    (run,) = catalog.runs()
    assert (run.engine, run.model, run.model_revision) == (engine, "tiny-lrm", info.revision)
    assert run.versions["transformers"]
    assert run.sampling["temperature"] == 0.8
    assert report.n_tokens == sum(len(c.token_ids) for c in recording.served.values())


def test_saved_means_on_disk_and_a_second_build_starts_no_engine(tiny_model: Path, tmp_path: Path, transformers_engine):
    path = tmp_path / "c.duckdb"
    events: list[Progress] = []

    def check(event: Progress) -> None:
        events.append(event)
        assert count(path) >= event.saved + event.existing

    options = {"catalog": path, "max_tokens": 40, "commit_every_seconds": 0.05, "progress": check}
    first = build(tiny_model, SUMS, samples=2, engine=transformers_engine, **options)
    assert [e.phase for e in events[:2]] == ["starting engine", "generating"]
    assert (events[-1].phase, events[-1].saved, events[-1].eta_seconds) == ("done", 24, 0)
    assert len({e.saved for e in events}) > 2  # as they finish, never all at the end
    assert sum(first.verdicts.values()) == 24
    events.clear()
    again = build(tiny_model, SUMS, samples=2, engine="transformers", **options)
    assert (again.n_new, again.n_existing, again.run_id, again.engine) == (0, 24, None, None)
    assert [(e.phase, e.saved, e.existing, e.total) for e in events] == [("done", 0, 24, 24)]
    more = build(tiny_model, SUMS, samples=3, engine=transformers_engine, **options)
    assert (more.n_new, more.n_existing) == (12, 24)
    assert_complete(path, 12, 3)


def test_an_engine_that_dies_leaves_what_finished_and_the_next_build_goes_on(
    tiny_model: Path, tmp_path, scripted_engine
):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    with pytest.raises(EngineError, match="run the same command again"):
        build(tiny_model, SUMS, samples=4, catalog=path, engine=scripted_engine(loaded, fail_after=20))
    assert count(path) == 20
    second = scripted_engine(loaded)
    report = build(tiny_model, SUMS, samples=4, catalog=path, engine=second)
    assert (report.n_existing, report.n_new, len(second.requests)) == (20, 28, 28)
    assert_complete(path, 12, 4)


def test_the_rate_is_of_the_time_in_which_the_tokens_were_made():
    rare, often = Rate(0.0), Rate(0.0)
    for minute in range(1, 5):
        rare.add(60.0 * minute, 6000)
        assert rare.per_second(60.0 * minute) == 100
    for second in range(1, 101):
        often.add(second, 10 if second <= 50 else 40)
    assert often.per_second(100) == 40  # the first minute is forgotten


@pytest.mark.parametrize("stray", [-1, 512, 2**31, True, 31.0, None])
def test_a_token_id_that_no_model_can_have_sampled_ends_the_build_in_a_line(
    tiny_model: Path, tmp_path, scripted_engine, stray
):
    """Whatever engine it comes from: what was whole before is kept, and the same build goes on."""
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    engine = scripted_engine(loaded)
    ids = iter([(31, 2)] * 10)
    engine.stream = lambda requests, sampling: (
        Completion(request.key, next(ids, (31, stray, 2)), "stop", 0.0) for request in requests
    )
    said = rf"the engine scripted returned the token id {stray}, outside the vocabulary of tiny-lrm \(512 tokens\)"
    with pytest.raises(EngineError, match=said):
        build(tiny_model, SUMS, samples=2, catalog=path, engine=engine)
    assert Catalog(path).query("SELECT count(*) FROM traces").rows == [(10,)]
    assert build(tiny_model, SUMS, samples=2, catalog=path, engine=scripted_engine(loaded)).n_existing == 10


def test_traces_that_a_smaller_limit_cut_are_kept_with_a_warning(tiny_model: Path, tmp_path, scripted_engine):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    cut = scripted_engine(loaded, token_ids=(31,) * 4, finish_reason="length")
    first = build(tiny_model, SUMS, samples=1, catalog=path, engine=cut, max_tokens=4)
    assert not first.warnings
    assert not build(tiny_model, SUMS, samples=1, catalog=path, engine=cut, max_tokens=4).warnings
    again = build(tiny_model, SUMS, samples=2, catalog=path, engine=scripted_engine(loaded), max_tokens=40)
    assert again.n_new == 12
    assert again.warnings == (
        "12 existing traces were cut at 4 tokens and kept: --retry truncated runs them again with 40",
    )


def test_truncated_traces_run_again_with_more_tokens_and_the_new_ones_count(
    tiny_model: Path, tmp_path, scripted_engine
):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    cut = scripted_engine(loaded, token_ids=(31,) * 4, finish_reason="length")
    build(tiny_model, SUMS, samples=2, catalog=path, engine=cut, max_tokens=4)
    same = build(tiny_model, SUMS, samples=2, catalog=path, engine=cut, max_tokens=4, retry=["truncated"])
    assert same.n_new == 0
    assert same.warnings == (
        "24 existing traces were cut at 4 tokens, no less than this build's 4: not run again; raise --max-tokens",
    )
    longer = {"samples": 2, "catalog": path, "max_tokens": 40, "retry": ["truncated"]}
    dying = scripted_engine(loaded, fail_after=10)
    with pytest.raises(EngineError):
        build(tiny_model, SUMS, engine=dying, **longer)
    rest = build(tiny_model, SUMS, engine=scripted_engine(loaded), **longer)
    assert rest.n_new == 14  # what finished before the engine died is not run a third time
    assert build(tiny_model, SUMS, engine=scripted_engine(loaded), **longer).n_new == 0
    store = Catalog(path)
    assert store.query("SELECT DISTINCT attempt, finish_reason, verdict FROM trace").rows == [(1, "stop", "no_answer")]
    assert store.query("SELECT count(*), count(DISTINCT trace_id) FROM trace").rows == [(24, 24)]
    assert store.query("SELECT attempt, count(*) FROM traces GROUP BY attempt ORDER BY attempt").rows == [
        (0, 24),
        (1, 24),
    ]
    # The same request again: its seed does not depend on the attempt.
    assert store.query("SELECT count(DISTINCT (trace_id, request_seed)) FROM traces").rows == [(24,)]


def test_traces_that_the_engine_failed_on_run_again_when_asked(tiny_model: Path, tmp_path, scripted_engine):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded, finish_reason="abort"))
    assert build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded)).n_new == 0
    assert build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded), retry=["error"]).n_new == 12
    assert Catalog(path).query("SELECT DISTINCT verdict FROM trace").rows == [("no_answer",)]


def test_requests_carry_their_own_seeds_and_other_run_seeds_give_others(tiny_model: Path, tmp_path, scripted_engine):
    loaded, seeds = inspect(tiny_model).revision, []
    for seed in (0, 1):
        engine = scripted_engine(loaded)
        build(tiny_model, SUMS, samples=4, catalog=tmp_path / f"{seed}.duckdb", engine=engine, seed=seed)
        seeds.append([request.seed for request in engine.requests])
        assert len(set(seeds[-1])) == 48
    assert not set(seeds[0]) & set(seeds[1])


def test_evaluation_traces_live_apart(tiny_model: Path, tmp_path, scripted_engine):
    loaded = inspect(tiny_model).revision
    path = tmp_path / "c.duckdb"
    one = build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded))
    two = build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded), kind="evaluate")
    assert one.generation_key != two.generation_key
    assert (one.n_new, two.n_new) == (12, 12)
    assert set(one.problem_ids) == set(two.problem_ids)


def test_a_running_engine_gets_the_weights_it_is_recorded_with(tiny_model, altered_model, tmp_path, scripted_engine):
    engine = scripted_engine(inspect(tiny_model).revision)
    build(altered_model, SUMS, samples=1, catalog=tmp_path / "c.duckdb", engine=engine)
    assert engine.swaps == [inspect(altered_model).revision]
    build(altered_model, SUMS, samples=2, catalog=tmp_path / "c.duckdb", engine=engine)
    assert len(engine.swaps) == 1


def test_truncated_and_unfinished_traces_are_never_correct(tiny_model: Path, tmp_path, scripted_engine):
    info = inspect(tiny_model)
    think = tuple(info.tokenizer("<think>\nmaybe \\boxed{5}", add_special_tokens=False).input_ids)
    for reason, expected in (("length", "truncated"), ("stop", "no_answer"), ("abort", "error")):
        engine = scripted_engine(info.revision, token_ids=think, finish_reason=reason)
        report = build(tiny_model, SUMS, samples=1, catalog=tmp_path / f"{reason}.duckdb", engine=engine)
        assert dict(report.verdicts) == {expected: 12}


def test_grading_again_keeps_the_history(tiny_model: Path, tmp_path, scripted_engine):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    report = build(tiny_model, SUMS, samples=2, catalog=path, engine=scripted_engine(loaded), graded=False)
    assert dict(report.verdicts) == {"ungraded": 24}
    seen: list[tuple[int, int | None]] = []
    graded = grade(path, ungraded=True, commit_size=10, progress=lambda e: seen.append((e.done, e.total)))
    assert (graded.n_graded, graded.n_changed) == (24, 24)
    assert seen == [(10, 24), (20, 24), (24, 24), (24, 24)]
    assert grade(path, ungraded=True).n_graded == 0
    assert grade(path, grader="math").n_graded == 24
    assert Catalog(path).query("SELECT count(*) FROM grades").rows == [(48,)]
    with pytest.raises(InputError, match="unknown grader"):
        grade(path, grader="maths")


def test_another_grader_than_that_of_stored_problems_is_said_before_the_engine_starts(
    tiny_model: Path, tmp_path, scripted_engine, recwarn: pytest.WarningsRecorder
):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    source = tmp_path / "my sums.jsonl"
    source.write_text("".join(json.dumps({"question": f"{n} + {n} =", "answer": str(2 * n)}) + "\n" for n in range(3)))

    def run(**options) -> tuple[str, ...]:
        asked = {"catalog": path, "engine": scripted_engine(loaded)} | options
        return generate.build(tiny_model, str(source), **asked).warnings

    says = "3 stored problems of my sums.jsonl have the grader math, .* grades by exact"
    for options in ({"samples": 1}, {"samples": 2}, {"samples": 3, "graded": False, "grader": "exact"}):
        assert not any("grader" in text for text in run(**options))
    assert not recwarn.list
    with pytest.warns(BuildWarning, match=says), pytest.raises(EngineError):
        run(samples=4, grader="exact", engine=scripted_engine(loaded, fail_after=0))
    with pytest.warns(BuildWarning, match=says):
        (said,) = (text for text in run(samples=4, grader="exact") if "grader" in text)
    assert said in dry_run(tiny_model, str(source), catalog=path, grader="exact", tokens_per_second=100).warnings
    advice = shlex.split(said[said.index("calset grade --grader") : said.rindex(", or")])
    graded = Catalog(path)
    assert {g for (g,) in graded.query("SELECT grader FROM trace WHERE grader IS NOT NULL").rows} == {"math", "exact"}
    CliRunner().invoke(cli, [*advice[1:], "--catalog", str(path)], catch_exceptions=False)
    assert graded.query("SELECT grader, count(*) FROM trace GROUP BY ALL").rows == [("exact", 12)]


def test_problems_that_an_evaluation_source_holds_are_left_out_with_the_evidence(
    tiny_model: Path, tmp_path, scripted_engine
):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    questions = [f"How many apples does {name} have after buying {n} more of them today?" for n, name in NAMED]
    mine, held_out = tmp_path / "mine.jsonl", tmp_path / "held_out.jsonl"
    mine.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    held_out.write_text(json.dumps({"question": questions[3].upper(), "answer": "1"}) + "\n")
    options = {"samples": 2, "catalog": path, "decontaminate": str(held_out)}
    report = build(tiny_model, str(mine), engine=scripted_engine(loaded), **options)
    assert (report.n_excluded, report.n_problems, report.n_new) == (1, len(NAMED) - 1, 2 * (len(NAMED) - 1))
    store = Catalog(path)
    assert store.query("SELECT DISTINCT question, evaluation_source FROM excluded").rows == [
        (questions[3], "held_out.jsonl")
    ]
    assert not store.query("SELECT 1 FROM traces t JOIN excluded e USING (problem_id)").rows
    assert build(tiny_model, str(mine), engine=scripted_engine(loaded), **options).n_new == 0
    with pytest.raises(InputError, match=r"all 1 problems of .* are in evaluation sources"):
        build(tiny_model, str(held_out), engine=scripted_engine(loaded), **options)


def test_what_is_left_out_is_kept_even_when_there_is_nothing_to_generate(tiny_model: Path, tmp_path, scripted_engine):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    rows = [{"question": f"How many prime factors does {n} have?", "answer": "1"} for n in range(20, 24)]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(json.dumps(row) + "\n" for row in rows))
    two.write_text(json.dumps(rows[0]) + "\n")
    build(tiny_model, str(one), samples=1, catalog=path, engine=scripted_engine(loaded))
    report = build(
        tiny_model, str(one), samples=1, catalog=path, engine=scripted_engine(loaded), decontaminate=[str(two)]
    )
    assert (report.n_new, report.run_id, report.n_excluded) == (0, None, 1)
    assert Catalog(path).query("SELECT count(DISTINCT problem_id) FROM excluded").rows == [(1,)]


def test_the_run_keeps_where_its_sampling_came_from(tiny_model: Path, tmp_path, scripted_engine):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded), top_p=0.5)
    (run,) = Catalog(path).runs()
    assert run.sampling_from is not None
    assert (run.sampling_from["top_p"], run.sampling_from["temperature"]) == ("asked for", "generation_config")
    assert (run.template_options, run.engine_options) == ({}, {})


def test_every_value_of_the_sampling_can_be_asked_for_and_is_part_of_the_key(
    tiny_model: Path, tmp_path, scripted_engine
):
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.1}
    keys = {build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded)).generation_key}
    for name, value in asked.items():
        report = build(tiny_model, SUMS, samples=1, catalog=path, engine=scripted_engine(loaded), **{name: value})
        keys.add(report.generation_key)
        run = Catalog(path).run(report.run_id or "")
        assert (report.n_new, run.sampling[name], run.sampling_from[name]) == (12, value, "asked for")
    assert len(keys) == 1 + len(asked)


def test_traces_that_wait_for_a_locked_catalog_are_bounded_and_saved_in_the_end(
    tiny_model: Path, tmp_path, scripted_engine, monkeypatch: pytest.MonkeyPatch
):
    from calset.builder import pipeline

    monkeypatch.setattr(pipeline, "MAX_HELD", 5)
    path, engine = tmp_path / "c.duckdb", scripted_engine(inspect(tiny_model).revision)
    build(tiny_model, SUMS, samples=1, limit=1, catalog=path, engine=scripted_engine(engine.loaded))
    held: list[int] = []
    store, locked = Catalog(path, lock_timeout=0.2), [3]
    record = store.record

    def busy(traces, grades, **rest):
        if traces and locked[0]:
            locked[0] -= 1
            held.append(len(traces))
            time.sleep(0.3)
            raise CatalogLocked("another process holds it")
        return record(traces, grades, **rest)

    monkeypatch.setattr(store, "record", busy)
    report = build(tiny_model, SUMS, samples=4, catalog=store, engine=engine, commit_every_seconds=0.05)
    assert report.n_new == 47
    assert max(held) <= 5 + 2  # one under way in each of two threads
    assert_complete(path, 12, 4)


class Broken:
    """An engine double whose stream does what a test says."""

    name, version, max_model_len = "broken", "1", 1024

    def __init__(self, loaded: str, stream) -> None:
        self.loaded, self.stream = loaded, stream

    def cancel(self) -> None: ...
    def load_weights(self, model: Path, revision: str) -> None: ...
    def close(self) -> None: ...


def test_an_engine_that_ends_too_early_is_no_finished_build(tiny_model: Path, tmp_path: Path):
    def stream(requests, sampling):
        for n, request in enumerate(requests):
            if n < 5:
                yield Completion(request.key, (31, 2), "stop", 0.0)

    engine = Broken(inspect(tiny_model).revision, stream)
    with pytest.raises(EngineError, match=r"ended without 43 of its requests.*run the same command again"):
        build(tiny_model, SUMS, samples=4, catalog=tmp_path / "c.duckdb", engine=engine)
    assert count(tmp_path / "c.duckdb") == 5


def test_a_source_that_breaks_while_generating_says_so_itself_and_what_ran_is_saved(
    tiny_model: Path, tmp_path: Path, scripted_engine, monkeypatch: pytest.MonkeyPatch
):
    from calset.builder.plan import Plan

    opened = Plan.opened

    def breaking(self, *args):
        for n, one in enumerate(opened(self, *args)):
            if n == 4:
                raise InputError("row 5 has gone")
            yield one

    monkeypatch.setattr(Plan, "opened", breaking)
    engine = scripted_engine(inspect(tiny_model).revision)
    with pytest.raises(InputError, match="row 5 has gone"):
        build(tiny_model, SUMS, samples=2, catalog=tmp_path / "c.duckdb", engine=engine)
    assert count(tmp_path / "c.duckdb") == 8


def test_waiting_for_a_lock_does_not_make_the_next_commit_late(
    tiny_model: Path, tmp_path: Path, scripted_engine, monkeypatch: pytest.MonkeyPatch
):
    from calset.builder import pipeline

    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.1)
    store, waited = Catalog(tmp_path / "c.duckdb"), [1]
    record = store.record

    def slow(traces, grades, **rest):
        if traces and waited:
            waited.clear()
            time.sleep(0.5)  # as if another process held the file
        return record(traces, grades, **rest)

    monkeypatch.setattr(store, "record", slow)

    def stream(requests, sampling):
        for request in requests:
            time.sleep(0.1)
            yield Completion(request.key, (31, 2), "stop", 0.0)

    saved: list[int] = []
    build(
        tiny_model, SUMS, samples=3, catalog=store, engine=Broken(inspect(tiny_model).revision, stream),
        progress=lambda event: saved.append(event.saved),
    )  # fmt: skip
    assert len(set(saved)) > 4  # a pause of ten times what was waited for would leave 0, the first commit and the last


def test_a_build_that_waits_for_the_catalog_stops_when_asked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from calset.builder import pipeline

    monkeypatch.setattr(pipeline, "LOCK_SECONDS", 0.2)
    path, cancelled = tmp_path / "c.duckdb", threading.Event()
    held = ExitStack()
    holders: list[subprocess.Popen[str]] = []

    def stream(requests, sampling):
        holders.append(held.enter_context(holding(path)))
        for n, request in enumerate(requests):
            yield Completion(request.key, (31, 2), "stop", 0.0)
            if n == 2:
                break
        time.sleep(0.5)  # a commit is waiting by now
        os.kill(os.getpid(), signal.SIGINT)
        cancelled.wait(20)

    engine = Broken(inspect(tiny_model).revision, stream)

    def cancel() -> None:
        held_still = holders[0].poll() is None and not holders[0].stdin.closed
        if held_still:
            cancelled.set()
            holders[0].stdin.close()

    engine.cancel = cancel
    with held:
        report = build(tiny_model, SUMS, samples=4, catalog=path, engine=engine, commit_every_seconds=0.05)
    assert cancelled.is_set()
    assert (report.stopped, report.n_new, count(path)) == (True, 3, 3)


def test_what_has_an_argument_of_its_own_may_be_an_engine_option_too(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "c.duckdb"
    build(tiny_model, SUMS, samples=1, limit=2, max_tokens=8, catalog=path, engine="transformers",
          engine_options={"concurrency": 1})  # fmt: skip
    assert count(path) == 2


VLLM = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 10**24}, "samples must be at least 1 and at most 1,000,000"),
        ({"seed": 10**26}, "seed must be a whole number of at most 63 bits"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2048}, "does not fit the model's context of 2048"),
        ({"temperature": 9.0}, "temperature must lie"),
        ({"min_p": 1.5}, "min_p must lie between 0 and 1, not 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, not 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be positive and finite, not inf"),
        ({"engine": "sglang"}, "unknown engine"),
        ({"grader": "maths"}, "unknown grader"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"template_options": {"enable_thinkin": True}}, "reads no option 'enable_thinkin'"),
        ({"decontaminate": "held-out.jsonl"}, "no file held-out.jsonl"),
        ({"retry": ["everything"]}, "retry takes truncated and error"),
        ({"engine": "transformers", "engine_options": {"tensor_parallel_size": 2}}, "has no option 'tensor_parallel"),
        ({"engine": "transformers", "engine_options": {"tokenizer": "other"}}, "tokenizer is no engine option"),
        pytest.param(
            {"engine": "vllm", "engine_options": {"revision": "x"}}, "revision is no engine option", marks=VLLM
        ),
        pytest.param({"engine": "vllm", "engine_options": {"max_model_len": 20}}, "20 is too short: the", marks=VLLM),
        pytest.param({"engine": "vllm", "engine_options": {"max_model_len": "2k"}}, "of tokens, not '2k'", marks=VLLM),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tiny_model: Path, tmp_path: Path, options: dict, says: str):
    path = tmp_path / "c.duckdb"
    with pytest.raises(InputError, match=says):
        build(tiny_model, SUMS, catalog=path, **options)
    assert not path.exists()


def test_a_question_longer_than_the_context_is_named(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "7 " * 3000, "answer": "7"}) + "\n")
    with pytest.raises(InputError, match=r"\(long\.jsonl row 1\) has \d+ tokens"):
        build(tiny_model, str(path), catalog=tmp_path / "c.duckdb")


# --- killed and interrupted --------------------------------------------------------------------------------------

SCRIPT = """
import sys
from calset.builder.build import build
if __name__ == "__main__":
    model, catalog, engine, max_tokens = sys.argv[1:]
    report = build(model, "gym:chain_sum?size=20&seed=5", samples=4, catalog=catalog, engine=engine,
                   max_tokens=int(max_tokens), concurrency=8, commit_every_seconds=0.1,
                   progress=lambda e: print(e.phase, e.existing + e.saved, flush=True))
    print("report", report.stopped, report.n_new, flush=True)
"""


def start(tmp_path: Path, model: Path, engine: str, max_tokens: int) -> subprocess.Popen[str]:
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    command = heeding(sys.executable, script, model, tmp_path / "c.duckdb", engine, max_tokens)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def run_until_saved(process: subprocess.Popen[str], at_least: int) -> int:
    """Read progress until so much is saved or the build ends; the last count that was claimed."""
    claimed = 0
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("report"):
            break
        claimed = int(line.split()[-1])
        if claimed >= at_least:
            break
    return claimed


def processes_of(session: int) -> list[str]:
    listed = subprocess.run(["ps", "-ww", "-eo", "sess=,stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(session) and line.split()[1][0] != "Z"]


def wait_for_end(session: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(session) == []


@pytest.mark.slow
def test_killed_at_random_moments_nothing_claimed_is_lost_and_nothing_comes_twice(tmp_path: Path, tiny_model: Path):
    """With vLLM: test_crash.py."""
    path, claimed = tmp_path / "c.duckdb", 0
    for attempt in range(2):
        process = start(tmp_path, tiny_model, "transformers", 100)
        claimed = max(claimed, run_until_saved(process, claimed + random.Random(attempt).randint(1, 25)))
        time.sleep(random.Random(attempt).random() * 0.3)
        process.kill()
        process.wait()
        wait_for_end(process.pid)  # workers and engine processes go with their parent
        assert count(path) >= claimed
    process = start(tmp_path, tiny_model, "transformers", 100)
    assert run_until_saved(process, 10**9) == 20 * 4
    assert process.wait(timeout=120) == 0
    assert_complete(path, 20, 4)


@pytest.mark.parametrize(
    "to_group",
    [pytest.param(False, id="to the process"), pytest.param(True, id="from the terminal", marks=pytest.mark.slow)],
)
def test_an_interrupt_commits_what_finished_and_leaves_nothing_running(
    tmp_path: Path, tiny_model: Path, to_group: bool
):
    process = start(tmp_path, tiny_model, "transformers", 1500)
    claimed = run_until_saved(process, 1)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "report True" in output
    last = [int(line.split()[-1]) for line in output.splitlines() if line.startswith(("generating", "stopped"))]
    assert not [line for line in output.splitlines() if line.startswith("done")]
    assert count(tmp_path / "c.duckdb") == max([claimed, *last])
    wait_for_end(process.pid)


@pytest.mark.vllm
@pytest.mark.slow
def test_an_interrupt_from_the_terminal_leaves_no_vllm_running(tmp_path: Path, tiny_model: Path):
    pytest.importorskip("vllm")
    process = start(tmp_path, tiny_model, "vllm", 1500)
    run_until_saved(process, 1)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert "report True" in output
    wait_for_end(process.pid)
    # The interrupt reaches vLLM's own process too, which then aborts what it runs: that is no trace.
    assert Catalog(tmp_path / "c.duckdb").query("SELECT DISTINCT finish_reason FROM traces").rows in ([], [("stop",)])

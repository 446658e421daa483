"""The progress event: every work of calset sends the same one, in an order that a reader can rely on."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from factories import fill
from hypothesis import given
from hypothesis import strategies as st
from small_models import make_subset

import calset
from calset import bundled
from calset.builder.model.info import inspect
from calset.catalog.catalog import Catalog
from calset.io import terminal
from calset.io.progress import Progress

GOOD = "<think>1 + 1 = 2</think>The answer is \\boxed{2}"


def check_course(events: Sequence[Progress], last: str = "done") -> None:
    """A phase never comes back, only grows, and its total stays; one event is the final one, the last."""
    phases = [(phase, list(group)) for phase, group in groupby(events, key=lambda event: event.phase)]
    names = [phase for phase, _ in phases]
    assert len(set(names)) == len(names), names
    for _, part in phases:
        assert [event.done for event in part] == sorted(event.done for event in part)
        assert len({event.total for event in part}) == 1
    for event in events:
        assert 0 <= event.existing <= event.done
        assert event.saved == event.done - event.existing
        assert event.total is None or event.done <= event.total
    assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].phase == last


def import_rows(folder: Path, **options: Any) -> None:
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "generations": [GOOD]} for n in range(9)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calset.import_traces(bundled.MODEL, folder / "t.jsonl", catalog=folder / "i.duckdb", commit_size=4, **options)


def merge_two(folder: Path, **options: Any) -> None:
    other = fill(folder / "other.duckdb", [[("correct", 5)]])
    calset.merge(folder / "c.duckdb", other, **options)


def decontaminate(folder: Path, **options: Any) -> None:
    fill(folder / "c.duckdb", [[("correct", 5)]] * 3)
    calset.decontaminate(folder / "c.duckdb", "demo:evaluate", **options)


def grade(folder: Path, **options: Any) -> None:
    fill(folder / "c.duckdb", [[("ungraded", 5)] * 3] * 3)
    calset.grade(folder / "c.duckdb", commit_size=4, **options)


def nothing_to_grade(folder: Path, **options: Any) -> None:
    fill(folder / "c.duckdb", [[("correct", 5)]])
    calset.grade(folder / "c.duckdb", ungraded=True, **options)


@pytest.mark.parametrize("work", [import_rows, merge_two, decontaminate, grade, nothing_to_grade])
def test_works_on_a_catalog_send_events_in_order(tmp_path: Path, work: Any) -> None:
    events: list[Progress] = []
    work(tmp_path, progress=events.append)
    check_course(events)


def test_builds_evaluations_and_judgings_send_events_in_order(tmp_path: Path, tiny_model, scripted_engine) -> None:
    path, loaded = tmp_path / "c.duckdb", inspect(tiny_model).revision
    common = {"samples": 2, "catalog": path, "limit": 4}
    built: list[Progress] = []
    calset.build(tiny_model, "demo", engine=scripted_engine(loaded), progress=built.append, commit_size=3, **common)
    check_course(built)
    assert [built[0].phase, built[-1].done] == ["starting engine", 8]
    assert built[-1].facts.keys() >= {"tokens/s", "overall"}
    again: list[Progress] = []
    calset.build(tiny_model, "demo", engine=scripted_engine(loaded), progress=again.append, **common)
    assert again == [Progress("done", 8, 8, existing=8, final=True)]
    adaptive: list[Progress] = []
    calset.build(
        tiny_model, "demo", engine=scripted_engine(loaded), progress=adaptive.append, target="rac", need=3,
        **common | {"catalog": tmp_path / "adaptive.duckdb"},
    )  # fmt: skip
    check_course(adaptive)
    assert adaptive[-1].total is None
    assert str(adaptive[-1].facts["target"]).endswith("/3")
    evaluated: list[Progress] = []
    calset.evaluate(
        tiny_model, "demo:evaluate", limit=3, catalog=path, engine=scripted_engine(loaded), progress=evaluated.append
    )
    check_course(evaluated)
    judged: list[Progress] = []
    calset.judge(path, tiny_model, engine=scripted_engine(loaded), commit_size=3, progress=judged.append)
    check_course(judged)


def test_an_orderly_stop_is_the_last_event(tmp_path: Path, tiny_model, scripted_engine) -> None:
    events: list[Progress] = []

    def stop(event: Progress) -> None:
        if event.saved and not any(before.saved for before in events):
            signal.raise_signal(signal.SIGTERM)
        events.append(event)

    engine = scripted_engine(inspect(tiny_model).revision)
    report = calset.build(
        tiny_model,
        "demo",
        samples=9,
        limit=9,
        catalog=tmp_path / "c.duckdb",
        engine=engine,
        commit_size=9,
        progress=stop,
    )
    assert report.stopped
    check_course(events, last="stopped")


@pytest.mark.parametrize("method", ["wanda", "depth"])
def test_a_pruning_and_its_verification_send_events_in_order(tmp_path: Path, llama: Path, method: str) -> None:
    pruned: list[Progress] = []
    calset.prune(llama, make_subset(), tmp_path / "out", method=method, sparsity=0.5, progress=pruned.append)
    check_course(pruned)
    verified: list[Progress] = []
    calset.verify(tmp_path / "out", progress=verified.append)
    check_course(verified)


def test_a_diagnosis_names_the_part_that_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calset import diagnosis

    monkeypatch.setattr(diagnosis, "_import", lambda program: (None, "not looked for"))
    events: list[Progress] = []
    calset.doctor(Catalog(tmp_path / "none.duckdb"), progress=events.append)
    check_course(events)
    assert [event.phase for event in events] == ["packages", "engines", "grading", "Hub", "catalog", "done"]


# --- how the command line shows it ------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@given(
    st.builds(
        Progress,
        TEXTS,
        st.integers(0, 10**9),
        st.none() | st.integers(0, 10**9),
        eta_seconds=st.none() | st.floats(0, 1e6),
        facts=st.dictionaries(TEXTS.map("fact {}".format), st.integers(0, 10**6) | st.floats(0, 1) | TEXTS, max_size=3),
        final=st.booleans(),
    )
)
def test_a_json_line_holds_the_whole_event(event: Progress) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr(terminal.sys.stderr, "write", written.append)
        with terminal.progress("json", "label", main="generating") as show:
            show(event)
        with terminal.progress("none", "label") as show:
            show(event)
    (line,) = written
    found = json.loads(line)
    expected = {"event": "label", "phase": event.phase, "done": event.done, "total": event.total, "final": event.final}
    expected |= {name: f"{fact:.0%}" if isinstance(fact, float) else fact for name, fact in event.facts.items()}
    assert found.pop("ETA", None) == (None if event.eta_seconds is None else terminal.duration(event.eta_seconds))
    assert found == expected


def test_a_plain_line_leaves_out_the_phase_that_its_label_names(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("plain", "saved", main="generating") as show:
        show(Progress("starting engine", 0, 8))
        show(Progress("generating", 4, 8, eta_seconds=90, facts={"tokens/s": 512, "correct": 0.75}))  # too soon after
        show(Progress("done", 8, 8, facts={"tokens/s": 1512, "length": 0.125}, final=True))
    assert capsys.readouterr().err.splitlines() == [
        "saved: 0/8, phase starting engine",
        "saved: 8/8, phase done, tokens/s 1512, length 12%",
    ]
    with terminal.progress("plain", "saved", main="generating") as show:
        show(Progress("generating", 4, None, eta_seconds=90, facts={"correct": 0.75}))
    assert capsys.readouterr().err == "saved: 4, correct 75%, ETA 1m30s\n"

"""A trace as a person reads it, and the heat map of a catalog."""

from __future__ import annotations

import json
import os
import pty
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import warm
from factories import START, make_grade, make_problem, make_run, make_source, make_trace

from calset.catalog.catalog import Catalog
from calset.catalog.query import show
from calset.catalog.query.stats import DIFFICULTY_BANDS, difficulty_band, length_bands, stats
from calset.catalog.records import Judgement, Trace

STEPS = [f"step {n}: {'so on ' * 12}" for n in range(60)]
THINKING = "<think>\n" + "\n".join(STEPS) + "\n</think>\n\n"


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    problem, run = make_problem(1), make_run()
    answer = "The answer is \\boxed{2}."
    return [
        make_trace(problem, run, 0, text=THINKING + answer, response=answer, reasoning_end=7, answer_start=8),
        make_trace(problem, run, 1, text="<think>\nfor ever", response="", answer_start=-1, finish_reason="length"),
        make_trace(problem, run, 2, text="just 2", response="just 2", reasoning_start=-1, reasoning_end=-1,
                   answer_start=0),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, traces: list[Trace]) -> Catalog:
    catalog = Catalog(tmp_path_factory.mktemp("show") / "c.duckdb")
    catalog.add_source(make_source())
    catalog.add_problems([make_problem(1, metadata={"domain": "sums"})])
    catalog.add_run(make_run())
    first = make_grade(traces[0], "incorrect", detail="an early mistake", extracted="3")
    second = make_grade(traces[0], "correct", after=9, detail="equal after simplifying\x1b[2J", extracted="2")
    cut = make_grade(traces[1], "truncated", extracted=None, detail="finish reason length")
    catalog.record(traces, [first, second, cut, make_grade(traces[2], "incorrect")])
    catalog.add_judgements(
        [Judgement(traces[0].trace_id, 0, "judge-model", "r9", "p", "none", "0", "incorrect", "3", "raw words",
                   "says 3", judged_at=START + timedelta(seconds=20))]
    )  # fmt: skip
    return catalog


def calset(*arguments: str | Path, cwd: Path) -> str:
    done = warm.calset(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_answer_stands_apart_from_the_reasoning(catalog: Catalog, traces: list[Trace]) -> None:
    thought, cut, plain = (show.parts(catalog.trace(t.trace_id)) for t in traces)
    assert thought == (THINKING, "The answer is \\boxed{2}.")
    assert cut == ("<think>\nfor ever", "")
    assert plain == ("", "just 2")
    titles = [[title for title, _ in show.texts(catalog.trace(t.trace_id), full=False)] for t in traces]
    assert titles[0] == ["question", "reasoning (tokens 1 to 7 of 10)", "answer (from token 8)"]
    assert titles[1] == ["question", "reasoning (tokens 1 to 4 of 10; it never ended, so there is no answer)"]
    assert titles[2] == ["question", "answer (from token 0)"]


def test_an_answer_that_the_text_does_not_hold_leaves_the_text_whole(catalog: Catalog, traces: list[Trace]) -> None:
    row = {**catalog.trace(traces[0].trace_id), "response": "not in there"}
    assert show.parts(row) == (traces[0].text, "not in there")


def test_reasoning_is_folded_to_its_first_and_last_lines(catalog: Catalog, traces: list[Trace]) -> None:
    row = catalog.trace(traces[0].trace_id)
    folded = dict(show.texts(row, full=False))["reasoning (tokens 1 to 7 of 10)"]
    assert folded.startswith("<think>\nstep 0:")
    assert folded.endswith("</think>")
    hidden = int(re.search(r"… ([\d,]+) characters folded; --full shows all …", folded)[1].replace(",", ""))  # type: ignore[index]
    head, tail = re.split(r"\n… .* …\n", folded)
    assert len(head) + len(tail) + hidden == len(THINKING.strip("\n"))
    assert THINKING.startswith(head)
    assert dict(show.texts(row, full=True))["reasoning (tokens 1 to 7 of 10)"] == THINKING.strip("\n")
    one_line = "x" * 5000
    assert len(show.fold(one_line)) < 1700
    assert show.fold("short\ntext\n" * 3) == ("short\ntext\n" * 3).strip("\n")


def test_show_says_why_and_what_else_was_said(catalog: Catalog, traces: list[Trace]) -> None:
    said = calset("show", traces[0].trace_id[:12], "--catalog", catalog.path, cwd=catalog.path.parent)
    assert "\x1b" not in said
    for words in ("verdict:    correct (by math 0.9)", "why:        equal after simplifying", "extracted:  2",
                  "reference:  2", "0.667 (1 of 3 judged samples correct)", "an early mistake", "judge-model", "says 3",
                  "other samples of this problem", traces[1].trace_id[:12], "length"):  # fmt: skip
        assert words in said, words
    assert "step 30:" not in said
    full = calset("show", traces[0].trace_id, "--full", "--catalog", catalog.path, cwd=catalog.path.parent)
    assert all(step.strip() in full for step in STEPS)


def test_show_json_is_complete(catalog: Catalog, traces: list[Trace]) -> None:
    row = json.loads(calset("show", traces[0].trace_id, "--json", "--catalog", catalog.path, cwd=catalog.path.parent))
    assert (row["reasoning_start"], row["reasoning_end"], row["answer_start"]) == (1, 7, 8)
    assert row["request_seed"] == traces[0].request_seed
    assert row["completion_ids"] == list(traces[0].completion_ids)
    assert [g["verdict"] for g in row["grades"]] == ["incorrect", "correct"]
    assert [(j["judge"], j["raw"]) for j in row["judgements"]] == [("judge-model", "raw words")]
    assert row["problem"]["metadata"] == {"domain": "sums"}
    assert row["run"]["sampling"] == {"temperature": 1.0, "top_p": 1.0}
    assert len(row["siblings"]) == 2
    assert row["text"] == traces[0].text


def test_the_places_are_those_of_the_attempt_that_counts(tmp_path: Path, traces: list[Trace]) -> None:
    catalog = Catalog(tmp_path / "c.duckdb")
    catalog.add_source(make_source())
    catalog.add_problems([make_problem(1)])
    catalog.add_run(make_run())
    catalog.add_traces(
        [traces[1], replace(traces[1], attempt=1, answer_start=5, text="<think></think>2", response="2")]
    )
    row = catalog.trace(traces[1].trace_id)
    assert (row["attempt"], row["answer_start"]) == (1, 5)
    assert show.parts(row) == ("<think></think>", "2")


# -- the heat map --------------------------------------------------------------------------------------------------


def test_the_heat_map_shades_by_traces_and_says_the_share_of_correct(catalog: Catalog) -> None:
    found = stats(catalog)
    assert [row[0] for row in found.heat()] == [row[0] for row in found.grid()]
    cells = [cell for _, cells in found.heat() for cell in cells]
    assert [cell for cell in cells if cell[0]] == [("3  33%", 1.0)]
    assert all(0 <= shade <= 1 and bool(text) == bool(shade) for text, shade in cells)


@pytest.mark.parametrize("term", ["xterm-256color", pytest.param("dumb", marks=pytest.mark.slow)])
def test_a_terminal_gets_shades_and_a_pipe_a_plain_table(catalog: Catalog, term: str) -> None:
    plain = calset("stats", "--catalog", catalog.path, cwd=catalog.path.parent)
    assert "# difficulty x length: correct / traces" in plain
    assert "\x1b" not in plain
    main, other = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": "100", "COLORTERM": "truecolor"}
    command = ("calset", "stats", "--catalog", catalog.path)
    process = warm.warm().start(*command, cwd=catalog.path.parent, env=env, streams=[other, other, other])
    os.close(other)
    out = b""
    while part := _read(main):
        out += part
    os.close(main)
    assert process.wait() == 0
    text = out.decode()
    assert "33%" in text
    assert ("\x1b[38;2;255;255;255;48;2;8;48;107m" in text) == (term != "dumb")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


def test_bands_of_rows_in_memory_are_those_of_the_statistics(catalog: Catalog) -> None:
    asked = [None, 0, 0.1, 0.2, 0.20001, 0.4, 0.8, 0.81, 0.99, 1]
    assert [DIFFICULTY_BANDS[difficulty_band(d)] for d in asked] == [
        "unknown", "0", "(0, 0.2]", "(0, 0.2]", "(0.2, 0.4]", "(0.2, 0.4]", "(0.6, 0.8]", "(0.8, 1)", "(0.8, 1)", "1"
    ]  # fmt: skip
    lengths = [row["n_tokens"] for row in catalog.rows("SELECT n_tokens FROM trace")]
    assert tuple(label for _, label in length_bands(lengths)) == stats(catalog).length_bands
    assert [label for _, label in length_bands(range(1, 9))] == ["1..2", "3..4", "5..6", "7..8"]
    assert length_bands([]) == []


def test_the_grade_of_an_earlier_attempt_is_an_earlier_grade(tmp_path: Path) -> None:
    catalog, problem, run = Catalog(tmp_path / "c.duckdb"), make_problem(1), make_run()
    old = make_trace(problem, run, finish_reason="length")
    catalog.add_run(run)
    catalog.record([old], [make_grade(old, "truncated")], problems=[problem])
    catalog.record([replace(old, attempt=1, finish_reason="stop")], [])  # an ungraded build ran it again
    row = catalog.trace(old.trace_id)
    assert ("verdict", "ungraded") in show.facts(row)
    (earlier,) = (rows for title, _, rows in show.tables(row) if title == "earlier grades")
    assert [(attempt, verdict) for attempt, _, _, verdict, *_ in earlier] == [(0, "truncated")]

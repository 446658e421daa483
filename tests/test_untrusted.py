"""Problems and traces are untrusted: any text is kept as it is, and none of it acts on SQL, a table or a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import warm
from warm import calset

from calset import build
from calset.builder.model.info import inspect
from calset.catalog.catalog import Catalog
from calset.cli import main
from calset.io import terminal
from calset.io.progress import Progress

pytestmark = pytest.mark.slow  # half a minute: every listing over texts of 10 MB
# What a terminal acts on, or what reorders or breaks the line it stands in.
ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
BIG = 10_000_000

NASTY = {
    "quotes": "'); DROP TABLE traces; -- \" ' `",
    "nul": "a\x00b\x00",
    "ansi": "\x1b[2J\x1b[31mred\x1b[0m \x9b2J",
    "osc": "\x1b]0;title\x07 \x1b]8;;http://example.test\x1b\\link\x1b]8;;\x1b\\ \x1b]52;c;cm0=\x07 \x9d0;t\x9c",
    "bidi": "\u202eevil\u202c \u2066x\u2069 \u200f\u200e\u061c",
    "breaks": "one\r\ntwo\rthree\u2028four\u2029five\x85six\x0bseven\x0ceight\ttab",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0010ffff",
    "markup": "[red]x[/red] [link=http://example.test]y[/link] [/] {0} %s $(id) `id` \\x1b[2J",
    "del": "\x7f\x7f\x08\x08",
    "formula": '=cmd|" /C calc"!A0',
}
SAID = "\x1b[2J\x1b]0;owned\x07\u202e\x9b2J\r'); DROP TABLE traces; -- \x00 😀 \\boxed{2}"
COMMANDS = (
    ("stats",),
    ("query", "SELECT * FROM trace"),
    ("query", "SELECT * FROM problem"),
    ("query", "SELECT metadata FROM problems"),
    ("query", "FROM runs"),
    ("subsets",),
)


def harmless(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Both outputs are UTF-8 without a character that acts; returns standard output."""
    out, err = done.stdout, done.stderr
    assert done.returncode == code, err[-2000:]
    assert not ACTIVE.search(out)
    assert not ACTIVE.search(err)
    assert "Traceback" not in err
    return out


def lines(text: str) -> list[Any]:
    """JSON lines; not splitlines(), which also splits at U+0085 inside a string."""
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"question": f"{name}: {text}", "answer": f"{text} 2", "note": text, f"key {text}": [text]}
        for name, text in NASTY.items()
    ]
    rows.append({"question": "big answer", "answer": "\x1b'" + "9" * BIG})
    rows.append({"question": "big metadata", "answer": "2", "note": "\x00'\u202e" + "m" * BIG})
    rows.append({"question": "deep", "answer": "2", "note": json.loads("[" * 400 + "]" * 400)})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: list[dict[str, Any]]) -> Path:
    """A catalog of traces whose problems, tokens and names are all hostile, one a problem."""
    from conftest import ScriptedEngine

    folder = tmp_path_factory.mktemp("untrusted")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # Half a surrogate pair in a question is refused (below); in anything else it is kept as U+FFFD.
    text += '{"question": "half", "answer": "2", "note": "x\\ud83dy", "key \\udc00": 1}\n'
    (folder / "q'\x1b[2J; --.jsonl").write_text(text)
    (folder / "m'\x1b[2J\u202e").symlink_to(tiny_model)
    info = inspect(tiny_model)
    token_ids = tuple(info.tokenizer.encode(f"<think>{SAID}</think>{SAID}<|im_end|>", add_special_tokens=False))
    engine = ScriptedEngine(info.revision, token_ids=token_ids)
    report = build(
        tiny_model,
        str(folder / "q'\x1b[2J; --.jsonl"),
        samples=1,
        engine=engine,
        catalog=folder / "calset.duckdb",
        system_prompt="'\x1b[2J\x00",
        grader="exact",
        graders=1,
    )
    assert report.n_new == len(rows) + 1
    harmless(calset("select", "all", "--recipe", "rac", "--tokens", "100000", cwd=folder))
    return folder


def test_nothing_is_lost_and_bytes_are_equal(folder: Path, rows: list[dict[str, Any]]) -> None:
    catalog = Catalog(folder / "calset.duckdb")
    kept = {row["question"]: row for row in catalog.rows("SELECT question, answer, metadata FROM problems")}
    for row in rows:
        want = dict(row)
        found = kept[want.pop("question")]
        assert found["answer"] == want.pop("answer")
        assert found["metadata"] == want
    assert kept["half"]["metadata"] == {"note": "x\ufffdy", "key \ufffd": 1}
    texts = catalog.query("SELECT DISTINCT text, response FROM trace").rows
    assert texts == [(f"<think>{SAID}</think>{SAID}", SAID)]


def test_no_listing_acts_on_a_terminal(folder: Path) -> None:
    for command in COMMANDS:
        for form in ((), ("--json",)):
            out = harmless(calset(*command, *form, cwd=folder))
            if form:
                assert lines(out)


def test_json_carries_every_character(folder: Path, rows: list[dict[str, Any]]) -> None:
    out = harmless(calset("query", "SELECT question, answer, response FROM trace", "--json", cwd=folder))
    found = {row["question"]: row for row in lines(out)}
    for row in rows:
        assert found[row["question"]]["answer"] == row["answer"]
    assert {row["response"] for row in found.values()} == {SAID}


def test_a_row_stays_one_line_of_a_plain_table(folder: Path) -> None:
    out = harmless(calset("query", "SELECT question, answer FROM problem WHERE length(answer) < 1000", cwd=folder))
    table = [line.split("\t") for line in out.splitlines()]
    assert len(table) == len(NASTY) + 4
    assert {len(row) for row in table} == {2}


def test_a_trace_can_be_shown(folder: Path) -> None:
    catalog = Catalog(folder / "calset.duckdb")
    for (trace_id,) in catalog.query("SELECT trace_id FROM trace WHERE length(answer) < 1000").rows[:4]:
        harmless(calset("show", trace_id, "--full", cwd=folder))
        shown = json.loads(harmless(calset("show", trace_id, "--json", cwd=folder)))
        assert shown["response"] == SAID
        assert shown["run"]["system_prompt"] == "'\x1b[2J\x00"


@pytest.mark.parametrize("command", [("stats",), ("query", "SELECT question, answer, text FROM trace"), ("subsets",)])
def test_a_real_terminal_gets_nothing_to_act_on(folder: Path, command: tuple[str, ...]) -> None:
    """Through a pseudo terminal that takes no escape sequences, so that rich writes none of its own."""
    main, other = pty.openpty()
    env = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    process = warm.warm().start("calset", *command, cwd=folder, env=env, streams=[other, other, other])
    os.close(other)
    out = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        out += part
    os.close(main)
    assert process.wait() == 0
    assert out
    # The terminal driver writes each newline as \r\n.
    assert not ACTIVE.search(out.decode().replace("\r\n", "\n"))


def test_an_export_holds_the_same_bytes(folder: Path, rows: list[dict[str, Any]]) -> None:
    harmless(calset("export", "all", "-o", "out'\x1b[2J", cwd=folder))
    table = pq.read_table(folder / "out'\x1b[2J" / "data" / "train.parquet").to_pylist()
    answers = {row["question"]: row["answer"] for row in table}
    assert {question: answers[question] for question in (row["question"] for row in rows)} == {
        row["question"]: row["answer"] for row in rows
    }
    assert {row["text"] for row in table} == {f"<think>{SAID}</think>{SAID}"}
    assert {row["messages"][-1]["content"] for row in table} == {f"<think>{SAID}</think>{SAID}"}
    assert {row["messages"][0]["content"] for row in table} == {"'\x1b[2J\x00"}


@pytest.mark.parametrize("hostile", ["'; DROP TABLE traces; --", "\x1b[2J", "\u202e\u2028", os.fsdecode(b"\xff\xfe")])
def test_hostile_arguments_are_answered_in_one_harmless_line(
    folder: Path, hostile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CALSET_CATALOG", raising=False)
    for command in (
        ("stats", "--model", hostile),
        ("stats", "--source", hostile),
        ("query", hostile),
        ("show", hostile),
        ("select", hostile),
        ("select", "x", "--model", hostile),
        ("select", "x", "--where", hostile),
        ("select", "x", "--recipe", hostile),
        ("export", hostile, "-o", "new"),
        ("diff", hostile, "all"),
        ("problems", hostile),
        ("problems", f"{hostile}.jsonl"),
        ("problems", "demo", "--question", hostile, "--answer", hostile, "--limit", hostile),
        (hostile,),
        ("stats", f"--{hostile}"),
        ("stats", "--catalog", hostile),
        ("build", "--model", hostile, "--problems", "demo"),
        ("build", "--model", "m'\x1b[2J\u202e", "--problems", hostile),
        ("prune", hostile, "--calibration", "all", "--sparsity", "0.5", "-o", "new"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(command))
        shown = capsys.readouterr()
        assert (ended.value.code, shown.out) == (2, ""), command
        assert shown.err.count("\n") == 1, command
        assert not ACTIVE.search(shown.err), command
    assert Catalog("calset.duckdb").query("SELECT count(*) > 5 FROM traces").rows == [(True,)]


def test_an_error_that_quotes_ten_megabytes_stays_short(folder: Path) -> None:
    done = calset("query", "SELECT answer::INTEGER FROM problem WHERE question = 'big answer'", cwd=folder)
    harmless(done, 2)
    assert len(done.stderr) < 5000


def test_a_terminal_of_another_encoding_gets_escapes(folder: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = ["-m", "calset.cli", "query", "SELECT question FROM problem WHERE question LIKE 'emoji%'"]
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, check=False)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "\\U0001f469" in done.stdout
    harmless(done)


def test_column_names_are_cleaned_too(folder: Path) -> None:
    sql = 'SELECT 1 AS "a\x1b[2J\u202e", 2 AS "b\nc"'
    assert harmless(calset("query", sql, cwd=folder)).splitlines()[0].count("\t") == 1
    (row,) = lines(harmless(calset("query", sql, "--json", cwd=folder)))
    assert row == {"a\x1b[2J\u202e": 1, "b\nc": 2}


def test_half_a_surrogate_pair_in_a_question_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "x\\ud83d", "answer": "2"}\n')
    done = calset("problems", "q.jsonl", cwd=tmp_path)
    harmless(done, 2)
    assert "surrogate" in done.stderr


def test_metadata_too_deep_to_keep_is_refused_not_a_crash(tmp_path: Path) -> None:
    """Python's own limit is near 1,000, a little more or less wherever JSON is read or written."""
    from calset.builder.problems import load_problems
    from calset.errors import InputError

    outcomes = set()
    for depth in (400, *range(960, 1000)):
        (tmp_path / "q.jsonl").write_text('{"question":"q","answer":"2","n":' + "[" * depth + "]" * depth + "}\n")
        catalog = Catalog(tmp_path / "c.duckdb")
        try:
            source, problems = load_problems(str(tmp_path / "q.jsonl"))
            catalog.add_source(source)
            catalog.add_problems(problems)
            outcomes.add("kept")
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"kept", "refused"}


def test_a_source_of_hostile_problems_is_previewed(folder: Path, rows: list[dict[str, Any]]) -> None:
    for form in ((), ("--json",)):
        out = harmless(calset("problems", "q'\x1b[2J; --.jsonl", "--limit", "100", *form, cwd=folder))
    assert json.loads(out)["problems"][0]["question"] == rows[0]["question"]


@pytest.mark.slow
def test_a_build_of_hostile_problems_prints_nothing_that_acts(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The real command, model and engine, its progress included; what it samples are the model's own tokens."""
    small = [json.dumps(row) for row in rows[: len(NASTY)]]
    (folder / "small\x1b[2J.jsonl").write_text("\n".join(small))
    for mode in ("plain", "json"):
        done = calset(
            "build", "--model", "m'\x1b[2J\u202e", "--problems", "small\x1b[2J.jsonl", "--samples", "1", "--max-tokens",
            "8", "--engine", "transformers", "--progress", mode, "--catalog", f"{mode}\x1b.duckdb", cwd=folder,
        )  # fmt: skip
        harmless(done)


def test_progress_takes_any_text(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("plain", "json", "bar"):
        with terminal.progress(mode, "saved\x1b[2J") as show:
            show(Progress("[/nothing] \x1b]0;x\x07\x7f\u202e [red]a", 1, 2, final=True))
        shown = capsys.readouterr().err
        assert "nothing" in shown
        if mode != "bar":  # rich moves the cursor itself
            assert not ACTIVE.search(shown)
        assert "\x1b]0" not in shown
        assert "\u202e" not in shown
        assert "[red]a" in json.loads(shown)["phase"] if mode == "json" else "[red]a" in shown

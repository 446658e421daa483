"""Asking the catalog: filters that mean what they say, relations that hold no lock, answers in every format."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import fewer
from factories import fill, make_grade, make_problem, make_run, make_source, make_trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import python
from warm import calset

from calset.catalog.catalog import Catalog
from calset.catalog.filters import COLUMNS, NARROW, Filter, parse_band
from calset.catalog.query import output
from calset.catalog.query.output import Question, print_answer, save_answer
from calset.catalog.records import VERDICTS
from calset.errors import CatalogError, CatalogLocked, InputError

ROOT = Path(__file__).parent.parent
OLDER = Path(sys.prefix) / "duckdb-1.5"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Two models, two sources, an evaluation; every verdict; texts that CSV, JSON and terminals must survive."""
    path = tmp_path_factory.mktemp("query") / "c.duckdb"
    plan = [
        [
            (VERDICTS[(n + i) % 9] if n % 2 else "correct" if i < n % 5 else "incorrect", 5 + (7 * n + i) % 40)
            for i in range(4)
        ]
        for n in range(24)
    ]  # fmt: skip
    catalog = fill(path, plan)
    fill(path, plan[:8], model="other", source="sums")
    fill(path, plan[:4], kind="evaluate")
    odd = make_problem(99, "odd", question='He said: "1,\n2"\t\x1b[2J\u202e', answer="2")
    run = make_run()
    trace = make_trace(odd, run, 0, 12, text="<think>\r\n\x00", response="")
    catalog.add_source(make_source("odd"))
    catalog.record([trace], [make_grade(trace, "incorrect", extracted=None, detail="")], problems=[odd])
    return catalog


# -- filters --------------------------------------------------------------------------------------------------------


def test_the_columns_are_those_of_the_view(catalog: Catalog) -> None:
    assert tuple(catalog.query("FROM trace LIMIT 0").columns) == COLUMNS


def band(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    ends = st.tuples(st.none() | numbers, st.none() | numbers)
    return st.none() | ends.filter(lambda b: None in b or b[0] <= b[1])


filters = st.builds(
    Filter,
    difficulty=band(st.sampled_from([0, 0.25, 0.3, 0.5, 0.8, 1])),
    correct=st.none() | st.booleans(),
    verdict=st.none() | st.sampled_from(VERDICTS) | st.lists(st.sampled_from(VERDICTS), max_size=3),
    tokens=band(st.integers(0, 50)),
    model=st.sampled_from([None, "tiny", "other", "tiny@r1", "tiny@r2", "nobody"]),
    source=st.sampled_from([None, "demo", "sums", "o'dd", "odd"]),
    k=band(st.integers(0, 5)),
    finished=st.none() | st.booleans(),
    kind=st.sampled_from([None, "build", "evaluate"]),
)


@settings(fewer(4), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(filters)
def test_a_filter_takes_exactly_the_rows_that_python_would(
    all_rows: list[dict[str, Any]], catalog: Catalog, asked: Filter
) -> None:
    sql, params = asked.select()
    found = catalog.query(sql, params)
    assert found.columns == list(NARROW)
    taken = [row[0] for row in found.rows]
    expected = [row for row in all_rows if _meets(row, asked)]
    expected.sort(key=lambda r: (r["problem_id"], r["sample_index"], r["trace_id"]))
    assert taken == [row["trace_id"] for row in expected]


@pytest.fixture(scope="module")
def all_rows(catalog: Catalog) -> list[dict[str, Any]]:
    return catalog.query("FROM trace").as_dicts()


def _meets(row: dict[str, Any], asked: Filter) -> bool:
    bands = {"difficulty": asked.difficulty, "n_tokens": asked.tokens, "k": asked.k}
    for column, ends in bands.items():
        for end, sign in zip(ends or (), (1, -1), strict=False):
            if end is not None and (row[column] is None or sign * row[column] < sign * end):
                return False
    equal = {"correct": asked.correct, "source": asked.source, "finished": asked.finished, "kind": asked.kind}
    model = asked.model in (None, row["model"], f"{row['model']}@{row['model_revision']}")
    verdict = asked.verdict is None or row["verdict"] in asked.verdict
    return model and verdict and all(value in (None, row[column]) for column, value in equal.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.3..0.8", (0.3, 0.8)), ("0.3..", (0.3, None)), ("..0.8", (None, 0.8)), ("1", (1, 1)), (" 0 .. 1 ", (0, 1))],
)
def test_bands_may_be_open(text: str, expected: tuple[Any, Any]) -> None:
    assert parse_band(text, "--difficulty") == expected


@pytest.mark.parametrize("text", ["", "..", "a..b", "1..2..3", "nan..1", "inf", "0x1..2", "١..٢"])
def test_what_is_no_band_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--difficulty takes LO\.\.HI"):
        parse_band(text, "--difficulty")
    with pytest.raises(InputError, match="whole"):
        parse_band("0.5..2", "--tokens", "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": (0, 2)}, "difficulty must be"), ({"difficulty": (0.8, 0.2)}, "difficulty must be"),
        ({"tokens": (-1, 2)}, "tokens must be"), ({"k": 3}, "k must be"), ({"correct": "yes"}, "correct must be"),
        ({"verdict": "corect"}, "did you mean 'correct'"), ({"kind": "test"}, "kind must be"),
        ({"sourse": "x"}, "no filter 'sourse', did you mean 'source'"),
        ({"columns": ["quesion"]}, "did you mean 'question'"), ({"columns": []}, "at least one"),
        ({"limit": 0}, "limit must be"), ({"difficulty": (float("nan"), 1)}, "difficulty"),
        ({"columns": ["k", "k"]}, "only once"), ({"columns": ['k" FROM runs --']}, "no column"),
    ],
)  # fmt: skip
def test_a_filter_that_makes_no_sense_names_what(catalog: Catalog, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        catalog.traces(**options)
    assert "\n" not in str(caught.value)


# -- relations ------------------------------------------------------------------------------------------------------


def test_a_relation_goes_to_polars_pandas_and_arrow(catalog: Catalog) -> None:
    relation = catalog.traces(difficulty=(0.25, 0.75), correct=True, tokens=(10, None), source="demo", limit=5)
    frame = relation.pl()
    assert isinstance(frame, pl.DataFrame)
    assert frame.columns == list(NARROW)
    assert 0 < len(frame) <= 5
    assert frame.lazy().filter(pl.col("n_tokens") < 10).collect().is_empty()
    assert frame["difficulty"].is_between(0.25, 0.75).all()
    assert relation.df()["trace_id"].tolist() == frame["trace_id"].to_list()
    assert relation.arrow().read_all().column("trace_id").to_pylist() == frame["trace_id"].to_list()
    assert relation.aggregate("count(*)").fetchall() == [(len(frame),)]
    assert catalog.traces(columns=["*"]).columns == list(COLUMNS)


def test_a_relation_keeps_duckdb_types(catalog: Catalog) -> None:
    relation = catalog.sql(
        "SELECT metadata, 1::HUGEINT AS h, NULL::UUID AS u, 1 AS a, 2 AS a, [1] AS l, ? AS p FROM problems LIMIT 1",
        ["x"],
    )
    assert [str(kind) for kind in relation.types] == [
        "JSON",
        "HUGEINT",
        "UUID",
        "INTEGER",
        "INTEGER",
        "INTEGER[]",
        "VARCHAR",
    ]
    assert relation.columns == ["metadata", "h", "u", "a", "a_1", "l", "p"]
    assert relation.fetchall()[0][1:] == (1, None, 1, 2, [1], "x")
    assert catalog.sql("EXPLAIN SELECT 1").fetchall()
    assert catalog.sql("SELECT 1 AS n WHERE false").pl().schema == {"n": pl.Int32}


def test_a_relation_that_is_kept_locks_nobody_out(catalog: Catalog) -> None:
    relation = catalog.sql("SELECT count(*) AS n FROM traces")
    code = (
        "import sys; from calset.catalog.catalog import Catalog; from calset.catalog.records import Source\n"
        "print(Catalog(sys.argv[1], lock_timeout=1).add_source(Source('late', 'late', 'late', 'file', '1', 'math')))"
    )
    done = subprocess.run([sys.executable, "-c", code, catalog.path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    assert catalog.add_source(make_source("later")) == 1
    assert relation.fetchall() == catalog.query("SELECT count(*) FROM traces").rows


@pytest.mark.parametrize(
    "sql", ["DROP TABLE traces", "SELECT 1; SELECT 2", "COPY traces TO 'x.csv'", "SELEC 1", "SET threads = 1",
            "FROM read_csv('/etc/passwd')", "FROM nowhere", "SELECT 1/"],
)  # fmt: skip
def test_a_relation_is_of_one_select_without_files(catalog: Catalog, sql: str) -> None:
    with pytest.raises(InputError) as caught:
        catalog.sql(sql)
    assert "\n" not in str(caught.value)
    with catalog.connect(), pytest.raises(CatalogError, match="ask on that connection"):
        catalog.sql("SELECT 1")


def test_python_variables_are_out_of_reach(catalog: Catalog) -> None:
    secret = pl.DataFrame({"x": [1]})
    with pytest.raises(InputError, match="secret"):
        catalog.sql("FROM secret")
    assert len(secret) == 1


@pytest.mark.slow
@pytest.mark.skipif(not OLDER.is_dir(), reason="DuckDB 1.5 is not installed beside DuckDB 2")
def test_relations_and_formats_on_duckdb_1_5(catalog: Catalog, tmp_path: Path) -> None:
    code = """
import sys, json, duckdb
from pathlib import Path
from calset.catalog.query.output import Question, save_answer
from calset.catalog.catalog import Catalog
catalog = Catalog(sys.argv[1])
relation = catalog.traces(difficulty=(0.25, 0.75), correct=True)
save_answer(catalog, Question("FROM trace ORDER BY trace_id"), "parquet", Path(sys.argv[2]))
types = [str(kind) for kind in catalog.sql("SELECT metadata FROM problems").types]
print(json.dumps([duckdb.__version__, relation.pl()["trace_id"].to_list(), types]))
"""
    env = {**os.environ, "PYTHONPATH": f"{OLDER}{os.pathsep}{ROOT}"}
    out = tmp_path / "older.parquet"
    done = subprocess.run(
        [sys.executable, "-c", code, catalog.path, out], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    version, found, types = json.loads(done.stdout)
    assert version.startswith("1.5.")
    assert found == catalog.traces(difficulty=(0.25, 0.75), correct=True).pl()["trace_id"].to_list()
    assert types == ["JSON"]
    assert pl.read_parquet(out).to_dicts() == catalog.sql("FROM trace ORDER BY trace_id").pl().to_dicts()


# -- formats --------------------------------------------------------------------------------------------------------


EVERYTHING = Question("FROM trace ORDER BY trace_id")


def test_every_format_holds_every_row(catalog: Catalog, tmp_path: Path, all_rows: list[dict[str, Any]]) -> None:
    expected = sorted(all_rows, key=lambda r: r["trace_id"])
    for form in ("jsonl", "csv", "parquet"):
        written = save_answer(catalog, EVERYTHING, form, tmp_path / form)
        assert (written.rows, written.truncated) == (len(expected), False)
    assert [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()] == expected
    with (tmp_path / "csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    for column in ("question", "text", "trace_id", "verdict"):
        assert [row[column] for row in listed] == [row[column] for row in expected]
    assert [row["difficulty"] for row in listed] == [_csv(row["difficulty"]) for row in expected]
    assert {row["finished"] for row in listed} == {"true", "false"}
    frame = pl.read_parquet(tmp_path / "parquet")
    assert frame["question"].to_list() == [row["question"] for row in expected]
    assert frame.schema["created_at"] == pl.Datetime("us")
    assert pl.read_csv(tmp_path / "csv").height == len(expected)
    assert pq.read_metadata(tmp_path / "parquet").row_group(0).column(0).compression == "ZSTD"


def _csv(value: float | None) -> str:
    return "" if value is None else repr(value)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "table"])
@pytest.mark.parametrize("limit", [1, 5, 10_000])
def test_a_limit_is_exact(
    catalog: Catalog, tmp_path: Path, form: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_BATCH", 2)
    n = catalog.query("SELECT count(*) FROM trace").rows[0][0]
    written = save_answer(catalog, Question("FROM trace", limit=limit), form, tmp_path / "out")
    assert (written.rows, written.truncated) == (min(limit, n), limit < n)
    if form == "parquet":
        assert pq.read_table(tmp_path / "out").num_rows == written.rows
    elif form == "jsonl":
        assert len((tmp_path / "out").read_text().splitlines()) == written.rows


def test_a_file_appears_whole_or_not_at_all(catalog: Catalog, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("before")
    dies = Question("SELECT CASE WHEN i = 9000 THEN error('dies late') ELSE i END AS i FROM range(10000) r(i)")
    for form in ("csv", "jsonl", "parquet"):
        with pytest.raises(InputError, match="dies late"):
            save_answer(catalog, dies, form, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]
    assert out.read_text() == "before"
    with pytest.raises(InputError, match="two columns are named a"):
        save_answer(catalog, Question("SELECT 1 AS a, 2 AS a"), "parquet", out)
    with pytest.raises(InputError, match="is a folder"):
        save_answer(catalog, EVERYTHING, "csv", tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        save_answer(catalog, EVERYTHING, "csv", tmp_path / "no" / "out.csv")
    save_answer(catalog, Question("SELECT 1 AS one"), "csv", out)
    assert out.read_text() == "one\n1\n"


def test_a_slow_reader_does_not_keep_the_catalog_open(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pager that nobody scrolls: another thread can write while printing hangs."""
    reading, seen = threading.Event(), []

    class Pager(io.StringIO):
        def write(self, text: str) -> int:
            reading.set()
            assert writer_done.wait(20)
            seen.append(text)
            return len(text)

    writer_done = threading.Event()

    def write() -> None:
        assert reading.wait(20)
        catalog.add_source(make_source("while printing"))
        writer_done.set()

    thread = threading.Thread(target=write)
    thread.start()
    monkeypatch.setattr(sys, "stdout", Pager())
    written = print_answer(catalog, EVERYTHING, "csv")
    thread.join()
    assert written.rows > 100
    assert "".join(seen).startswith("trace_id,")


# -- the command line -----------------------------------------------------------------------------------------------


def test_filters_on_the_command_line(catalog: Catalog, tmp_path: Path) -> None:
    at = ("--catalog", catalog.path)
    done = calset("query", "--difficulty", "0.25..0.75", "--correct", "--tokens", "10..", "--source", "demo",
                  "--columns", "trace_id,n_tokens", "--limit", "3", *at, cwd=tmp_path)  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "trace_id\tn_tokens"
    expected = catalog.traces(difficulty=(0.25, 0.75), correct=True, tokens=(10, None), source="demo", limit=3)
    assert [line.split("\t")[0] for line in lines[1:]] == expected.pl()["trace_id"].to_list()
    assert done.stderr == "The first 3 rows; more match.\n"
    done = calset(
        "query",
        "--verdict",
        "truncated",
        "--verdict",
        "timeout",
        "--kind",
        "all",
        "-o",
        "out.parquet",
        *at,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert set(pl.read_parquet(tmp_path / "out.parquet")["verdict"]) == {"truncated", "timeout"}


def test_what_goes_to_standard_output_acts_on_no_terminal(catalog: Catalog, tmp_path: Path) -> None:
    for form in ("csv", "jsonl", "table"):
        done = calset(
            "query", "--source", "odd", "--columns", "*", "--format", form, "--catalog", catalog.path, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert not set("\x1b\x00\u202e") & set(done.stdout)
        if form == "jsonl":
            assert json.loads(done.stdout)["text"] == "<think>\r\n\x00"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing is asked"),
        (("SELECT 1", "--correct"), "SQL or filters, not both"),
        (("SELECT 1", "--format", "parquet"), "parquet needs a file"),
        (("SELECT 1", "-o", "x.txt"), "does not say a format"),
        (("--difficulty", "0.2..1.5"), "difficulty must be"),
        (("SELECT 1", "--json", "--format", "csv"), "--json is --format jsonl"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(
    catalog: Catalog, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = calset("query", *arguments, "--catalog", catalog.path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        *(pytest.param(form, 200_000, marks=pytest.mark.slow) for form in ("csv", "jsonl", "parquet")),
        *(pytest.param(form, 1_000_000, marks=pytest.mark.nightly) for form in ("csv", "jsonl", "parquet")),
    ],
)
def test_an_answer_streams(catalog: Catalog, tmp_path: Path, form: str, rows: int) -> None:
    """1 kB of text a row through a process that may not use much more memory than it starts with."""
    code = (
        "import sys, resource; from pathlib import Path\n"
        "from calset.catalog.query.output import Question, save_answer\n"
        "from calset.catalog.catalog import Catalog\n"
        "catalog, form, out = Catalog(sys.argv[1]), sys.argv[2], Path(sys.argv[3])\n"
        "save_answer(catalog, Question('SELECT 1 AS i'), form, out)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = int(sys.argv[4])\n"
        "asked = Question(f\"SELECT i, repeat('x', 1000) AS text FROM range({n}) r(i)\")\n"
        "assert save_answer(catalog, asked, form, out).rows == n\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    script, out = tmp_path / "stream.py", tmp_path / "out"
    script.write_text(code)  # DuckDB takes "python -c" for a person and draws a progress bar
    done = subprocess.run(
        [sys.executable, script, catalog.path, form, out, str(rows)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 + 0.1 * rows / 1000  # MB; holding the rows would take as many as thousands of rows
    out.unlink()


def test_no_progress_bar_is_drawn_where_python_is_interactive_and_no_setting_can_be_changed(catalog: Catalog) -> None:
    code = (
        "import calset, sys; catalog = calset.Catalog(sys.argv[1])\n"
        "names = ('enable_progress_bar', 'lock_configuration')\n"
        "sql = f'SELECT name, value FROM duckdb_settings() WHERE name IN {names}'\n"
        "print(dict(catalog.query(sql).rows))\n"
        "with catalog.connect() as con: print(dict(con.execute(sql).fetchall()))"
    )
    done = subprocess.run([sys.executable, "-c", code, catalog.path], capture_output=True, text=True, check=True)
    asked, own = done.stdout.splitlines()
    assert asked == "{'enable_progress_bar': 'false', 'lock_configuration': 'true'}"
    assert own == "{'enable_progress_bar': 'false', 'lock_configuration': 'false'}"


def test_an_answer_never_takes_the_place_of_a_catalog(catalog: Catalog) -> None:
    before = catalog.path.read_bytes()
    with pytest.raises(InputError, match="is a DuckDB file"):
        save_answer(catalog, Question("SELECT 1 AS a"), "csv", catalog.path)
    assert catalog.path.read_bytes() == before


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------

ENDLESS = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range + b.range = 7"
STOPPABLE = """
    import sys
    from calset.catalog.catalog import Catalog
    from calset.cli import main
    if sys.argv[1:2] != ["api"]:
        main()
    catalog = Catalog(sys.argv[2])
    try:
        if sys.argv[3] == "sql":
            catalog.sql(sys.argv[4])
        elif sys.argv[3] == "query":
            catalog.query(sys.argv[4])
        else:
            with catalog.stream(sys.argv[4]) as (names, batches):
                list(batches)
    except KeyboardInterrupt:
        print(catalog.query("SELECT count(*) FROM trace").rows)
"""


def stopped(catalog: Catalog, *arguments: object, times: int = 1) -> tuple[int, str, str]:
    """Exit code and outputs of a process that gets SIGINT while it has the catalog open; somebody then writes to it."""
    with python(STOPPABLE, *arguments) as process:
        try:
            while process.poll() is None:
                try:
                    with Catalog(catalog.path, lock_timeout=0).transaction():
                        time.sleep(0.05)
                except CatalogLocked:
                    break
            time.sleep(0.5)  # it has opened the file, and begins
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                time.sleep(0.02)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    with Catalog(catalog.path, lock_timeout=1).transaction():
        pass
    return process.returncode, out, err


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("ending", [(), ("-o", "out.csv"), ("-o", "out.parquet")])
def test_ctrl_c_ends_a_query_in_one_line_and_gives_the_lock_back(
    tmp_path: Path, ending: tuple[str, ...], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    said = stopped(catalog, "query", ENDLESS, *ending, "--catalog", catalog.path, times=times)
    assert said == (130, "", "calset: stopped\n")
    assert os.listdir(tmp_path) == ["c.duckdb"]


@pytest.mark.parametrize("how", ["query", "sql", "stream"])
def test_ctrl_c_is_a_keyboard_interrupt_in_python_and_the_catalog_can_be_asked_again(tmp_path: Path, how: str) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    assert stopped(catalog, "api", catalog.path, how, ENDLESS) == (0, "[(1,)]\n", "")


def test_signals_reach_whoever_waited_for_them_before(catalog: Catalog) -> None:
    reader, writer = socket.socketpair()
    for end in (reader, writer):
        end.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with catalog.stream("FROM range(3)") as (_, batches):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert len(next(batches)) == 3
        assert reader.recv(10) == bytes([signal.SIGUSR1])
        assert signal.set_wakeup_fd(before) == writer.fileno()
    finally:
        signal.signal(signal.SIGUSR1, handler)
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def test_streams_may_end_in_the_order_in_which_they_began(catalog: Catalog) -> None:
    first, second = ExitStack(), ExitStack()
    with first, second:
        _, ones = first.enter_context(catalog.stream("FROM range(3)"))
        _, others = second.enter_context(catalog.stream("FROM range(4)"))
        assert len(next(ones)) == 3
        first.close()
        assert len(next(others)) == 4
    assert signal.set_wakeup_fd(-1) == -1

"""The catalog: what is kept and refused, what the views count, and what locks, kills and full disks do."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
from factories import START, fill, make_grade, make_problem, make_run, make_source, make_trace
from processes import python

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.query.stats import stats
from calset.catalog.references import diff, export
from calset.catalog.select import select
from calset.catalog.store import connection, migrations, schema
from calset.catalog.store.values import clean, dump_json
from calset.catalog.subsets.versions import load
from calset.errors import CatalogError, CatalogLocked, InputError, SchemaTooNew
from calset.io.jsonable import jsonable

ROOT = Path(__file__).parent.parent


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "c.duckdb", lock_timeout=5)


def only(catalog: Catalog, sql: str, *params: object) -> object:
    ((value,),) = catalog.query(sql, params).rows
    return value


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_went_in(catalog: Catalog) -> None:
    problem, run = make_problem(3, metadata={"entry": {"nested": [1, 2.5, None, "ü"]}}), make_run()
    trace = make_trace(problem, run, 2, 7, finish_reason="length", attempt=0)
    catalog.add_source(make_source())
    assert catalog.add_problems([problem]) == 1
    assert catalog.add_run(run) == 1
    assert catalog.record([trace], [make_grade(trace, "truncated")]).traces == 1
    assert catalog.problem(problem.problem_id) == problem
    assert catalog.run(run.run_id) == run
    assert catalog.sources() == [make_source()]
    back = catalog.load_traces([trace.trace_id])[trace.trace_id]
    assert replace(back, prompt_ids=tuple(back.prompt_ids), completion_ids=tuple(back.completion_ids)) == trace


def test_inserting_again_changes_nothing(catalog: Catalog) -> None:
    problems, run = [make_problem(n) for n in range(3)], make_run()
    traces = [make_trace(problem, run, i) for problem in problems for i in range(2)]
    grades = [make_grade(trace) for trace in traces]
    for new in (True, False):
        assert catalog.add_source(make_source()) == new
        assert catalog.add_problems([*problems, *problems]) == 3 * new
        assert catalog.add_run(run) == new
        recorded = catalog.record([*traces, traces[0]], [*grades, grades[0]])
        assert (recorded.traces, recorded.grades) == (6 * new, 6 * new)
    for table, n in {"problems": 3, "runs": 1, "traces": 6, "trace_tokens": 6, "grades": 6, "sources": 1}.items():
        assert only(catalog, f"SELECT count(*) FROM {table}") == n


def test_what_is_there_of_a_generation_key_is_told_by_problem_and_sample(catalog: Catalog) -> None:
    problem, other, one, two = make_problem(), make_problem(1), make_run("one"), make_run("two")
    asked = [problem.problem_id, other.problem_id]
    assert catalog.attempts("anything", asked) == {}
    assert not catalog.exists()
    catalog.add_problems([problem, other])
    catalog.add_run(one)
    catalog.add_run(two)
    traces = [make_trace(problem, run, i, max_tokens=64) for run in (one, two) for i in range(3)]
    cut = make_trace(problem, one, 3, finish_reason="length", max_tokens=8)
    again = make_trace(problem, one, 3, attempt=1, finish_reason="abort", max_tokens=16)
    catalog.record([*traces, cut], [make_grade(traces[0], "correct")])
    found = catalog.attempts(one.generation_key, asked)
    assert list(found) == [problem.problem_id]
    assert sorted(found[problem.problem_id]) == [0, 1, 2, 3]
    assert [found[problem.problem_id][i].verdict for i in (0, 1)] == ["correct", None]
    assert {a.trace_id for a in found[problem.problem_id].values()} == {t.trace_id for t in (*traces[:3], cut)}
    counted = catalog.count_attempts(one.generation_key, asked, samples=4, max_tokens=16)
    assert sorted((c.n, c.cut, c.as_long, c.broken, c.max_tokens) for c in counted) == [
        (1, True, False, False, 8),
        (3, False, True, False, 64),
    ]
    catalog.add_traces([again])
    assert catalog.attempts(one.generation_key, asked)[problem.problem_id][3].broken
    counted = catalog.count_attempts(one.generation_key, asked, samples=4, max_tokens=16)
    assert sorted((c.n, c.broken) for c in counted) == [(1, True), (3, False)]


def test_a_trace_or_grade_without_its_parent_is_refused_and_nothing_of_the_batch_is_kept(catalog: Catalog) -> None:
    problem, run = make_problem(), make_run()
    trace = make_trace(problem, run)
    with pytest.raises(InputError, match="run_id"):
        catalog.add_traces([trace])
    catalog.add_run(run)
    with pytest.raises(InputError, match="problem_id"):
        catalog.add_traces([trace])
    catalog.add_problems([problem])
    stray = make_grade(make_trace(problem, run, 9))
    with pytest.raises(InputError, match="grades name a trace"):
        catalog.record([trace], [stray])
    assert only(catalog, "SELECT count(*) FROM traces") == 0
    assert only(catalog, "SELECT count(*) FROM trace_tokens") == 0


@pytest.mark.parametrize(
    "text",
    ["", "nul \0 inside", "quote ' \" ; DROP TABLE traces; --", "\ud83d\ude00 pair", "é" * 5, "a\r\nb\tc", "{}[]%$?1"],
)
def test_any_text_survives(catalog: Catalog, text: str) -> None:
    problem = make_problem(0, question=text, answer=text, metadata={"solution": text, text: [text]}, source_row=text)
    run = make_run(system_prompt=text, command=text)
    trace = make_trace(problem, run, text=text, response=text)
    catalog.add_problems([problem])
    catalog.add_run(run)
    catalog.record([trace], [make_grade(trace, detail=text, extracted=text)])
    row = catalog.trace(trace.trace_id)
    for column in ("question", "answer", "text", "response", "detail", "extracted"):
        assert row[column] == clean(text), column
    assert catalog.problem(problem.problem_id).metadata == {"solution": clean(text), clean(text): [clean(text)]}
    assert only(catalog, "SELECT count(*) FROM trace WHERE text = ?", text) == 1


def test_a_lone_surrogate_becomes_a_replacement_character(catalog: Catalog) -> None:
    problem, run = make_problem(0, question="a\ud800b"), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    trace = make_trace(problem, run, text="\udfff")
    catalog.record([trace], [make_grade(trace, extracted="x\udc00")])
    row = catalog.trace(trace.trace_id)
    assert (row["question"], row["text"], row["extracted"]) == ("a\ufffdb", "\ufffd", "x\ufffd")


def test_a_ten_megabyte_text_survives(catalog: Catalog) -> None:
    text = "0123456789" * 1_000_000
    problem, run = make_problem(0, question=text), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    trace = make_trace(problem, run, text=text)
    catalog.add_traces([trace])
    assert catalog.trace(trace.trace_id)["text"] == text


def test_json_takes_what_graders_produce() -> None:
    value = {"nan": math.nan, "inf": [math.inf], "set": {2, 1}, "tuple": (1, 2), "path": Path("x"), "s": "\ud800"}
    assert json.loads(dump_json(value)) == {
        "nan": None, "inf": [None], "set": [1, 2], "tuple": [1, 2], "path": "x", "s": "\ufffd"
    }  # fmt: skip


def test_a_problem_that_is_not_there_names_the_query_that_lists_them(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    with pytest.raises(InputError, match=r"no problem 'x'.*calset query 'SELECT problem_id FROM problem'"):
        catalog.problem("x")
    assert catalog.problem(str(only(catalog, "SELECT problem_id FROM problem"))).question


def test_documents_of_prunings_and_evaluations_come_back_in_order(catalog: Catalog) -> None:
    first, second = {"model": "a", "accuracy": 0.5}, {"model": "b", "sparsity": {"q_proj": 0.5}}
    catalog.add_evaluation(first)
    catalog.add_pruning(second)
    catalog.add_evaluation(second)
    assert [{k: e[k] for k in e if k not in ("evaluation_id", "created_at")} for e in catalog.evaluations()] == [
        first, second
    ]  # fmt: skip
    assert catalog.prunings()[0]["sparsity"] == {"q_proj": 0.5}


# -- views ----------------------------------------------------------------------------------------------------------


def test_pass_rate_counts_judged_traces_only(tmp_path: Path) -> None:
    plan = [
        [("correct", 10), ("incorrect", 20), ("no_answer", 30), ("truncated", 40), ("pred_unparsable", 50)],
        [("correct", 10), ("gold_unparsable", 10), ("timeout", 10), ("error", 10), ("ungraded", 10)],
        [("ungraded", 5), ("gold_unparsable", 6)],
        [],
    ]
    catalog = fill(tmp_path / "c.duckdb", plan)
    rows = catalog.query("SELECT k, n_correct, pass_rate, difficulty, n_traces FROM problem ORDER BY source_row").rows
    assert rows == [(5, 1, 0.2, 0.8, 5), (1, 1, 1.0, 0.0, 5), (0, 0, None, None, 2), (0, 0, None, None, 0)]
    by_verdict = dict(catalog.query("SELECT verdict, any_value(correct) FROM trace GROUP BY verdict").rows)
    assert by_verdict == {
        "correct": True, "incorrect": False, "no_answer": False, "truncated": False, "pred_unparsable": False,
        "gold_unparsable": None, "timeout": None, "error": None, "ungraded": None,
    }  # fmt: skip
    trace_rates = catalog.query("SELECT DISTINCT pass_rate, k FROM trace ORDER BY k").rows
    assert trace_rates == [(None, 0), (1.0, 1), (0.2, 5)]


def test_difficulty_of_one_in_five_is_inside_a_band_from_a_fifth(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 10)] * 4 + [("incorrect", 10)]])
    assert only(catalog, "SELECT count(*) FROM trace WHERE difficulty BETWEEN 0.2 AND 0.8") == 5


def test_problem_view_gives_length_quantiles_and_the_majority(catalog: Catalog) -> None:
    problem, run = make_problem(0, answer="5"), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    traces = [make_trace(problem, run, i, n) for i, n in enumerate([10, 20, 30, 40, 50, 60, 70, 80, 90, 100])]
    answers = ["7", "7", "7", "7", "7", "8", "8", "8", None, "9"]
    grades = [make_grade(t, "incorrect", extracted=a) for t, a in zip(traces, answers, strict=True)]
    catalog.record(traces, grades)
    sql = "SELECT n_tokens_p10, n_tokens_p50, n_tokens_p90, majority_answer, majority_n, majority_share FROM problem"
    assert catalog.query(sql).rows == [(10, 50, 90, "7", 5, 0.5)]
    assert only(catalog, "SELECT majority_answer FROM suspect_gold") == "7"


def test_a_tie_of_answers_goes_to_the_lesser_and_a_solved_problem_is_not_suspect(catalog: Catalog) -> None:
    problem, run = make_problem(), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    traces = [make_trace(problem, run, i) for i in range(4)]
    verdicts = ["incorrect", "incorrect", "correct", "incorrect"]
    answers = ["b", "a", "b", "a"]
    catalog.record(traces, [make_grade(t, v, extracted=a) for t, v, a in zip(traces, verdicts, answers, strict=True)])
    assert catalog.query("SELECT majority_answer, majority_share FROM problem").rows == [("a", 0.5)]
    assert catalog.query("FROM suspect_gold").rows == []


def test_models_revisions_and_evaluations_have_pass_rates_of_their_own(catalog: Catalog) -> None:
    problem = make_problem()
    catalog.add_problems([problem])
    runs = [make_run("a"), make_run("a", revision="r2"), make_run("b"), make_run("a", kind="evaluate")]
    for n_correct, run in enumerate(runs):
        catalog.add_run(run)
        traces = [make_trace(problem, run, i) for i in range(4)]
        catalog.record(
            traces, [make_grade(t, "correct" if i < n_correct else "incorrect") for i, t in enumerate(traces)]
        )
    sql = "SELECT DISTINCT model, model_revision, kind, pass_rate FROM trace ORDER BY pass_rate"
    assert catalog.query(sql).rows == [
        ("a", "r1", "build", 0.0), ("a", "r2", "build", 0.25), ("b", "r1", "build", 0.5), ("a", "r1", "evaluate", 0.75)
    ]  # fmt: skip


def test_the_newest_grade_counts_whatever_the_order_of_insertion(catalog: Catalog) -> None:
    problem, run = make_problem(), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    trace, other = make_trace(problem, run, 0), make_trace(problem, run, 1)
    catalog.add_traces([trace, other])
    catalog.add_grades([make_grade(trace, "incorrect", after=10), make_grade(other, "incorrect")])
    catalog.add_grades([make_grade(trace, "error", after=5)])
    assert catalog.trace(trace.trace_id)["verdict"] == "incorrect"
    catalog.add_grades([make_grade(trace, "correct", after=20), make_grade(trace, "no_answer", after=15)])
    row = catalog.trace(trace.trace_id)
    assert row["verdict"] == "correct"
    assert [g["verdict"] for g in row["grades"]] == ["error", "incorrect", "no_answer", "correct"]
    assert (row["k"], row["pass_rate"]) == (2, 0.5)
    # Among equal times the one added last counts.
    catalog.add_grades([make_grade(trace, "timeout", after=20)])
    assert catalog.trace(trace.trace_id)["verdict"] == "timeout"
    assert only(catalog, "SELECT count(*) FROM trace") == 2


def test_a_retry_supersedes_with_its_own_grade(catalog: Catalog) -> None:
    problem, run = make_problem(), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    first = make_trace(problem, run, 0, 8, finish_reason="length")
    catalog.record([first], [make_grade(first, "truncated")])
    retry = make_trace(problem, run, 0, 20, attempt=1, max_tokens=128)
    catalog.record([retry], [])
    assert catalog.query("SELECT attempt, verdict, n_tokens, k FROM trace").rows == [(1, "ungraded", 20, 0)]
    catalog.add_grades([make_grade(retry, "correct")])
    assert catalog.query("SELECT attempt, verdict, n_tokens, k, pass_rate FROM trace").rows == [
        (1, "correct", 20, 1, 1.0)
    ]
    assert len(catalog.load_traces([first.trace_id])[first.trace_id].completion_ids) == 20
    assert [g["verdict"] for g in catalog.trace(first.trace_id)["grades"]] == ["truncated", "correct"]


def test_a_trace_is_found_by_an_unambiguous_prefix_with_its_siblings(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 10), ("incorrect", 11), ("ungraded", 12)], [("correct", 9)]])
    wanted, n_tokens = catalog.query("SELECT trace_id, n_tokens FROM trace WHERE n_tokens = 11").rows[0]
    row = catalog.trace(wanted[:10])
    assert (row["trace_id"], len(row["completion_ids"]), n_tokens) == (wanted, 11, 11)
    assert sorted(s["n_tokens"] for s in row["siblings"]) == [10, 12]
    assert row["run"]["model"] == "tiny"
    for prefix, message in {"": "no trace", "zz": "no trace", "%": "no trace", "\ud800": "no trace"}.items():
        with pytest.raises(InputError, match=message):
            catalog.trace(prefix)


def test_an_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    # Of 17 ids, two begin with the same hex digit.
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 5)] * 17])
    prefix = only(catalog, "SELECT trace_id[1] FROM trace GROUP BY 1 HAVING count(*) > 1 LIMIT 1")
    with pytest.raises(InputError, match="several traces start with"):
        catalog.trace(str(prefix))


# -- queries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM traces",
        "INSERT INTO meta VALUES ('a', 'b')",
        "WITH x AS (INSERT INTO meta VALUES ('a', 'b') RETURNING *) SELECT * FROM x",
        "UPDATE grades SET verdict = 'correct'",
        "CREATE TEMP TABLE x AS SELECT 1",
        "DROP VIEW trace",
        "SET threads = 1",
        "SET enable_external_access = true",
        "ATTACH 'other.duckdb'",
        "COPY traces TO 'traces.csv'",
        "EXPORT DATABASE 'folder'",
        "LOAD json",
        "INSTALL httpfs",
        "CALL pragma_version()",
        "BEGIN",
        "CHECKPOINT",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE traces",
        "",
        " ; ",
        "-- nothing",
        "SELEC 1",
        "SELECT * FROM nowhere",
        "SELECT nope FROM trace",
        "SELECT 'open",
        "SELECT CAST('x' AS INTEGER)",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM secret_of_the_caller",
        "EXPLAIN ANALYZE COPY traces TO 'traces.csv'",
        "SELECT '\ud800",
    ],
)
def test_query_answers_only_single_selects_within_the_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    monkeypatch.chdir(tmp_path)
    secret_of_the_caller = duckdb.connect().sql("SELECT 42 AS x")  # noqa: F841 - must not be reachable by name
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    with pytest.raises(InputError) as caught:
        catalog.query(sql)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["c.duckdb"]
    assert only(catalog, "SELECT count(*) FROM trace WHERE verdict = 'correct'") == 1


def test_query_takes_parameters_never_text(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    assert catalog.query("SELECT count(*) FROM trace WHERE model = ?", ["' OR 1=1 --"]).rows == [(0,)]
    for sql in ("FROM problem", "SHOW TABLES", "DESCRIBE trace", "SUMMARIZE trace", "EXPLAIN SELECT 1", "VALUES (1)"):
        assert catalog.query(sql).columns


def test_query_says_types_limits_and_json_values(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3), ("correct", 4)]])
    result = catalog.query("SELECT trace_id, n_tokens FROM trace ORDER BY n_tokens", limit=1)
    assert (result.columns, result.types, len(result.rows)) == (["trace_id", "n_tokens"], ["VARCHAR", "INTEGER"], 1)
    assert result.truncated
    assert not catalog.query("FROM trace", limit=2).truncated
    sql = """
        SELECT TIMESTAMP '2026-01-02 03:04:05' AS t, 1.50::DECIMAL(4, 2) AS d, [1, NULL] AS l,
            {'a': DATE '2026-01-01'} AS s, 'nan'::DOUBLE AS f, MAP {'k': 1} AS m,
            170141183460469231731687303715884105727::HUGEINT AS h, '\\x00'::BLOB AS b
    """
    (row,) = catalog.query(sql).as_dicts()
    assert json.loads(json.dumps(row)) == {
        "t": "2026-01-02T03:04:05", "d": 1.5, "l": [1, None], "s": {"a": "2026-01-01"}, "f": None,
        "h": 2**127 - 1, "b": "AA==", "m": {"k": 1},
    }  # fmt: skip
    assert jsonable({1: {2, 3}}) == {"1": [2, 3]}


def test_python_users_get_a_relation_on_a_connection_of_their_own(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3), ("incorrect", 4)]])
    with catalog.connect() as con:
        assert con.sql("FROM trace").filter("correct").aggregate("count(*)").fetchall() == [(1,)]
        assert catalog.path.exists()
        with pytest.raises(CatalogError, match="close that connection first"):
            catalog.add_problems([make_problem(99)])
    assert catalog.add_problems([make_problem(99)]) == 1


def test_own_reads_work_inside_a_connection_of_the_users(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3), ("incorrect", 4)]])
    trace_id = str(only(catalog, "SELECT min(trace_id) FROM trace"))
    (tmp_path / "lengths.csv").write_text("n\n3\n")
    subset = select(catalog, "kept", "rac")
    with catalog.connect() as con:
        con.execute("SET threads = 1")
        assert stats(catalog).traces == 2
        assert catalog.trace(trace_id[:10])["trace_id"] == trace_id
        assert catalog.attempts(make_run().generation_key, [make_problem().problem_id])
        assert [run.model for run in catalog.runs()] == ["tiny"]
        assert load(catalog, "kept").content_hash == subset.content_hash
        assert diff(catalog, "kept", subset).same
        assert export(catalog, "kept", tmp_path / "out").is_dir()
        # The user's connection is still open, and still may do what it could.
        assert con.sql(f"FROM '{tmp_path / 'lengths.csv'}' JOIN trace ON n = n_tokens").fetchall()
    assert only(catalog, "SELECT count(*) FROM trace") == 2


def test_what_would_write_or_lose_its_walls_inside_a_connection_says_to_close_it(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    with catalog.connect() as con:
        for use in (
            lambda: catalog.query("SELECT * FROM read_text('/etc/passwd')"),
            lambda: select(catalog, "x", "rac", where="n_tokens > 0"),
            lambda: catalog.add_run(make_run("b")),
        ):
            with pytest.raises(CatalogError, match=r"this thread still has .*close that connection first"):
                use()
        assert con.sql("FROM trace").fetchall()
    assert catalog.query("SELECT 1").rows == [(1,)]


def test_own_reads_of_other_threads_need_not_wait_for_a_connection_to_close(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    found: list[int] = []
    with catalog.connect():
        thread = threading.Thread(target=lambda: found.append(stats(catalog.path).traces))
        thread.start()
        thread.join(10)
        assert found == [1]


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_default_path_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALSET_CATALOG", str(tmp_path / "env.duckdb"))
    assert Catalog().path == tmp_path / "env.duckdb"
    monkeypatch.delenv("CALSET_CATALOG")
    assert Catalog().path == Path("calset.duckdb")


@pytest.mark.parametrize("name", [":memory:", "md:x.duckdb", "c d'.duckdb"])
def test_a_relative_path_is_a_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path(name), [[("correct", 3)]])
    assert os.listdir(tmp_path) == [name]
    assert only(Catalog(name), "SELECT count(*) FROM trace") == 1
    assert stats(tmp_path / name).traces == 1


@pytest.mark.parametrize("length", [250, 300])
def test_a_file_name_that_is_too_long_is_one_clear_line(tmp_path: Path, length: int) -> None:
    catalog = Catalog(tmp_path / ("x" * length))
    with pytest.raises(InputError, match="too long for a file name") as caught:
        catalog.add_run(make_run())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no catalog"):
        catalog.query("SELECT 1")
    assert not catalog.exists()
    assert os.listdir(tmp_path) == []


def test_files_open_in_duckdb_1_5(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    with catalog.connect() as con:
        tags = con.execute("SELECT tags FROM duckdb_databases() WHERE NOT internal").fetchall()
    assert tags[0][0]["storage_version"].startswith("v1.5.0")


def test_what_is_not_a_catalog_is_named_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database\n" * 1000)
    (tmp_path / "empty.duckdb").touch()
    with duckdb.connect(str(tmp_path / "other.duckdb")) as con:
        con.execute("CREATE TABLE mine AS SELECT 1 AS x")
    cases = {
        "notes.txt": "not a DuckDB file",
        "empty.duckdb": "not a DuckDB file",
        "other.duckdb": "not a calset catalog",
        ".": "is a folder",
        "no/such/folder/c.duckdb": "does not exist",
    }
    for name, message in cases.items():
        catalog = Catalog(tmp_path / name)
        with pytest.raises(InputError, match=message) as reading:
            catalog.query("SELECT 1")
        with pytest.raises(InputError, match=message) as writing:
            catalog.add_run(make_run())
        assert "\n" not in f"{reading.value}{writing.value}"
    with pytest.raises(InputError, match="there is no catalog"):
        Catalog(tmp_path / "missing.duckdb").query("SELECT 1")
    assert text.read_text() == "not a database\n" * 1000
    assert sorted(os.listdir(tmp_path)) == ["empty.duckdb", "notes.txt", "other.duckdb"]


def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    newer = migrations.SCHEMA_VERSION + 1
    with duckdb.connect(str(catalog.path)) as con:
        con.execute("INSERT INTO migrations VALUES (?, 'later', ?, '9.9.9', '3.0')", [newer, START])
    for use in (lambda: catalog.query("FROM trace"), lambda: catalog.add_run(make_run("b"))):
        with pytest.raises(SchemaTooNew, match=rf"schema {newer}.*9\.9\.9.*schema {migrations.SCHEMA_VERSION}"):
            use()


def test_an_interrupted_first_migration_is_carried_on(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    duckdb.connect(str(path)).close()
    Catalog(path).add_run(make_run())
    assert Catalog(path).query("SELECT number, name FROM migrations").rows == [
        (m.number, m.name) for m in migrations.MIGRATIONS
    ]


def test_an_older_catalog_is_upgraded_by_a_reader_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 3)]])
    n = migrations.SCHEMA_VERSION + 1
    later = migrations.Migration(n, "second", lambda con: con.execute("CREATE TABLE added (x INTEGER)") and None)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, later))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", n)
    assert catalog.query("SELECT count(*) FROM added").rows == [(0,)]
    assert catalog.query("SELECT name FROM migrations ORDER BY number DESC LIMIT 1").rows == [("second",)]


def test_a_migration_reaches_new_files_and_old_ones_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fill(tmp_path / "old.duckdb", [[("correct", 3)]])
    n = migrations.SCHEMA_VERSION
    note = 'ALTER TABLE "prunings" ADD COLUMN "note" VARCHAR'
    later = (
        migrations.Migration(n + 1, "notes", lambda con: con.execute(note)),
        migrations.Migration(n + 2, "view_only"),
    )
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, *later))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", n + 2)
    monkeypatch.setattr(
        schema, "TABLES", {**schema.TABLES, "prunings": {**schema.TABLES["prunings"], "note": "VARCHAR"}}
    )
    # A view that names the new column: it can only be made once the table has it.
    view = "SELECT *, (SELECT max(note) FROM prunings) AS note FROM problem WHERE pass_rate = 0"
    monkeypatch.setattr(schema, "VIEWS", {**schema.VIEWS, "suspect_gold": view})
    new = fill(tmp_path / "new.duckdb", [[("correct", 3)]])
    for catalog in (old, new):
        assert catalog.query("DESCRIBE prunings").rows[-1][:2] == ("note", "VARCHAR")
        assert catalog.query("FROM suspect_gold").columns[-1] == "note"
        assert catalog.query("SELECT number, name FROM migrations ORDER BY number").rows == [
            (m.number, m.name) for m in migrations.MIGRATIONS
        ]
        assert only(catalog, "SELECT count(*) FROM trace") == 1


def test_a_changed_schema_comes_with_a_migration() -> None:
    # This fails when a table or view was edited: add a migration (see MIGRATIONS), then put the new digest here. An
    # edit that never left this machine needs only the digest.
    tables = {name: list(columns.items()) for name, columns in schema.TABLES.items()}
    views = {name: " ".join(sql.split()) for name, sql in schema.VIEWS.items()}
    assert (migrations.SCHEMA_VERSION, ids.digest(tables, views)) == (4, "218d73743ea9448832b82040")


def _as_nobody(path: str, results: multiprocessing.Queue) -> None:
    os.setuid(65534)
    catalog = Catalog(path)
    for use in (lambda: catalog.add_run(make_run("b")), lambda: catalog.query("SELECT count(*) FROM runs").rows):
        try:
            results.put(repr(use()))
        except Exception as error:
            results.put(f"{type(error).__name__}: {error}")


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes nobody here; others are stopped by chmod below")
@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_folder_is_one_clear_line(exists: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to nobody
        path = Path(folder) / "c.duckdb"
        if exists:
            Catalog(path).add_run(make_run())
            path.chmod(0o444)
        os.chmod(folder, 0o555)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        process = context.Process(target=_as_nobody, args=(str(path), results))
        process.start()
        written, read = results.get(timeout=30), results.get(timeout=30)
        process.join()
        assert written.startswith("InputError: ")
        assert "permission" in written
        assert str(path) in written
        assert read == "[(1,)]" if exists else "there is no catalog" in read
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == (["c.duckdb"] if exists else [])


def _with_little_room(path: str, results: multiprocessing.Queue) -> None:
    # A file size limit stands in for a full disk: both fail in the middle of a write.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    catalog, problem, run = Catalog(path), make_problem(), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    kept = 0
    try:
        for i in range(400):
            text = os.urandom(100_000).hex()
            kept += catalog.add_traces([make_trace(problem, run, i, text=text)])
    except Exception as error:
        results.put((kept, f"{type(error).__name__}: {error}"))


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_with_little_room, args=(str(path), results))
    process.start()
    kept, message = results.get(timeout=60)
    process.join()
    assert message.startswith("CatalogError: no space left for ")
    assert "\n" not in message
    assert kept > 0
    assert only(Catalog(path), "SELECT count(*) FROM trace") == kept
    assert Catalog(path).add_run(make_run("after")) == 1


# -- processes and threads ------------------------------------------------------------------------------------------

WRITER = """
    import sys
    from factories import make_grade, make_problem, make_run, make_trace
    from calset.catalog.catalog import Catalog

    catalog, start, n = Catalog(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    problem, run = make_problem(), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    for i in range(start, start + n):
        traces = [make_trace(problem, run, i * 4 + j, 50) for j in range(4)]
        catalog.record(traces, [make_grade(t) for t in traces])
        print(i, flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.nightly)])
def test_kill_9_loses_nothing_that_was_acknowledged_and_halves_nothing(tmp_path: Path, kills: int) -> None:
    path = tmp_path / "c.duckdb"
    acknowledged = 0
    for attempt in range(kills):
        process = python(WRITER, path, acknowledged, 10_000)
        assert process.stdout is not None
        for _ in range(3 + attempt):
            acknowledged = max(acknowledged, int(process.stdout.readline()) + 1)
        time.sleep(0.01 * attempt)
        process.send_signal(signal.SIGKILL)
        # What it had printed before it died was acknowledged as well.
        rest = process.communicate()[0].split()
        acknowledged = max([acknowledged, *(int(line) + 1 for line in rest)])
        n = only(Catalog(path), "SELECT count(*) FROM trace WHERE verdict = 'correct'")
        assert isinstance(n, int)
        assert n >= 4 * acknowledged
        assert n % 4 == 0
        assert only(Catalog(path), "SELECT count(*) FROM trace_tokens") == n


@pytest.mark.parametrize("batches", [8, pytest.param(40, marks=pytest.mark.nightly)])
def test_readers_in_another_process_see_whole_batches_while_a_build_writes(tmp_path: Path, batches: int) -> None:
    path = tmp_path / "c.duckdb"
    fill(path, [[("correct", 5)] * 4])
    process = python(WRITER, path, 1, batches)
    counts = []
    while process.poll() is None:
        catalog = Catalog(path)
        counts.append(only(catalog, "SELECT count(*) FROM trace"))
        time.sleep(0.005)
    assert process.wait() == 0, process.communicate()
    assert all(n % 4 == 0 for n in counts)
    assert counts == sorted(counts)
    assert only(Catalog(path), "SELECT count(*) FROM trace") == 4 + 4 * batches


@pytest.mark.parametrize("shared", [2, pytest.param(6, marks=pytest.mark.nightly)])
def test_two_writers_at_once_lose_no_rows_and_double_none(tmp_path: Path, shared: int) -> None:
    path = tmp_path / "c.duckdb"
    processes = [python(WRITER, path, start, 2 * shared) for start in (0, shared)]
    for process in processes:
        assert process.wait() == 0, process.communicate()
    n = 4 * 3 * shared  # each of the writers has half of its batches from the other
    assert only(Catalog(path), "SELECT count(*) FROM trace") == n
    assert only(Catalog(path), "SELECT count(DISTINCT trace_id) FROM traces") == n
    assert only(Catalog(path), "SELECT count(*) FROM grades") == n


HOLDER = """
    import sys, time, duckdb
    con = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "True")
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("read_only", [False, True])
def test_a_lock_that_stays_names_its_holder_and_the_remedy(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "c.duckdb"
    fill(path, [[("correct", 5)]])
    process = python(HOLDER, path, read_only)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        catalog = Catalog(path, lock_timeout=0.4)
        with pytest.raises(CatalogLocked, match=rf"process {process.pid} .*kill {process.pid}") as caught:
            catalog.add_run(make_run("b"))
        assert "\n" not in str(caught.value)
        if read_only:
            assert only(catalog, "SELECT count(*) FROM trace") == 1
        else:
            with pytest.raises(CatalogLocked):
                catalog.query("FROM trace")
    finally:
        process.kill()
        process.communicate()
    assert catalog.add_run(make_run("b")) == 1


@pytest.mark.parametrize(("n_threads", "each"), [(3, 2), pytest.param(6, 5, marks=pytest.mark.nightly)])
def test_threads_of_one_process_share_a_catalog_without_wrong_rows(tmp_path: Path, n_threads: int, each: int) -> None:
    path = tmp_path / "c.duckdb"
    problem, run = make_problem(), make_run()
    Catalog(path).add_problems([problem])
    Catalog(path).add_run(run)
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            catalog = Catalog(path)
            for i in range(start, start + each):
                trace = make_trace(problem, run, i)
                catalog.record([trace], [make_grade(trace)])
                assert only(catalog, "SELECT sample_index FROM trace WHERE trace_id = ?", trace.trace_id) == i
                with catalog.connect() as con:
                    assert con.execute("SELECT ?", [i]).fetchall() == [(i,)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert only(Catalog(path), "SELECT count(*) FROM trace") == n_threads * each


def test_a_thread_that_keeps_the_catalog_open_is_reported_after_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    fill(path, [[("correct", 5)]])
    done, opened = threading.Event(), threading.Event()

    def hold() -> None:
        with Catalog(path).connect():
            opened.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait(20)
    try:
        with pytest.raises(CatalogLocked, match="another thread"):
            Catalog(path, lock_timeout=0.2).add_run(make_run("b"))
    finally:
        done.set()
        thread.join()
    assert Catalog(path).add_run(make_run("b")) == 1


def test_only_lock_errors_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.duckdb").write_text("x" * 10_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(InputError):
        Catalog(tmp_path / "c.duckdb", lock_timeout=30).query("SELECT 1")
    error = duckdb.IOException("IO Error: Something else\nwith a second line")
    assert str(connection.translate(error, Path("x.duckdb"))) == "x.duckdb: IO Error: Something else"


# -- stats ----------------------------------------------------------------------------------------------------------


def test_stats_count_by_hand(tmp_path: Path) -> None:
    plan = [
        [("correct", 10), ("correct", 20), ("incorrect", 30), ("truncated", 40)],  # difficulty 0.5
        [("correct", 10), ("correct", 10)],  # 0
        [("incorrect", 40), ("no_answer", 40)],  # 1
        [("ungraded", 15)],
    ]
    catalog = fill(tmp_path / "c.duckdb", plan)
    result = stats(catalog)
    assert (result.problems, result.traces, result.graded, result.judged, result.correct) == (4, 9, 8, 8, 4)
    assert (result.tokens, result.prompt_tokens, result.pass_rate) == (215, 27, 0.5)
    assert result.by_verdict == {"correct": 4, "incorrect": 2, "no_answer": 1, "truncated": 1, "ungraded": 1}
    assert result.by_finish_reason == {"stop": 8, "length": 1}
    assert result.length_bands == ("10..10", "11..20", "21..40")
    cells = {(c.difficulty, c.length): (c.traces, c.correct) for c in result.difficulty_length}
    assert cells == {
        ("0", "10..10"): (2, 2), ("(0.4, 0.6]", "10..10"): (1, 1), ("(0.4, 0.6]", "11..20"): (1, 1),
        ("(0.4, 0.6]", "21..40"): (2, 0), ("1", "21..40"): (2, 0), ("unknown", "11..20"): (1, 0),
    }  # fmt: skip
    assert result.by_model[0]["model"] == "tiny"
    assert json.loads(json.dumps(result.as_dict()))["traces"] == 9
    assert all(len(row) == len(columns) for _, columns, rows in result.tables() for row in rows)


def test_stats_leave_out_evaluations_and_filter(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    fill(path, [[("correct", 10)]], model="a", source="x")
    fill(path, [[("incorrect", 10)]] * 2, model="b", source="y")
    fill(path, [[("incorrect", 10)]], model="b", kind="evaluate", source="y")
    assert stats(path).traces == 3
    assert stats(path, model="a").pass_rate == 1.0
    assert stats(path, source="y").problems == 2
    with pytest.raises(InputError, match=r"no model 'c'.*a, b"):
        stats(path, model="c")
    with pytest.raises(InputError, match="no source"):
        stats(path, source="z")


def test_stats_of_an_empty_catalog_are_zeros(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c.duckdb")
    catalog.add_run(make_run())
    result = stats(catalog)
    assert (result.traces, result.pass_rate, result.difficulty_length) == (0, None, [])
    assert result.tables()


def test_a_verdict_on_another_builds_completion_does_not_reach_the_stored_trace(catalog: Catalog) -> None:
    """Two builds of the same traces at once: the first to commit wins with its verdict, the other's is dropped."""
    problem, run = make_problem(), make_run()
    catalog.add_problems([problem])
    catalog.add_run(run)
    first = make_trace(problem, run, finish_reason="length")
    second = replace(first, completion_ids=[7, 8, 9], finish_reason="stop")
    assert catalog.record([first], [make_grade(first, "truncated")]).fresh == {(first.trace_id, 0)}
    assert catalog.record([second], [make_grade(second, "correct")]).fresh == frozenset()
    assert catalog.query("SELECT verdict, finish_reason FROM trace").rows == [("truncated", "length")]
    assert only(catalog, "SELECT count(*) FROM grades") == 1

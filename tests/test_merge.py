"""Merging catalogs: shards make the whole, twice is once, what differs stays as it is here, a kill halves nothing."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import fewer
from factories import START, fill, make_grade, make_problem, make_run, make_source, make_trace
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processes import holding, python

from calset.catalog.catalog import Catalog
from calset.catalog.maintenance import merge as merge_module
from calset.catalog.maintenance.merge import KEYS, OWN_TABLES, PARENTS, PARTS, merge
from calset.catalog.records import Decision, Grade, Judgement, Trace
from calset.catalog.select import select
from calset.catalog.store import migrations, schema
from calset.catalog.subsets.versions import load
from calset.errors import CatalogLocked, InputError, SchemaTooNew

ROOT = Path(__file__).parent.parent


def content(catalog: Catalog | Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every table's rows in a fixed order, without a grade's place and what a trace repeats of its first grade: these
    follow the order of merges."""
    path = catalog.path if isinstance(catalog, Catalog) else catalog
    found = {}
    with Catalog(path).connect() as con:
        for table in schema.TABLES:
            if table not in OWN_TABLES:
                columns = ", ".join(f'"{c}"' for c in schema.TABLES[table] if c != "seq" and not c.startswith("first_"))
                found[table] = sorted(con.execute(f"SELECT {columns} FROM {table}").fetchall(), key=repr)
    return found


def write(path: Path, traces: list[Trace], grades: list[Grade]) -> Catalog:
    """A shard: some traces of 4 problems and 2 runs, with what they need."""
    catalog = Catalog(path)
    catalog.add_source(make_source())
    catalog.add_problems([p for p in PROBLEMS if any(t.problem_id == p.problem_id for t in traces)])
    for run in RUNS:
        if any(t.run_id == run.run_id for t in traces):
            catalog.add_run(run)
    catalog.record(traces, grades)
    return catalog


PROBLEMS = [make_problem(n) for n in range(4)]
RUNS = [make_run("one"), make_run("two")]
TRACES = [
    make_trace(problem, run, i, 3 + i, attempt=attempt)
    for problem in PROBLEMS
    for run in RUNS
    for i in range(2)
    for attempt in (0, 1)
]
GRADES = [
    make_grade(trace, verdict, after=after, grader=grader)
    for trace in TRACES
    for verdict, after, grader in (("correct", 0, "math"), ("incorrect", 1, "math"), ("correct", 2, "exact"))
]


# -- what is brought ------------------------------------------------------------------------------------------------


def check_shards(places: list[tuple[int, int]]) -> None:
    # Bit i of the first number: shard i holds the trace; of the second: its grades (without the trace they cannot).
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, graded = [], set()
        for shard in range(3):
            traces = [t for t, (held, _) in zip(TRACES, places, strict=True) if held >> shard & 1]
            judged = {
                (t.trace_id, t.attempt)
                for t, (held, judged) in zip(TRACES, places, strict=True)
                if held & judged & 1 << shard
            }
            grades = [g for i, g in enumerate(GRADES) if (g.trace_id, g.attempt) in judged and (i + shard) % 3]
            graded.update(grades)
            shards.append(write(folder / f"{shard}.duckdb", traces, grades))
        whole = write(folder / "whole.duckdb", TRACES, [g for g in GRADES if g in graded])
        merged = [Catalog(folder / f"{order[0]}-first.duckdb") for order in ((0, 1, 2), (2, 1, 0))]
        for target, order in zip(merged, ((0, 1, 2), (2, 1, 0)), strict=True):
            reports = [merge(target, shards[i]) for i in order]
            assert not any(r.warnings for r in reports)
            assert content(target) == content(whole)
            assert target.query("FROM trace ORDER BY ALL").rows == whole.query("FROM trace ORDER BY ALL").rows
        again = merge(merged[0], merged[1])
        assert again.n_added == 0
        assert content(merged[0]) == content(whole)


def test_shards_in_any_order_make_the_whole_and_again_add_nothing() -> None:
    chance = random.Random(1)
    check_shards([(chance.randint(1, 7), chance.randint(0, 7)) for _ in TRACES])


# Without shrinking: an example writes seven files.
@pytest.mark.slow
@settings(fewer(20), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=len(TRACES), max_size=len(TRACES)))
def test_any_shards_make_the_whole(places: list[tuple[int, int]]) -> None:
    check_shards(places)


def test_every_table_and_column_is_brought(tmp_path: Path) -> None:
    one = {
        "VARCHAR": "'x'", "INTEGER": "1", "BIGINT": "2", "DOUBLE": "0.5", "JSON": """'{"a": 1}'""", "BOOLEAN": "true",
        "TIMESTAMP": "TIMESTAMP '2026-01-01'", "INTEGER[]": "[1, 2]",
    }  # fmt: skip
    other, target = Catalog(tmp_path / "other.duckdb"), Catalog(tmp_path / "target.duckdb")
    with other.transaction() as con:
        for table, columns in schema.TABLES.items():
            if table not in OWN_TABLES:
                names = ", ".join(f'"{name}"' for name in columns)
                con.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join(one[k] for k in columns.values())})")
    report = merge(target, other)
    assert set(report.added.values()) == {1}
    assert content(target) == content(other)
    assert merge(target, other).n_added == 0


def test_the_schema_and_the_keys_name_each_other() -> None:
    for table, key in KEYS.items():
        assert set(key) <= set(schema.TABLES[table]), table
    for child, parent in (PARENTS | PARTS).items():
        assert set(KEYS[parent]) <= set(schema.TABLES[child]), child


def test_a_shared_trace_gets_the_grades_it_lacks_with_their_place_in_its_history(tmp_path: Path) -> None:
    problem, run = PROBLEMS[0], RUNS[0]
    trace = make_trace(problem, run)
    here = write(tmp_path / "here.duckdb", [trace], [make_grade(trace, "incorrect", after=5)])
    there = write(
        tmp_path / "there.duckdb",
        [trace],
        [make_grade(trace, "no_answer", after=1), make_grade(trace, "incorrect", after=5)],
    )
    there.add_grades([make_grade(trace, "correct", after=9)])
    assert merge(here, there).added["grades"] == 2
    rows = here.query("SELECT verdict, seq FROM grades ORDER BY seq").rows
    assert rows == [("incorrect", 0), ("no_answer", 1), ("correct", 2)]
    assert here.query("SELECT verdict FROM trace").rows == [("correct",)]


def test_a_grade_of_a_trace_that_has_none_here_is_seen(tmp_path: Path) -> None:
    trace = TRACES[0]
    here = write(tmp_path / "here.duckdb", [trace], [])
    merge(here, write(tmp_path / "there.duckdb", [trace], [make_grade(trace, "correct")]))
    assert here.query("SELECT verdict, correct, pass_rate FROM trace").rows == [("correct", True, 1.0)]
    here.add_grades([make_grade(trace, "incorrect", after=1)])
    assert here.query("SELECT verdict, count(*) OVER () FROM trace").rows == [("incorrect", 1)]


def test_judgements_decisions_and_documents_come_once(tmp_path: Path) -> None:
    here, there = (fill(tmp_path / f"{name}.duckdb", [[("correct", 3)]]) for name in ("here", "there"))
    ((trace_id,),) = there.query("SELECT trace_id FROM trace").rows
    judgement = Judgement(trace_id, 0, "j", "1", "p", "e", "1", "correct", "0", "raw", judged_at=START)
    there.add_judgements([judgement])
    decision = Decision("r", "k", make_problem().problem_id, "stop", "why", 4, 0, 8, None, 0.95, "ssgr", START)
    there.record((), (), decisions=[decision, decision])
    there.add_pruning({"model": "m"})
    there.add_evaluation({"accuracy": 0.5})
    report = merge(here, there)
    expected = {"judgements": 1, "decisions": 1, "prunings": 1, "evaluations": 1}
    assert {t: n for t, n in report.added.items() if n} == expected
    assert merge(here, there).n_added == 0
    assert here.query("SELECT judge_verdict FROM judgement").rows == [("correct",)]


# -- what differs ---------------------------------------------------------------------------------------------------


def test_a_trace_with_other_tokens_stays_as_it_is_here_and_their_grades_stay_there(tmp_path: Path) -> None:
    mine = make_trace(PROBLEMS[0], RUNS[0], completion_ids=(7, 8), text="mine")
    theirs = make_trace(PROBLEMS[0], RUNS[0], completion_ids=(7, 9), text="theirs")
    retry = make_trace(PROBLEMS[0], RUNS[0], 1, attempt=1)
    here = write(tmp_path / "here.duckdb", [mine], [make_grade(mine, "incorrect")])
    there = write(
        tmp_path / "there.duckdb", [theirs, retry], [make_grade(theirs, "correct", after=9), make_grade(retry)]
    )
    report = merge(here, there)
    assert (report.n_trace_conflicts, report.trace_conflicts) == (1, (mine.trace_id,))
    assert mine.trace_id in report.warnings[0]
    rows = here.query("SELECT text, verdict FROM trace ORDER BY sample_index").rows
    assert rows == [("mine", "incorrect"), (retry.text, "correct")]
    assert tuple(here.tokens([(mine.trace_id, 0)])[mine.trace_id, 0][1]) == (7, 8)
    assert merge(here, there).n_added == 0


def test_a_subset_of_the_same_name_and_another_content_is_left_out_and_named(tmp_path: Path) -> None:
    here = fill(tmp_path / "here.duckdb", [[("correct", 5)]])
    there = fill(tmp_path / "there.duckdb", [[("correct", 5)], [("correct", 6)], [("correct", 7)]])
    mine, theirs = select(here, "math", "rac"), select(there, "math", "rac")
    second = select(there, "math", "rac", samples=2)
    with there.transaction() as con:
        con.execute(
            "INSERT INTO publications (name, version, repo) VALUES ('math', 1, 'theirs'), ('math', 2, 'theirs')"
        )
    report = merge(here, there)
    (conflict,) = report.subset_conflicts
    assert (conflict.ref, conflict.here, conflict.there) == ("math@1", mine.content_hash, theirs.content_hash)
    assert "math@1" in report.warnings[0]
    assert load(here, "math@1").content_hash == mine.content_hash
    assert load(here, "math@2").content_hash == second.content_hash
    assert here.query("SELECT version FROM publications").rows == [(2,)]
    assert merge(here, there).n_added == 0


@pytest.mark.slow
def test_the_same_content_selected_on_both_sides_is_no_conflict(tmp_path: Path) -> None:
    here, there = (fill(tmp_path / f"{name}.duckdb", [[("correct", 5)]]) for name in ("here", "there"))
    assert select(here, "math", "rac").content_hash == select(there, "math", "rac").content_hash
    report = merge(here, there)
    assert (report.n_added, report.warnings) == (0, ())


# -- what is refused ------------------------------------------------------------------------------------------------


def _damage(sql: str):
    def make(path: Path) -> None:
        with fill(path, [[("correct", 5)]]).transaction() as con:
            con.execute(sql)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no catalog at"),
        (lambda path: path.mkdir(), "there is no catalog at"),
        (lambda path: path.write_text("no database" * 1000), "not a DuckDB file"),
        (lambda path: duckdb.connect(str(path)).close(), "is an empty database"),
        (lambda path: duckdb.connect(str(path)).execute("CREATE TABLE t (a INT)"), "not a calset catalog"),
        (_damage("DELETE FROM trace_tokens"), "traces without token ids.*calset doctor --catalog"),
        (_damage("DELETE FROM problems"), "1 traces whose problem_id neither file holds"),
        (_damage("INSERT INTO traces FROM traces"), "holds 1 rows of traces twice"),
    ],
)  # fmt: skip
def test_what_is_no_whole_catalog_is_refused_and_nothing_is_added(tmp_path: Path, make: Any, words: str) -> None:
    other, target = tmp_path / "other.duckdb", fill(tmp_path / "target.duckdb", [])
    make(other)
    before = content(target)
    with pytest.raises(InputError, match=words):
        merge(target, other)
    assert content(target) == before


def test_a_missing_other_leaves_no_new_catalog(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no catalog at"):
        merge(tmp_path / "new.duckdb", tmp_path / "typo.duckdb")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("link", [None, os.symlink, pytest.param(os.link, marks=pytest.mark.slow)])
def test_the_catalog_itself_is_refused(tmp_path: Path, link: Any) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 5)]])
    other = catalog.path if link is None else tmp_path / "same.duckdb"
    if link is not None:
        link(catalog.path, other)
    with pytest.raises(InputError, match=r"is the catalog .* itself"):
        merge(catalog, other)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    there = fill(tmp_path / "there.duckdb", [[("correct", 5)]])
    with there.transaction() as con:
        con.execute("INSERT INTO migrations VALUES (99, 'later', ?, '9.9.9', '3.0')", [START])
    with pytest.raises(SchemaTooNew, match="upgrade"):
        merge(tmp_path / "here.duckdb", there)


def test_an_older_schema_is_read_from_an_upgraded_copy_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = fill(tmp_path / "there.duckdb", [[("correct", 3), ("incorrect", 4)]])
    bytes_before, was = there.path.read_bytes(), migrations.SCHEMA_VERSION
    for name, value in later_schema().items():
        monkeypatch.setattr(*name, value)
    here = fill(tmp_path / "here.duckdb", [[("correct", 3)]])
    there_of_old = merge(here, there)
    assert (there_of_old.upgraded_from, there_of_old.added["traces"]) == (was, 1)
    assert there.path.read_bytes() == bytes_before
    assert sorted(os.listdir(tmp_path)) == ["here.duckdb", "there.duckdb"]
    assert merge(here, there).n_added == 0


def later_schema() -> dict[tuple[Any, str], Any]:
    """What a calset with one more migration, that adds a column, has in its modules."""
    n = migrations.SCHEMA_VERSION + 1
    note = 'ALTER TABLE "prunings" ADD COLUMN "note" VARCHAR'
    tables = {**schema.TABLES, "prunings": {**schema.TABLES["prunings"], "note": "VARCHAR"}}
    return {
        (migrations, "MIGRATIONS"): (
            *migrations.MIGRATIONS,
            migrations.Migration(n, "notes", lambda c: c.execute(note)),
        ),
        (migrations, "SCHEMA_VERSION"): n,
        (schema, "TABLES"): tables,
        (merge_module, "TABLES"): tables,
    }


# -- other processes ------------------------------------------------------------------------------------------------


def test_what_waits_in_the_others_write_ahead_log_comes_too_and_stays_there(tmp_path: Path) -> None:
    code = """
        import os, sys
        from factories import *
        catalog = fill(sys.argv[1], [[("correct", 3)]])
        with catalog.transaction() as con:
            con.execute("INSERT INTO prunings VALUES ('p', now()::TIMESTAMP, '{}')")
            con.execute("COMMIT")
            os._exit(9)
    """
    there, wal = tmp_path / "there.duckdb", tmp_path / "there.duckdb.wal"
    assert python(code, there).wait() == 9
    before = wal.read_bytes()
    report = merge(tmp_path / "here.duckdb", there)
    assert (report.added["prunings"], report.added["traces"]) == (1, 1)
    assert wal.read_bytes() == before


def test_a_locked_other_names_its_holder(tmp_path: Path) -> None:
    there = fill(tmp_path / "there.duckdb", [[("correct", 3)]])
    with holding(there.path) as holder:
        with pytest.raises(CatalogLocked, match=rf"there\.duckdb is locked by process {holder.pid}"):
            merge(Catalog(tmp_path / "here.duckdb", lock_timeout=0.3), there)
        assert not (tmp_path / "here.duckdb").exists()


MERGE = """
    import sys
    from calset.catalog.maintenance.merge import merge
    said = lambda event: print(event.phase, flush=True)
    print("added", merge(sys.argv[1], sys.argv[2], progress=said).n_added, flush=True)
"""


def big(path: Path, first: int, n: int, n_tokens: int = 200) -> Catalog:
    """A catalog of ``n`` traces, large enough that a merge of it takes a second."""
    problems, run = [make_problem(i) for i in range(first, first + n // 8)], make_run()
    traces = [make_trace(p, run, i, n_tokens, text="x" * 500) for p in problems for i in range(8)]
    catalog = Catalog(path)
    catalog.add_source(make_source())
    catalog.add_problems(problems)
    catalog.add_run(run)
    catalog.record(traces, [make_grade(trace) for trace in traces])
    return catalog


def test_a_full_disk_is_one_clear_line_and_adds_nothing(tmp_path: Path) -> None:
    target, other = fill(tmp_path / "target.duckdb", [[("correct", 3)]]), tmp_path / "other.duckdb"
    noise = [make_trace(PROBLEMS[0], RUNS[0], i, text=random.Random(i).randbytes(100_000).hex()) for i in range(50)]
    write(other, noise, [])
    before = content(target)
    code = """
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from calset.catalog.maintenance.merge import merge
        room = int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # fails in the middle of a write, as a full disk does
        try:
            merge(sys.argv[1], sys.argv[2])
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    """
    process = python(code, target.path, other, target.path.stat().st_size + 1_000_000)
    said, errors = process.communicate(timeout=60)
    assert said.startswith("CatalogError: no space left for "), said + errors
    assert len(said.splitlines()) == 1
    assert content(target) == before
    assert merge(target, other).added["traces"] == 50


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_merge_killed_at_any_moment_leaves_the_catalog_as_it_was_and_again_finishes_it(tmp_path: Path) -> None:
    chance = random.Random(4)
    start, other = big(tmp_path / "start.duckdb", 0, 800), big(tmp_path / "other.duckdb", 50, 16_000)
    select(other, "math", "rac", samples=50)
    before = content(start)
    whole = tmp_path / "whole.duckdb"
    whole.write_bytes(start.path.read_bytes())
    began = time.monotonic()
    merge(whole, other)
    seconds = time.monotonic() - began
    after = content(whole)
    target, outcomes = tmp_path / "target.duckdb", []
    target.write_bytes(start.path.read_bytes())
    tables = ["conflicts", "traces", "trace_tokens", "grades", "judgements", "commit", "commit", "commit", "commit"]
    for table in tables:
        process = python(MERGE, target, other.path)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == table:
                break
        time.sleep(chance.random() * seconds / 4)
        process.kill()
        process.wait()
        found = content(target)
        # The commit may have been done before the kill came; a part of it never is.
        assert found in (before, after)
        outcomes.append(found == after)
        if found == after:
            Path(f"{target}.wal").unlink(missing_ok=True)
            target.write_bytes(start.path.read_bytes())
    assert outcomes.count(False) >= 5, "the kills came too late to show anything"
    assert merge(target, other).added["traces"] == 15_600
    assert content(target) == after
    assert merge(target, other).n_added == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_merge_of_an_older_catalog_is_run_again_whatever_it_left(tmp_path: Path) -> None:
    other = big(tmp_path / "other.duckdb", 0, 8000)
    bytes_before, was = other.path.read_bytes(), migrations.SCHEMA_VERSION
    target = tmp_path / "target.duckdb"
    later = "import test_merge\nfor name, value in test_merge.later_schema().items():\n    setattr(*name, value)\n"
    for seconds in (1.5, 2.0, 2.5):
        process = python(later + textwrap.dedent(MERGE), target, other.path)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = python(later + textwrap.dedent(MERGE), target, other.path)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert said.splitlines()[-1].startswith("added ")
    with duckdb.connect(str(target), read_only=True) as con:
        assert con.execute("SELECT count(*), max(number) FROM traces, migrations").fetchall() == [
            (8000 * (was + 1), was + 1)
        ]
    assert other.path.read_bytes() == bytes_before


@pytest.mark.slow
def test_grades_dated_later_win_whichever_file_they_came_from(tmp_path: Path) -> None:
    trace = TRACES[0]
    early, late = make_grade(trace, "incorrect"), make_grade(trace, "correct", graded_at=START + timedelta(hours=1))
    here, there = write(tmp_path / "here.duckdb", [trace], [late]), write(tmp_path / "there.duckdb", [trace], [early])
    merge(here, there)
    assert here.query("SELECT verdict FROM trace").rows == [("correct",)]
    merge(there, here)
    assert there.query("SELECT verdict FROM trace").rows == [("correct",)]

"""An older catalog is upgraded to the same answers, with a copy of it kept; on DuckDB 1.5 and 2.x alike."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from factories import keep_as_pulled, make_grade, make_problem, make_run, make_source, make_trace
from older_catalogs import as_first_schema

from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.compact import compact
from calset.catalog.maintenance.merge import merge
from calset.catalog.references import export
from calset.catalog.select import select
from calset.catalog.store import migrations
from calset.catalog.subsets.folder import DATA
from calset.errors import CatalogError, CatalogUpgraded

ROOT = Path(__file__).parent.parent
OLDER_DUCKDB = ROOT / ".venv" / "duckdb-1.5"
VIEWS = ("trace", "problem", "suspect_gold")


def everything(path: Path) -> Catalog:
    """A catalog with whatever may happen to a trace: retries, grades that came later, went back in time, or never."""
    catalog, run, other = Catalog(path), make_run(), make_run("b", kind="evaluate")
    problems = [make_problem(n) for n in range(6)]
    catalog.add_source(make_source())
    catalog.add_problems(problems)
    for one in (run, other):
        catalog.add_run(one)
    traces = [make_trace(p, r, i, 10 + i) for p in problems for r in (run, other) for i in range(4)]
    verdicts = ("correct", "incorrect", "no_answer", "truncated", "timeout")
    catalog.record(traces[:40], [make_grade(t, verdicts[i % 5]) for i, t in enumerate(traces[:36])])
    catalog.record(traces[40:], [make_grade(t, "incorrect", extracted="7") for t in traces[40:]])
    retried = make_trace(problems[0], run, 0, 30, attempt=1, max_tokens=128)
    catalog.record([retried], [make_grade(retried, "correct"), make_grade(retried, "incorrect", after=5)])
    catalog.add_grades([make_grade(t, "correct", after=9, detail="again") for t in traces[4:9]])
    catalog.add_grades([make_grade(t, "error", after=-9) for t in traces[10:13]])
    catalog.add_grades([make_grade(t, "correct", grader="late") for t in traces[36:38]])
    return catalog


def answers(con: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the public views, sorted."""
    return {view: con.execute(f"SELECT * FROM {view} ORDER BY ALL").fetchall() for view in VIEWS}


def asked(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with duckdb.connect(str(path), read_only=True) as con:
        return answers(con)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    everything(folder / "now.duckdb")
    as_first_schema(folder / "now.duckdb", folder / "older.duckdb")
    return folder


@pytest.fixture
def older(made: Path, tmp_path: Path) -> Path:
    """A catalog of the first schema, beside the same rows in the present one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "older.duckdb"


def test_a_catalog_of_the_first_schema_gives_the_same_answers_and_leaves_a_copy(older: Path, tmp_path: Path) -> None:
    before, first = asked(older), older.read_bytes()
    assert len(before["trace"]) == 48
    assert before["suspect_gold"]
    with pytest.warns(CatalogUpgraded, match=r"schema 1 to \d+.*older\.duckdb\.schema1\.bak") as caught:
        assert select(older, "all", "rac").n_samples == 24
    assert len(caught) == 1
    assert asked(older) == before == asked(tmp_path / "now.duckdb")
    assert select(tmp_path / "now.duckdb", "all", "rac").content_hash == select(older, "all", "rac").content_hash
    assert (tmp_path / "older.duckdb.schema1.bak").read_bytes() == first
    catalog = Catalog(older)
    assert catalog.query("SELECT number FROM migrations").rows == [(m.number,) for m in migrations.MIGRATIONS]
    for table in ("decisions", "contaminations", "judgements", "excluded", "judgement", "published_rows"):
        assert catalog.query(f"SELECT count(*) FROM {table}").rows == [(0,)]


def test_an_upgraded_catalog_keeps_the_rows_of_what_is_pulled_into_it(older: Path, tmp_path: Path) -> None:
    now = Catalog(tmp_path / "now.duckdb")
    pulled = keep_as_pulled(now, select(now, "all", "rac"), tmp_path / "pulled.duckdb")
    with pytest.warns(CatalogUpgraded):
        merge(older, pulled)
    assert Catalog(older).query("FROM published_rows ORDER BY ALL") == pulled.query("FROM published_rows ORDER BY ALL")
    compact(older)
    tables = [pq.read_table(export(c, "all@1", tmp_path / c.path.stem) / DATA) for c in (Catalog(older), pulled)]
    assert tables[0].equals(tables[1])
    assert None not in tables[0]["text"].to_pylist()


def test_what_is_added_to_an_upgraded_catalog_counts_as_in_a_new_one(older: Path, tmp_path: Path) -> None:
    with pytest.warns(CatalogUpgraded):
        Catalog(older).add_run(make_run("c"))
    for path in (older, tmp_path / "now.duckdb"):
        catalog = Catalog(path)
        catalog.add_run(make_run("c"))
        traces = list(catalog.load_traces([r["trace_id"] for r in catalog.rows("SELECT trace_id FROM trace")]).values())
        assert catalog.add_traces(traces) == 0
        catalog.add_grades(
            [make_grade(t, "no_answer", after=60) for t in sorted(traces, key=lambda t: t.trace_id)[::2]]
        )
        fresh = make_trace(make_problem(1), make_run("c"), 7)
        catalog.record([fresh], [make_grade(fresh)])
    assert asked(older) == asked(tmp_path / "now.duckdb")


def test_a_copy_that_is_there_stays_as_it_is(older: Path) -> None:
    kept = older.with_name("older.duckdb.schema1.bak")
    kept.write_bytes(b"from an earlier upgrade")
    with pytest.warns(CatalogUpgraded):
        Catalog(older).query("FROM trace")
    assert kept.read_bytes() == b"from an earlier upgrade"


def _upgrade_with_little_room(path: str, results: multiprocessing.Queue) -> None:
    room = os.path.getsize(path) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        Catalog(path).query("FROM trace")
    except Exception as error:
        results.put((type(error).__name__, str(error)))


def test_without_room_for_the_copy_nothing_is_upgraded_and_no_half_copy_stays(older: Path) -> None:
    before, context = older.read_bytes(), multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_upgrade_with_little_room, args=(str(older), results))
    process.start()
    kind, message = results.get(timeout=60)
    process.join()
    assert kind == CatalogError.__name__
    assert "schema1.bak" in message
    assert "File too large; make room" in message
    assert older.read_bytes() == before
    assert sorted(p.name for p in older.parent.iterdir()) == ["now.duckdb", "older.duckdb"]


KILLED = """
    import os, sys
    from dataclasses import replace
    from calset.catalog.store import migrations
    from calset.catalog.catalog import Catalog

    number, moment = int(sys.argv[2]), sys.argv[3]

    def killed(migration):
        def apply(con):
            if moment == "inside":
                migration.apply(con)
            os.kill(os.getpid(), 9)
        return replace(migration, apply=apply)

    dies = number if moment == "inside" else number + 1
    migrations.MIGRATIONS = [killed(m) if m.number == dies else m for m in migrations.MIGRATIONS]
    Catalog(sys.argv[1]).query("FROM trace")
"""


@pytest.mark.parametrize(("number", "moment"), [(2, "inside"), (2, "between"), (4, "inside"), (5, "inside")])
def test_an_upgrade_killed_at_any_step_is_carried_on_by_the_next_open(older: Path, number: int, moment: str) -> None:
    before = asked(older)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(older), str(number), moment],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -9
    with duckdb.connect(str(older)) as con:
        reached = con.execute("SELECT max(number) FROM migrations").fetchall()[0][0]
    assert reached == (number if moment == "between" else number - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CatalogUpgraded)
        assert Catalog(older).query("SELECT max(number) FROM migrations").rows == [(migrations.SCHEMA_VERSION,)]
    assert asked(older) == before
    assert asked(older.with_name("older.duckdb.schema1.bak")) == before


# -- DuckDB 1.5 -----------------------------------------------------------------------------------------------------

needs_older = pytest.mark.skipif(
    not OLDER_DUCKDB.is_dir(), reason="no DuckDB 1.5 in .venv/duckdb-1.5: make test-ci puts it there"
)


def with_older_duckdb(*arguments: str, cwd: Path = ROOT) -> str:
    """What a Python that imports DuckDB 1.5 prints."""
    path = os.pathsep.join(map(str, (OLDER_DUCKDB, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


USE = """
    import sys, duckdb
    from pathlib import Path
    from factories import make_grade, make_problem, make_run, make_trace
    from calset.catalog.catalog import Catalog
    from calset.catalog.maintenance.compact import compact
    from calset.catalog.select import select
    from test_migrations import everything

    assert duckdb.__version__.startswith("1.5."), duckdb.__version__
    catalog = Catalog(sys.argv[1])
    if not catalog.exists():
        everything(catalog.path)
    if "write" in sys.argv:
        trace = make_trace(make_problem(1), make_run(), 50)
        catalog.record([trace], [make_grade(trace)])
        catalog.add_grades([make_grade(trace, "incorrect", after=1)])
    if "compact" in sys.argv:
        compact(catalog)
    for recipe in ("rac", "random", "correct"):
        print(select(catalog, recipe, recipe, seed=3).content_hash)
"""


def hashes(path: Path) -> list[str]:
    return [select(path, recipe, recipe, seed=3).content_hash for recipe in ("rac", "random", "correct")]


@needs_older
@pytest.mark.slow
def test_both_duckdbs_write_one_file_in_turn_and_select_the_same(tmp_path: Path) -> None:
    assert duckdb.__version__.startswith("2.")
    path = tmp_path / "c.duckdb"
    everything(path)
    before, here = hashes(path), asked(path)
    code = textwrap.dedent(USE)
    assert with_older_duckdb("-c", code, str(path)).split() == before
    after = with_older_duckdb("-c", code, str(path), "write", "compact").split()
    assert after[0] != before[0]
    assert hashes(path) == after
    assert len(asked(path)["trace"]) == len(here["trace"]) + 1
    trace = make_trace(make_problem(2), make_run(), 51)
    Catalog(path).record([trace], [make_grade(trace)])
    assert with_older_duckdb("-c", code, str(path)).split() == hashes(path)


@needs_older
@pytest.mark.slow
def test_a_file_made_by_the_older_duckdb_is_the_same_catalog(tmp_path: Path) -> None:
    made = with_older_duckdb("-c", textwrap.dedent(USE), str(tmp_path / "there.duckdb")).split()
    everything(tmp_path / "here.duckdb")
    assert hashes(tmp_path / "here.duckdb") == made == hashes(tmp_path / "there.duckdb")
    assert asked(tmp_path / "here.duckdb") == asked(tmp_path / "there.duckdb")


@needs_older
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_catalogs_own_tests_pass_on_the_older_duckdb() -> None:
    files = ["test_catalog.py", "test_migrations.py", "test_compact.py", "test_subsets.py", "test_select.py",
             "test_received.py"]  # fmt: skip
    said = with_older_duckdb(
        "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not slow and not nightly and not vllm",
        "-k", "not both_duckdbs",
        *(str(ROOT / "tests" / file) for file in files if (ROOT / "tests" / file).exists()),
    )  # fmt: skip
    assert " passed" in said

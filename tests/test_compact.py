"""compact: less space, the same rows, and the old or the new file whole whatever happens meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path

import duckdb
import pytest
from factories import fill, make_grade, make_problem, make_run, make_trace
from processes import python

from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.compact import compact
from calset.catalog.select import select
from calset.catalog.store import connection
from calset.errors import CatalogError, CatalogLocked, InputError

ROOT = Path(__file__).parent.parent


def with_holes(path: Path) -> Catalog:
    """A catalog of some megabytes whose larger part was deleted, and a table of somebody's own in it."""
    catalog = fill(path, [[("correct", 40), ("incorrect", 20)]] * 20)
    problem, run = make_problem(0), make_run()
    big = [make_trace(problem, run, i, 10, text=os.urandom(20_000).hex()) for i in range(100, 300)]
    catalog.record(big, [make_grade(t) for t in big])
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE mine AS SELECT range AS x FROM range(7)")
        con.execute("CHECKPOINT")
        for table in ("trace_tokens", "grades", "traces"):
            con.execute(f"DELETE FROM {table} WHERE trace_id IN (SELECT unnest(?))", [[t.trace_id for t in big]])
            con.execute("CHECKPOINT")
    return catalog


def rows(catalog: Catalog) -> list[list[tuple[object, ...]]]:
    asked = ("trace", "problem", "grades", "trace_tokens", "runs", "mine", "migrations", "meta")
    return [catalog.query(f"SELECT * FROM {table} ORDER BY ALL").rows for table in asked]


@pytest.mark.slow
def test_space_of_deleted_rows_is_given_back_and_every_row_stays(tmp_path: Path) -> None:
    catalog = with_holes(tmp_path / "it's.duckdb")
    before, size = rows(catalog), catalog.path.stat().st_size
    chosen = select(catalog, "kept", "rac").content_hash
    done = compact(catalog)
    assert done.bytes_before >= size > 5_000_000
    assert done.bytes_after == catalog.path.stat().st_size < done.bytes_before / 2
    assert done.rows["traces"] == 40
    assert done.rows["mine"] == 7
    assert rows(catalog) == before
    assert os.listdir(tmp_path) == ["it's.duckdb"]
    assert select(catalog, "kept", "rac").content_hash == chosen
    with catalog.connect() as con:
        tags = con.execute("SELECT tags FROM duckdb_databases() WHERE NOT internal").fetchall()
    assert tags[0][0]["storage_version"].startswith("v1.5.0")


def test_views_of_ones_own_and_the_mode_of_the_file_stay(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 4)]] * 3)
    with duckdb.connect(str(catalog.path)) as con:
        con.execute("CREATE VIEW right_ones AS SELECT * FROM trace WHERE correct")
        con.execute("CREATE VIEW how_many AS SELECT count(*) AS n FROM right_ones")
    catalog.path.chmod(0o664)
    compact(catalog)
    assert catalog.query("FROM how_many").rows == [(3,)]
    assert catalog.path.stat().st_mode & 0o777 == 0o664


OWN = """
    CREATE SEQUENCE numbers START 5 INCREMENT 2;
    CREATE SCHEMA "my own";
    CREATE TABLE "my own".notes (
        id INTEGER PRIMARY KEY DEFAULT nextval('numbers'), note VARCHAR UNIQUE, how VARCHAR,
        length INTEGER GENERATED ALWAYS AS (length(note)), CHECK (note <> '')
    );
    INSERT INTO "my own".notes (note, how) VALUES ('one', 'good'), ('three', 'bad');
    CREATE TABLE "my own"."a ""quoted"" one" (note_id INTEGER REFERENCES "my own".notes (id));
    INSERT INTO "my own"."a ""quoted"" one" VALUES (7);
    CREATE VIEW "my own".good AS FROM "my own".notes WHERE how = 'good';
"""


def test_tables_views_sequences_and_schemas_that_somebody_added_stay(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 4), ("correct", 9)]])
    with duckdb.connect(str(catalog.path)) as con:
        con.execute(OWN)
    listing = "SELECT schema_name, table_name, sql FROM duckdb_tables() WHERE NOT internal ORDER BY ALL"
    with catalog.connect() as con:
        before = con.execute(listing).fetchall()
    done = compact(catalog)
    assert (done.rows["my own.notes"], done.rows['my own.a "quoted" one'], done.rows["traces"]) == (2, 1, 2)
    with catalog.connect() as con:
        assert con.execute(listing).fetchall() == before
        assert con.execute('FROM "my own".good').fetchall() == [(5, "one", "good", 3)]
    with duckdb.connect(str(catalog.path)) as con:
        con.execute("INSERT INTO \"my own\".notes (note) VALUES ('five')")
        assert con.execute("SELECT id, length FROM \"my own\".notes WHERE note = 'five'").fetchall() == [(9, 4)]
        with pytest.raises(duckdb.ConstraintException):
            con.execute("INSERT INTO \"my own\".notes (note) VALUES ('one')")
    assert compact(catalog).rows["my own.notes"] == 3


def refusal(tmp_path: Path, added: str, error: type[Exception], match: str) -> tuple[Catalog, str]:
    """A catalog with something added, and the one line that refuses it: the file stays, and nothing lies beside it."""
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 4)]])
    with duckdb.connect(str(catalog.path)) as con:
        con.execute(added)
        con.execute("CHECKPOINT")
    before = catalog.path.read_bytes()
    with pytest.raises(error, match=match) as refused:
        compact(catalog)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["c.duckdb"]
    assert catalog.path.read_bytes() == before
    return catalog, str(refused.value)


@pytest.mark.parametrize(
    "added",
    [
        "CREATE MACRO twice(x) AS 2 * x",
        "CREATE MACRO longer(n) AS TABLE SELECT trace_id FROM trace WHERE n_tokens > n",
        "CREATE TYPE mood AS ENUM ('good', 'bad')",
        "CREATE INDEX by_length ON traces (n_tokens)",
        "CREATE TABLE notes (how VARCHAR); CREATE INDEX by_mood ON notes (how)",
    ],
)
def test_a_macro_a_type_or_an_index_is_refused_with_the_statement_that_drops_it(tmp_path: Path, added: str) -> None:
    lost = r"compact would lose: in DuckDB, DROP .* takes it out$"
    catalog, line = refusal(tmp_path, added, InputError, lost)
    with duckdb.connect(str(catalog.path)) as con:
        con.execute(line.partition("in DuckDB, ")[2].partition(" takes it out")[0])
    assert compact(catalog).rows["traces"] == 1


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ("ALTER TABLE problems ADD COLUMN mine INTEGER", "the column main.problems.mine, which is not calset's"),
        (
            "CREATE TABLE tree (id INTEGER PRIMARY KEY, up INTEGER REFERENCES tree (id)); INSERT INTO tree VALUES "
            "(1, NULL); INSERT INTO tree VALUES (2, 1)",
            "the table tree cannot be copied",
        ),
    ],
)
def test_what_cannot_be_kept_is_named_and_the_file_stays(tmp_path: Path, added: str, named: str) -> None:
    refusal(tmp_path, added, CatalogError, rf"{named}.* drop it, or leave the catalog as it is")


def test_a_link_to_a_catalog_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere" / "c.duckdb", [[("correct", 4)]])
    (tmp_path / "c.duckdb").symlink_to(tmp_path / "elsewhere" / "c.duckdb")
    compact(tmp_path / "c.duckdb")
    assert (tmp_path / "c.duckdb").is_symlink()
    assert Catalog(tmp_path / "c.duckdb").query("SELECT count(*) FROM trace").rows == [(1,)]


def test_what_is_no_catalog_or_open_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no catalog"):
        compact(tmp_path / "none.duckdb")
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 4)]])
    process = python("import sys, duckdb, time; con = duckdb.connect(sys.argv[1], read_only=True);"
                     "print(1, flush=True); time.sleep(60)", catalog.path)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(CatalogLocked, match=rf"process {process.pid} .*kill {process.pid}"):
            compact(Catalog(catalog.path, lock_timeout=0.3))
    finally:
        process.kill()
        process.communicate()
    with catalog.connect(), pytest.raises(CatalogError, match="close that connection first"):
        compact(catalog)


COMPACT = """
    import sys
    from calset.catalog.maintenance.compact import compact
    print("go", flush=True)
    print(compact(sys.argv[1]).rows["traces"], flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_whole_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    catalog = with_holes(tmp_path / "c.duckdb")
    before, seen = rows(catalog), set()
    for pause in (0.0, 0.02, 0.05, 0.08, 0.12, 0.2):
        process = python(COMPACT, catalog.path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen |= {re.sub(r"\.\w{8}\.", ".*.", name) for name in os.listdir(tmp_path) if name != "c.duckdb"}
        assert rows(catalog) == before
    assert seen <= {".c.duckdb.*.compact", "c.duckdb.wal"}
    assert compact(catalog).rows["traces"] == 40
    assert os.listdir(tmp_path) == ["c.duckdb"]
    assert rows(catalog) == before


def _compact_with_little_room(path: str, results: multiprocessing.Queue) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
    try:
        compact(path)
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")


def test_without_room_the_old_file_stays_and_nothing_beside_it(tmp_path: Path) -> None:
    catalog = with_holes(tmp_path / "c.duckdb")
    before, context = rows(catalog), multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_compact_with_little_room, args=(str(catalog.path), results))
    process.start()
    message = results.get(timeout=60)
    process.join()
    assert message.startswith("CatalogError: no space left for ")
    assert os.listdir(tmp_path) == ["c.duckdb"]
    assert rows(catalog) == before


WRITE = """
    import sys
    from factories import make_grade, make_problem, make_run, make_trace
    from calset.catalog.catalog import Catalog
    catalog, problem, run = Catalog(sys.argv[1]), make_problem(0), make_run()
    for i in range(15):
        trace = make_trace(problem, run, int(sys.argv[2]) + i)
        catalog.record([trace], [make_grade(trace)])
"""


@pytest.mark.slow
def test_writers_that_wait_for_it_write_to_the_new_file(tmp_path: Path) -> None:
    """Whoever had opened the old file just before it was replaced must not write to what nobody will read again."""
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 4)]])
    writers = [python(WRITE, catalog.path, start) for start in (1000, 2000)]
    n = 0
    while any(writer.poll() is None for writer in writers):
        compact(catalog)
        n += 1
    for writer in writers:
        assert writer.wait() == 0, writer.communicate()
    assert n > 3
    assert catalog.query("SELECT count(*) FROM trace").rows == [(31,)]


def test_a_file_replaced_while_it_was_being_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, other = (fill(tmp_path / name, [[("correct", n)]]) for n, name in ((3, "c.duckdb"), (9, "o.duckdb")))
    connect = duckdb.connect

    def replaced_meanwhile(*args: object, **options: object) -> duckdb.DuckDBPyConnection:
        con = connect(*args, **options)  # type: ignore[arg-type]
        if other.path.exists():
            os.replace(other.path, catalog.path)
        return con

    monkeypatch.setattr(connection.duckdb, "connect", replaced_meanwhile)
    assert catalog.query("SELECT n_tokens FROM trace").rows == [(9,)]


def test_small_row_groups_are_merged_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, problem, run = fill(tmp_path / "c.duckdb", [[("correct", 4)]]), make_problem(0), make_run()

    def groups_after_a_write(i: int) -> int:
        trace = make_trace(problem, run, i)
        catalog.record([trace], [make_grade(trace)])
        sql = "SELECT count(DISTINCT row_group_id) FROM pragma_storage_info('traces')"
        with catalog.connect() as con:
            return con.execute(sql).fetchall()[0][0]

    monkeypatch.setattr(connection.random, "random", lambda: 0.999)
    assert [groups_after_a_write(i) for i in range(10, 15)] == [2, 3, 4, 5, 6]
    monkeypatch.setattr(connection.random, "random", lambda: 0.0)
    monkeypatch.setattr(connection, "MERGE_BYTES", 0)
    assert groups_after_a_write(20) == 7
    monkeypatch.undo()
    monkeypatch.setattr(connection.random, "random", lambda: 0.0)
    assert groups_after_a_write(21) == 1
    assert catalog.query("SELECT count(*) FROM trace").rows == [(8,)]

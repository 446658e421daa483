"""compact: a catalog rewritten into a new, smaller file that takes the old one's place.

Why here: DuckDB never gives space back, a checkpoint after each commit leaves small row groups, and a migrated file
keeps the layout that it was made with. The old file stays locked for writing until the new one, checked and on disk,
has its name: a kill at any moment leaves the old or the new file whole. Must not know: what the tables mean.
"""

from __future__ import annotations

import glob
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb

from calset.catalog.catalog import Catalog
from calset.catalog.store import definitions, schema
from calset.catalog.store.connection import allow_only, exclusive, quoted
from calset.catalog.store.values import identifier
from calset.errors import CatalogError, InputError, first_line
from calset.io.files import drafted, sync


@dataclass(frozen=True, slots=True)
class Compacted:
    """Bytes of the file before and after, and the rows of each table that were copied and counted again."""

    catalog: str
    bytes_before: int
    bytes_after: int
    rows: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compact(catalog: Catalog | str | Path) -> Compacted:
    """Rewrite a catalog without the space that it no longer needs. It needs as much free space as the result.

    Tables, views, sequences and schemas that somebody added to the file stay in it, but not a view that reads another
    file. A file with macros, types or indexes is refused.

    Nobody can write to the catalog or open it meanwhile; who waits longer than its own lock timeout is told the PID.

    Raises:
        InputError: no catalog, a folder that cannot be written, or a file with a macro, type or index; the message
            has the statement that drops it.
        CatalogLocked: others held the file for ``lock_timeout`` seconds.
        CatalogError: no space left, something added that cannot be copied, or a copy that does not hold what the file
            does; the old file stays.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    path = Path(os.path.realpath(catalog.path))  # a link stays a link
    with exclusive(path, catalog.lock_timeout) as con:
        before = os.path.getsize(path)
        try:
            # Nobody else can be writing one, as only the holder of the lock does: it is what a kill left.
            for left in path.parent.glob(f".{glob.escape(path.name)}.????????.compact"):
                shutil.rmtree(left, ignore_errors=True)  # which follows no link
            with drafted(path, ".compact") as draft:
                allow_only(con, [draft])
                _refuse(con, path)
                rows = _copy(con, draft)
                os.chmod(draft, os.stat(path).st_mode & 0o7777)
                sync(draft)
                # Before the lock is let go: whoever waits for it then finds that the file has been replaced.
                os.replace(draft, path)
            sync(path.parent)
        except OSError as error:
            raise CatalogError(f"{path} cannot be compacted ({error.strerror}): the file is as it was") from error
        return Compacted(str(catalog.path), before, os.path.getsize(path), rows)


def _refuse(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """
    Raises:
        InputError: naming something in the attached ``old`` that would not be copied, and how to take it out.
    """
    for finding in definitions.strangers(con, "old", ("macro", "type", "index")):
        raise InputError(f"{path} holds {finding.what} and which compact would lose: {finding.remedy}")


def _copy(con: duckdb.DuckDBPyConnection, draft: Path) -> dict[str, int]:
    """All that the attached ``old`` holds, in a new database file; returns the rows of each table.

    Rows go in table by table and not with COPY FROM DATABASE: a migrated table has its columns in another order.
    """
    # One thread: with more, each writes blocks of its own and a fifth of the file stays empty (measured).
    con.execute("SET threads = 1")
    con.execute(f"ATTACH {quoted(draft)} AS new (STORAGE_VERSION 'v1.5.0')")
    try:
        _copy_schema(con)
        rows = _copy_rows(con)
        con.execute("CHECKPOINT new")
        for table, n in rows.items():
            if (copied := _count(con, "new", *table)) != n:
                raise CatalogError(
                    f"the copy has {copied} rows of {_shown(*table)} where the catalog has {n}: it was dropped"
                )
        return {_shown(*table): n for table, n in rows.items()}
    finally:
        with suppress(duckdb.Error):
            con.execute("USE memory")
        with suppress(duckdb.Error):
            con.execute("DETACH new")


def _copy_schema(con: duckdb.DuckDBPyConnection) -> None:
    """Everything but rows: calset's tables and views as they are made today, what somebody added as it is.

    Raises:
        CatalogError: naming something that cannot be kept.
    """
    try:
        con.execute("COPY FROM DATABASE old TO new (SCHEMA)").fetchall()
        con.execute("USE new")
        for table in schema.TABLES:
            con.execute(schema.create_table(table).replace("CREATE TABLE", "CREATE OR REPLACE TABLE", 1))
        for view in schema.VIEWS:
            con.execute(schema.create_view(view))
        con.execute("USE memory")
    except (duckdb.IOException, duckdb.FatalException):  # a full disk is nothing that somebody added
        raise
    except duckdb.Error as error:
        raise CatalogError(f"{_added(con)}, and it cannot be copied ({first_line(error)}): {_ADVICE}") from error
    if lost := sorted(_entries(con, "old") - _entries(con, "new")):
        kind, name = lost[0]
        raise CatalogError(f"the {kind} {name}, which is not calset's, cannot be kept: {_ADVICE}")


_ADVICE = "drop it, or leave the catalog as it is; nothing was changed"
# What is copied besides rows: (kind, name).
_ENTRIES = """
    SELECT 'schema', schema_name FROM duckdb_schemas() WHERE database_name = $db AND NOT internal
    UNION ALL SELECT 'table', concat_ws('.', schema_name, table_name)
    FROM duckdb_tables() WHERE database_name = $db AND NOT internal
    UNION ALL SELECT 'column', concat_ws('.', schema_name, table_name, column_name)
    FROM duckdb_columns() SEMI JOIN duckdb_tables() USING (database_name, schema_name, table_name)
    WHERE database_name = $db AND NOT internal
    UNION ALL SELECT 'view', concat_ws('.', schema_name, view_name)
    FROM duckdb_views() WHERE database_name = $db AND NOT internal
    UNION ALL SELECT 'sequence', concat_ws('.', schema_name, sequence_name)
    FROM duckdb_sequences() WHERE database_name = $db
"""


def _entries(con: duckdb.DuckDBPyConnection, database: str) -> set[tuple[str, str]]:
    return set(con.execute(_ENTRIES, {"db": database}).fetchall())


def _added(con: duckdb.DuckDBPyConnection) -> str:
    """What somebody added to the catalog, in words."""
    calsets = {f"main.{name}" for name in (*schema.TABLES, *schema.VIEWS)}
    added = sorted(f"the {k} {name}" for k, name in _entries(con, "old") if k != "column" and name not in calsets)
    return f"the catalog holds more than calset made: {', '.join(added[:5])}{', ...' if len(added) > 5 else ''}"


def _copy_rows(con: duckdb.DuckDBPyConnection) -> dict[tuple[str, str], int]:
    """The rows of all tables; those of a table that refers to another come after the other's."""
    names = "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'old' AND NOT internal"
    left = sorted(con.execute(names).fetchall())
    rows: dict[tuple[str, str], int] = {}
    while left:
        failed: dict[tuple[str, str], duckdb.Error] = {}
        for table in left:
            try:
                con.execute(_insert(con, *table)).fetchall()
                rows[table] = _count(con, "old", *table)
            except duckdb.ConstraintException as error:
                failed[table] = error
        if len(failed) == len(left):
            table, error = next(iter(failed.items()))
            raise CatalogError(
                f"the table {_shown(*table)} cannot be copied ({first_line(error)}): {_ADVICE}"
            ) from error
        left = list(failed)
    return rows


def _insert(con: duckdb.DuckDBPyConnection, schema_name: str, table: str) -> str:
    """The statement that copies a table's rows, by the names of all columns that can be written."""
    sql = (
        "SELECT column_name, column_default FROM duckdb_columns() "
        "WHERE database_name = 'old' AND schema_name = ? AND table_name = ?"
    )
    defaults = dict(con.execute(sql, [schema_name, table]).fetchall())
    place = _place("old", schema_name, table)
    # Of a generated column DESCRIBE has no default and duckdb_columns() its expression; 1.5 says it in no other way.
    listed = ", ".join(
        identifier(column)
        for column, _, _, _, default, _ in con.execute(f"DESCRIBE {place}").fetchall()
        if defaults[column] == default
    )
    return f"INSERT INTO {_place('new', schema_name, table)} ({listed}) SELECT {listed} FROM {place}"


def _count(con: duckdb.DuckDBPyConnection, database: str, schema_name: str, table: str) -> int:
    ((n,),) = con.execute(f"SELECT count(*) FROM {_place(database, schema_name, table)}").fetchall()
    return n


def _place(*names: str) -> str:
    return ".".join(map(identifier, names))


def _shown(schema_name: str, table: str) -> str:
    """A table as people call it."""
    return table if schema_name == "main" else f"{schema_name}.{table}"

"""compact: a catalog rewritten into a new, smaller file that takes the old one's place.

Why here: DuckDB never gives space back, a checkpoint after each commit leaves small row groups, and a migrated file
keeps the layout that it was made with. The old file stays locked for writing until the new one, checked and on disk,
has its name: a kill at any moment leaves the old or the new file whole. Must not know: what the tables mean.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb

from calset.catalog import schema
from calset.catalog.catalog import Catalog
from calset.catalog.connection import exclusive, quoted
from calset.errors import CatalogError, first_line
from calset.files import sync


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

    Nobody can write to the catalog or open it meanwhile; who waits longer than its own lock timeout is told the PID.

    Raises:
        InputError: no catalog, or a folder that cannot be written.
        CatalogLocked: others held the file for ``lock_timeout`` seconds.
        CatalogError: no space left, or the copy does not hold what the file does; the old file stays.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    path = Path(os.path.realpath(catalog.path))  # a link stays a link
    draft = path.with_name(f".{path.name}.compact")
    with exclusive(path, catalog.lock_timeout) as con:
        before = os.path.getsize(path)
        try:
            # Nobody else can be writing one, as only the holder of the lock does: it is what a kill left.
            _remove(draft)
            rows = _copy(con, draft)
            os.chmod(draft, os.stat(path).st_mode & 0o7777)
            sync(draft)
            # Before the lock is let go: whoever waits for it then finds that the file has been replaced.
            os.replace(draft, path)
            sync(path.parent)
        except OSError as error:
            raise CatalogError(f"{path} cannot be compacted ({error.strerror}): the file is as it was") from error
        finally:
            _remove(draft)
        return Compacted(str(catalog.path), before, os.path.getsize(path), rows)


def _copy(con: duckdb.DuckDBPyConnection, draft: Path) -> dict[str, int]:
    """All tables and views of the attached ``old`` in a new database file; returns the rows of each table."""
    # One thread: with more, each writes blocks of its own and a fifth of the file stays empty (measured).
    con.execute("SET threads = 1")
    con.execute(f"ATTACH {quoted(draft)} AS new (STORAGE_VERSION 'v1.5.0')")
    try:
        names = "SELECT table_name FROM duckdb_tables() WHERE database_name = 'old' AND NOT internal"
        tables = sorted(name for (name,) in con.execute(names).fetchall())
        rows = {table: _copy_table(con, table) for table in tables}
        con.execute("USE new")
        for view in schema.VIEWS:
            con.execute(schema.create_view(view))
        _copy_own_views(con)
        con.execute("USE memory")
        con.execute("CHECKPOINT new")
        for table, n in rows.items():
            ((copied,),) = con.execute(f'SELECT count(*) FROM new."{table}"').fetchall()
            if copied != n:
                raise CatalogError(f"the copy has {copied} rows of {table} where the catalog has {n}: it was dropped")
        return rows
    finally:
        with suppress(duckdb.Error):
            con.execute("USE memory")
        with suppress(duckdb.Error):
            con.execute("DETACH new")


def _copy_table(con: duckdb.DuckDBPyConnection, table: str) -> int:
    ((n,),) = con.execute(f'SELECT count(*) FROM old."{table}"').fetchall()
    if table in schema.TABLES:
        con.execute("USE new")
        con.execute(schema.create_table(table))
        con.execute("USE memory")
        con.execute(f'INSERT INTO new."{table}" BY NAME FROM old."{table}"').fetchall()
    else:  # somebody's own
        con.execute(f'CREATE TABLE new."{table}" AS FROM old."{table}"').fetchall()
    return n


def _copy_own_views(con: duckdb.DuckDBPyConnection) -> None:
    """Views that somebody added to the catalog, in the database in use; one may rest on another."""
    sql = "SELECT view_name, sql FROM duckdb_views() WHERE database_name = 'old' AND NOT internal ORDER BY view_name"
    left = {name: text for name, text in con.execute(sql).fetchall() if name not in schema.VIEWS}
    while left:
        failed: dict[str, duckdb.Error] = {}
        for name, text in left.items():
            try:
                con.execute(text)
            except duckdb.Error as error:
                failed[name] = error
        if len(failed) == len(left):
            name, error = next(iter(failed.items()))
            raise CatalogError(
                f"the view {name}, which is not calset's, cannot be copied ({first_line(error)}): drop it, or keep the "
                "catalog as it is"
            ) from error
        left = {name: left[name] for name in failed}


def _remove(draft: Path) -> None:
    for leftover in (draft, Path(f"{draft}.wal")):
        with suppress(FileNotFoundError):
            leftover.unlink()

"""Numbered migrations: how a catalog file gets from any older schema to this calset's.

Each migration is one transaction that also records its own name, followed by a checkpoint, so a kill at any moment
leaves a file that the next open carries on with. Must not know: how files are opened or locked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import duckdb

from calset.catalog import schema
from calset.catalog.records import utc_now
from calset.errors import InputError, SchemaTooNew


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step; ``apply`` runs inside a transaction."""

    number: int
    name: str
    apply: Callable[[duckdb.DuckDBPyConnection], None]


def _first_tables(con: duckdb.DuckDBPyConnection) -> None:
    for table in schema.TABLES:
        con.execute(schema.create_table(table))
    for view in schema.VIEWS:
        con.execute(schema.create_view(view))
    con.execute("INSERT INTO meta VALUES ('format', 'calset catalog'), ('created_at', ?)", [utc_now().isoformat()])


MIGRATIONS: Sequence[Migration] = (Migration(1, "first_tables", _first_tables),)
SCHEMA_VERSION = MIGRATIONS[-1].number


def schema_version(con: duckdb.DuckDBPyConnection, path: str) -> int:
    """The schema of an open catalog; 0 for an empty database.

    Raises:
        InputError: the database holds tables, but none of a calset catalog.
        SchemaTooNew: a newer calset wrote it.
    """
    # One look at the file's own catalog, ours or not, before any table of ours is named.
    tables = {name for (name,) in con.execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal").fetchall()}
    if not tables:
        return 0
    if "migrations" not in tables or "meta" not in tables:
        raise InputError(f"{path} is a DuckDB database but not a calset catalog: name another file with --catalog")
    rows = con.execute("SELECT number, calset_version FROM migrations ORDER BY number DESC LIMIT 1").fetchall()
    found, writer = rows[0] if rows else (0, "?")
    if found > SCHEMA_VERSION:
        raise SchemaTooNew(
            f"{path} has catalog schema {found}, written by calset {writer}; calset {calset_version()} knows schema "
            f"{SCHEMA_VERSION}: upgrade with pip install -U calset"
        )
    return found


def migrate(con: duckdb.DuckDBPyConnection, path: str) -> int:
    """Bring an open, writable catalog to ``SCHEMA_VERSION``; returns the number of migrations applied.

    Raises:
        InputError, SchemaTooNew: see ``schema_version``.
    """
    current = schema_version(con, path)
    pending = [migration for migration in MIGRATIONS if migration.number > current]
    for migration in pending:
        con.execute("BEGIN")
        migration.apply(con)
        con.execute(
            "INSERT INTO migrations VALUES (?, ?, ?, ?, ?)",
            [migration.number, migration.name, utc_now(), calset_version(), duckdb.__version__],
        )
        con.execute("COMMIT")
        con.execute("CHECKPOINT")
    return len(pending)


def calset_version() -> str:
    """The installed calset's version; "0+source" for a bare source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("calset")
    except PackageNotFoundError:
        return "0+source"

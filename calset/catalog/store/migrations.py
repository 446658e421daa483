"""Numbered migrations: how a catalog file gets from any older schema to this calset's.

A new file gets the present schema at once; the steps are for older files, which are copied before the first one. Each
step is one transaction that also records its own name, followed by a checkpoint, so a kill at any moment leaves a file
that the next open carries on with. Must not know: how files are opened or locked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from calset.catalog.records import utc_now
from calset.catalog.store import schema
from calset.catalog.store.backup import keep_copy
from calset.errors import CatalogUpgraded, InputError, SchemaTooNew


def _nothing(con: duckdb.DuckDBPyConnection) -> None:
    """For a step that needs no statement: the first tables, which every older file has, and steps for a view only."""


def _builder_tables(con: duckdb.DuckDBPyConnection) -> None:
    for table in ("decisions", "contaminations", "judgements"):
        con.execute(schema.create_table(table))
    for column in ("sampling_from", "template_options", "engine_options"):
        con.execute(f"ALTER TABLE runs ADD COLUMN {column} JSON")


def _subset_origin(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("ALTER TABLE subsets ADD COLUMN origin JSON")


def _verdicts_beside_traces(con: duckdb.DuckDBPyConnection) -> None:
    for column in ("pool_key", *(c for c in schema.TABLES["traces"] if c.startswith("first_"))):
        con.execute(f"ALTER TABLE traces ADD COLUMN {column} {schema.TABLES['traces'][column]}")
    con.execute("""
        UPDATE traces SET pool_key = ('0x' || left(sha256(concat_ws(
            chr(10), traces.problem_id, r.model, r.model_revision, r.kind)), 15))::BIGINT
        FROM runs r WHERE r.run_id = traces.run_id
    """)
    con.execute("""
        UPDATE traces SET first_verdict = g.verdict, first_extracted = g.extracted, first_grader = g.grader,
            first_detail = g.detail, first_graded_at = g.graded_at
        FROM grades g WHERE g.seq = 0 AND g.trace_id = traces.trace_id AND g.attempt = traces.attempt
    """)
    con.execute("DROP VIEW IF EXISTS pass_rates")


def _published_rows(con: duckdb.DuckDBPyConnection) -> None:
    con.execute(schema.create_table("published_rows"))


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step from the schema before it; ``apply`` runs inside a transaction."""

    number: int
    name: str
    apply: Callable[[duckdb.DuckDBPyConnection], object] = _nothing


# Whatever changes in ``schema`` needs a step here: a table's change an ``apply`` that makes it (a new column is added
# last, as rows are inserted by position), a view's change none.
MIGRATIONS: Sequence[Migration] = (
    Migration(1, "first_tables"),
    Migration(2, "builder_tables", _builder_tables),
    Migration(3, "subset_origin", _subset_origin),
    Migration(4, "verdicts_beside_traces", _verdicts_beside_traces),
    Migration(5, "published_rows", _published_rows),
)
SCHEMA_VERSION = MIGRATIONS[-1].number


def schema_version(con: duckdb.DuckDBPyConnection, path: str) -> int:
    """The schema of an open catalog; 0 for an empty database.

    Raises:
        InputError: the database holds tables, but none of a calset catalog.
        SchemaTooNew: a newer calset wrote it.
    """
    # Asked at every opening: listing the tables first would take ten times as long. Not ORDER BY ... LIMIT 1: in a
    # table that rows were deleted from, DuckDB 1.5.6 and 2.0.0 answer that wrongly.
    last = """
        SELECT number, calset_version FROM migrations
        WHERE number = (SELECT max(number) FROM migrations) AND (SELECT count(*) FROM meta) >= 0
    """
    try:
        rows = con.execute(last).fetchall()
    except (duckdb.CatalogException, duckdb.BinderException):
        if not con.execute("SELECT 1 FROM duckdb_tables() WHERE NOT internal LIMIT 1").fetchall():
            return 0
        raise InputError(
            f"{path} is a DuckDB database but not a calset catalog: name another file with --catalog"
        ) from None
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
        CatalogError: no room for the copy of the older file.

    Warns:
        CatalogUpgraded: the file was of an older schema; says where its copy is.
    """
    current = schema_version(con, path)
    pending = [migration for migration in MIGRATIONS if migration.number > current]
    if current == 0 and pending:
        _in_transaction(con, lambda: _create(con, pending))
    elif pending:
        con.execute("CHECKPOINT")  # so that the copy needs no log beside it
        copy = keep_copy(Path(path), current)
        warnings.warn(
            f"{path} is upgraded from catalog schema {current} to {SCHEMA_VERSION}; as it was, it is kept as {copy}: "
            "delete that when you are sure",
            CatalogUpgraded,
            stacklevel=2,
        )
        for migration in pending:
            _in_transaction(con, lambda migration=migration: _step(con, migration, last=migration is pending[-1]))
    return len(pending)


def _in_transaction(con: duckdb.DuckDBPyConnection, work: Callable[[], None]) -> None:
    con.execute("BEGIN")
    work()
    con.execute("COMMIT")
    con.execute("CHECKPOINT")


def _create(con: duckdb.DuckDBPyConnection, migrations: Sequence[Migration]) -> None:
    """A new file: the present schema at once, with every step that it no longer needs recorded."""
    for table in schema.TABLES:
        con.execute(schema.create_table(table))
    _replace_views(con)
    con.execute("INSERT INTO meta VALUES ('format', 'calset catalog'), ('created_at', ?)", [utc_now().isoformat()])
    for migration in migrations:
        _record(con, migration)


def _step(con: duckdb.DuckDBPyConnection, migration: Migration, *, last: bool) -> None:
    migration.apply(con)
    # Only at the end: a view of the present schema may name columns that a later step adds.
    if last:
        _replace_views(con)
    _record(con, migration)


def _replace_views(con: duckdb.DuckDBPyConnection) -> None:
    for view in schema.VIEWS:
        con.execute(schema.create_view(view))


def _record(con: duckdb.DuckDBPyConnection, migration: Migration) -> None:
    con.execute(
        "INSERT INTO migrations VALUES (?, ?, ?, ?, ?)",
        [migration.number, migration.name, utc_now(), calset_version(), duckdb.__version__],
    )


def calset_version() -> str:
    """The installed calset's version; "0+source" for a bare source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("calset")
    except PackageNotFoundError:
        return "0+source"

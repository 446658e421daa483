"""One SQL question or transaction on an open connection: that it only reads, that it is committed whole, its answer.

Must not know: files, tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb

from calset.catalog.store.values import clean, identifier
from calset.errors import InputError
from calset.io.jsonable import jsonable

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Result:
    """What a query returned: column names, their DuckDB types, rows in order; ``truncated`` when a limit cut it."""

    columns: list[str]
    types: list[str]
    rows: list[tuple[Any, ...]]
    truncated: bool = False

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as JSON-able dicts; of two columns with one name the last counts."""
        return [dict(zip(self.columns, map(jsonable, row), strict=True)) for row in self.rows]


@contextmanager
def registered(con: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> Iterator[None]:
    """Let a connection know an Arrow table by a name while the block lasts."""
    con.register(name, table)
    try:
        yield
    finally:
        con.unregister(name)


@contextmanager
def transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    con.execute("BEGIN")
    try:
        yield
    except BaseException:
        with suppress(duckdb.Error):
            con.execute("ROLLBACK")
        raise
    con.execute("COMMIT")


def in_memory(names: Sequence[str], types: Sequence[str], rows: pa.Table) -> duckdb.DuckDBPyRelation:
    """An Arrow table as a relation of its own connection, which the relation keeps alive."""
    con = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"})
    # SQL may name two columns alike, a table may not.
    unique = [name if name not in names[:i] else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]
    con.register("answer", rows.rename_columns(unique))
    there = [str(kind) for kind in con.sql("FROM answer").types]
    # Arrow knows neither JSON nor HUGEINT nor UUID: what came as text or decimal goes back to its type.
    quoted = [identifier(name) for name in unique]
    columns = [q if was == now else f"{q}::{was} AS {q}" for q, was, now in zip(quoted, types, there, strict=True)]
    return con.sql(f"SELECT {', '.join(columns)} FROM answer")


def check_select(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse anything but one statement that reads.

    Why besides the read-only connection: SET, ATTACH, CALL, temporary tables and transactions would pass that.

    Raises:
        InputError: no statement, several, or one that is not a SELECT.
        duckdb.ParserException: not SQL.
    """
    statements = con.extract_statements(clean(sql))
    if len(statements) != 1:
        raise InputError(f"one SELECT statement is wanted, not {len(statements)}")
    kind = statements[0].type
    if kind not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        name = str(kind).rsplit(".", 1)[-1]
        raise InputError(f"only SELECT statements are answered (the catalog is open read-only), not {name}")

"""Walls between calset and a catalog file that somebody else made: its rows are data, its definitions are never run.

Why: a view, a macro, a default, a generated column or a trigger is SQL of the file's author, and reading or writing the
catalog would run that SQL. So what may run is refused by name before the first statement that could meet it, and
``trace``, ``problem``, ... are calset's own definitions whatever the file calls so.

All of this looks at DuckDB's lists of entries, with DuckDB's own schema before the file's in the search path: there no
macro and no type of the file has a say. Must not know: files, locks, modes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import duckdb

from calset.catalog.store import migrations, schema
from calset.catalog.store.values import identifier
from calset.errors import InputError

_VIEWS_OF_OLD = ("pass_rates",)  # of older schemas, dropped by an upgrade


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a catalog file that calset refuses: what it is, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of a database: its kind, schema and name, the table that it belongs to, its SQL or expressions."""

    kind: str
    schema: str
    name: str
    table: str | None
    sql: str


def check(con: duckdb.DuckDBPyConnection, path: str, *, extra_columns: bool = False, foreign: bool = False) -> int:
    """Refuse a catalog file that holds what would be run; returns the file's schema version, 0 for an empty database.

    Args:
        path: the file as messages name it.
        extra_columns: let plain columns of somebody's own in calset's tables pass.
        foreign: refuse by name whatever calset did not make, however harmless: the file's rows go into another catalog.

    Raises:
        InputError: the file holds something to refuse, or is no catalog; SchemaTooNew: a newer calset wrote it.
    """
    with built_ins_first(con) as database:
        entries = _entries(con, database)
        _refuse(path, _running(con, entries))
        version = migrations.schema_version(con, path)
        if version:
            _refuse(path, _columns(entries, version, extra_columns))
            if foreign:
                _refuse(path, _strangers(entries))
        return version


def findings(con: duckdb.DuckDBPyConnection) -> list[Finding]:
    """All that ``check`` refuses because DuckDB would run it; other columns than calset's are not among them."""
    with built_ins_first(con) as database:
        return list(_running(con, _entries(con, database)))


def strangers(con: duckdb.DuckDBPyConnection, database: str, kinds: Collection[str]) -> list[Finding]:
    """Whatever calset did not make in an attached database, of these kinds.

    Args:
        con: whose current database is another one, so that nothing of the attached one takes a name of DuckDB's.
    """
    return list(_strangers(_entries(con, database, kinds)))


def changed_views(con: duckdb.DuckDBPyConnection) -> list[str]:
    """calset's views that the file defines in another way or not at all.

    Not by their text alone: DuckDB 1.5 and 2 write one view in several ways, so equal plans are equal views too.
    """
    with built_ins_first(con) as database:
        differ = _texts_differ(con, _entries(con, database))
        if not differ:
            return []
        create_own_views(con)
        return [view for view in schema.VIEWS if view in differ and not _same_plan(con, database, view)]


def views_differ(con: duckdb.DuckDBPyConnection) -> bool:
    """Return True if a view of calset's has another text in the file, as after DuckDB 1.5 wrote it for DuckDB 2."""
    with built_ins_first(con) as database:
        return bool(_texts_differ(con, _entries(con, database, kinds=("view",))))


def create_own_views(con: duckdb.DuckDBPyConnection) -> None:
    """Create all of calset's views among this connection's own entries, which come before the file's.

    All of them: a view of the file's names those of the file.
    """
    for view in schema.VIEWS:
        con.execute(schema.create_view(view).replace(" VIEW ", " TEMP VIEW ", 1))


@contextmanager
def built_ins_first(con: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Let nothing of the file take the name of a function or type of DuckDB's; yields the database's name."""
    ((database,),) = con.execute("SELECT system.main.current_database()").fetchall()
    text = f"system.main,{identifier(database)}.main".replace("'", "''")
    con.execute(f"SET search_path = '{text}'")
    try:
        yield database
    finally:
        con.execute("RESET search_path")


def _refuse(path: str, found: Iterator[Finding]) -> None:
    for finding in found:
        raise InputError(f"{path} holds {finding.what}: {finding.remedy}")


# --- what there is -----------------------------------------------------------------------------------------------

_LISTED: Mapping[str, str] = {
    "schema": "SELECT 'schema', schema_name, schema_name, NULL, '' FROM duckdb_schemas() WHERE NOT internal",
    "table": "SELECT 'table', schema_name, table_name, NULL, sql FROM duckdb_tables() WHERE NOT internal",
    "view": "SELECT 'view', schema_name, view_name, NULL, sql FROM duckdb_views() WHERE NOT internal",
    "type": "SELECT 'type', schema_name, type_name, NULL, '' FROM duckdb_types() WHERE NOT internal",
    "sequence": "SELECT 'sequence', schema_name, sequence_name, NULL, '' FROM duckdb_sequences() WHERE true",
    # Of an index no more is needed than whether it refuses rows, or has an expression to run.
    "index": "SELECT 'index', schema_name, index_name, table_name, "
    "CASE WHEN is_unique THEN 'UNIQUE' WHEN contains(expressions, '(') THEN 'an expression' ELSE '' END "
    "FROM duckdb_indexes() WHERE true",
    "macro": "SELECT 'macro', schema_name, function_name, NULL, function_type FROM duckdb_functions() "
    "WHERE NOT internal",
    "trigger": "SELECT 'trigger', schema_name, trigger_name, table_name, '' FROM duckdb_triggers() WHERE NOT temporary",
}


def _entries(con: duckdb.DuckDBPyConnection, database: str, kinds: Collection[str] = tuple(_LISTED)) -> list[_Entry]:
    """What the file's database holds, apart from DuckDB's own."""
    if duckdb.__version__.startswith("1."):  # has no triggers
        kinds = [kind for kind in kinds if kind != "trigger"]
    sql = " UNION ALL ".join(f"{_LISTED[kind]} AND database_name = $db" for kind in kinds)
    return [_Entry(*row) for row in con.execute(sql, {"db": database}).fetchall()]


def _of_calset(entry: _Entry, names: Collection[str], kind: str) -> bool:
    return entry.kind == kind and entry.schema == "main" and entry.name in names


# --- what would be run -------------------------------------------------------------------------------------------


def _running(con: duckdb.DuckDBPyConnection, entries: Collection[_Entry]) -> Iterator[Finding]:
    """What reading or writing the catalog would run, or what would stand in the place of something else."""
    for entry in entries:
        shown = _shown(entry.name)
        if _of_calset(entry, schema.TABLES, "view"):
            yield Finding(f"a view {shown} where calset keeps a table", _DAMAGED)
        elif _of_calset(entry, schema.VIEWS, "table"):
            yield Finding(f"a table {shown} where calset has a view", f"{_drop('TABLE', entry)}, or {_DAMAGED}")
        elif _of_calset(entry, schema.TABLES, "table"):
            if odd := _odd_columns(entry):
                yield Finding(f"SQL in the definition of the table {shown} ({odd})", _DAMAGED)
        elif entry.kind == "trigger":
            yield Finding(f"the trigger {shown}", f"{_drop('TRIGGER', entry)}, or {_DAMAGED}")
        elif entry.kind == "index" and entry.table in schema.TABLES and entry.schema == "main" and entry.sql:
            what = f"the UNIQUE index {shown}" if entry.sql == "UNIQUE" else f"the index {shown} on an expression"
            yield Finding(what, f"{_drop('INDEX', entry)}, or {_DAMAGED}")
    yield from _shadows(con, entries)


def _shadows(con: duckdb.DuckDBPyConnection, entries: Collection[_Entry]) -> Iterator[Finding]:
    """Macros and types with the name of something of DuckDB's, which would be taken in its place."""
    for kind, names in (
        ("macro", "SELECT DISTINCT lower(function_name) FROM duckdb_functions() WHERE internal"),
        ("type", "SELECT DISTINCT lower(type_name) FROM duckdb_types() WHERE internal"),
    ):
        there = [entry for entry in entries if entry.kind == kind and entry.schema == "main"]
        if not there:
            continue
        own = {name for (name,) in con.execute(names).fetchall()}
        for entry in there:
            if entry.name.lower() in own:
                what = "function" if kind == "macro" else "type"
                yield Finding(
                    f"the {kind} {_shown(entry.name)}, which hides DuckDB's {what} of that name",
                    f"{_drop(_dropped(entry), entry)}, or {_DAMAGED}",
                )


_DAMAGED = "use another copy of the file"


def _drop(kind: str, entry: _Entry) -> str:
    """The statement that takes an entry out of the file, in words."""
    on = f" ON {identifier(entry.table)}" if kind == "TRIGGER" and entry.table else ""
    place = identifier(entry.name) if entry.schema in ("main", entry.name) else _place(entry)
    cascade = " CASCADE" if kind == "SCHEMA" else ""
    return f"in DuckDB, {_printable(f'DROP {kind} {place}{on}{cascade}')} takes it out"


def _place(entry: _Entry) -> str:
    return f"{identifier(entry.schema)}.{identifier(entry.name)}"


def _dropped(entry: _Entry) -> str:
    """The kind of an entry as DROP names it."""
    return "MACRO TABLE" if entry.kind == "macro" and entry.sql == "table_macro" else entry.kind.upper()


def _shown(name: str) -> str:
    return _printable(name) if re.fullmatch(r"\w+", name) else _printable(repr(name))


def _printable(text: str) -> str:
    """A text of the file's, on one line and short."""
    short = text if len(text) <= 120 else f"{text[:119]}…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in short)


# --- columns -----------------------------------------------------------------------------------------------------

# A column as DuckDB writes it where nothing but a name and a type was given. The compression decides nothing.
_PLAIN = re.compile(r'(?:"(?P<quoted>[A-Za-z_]\w*)"|(?P<name>[A-Za-z_]\w*)) (?P<kind>"?[A-Za-z]\w*"?(?:\[\])?)')
_COMPRESSION = re.compile(r" USING COMPRESSION \w+(?=,|\))", re.IGNORECASE)


def _columns_of(entry: _Entry) -> tuple[dict[str, str], list[str]]:
    """The plain columns of a table with their types, and whatever else its definition says."""
    plain: dict[str, str] = {}
    others = []
    inside = _COMPRESSION.sub("", entry.sql).partition("(")[2].rpartition(")")[0]
    for piece in inside.split(", "):
        if found := _PLAIN.fullmatch(piece):
            plain[found["quoted"] or found["name"]] = found["kind"].strip('"').upper()
        else:
            others.append(piece)
    return plain, others


def _odd_columns(entry: _Entry) -> str:
    """What a table's definition says beyond names and types: defaults, generated columns, checks, keys, collations."""
    return ", ".join(_printable(piece) for piece in _columns_of(entry)[1])


def _columns(entries: Collection[_Entry], version: int, extra_columns: bool) -> Iterator[Finding]:
    """Tables and columns that are not those of the schema; a file of an older one may lack some."""
    present = version == migrations.SCHEMA_VERSION
    tables = {entry.name: entry for entry in entries if _of_calset(entry, schema.TABLES, "table")}
    for table, columns in schema.TABLES.items():
        if table not in tables:
            if present:
                yield Finding(f"no table {table}", f"calset doctor says what else is missing; {_DAMAGED}")
            continue
        there, _ = _columns_of(tables[table])
        for name, kind in columns.items():
            if name not in there and present:
                yield Finding(f"a table {table} without the column {name}", _DAMAGED)
            elif there.get(name, kind) != kind:
                said = f"a table {table} whose column {name} is {_printable(there[name])} and not {kind}"
                yield Finding(said, _DAMAGED)
        for name in there.keys() - columns.keys():
            if present and not extra_columns:
                drop = f"in DuckDB, ALTER TABLE {table} DROP {identifier(name)} takes it out"
                yield Finding(f"a column {_shown(name)} in the table {table}, which is not calset's", drop)


def _strangers(entries: Collection[_Entry]) -> Iterator[Finding]:
    """Whatever calset did not make. The views of the file's schema are none, and are never read."""
    views = (*schema.VIEWS, *_VIEWS_OF_OLD)
    for entry in entries:
        if _of_calset(entry, schema.TABLES, "table") or _of_calset(entry, views, "view"):
            continue
        what = f"the {entry.kind} {_shown(entry.name)}, which is not calset's"
        yield Finding(what, _drop(_dropped(entry), entry))


# --- views -------------------------------------------------------------------------------------------------------


def _texts_differ(con: duckdb.DuckDBPyConnection, entries: Collection[_Entry]) -> set[str]:
    """calset's views whose text in the file is not the one that this DuckDB writes for calset's definition."""
    there = {entry.name: _body(entry) for entry in entries if _of_calset(entry, schema.VIEWS, "view")}
    written = _rewritten(con, list(schema.VIEWS.values()))
    differ = {view for view, text in zip(schema.VIEWS, written, strict=True) if there.get(view) != text}
    ours = {view: text for view, text in zip(schema.VIEWS, written, strict=True) if view in differ}
    if not differ or any(not there.get(view) for view in differ):
        return differ
    # DuckDB 1.5 writes a text that it has read from its own writing in yet another way, once.
    with suppress(duckdb.Error):  # not a SELECT
        again = zip(ours, _rewritten(con, list(ours.values())), _rewritten(con, [there[v] for v in ours]), strict=True)
        return {view for view, mine, its in again if mine != its}
    return differ


def _body(entry: _Entry) -> str:
    """The SELECT of a view; nothing where the view renames its columns."""
    found = re.fullmatch(rf'CREATE VIEW "?{re.escape(entry.name)}"? AS (.+);', entry.sql, re.DOTALL)
    return found[1] if found else ""


def _rewritten(con: duckdb.DuckDBPyConnection, texts: list[str]) -> list[str]:
    """SELECT statements as DuckDB writes them itself."""
    sql = "SELECT json_deserialize_sql(json_serialize_sql(text)) FROM (SELECT unnest(?::VARCHAR[]) AS text)"
    return [text for (text,) in con.execute(sql, [texts]).fetchall()]


def _same_plan(con: duckdb.DuckDBPyConnection, database: str, view: str) -> bool:
    """Return True if DuckDB would do the same for the file's view as for calset's own, to the last column."""
    seen = []
    for place in (f"{identifier(database)}.main", "temp.main"):
        name = f"{place}.{identifier(view)}"
        try:
            columns = con.execute(f"DESCRIBE {name}").fetchall()
            plan = con.execute(f"EXPLAIN (FORMAT JSON) SELECT * FROM {name}").fetchall()
        except duckdb.Error:  # it is not there, or names what is not
            return False
        seen.append((columns, _without_guesses(json.loads(plan[0][1]))))
    return seen[0] == seen[1]


def _without_guesses(plan: Any) -> Any:
    """A plan without the estimated numbers of rows."""
    if isinstance(plan, dict):
        return {key: _without_guesses(value) for key, value in plan.items() if key != "Estimated Cardinality"}
    return [_without_guesses(value) for value in plan] if isinstance(plan, list) else plan

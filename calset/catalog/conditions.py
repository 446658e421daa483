"""Whether a user's condition gives the same answer tomorrow, in another process, and on a copy of the catalog.

DuckDB's own parser reads the condition, so that strings, comments and quoted names are what DuckDB takes them for.
Must not know: recipes, the catalog's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import duckdb

from calset.errors import InputError

# Values that SQL spells without parentheses. rowid is the order of insertion, which a copy need not keep.
_VALUES = re.compile(r"current_\w+|localtime|localtimestamp|rowid", re.IGNORECASE)
# DuckDB calls these CONSISTENT, yet they read the clock, differ between versions (hash does; md5 and sha256 do not),
# or are macros that add floating-point numbers.
_MISLABELLED = {
    "age", "current_localtime", "current_localtimestamp", "timezone", "hash", "version", "geomean", "geometric_mean",
}  # fmt: skip
# The aggregates that give the same whatever the order of rows. All others are refused: most keep an order (an ORDER BY
# inside may have ties), choose among equals, or add floating-point numbers.
_ORDER_FREE = {
    "count", "count_star", "count_if", "countif", "regr_count", "min", "max", "bool_and", "bool_or", "bit_and",
    "bit_or", "bit_xor", "bitstring_agg", "median", "quantile", "quantile_cont", "quantile_disc", "mad",
}  # fmt: skip
# Free too, but only of whole numbers and decimals: of floating-point ones the last digit depends on the order of
# adding, and so on the number of threads.
_SUMS = {"sum", "sum_no_overflow", "avg", "mean"}
_EXACT_TYPES = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "BOOLEAN", "DECIMAL"}
_WHOLE_COLUMNS = {"sample_index", "attempt", "k", "n_prompt_tokens", "n_tokens", "n_reasoning_tokens", "max_tokens"}
# The window functions that give equals the same. The others tell them apart by the order in which rows happen to come,
# an ORDER BY or not: it may have ties.
_RANKS = {"rank", "rank_dense", "dense_rank", "percent_rank", "cume_dist"}
# ASOF takes one of several equally near rows, POSITIONAL goes by the rows' order.
_JOINS = {"REGULAR", "NATURAL", "CROSS", "DEPENDENT"}
# Any other table function tells about this process or its files, or runs SQL out of a string.
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "repeat", "json_each", "json_tree"}


def require_stable(
    con: duckdb.DuckDBPyConnection, sql: str, *, views: Collection[str] = (), not_content: Collection[str] = ()
) -> None:
    """Refuse a SELECT whose rows may differ from run to run over the same content.

    Args:
        views: those that are known to be stable; any other, DuckDB's own too, may say something else tomorrow.
        not_content: tables that tell about the file and not about what it holds.

    Raises:
        InputError: naming what may not be used.
        duckdb.Error: DuckDB cannot read it.
    """
    ((text,),) = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise InputError(f"--where cannot be checked: {str(tree.get('error_message')).splitlines()[0]}")
    unstable = _unstable_functions(con)
    nodes = list(_nodes(tree))
    renamed = {str(name).lower() for node in nodes for name in _names_given(node)}
    other = _views(con) - {name.lower() for name in views} | set(not_content)
    for node in nodes:
        found = _unstable(node, unstable) or _inexact(node, _WHOLE_COLUMNS - renamed) or _unknown(node, other)
        if found:
            raise InputError(f"--where may not use {found}: a selection must be the same tomorrow")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree, without recursion: a long chain of ORs is a deep tree."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield item
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _unstable(node: dict[str, Any], functions: set[str]) -> str | None:
    """What makes one node of the parse tree unstable, in the user's words."""
    kind, name = node.get("type"), str(node.get("function_name", "")).lower()
    if name in functions:
        return name
    if node.get("class") == "WINDOW":
        if name not in _RANKS | _ORDER_FREE | _SUMS:
            return f"{name} as a window (rank() gives equals the same)"
        if any(str(node.get(end)).endswith("_ROWS") for end in ("start", "end")):
            return "a window of ROWS (one of RANGE takes equals together)"
    if kind == "JOIN" and node.get("ref_type") not in _JOINS:
        return f"{node.get('ref_type')} JOIN"
    if kind == "OPERATOR_CAST" and ("TIME ZONE" in _cast_type(node) or _cast_type(node).endswith("TZ")):
        return "a time zone (it is the machine's)"
    if kind == "TABLE_FUNCTION":
        called = str(node.get("function", {}).get("function_name", "")).lower()
        return None if called in _TABLE_FUNCTIONS else called
    if kind == "COLUMN_REF":
        return next((n for n in node.get("column_names", ()) if _VALUES.fullmatch(n)), None)
    if kind in ("LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER"):
        return "LIMIT or OFFSET"
    if kind == "DISTINCT_MODIFIER" and node.get("distinct_on_targets"):
        return "DISTINCT ON"
    return "SAMPLE" if node.get("sample") else None


def _inexact(node: dict[str, Any], whole_columns: set[str]) -> str | None:
    """A sum of what may be floating-point numbers, in the user's words."""
    name = str(node.get("function_name", "")).lower()
    if name not in _SUMS or all(_is_exact(argument, whole_columns) for argument in _arguments(node)):
        return None
    return f"{name} of what may be no whole number (median(x) or {name}(x::DECIMAL(18, 9)) is exact)"


def _arguments(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call, as DuckDB 1.5 and as 2 write them."""
    return [*node.get("children", ()), *(argument["expression"] for argument in node.get("arguments", ()))]


def _is_exact(node: dict[str, Any], whole_columns: set[str]) -> bool:
    """Whether an expression is surely a whole number or a decimal: a column of the view, a cast, a constant."""
    if node.get("class") == "COLUMN_REF":
        return str(node.get("column_names", [""])[-1]).lower() in whole_columns
    if node.get("class") == "CAST":
        return _cast_type(node) in _EXACT_TYPES
    if node.get("class") == "CONSTANT":
        there = node.get("value", {}).get("type", {}).get("id") or node.get("literal", {}).get("kind")
        return str(there).upper() in _EXACT_TYPES
    return False


def _cast_type(node: dict[str, Any]) -> str:
    """What a cast makes, as DuckDB 1.5 and as 2 write it."""
    return str(node.get("cast_type", {}).get("id") or node.get("type_expr", {}).get("type_name")).upper()


def _unknown(node: dict[str, Any], names: set[str]) -> str | None:
    """A view or table that is no content of the catalog, in the user's words."""
    if node.get("type") != "BASE_TABLE":
        return None
    name = str(node.get("table_name")).lower()
    outside = str(node.get("schema_name")).lower() not in ("", "main")
    return f"the view or table {name} (write what it selects)" if outside or name in names else None


def _views(con: duckdb.DuckDBPyConnection) -> set[str]:
    return {name for (name,) in con.execute("SELECT lower(view_name) FROM duckdb_views()").fetchall()}


def _names_given(node: dict[str, Any]) -> list[Any]:
    """Names that a query gives to columns of its own: they hide those of the view."""
    return [node.get("alias"), *(node.get("column_name_alias") or ()), *(node.get("aliases") or ())]


def _unstable_functions(con: duckdb.DuckDBPyConnection) -> set[str]:
    """The functions that DuckDB does not call CONSISTENT, those it mislabels, the aggregates that are not known to be
    free of the rows' order, and the macros that use one of them."""
    known = _ORDER_FREE | _SUMS | _RANKS
    macros, found, zones, others = [], set(_MISLABELLED), set(), set()
    for name, kind, stability, definition, internal, zoned in con.execute(_FUNCTIONS).fetchall():
        # From DuckDB 2.0.1 on, + is CONSISTENT but for moments of the machine's time zone, which no condition can make.
        if zoned:
            zones.add(name)
            continue
        others.add(name)
        if definition is not None and internal:
            macros.append((name, set(re.findall(r"\w+", definition))))
            continue
        # Of somebody's own macro a copy of the catalog may have another definition, or none.
        steady = definition is None and stability in (None, "CONSISTENT")
        if not steady or (kind == "aggregate" and name not in known):
            found.add(name)
    found |= zones - others  # what is only about moments of the machine's time zone
    # assert_true and json_group_object call error(), which only ever stops a query.
    unsure = found - {"error"} | {"current_timestamp", "current_user"}
    return found | {name for name, words in macros if words & unsure}


# The last column: whether it takes or gives moments of the machine's time zone.
_FUNCTIONS = """
    SELECT lower(function_name), function_type, stability, lower(macro_definition), internal,
        regexp_matches(concat_ws(' ', return_type, parameter_types), 'WITH TIME ZONE|TIMESTAMPTZ')
    FROM duckdb_functions()
"""

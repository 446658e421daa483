"""Whether a user's condition gives the same answer tomorrow, in another process, and on a copy of the catalog.

DuckDB's own parser reads the condition, so that strings, comments and quoted names are what DuckDB takes them for.
Must not know: recipes, the catalog's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import duckdb

from calset.errors import InputError

# Values that SQL spells without parentheses. rowid is the order of insertion, which a copy need not keep.
_VALUES = re.compile(r"current_\w+|localtime|localtimestamp|rowid", re.IGNORECASE)
# DuckDB calls these CONSISTENT, yet they read the clock, depend on the order of rows (an ORDER BY inside may have
# ties), or are promised to no other version (hash; md5 and sha256 are).
_MISLABELLED = {
    "age", "current_localtime", "current_localtimestamp", "any_value", "arbitrary", "first", "last",
    "reservoir_quantile", "arg_max", "arg_min", "argmax", "argmin", "max_by", "min_by", "arg_max_null", "arg_min_null",
    "arg_max_nulls_last", "arg_min_nulls_last", "mode", "histogram", "approx_quantile", "approx_top_k",
    "approx_count_distinct", "list", "array_agg", "string_agg", "group_concat", "listagg", "hash",
}  # fmt: skip
_ORDERED_WINDOWS = {"row_number", "ntile", "lag", "lead", "first_value", "last_value", "nth_value"}
# Any other table function tells about this process or its files, or runs SQL out of a string.
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "repeat", "json_each", "json_tree"}


def require_stable(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse a SELECT whose rows may differ from run to run over the same content.

    Raises:
        InputError: naming what may not be used.
        duckdb.Error: DuckDB cannot read it.
    """
    ((text,),) = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise InputError(f"--where cannot be checked: {str(tree.get('error_message')).splitlines()[0]}")
    unstable = _unstable_functions(con)
    for node in _nodes(tree):
        if found := _unstable(node, unstable):
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
    if name in _ORDERED_WINDOWS and not (node.get("orders") or node.get("arg_orders")):
        return f"{name} without ORDER BY"
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


def _unstable_functions(con: duckdb.DuckDBPyConnection) -> set[str]:
    """The functions that DuckDB does not call CONSISTENT, those it mislabels, and the macros that use one of them."""
    rows = con.execute("SELECT lower(function_name), stability, lower(macro_definition) FROM duckdb_functions()")
    macros, found = [], set(_MISLABELLED)
    for name, stability, definition in rows.fetchall():
        if definition is not None:
            macros.append((name, set(re.findall(r"\w+", definition))))
        elif stability not in (None, "CONSISTENT"):
            found.add(name)
    # assert_true and json_group_object call error(), which only ever stops a query.
    unsure = found - {"error"} | {"current_timestamp", "current_user"}
    return found | {name for name, words in macros if words & unsure}

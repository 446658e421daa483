"""Refuse a user's condition whose answer DuckDB itself calls changeable, or leaves to the order of rows.

DuckDB's own parser reads the condition, so that strings, comments and quoted names are what DuckDB takes them for, and
DuckDB's own list of functions says which of them change. Must not know: recipes, the catalog's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from calset.errors import InputError

# Functions that SQL spells without parentheses; DuckDB lists some of them under another name.
_VALUES = re.compile(r"current_\w+|localtime|localtimestamp", re.IGNORECASE)
# DuckDB does not list by which aggregates the order of rows is seen, so these are named, and any other one needs an
# ORDER BY inside. (Sums of floating-point numbers differ in the last digit at most.)
_ORDER_FREE = {
    "count", "count_star", "count_if", "countif", "min", "max", "sum", "sum_no_overflow", "avg", "mean", "fsum", "favg",
    "kahan_sum", "sumkahan", "product", "median", "quantile", "quantile_cont", "quantile_disc", "mad", "bool_and",
    "bool_or", "bit_and", "bit_or", "bit_xor", "bitstring_agg", "stddev", "stddev_pop", "stddev_samp", "variance",
    "var_pop", "var_samp", "sem", "covar_pop", "covar_samp", "corr", "regr_avgx", "regr_avgy", "regr_count",
    "regr_intercept", "regr_r2", "regr_slope", "regr_sxx", "regr_sxy", "regr_syy", "entropy", "skewness", "kurtosis",
    "kurtosis_pop", "approx_count_distinct",
}  # fmt: skip
# Table functions have no stability in DuckDB's list; all others tell about this process, or run SQL out of a string.
_STABLE_TABLES = {"json_each", "json_tree", "unnest"}


def require_stable(con: duckdb.DuckDBPyConnection, sql: str, *, views: Collection[str] = ()) -> None:
    """Refuse a SELECT that calls what changes, or that leaves an answer to the order of rows.

    Args:
        views: those that may be read; other views, and macros, of the file are not calset's and are refused.

    Raises:
        InputError: naming what may not be used, and what to write instead.
        duckdb.Error: DuckDB cannot read it.
    """
    ((text,),) = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise InputError(f"--where cannot be checked: {str(tree.get('error_message')).splitlines()[0]}")
    refused = _Refused.of(con, views)
    for node in _nodes(tree):
        if found := refused.by(node):
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


@dataclass(frozen=True, slots=True)
class _Refused:
    """Lower-case names: functions that change, aggregates that see the order of rows, strangers' macros and views."""

    changing: Collection[str]
    ordered: Collection[str]
    macros: Collection[str]
    views: Collection[str]

    @classmethod
    def of(cls, con: duckdb.DuckDBPyConnection, views: Collection[str]) -> _Refused:
        """Read DuckDB's list of functions, and the file's macros and views."""
        stable, changing, ordered, added = set(_STABLE_TABLES), set(), set(), set()
        built_in: list[tuple[str, str]] = []
        for name, kind, stability, definition, internal in con.execute(_FUNCTIONS).fetchall():
            if not internal:
                added.add(name)
            elif definition is not None:
                built_in.append((name, definition))
            else:
                # Of several functions of one name, such as + of numbers and of moments, one that does not change is
                # enough: the name does not tell which of them is called.
                (stable if stability == "CONSISTENT" else changing).add(name)
                if kind == "aggregate" and name not in _ORDER_FREE:
                    ordered.add(name)
        changing -= stable
        while more := {n for n, text in built_in if n not in changing and _calls(text) & (changing | ordered)}:
            changing |= more
        others = con.execute("SELECT lower(view_name) FROM duckdb_views() WHERE NOT internal").fetchall()
        return cls(changing, ordered, added, {name for (name,) in others} - {view.lower() for view in views})

    def by(self, node: dict[str, Any]) -> str | None:
        """What is refused in one node of a parse tree, and what to write instead."""
        name = str(node.get("function_name", "")).lower()
        if name in self.macros:
            return f"the macro {name} (write what it computes)"
        if name in self.changing:
            return f"{name} (write the value itself)"
        if node.get("type") == "BASE_TABLE" and (view := str(node.get("table_name")).lower()) in self.views:
            return f"the view {view} (write what it selects)"
        if node.get("type") == "COLUMN_REF":
            value = next((n for n in node.get("column_names", ()) if _VALUES.fullmatch(n)), None)
            return f"{value} (write the value itself)" if value else None
        if node.get("class") == "WINDOW":
            by_rows = any(str(node.get(end)).endswith("_ROWS") for end in ("start", "end"))
            if (by_rows or name not in _ORDER_FREE) and not (node.get("orders") or node.get("arg_orders")):
                return f"{name} over rows in no order (write ORDER BY inside OVER)"
        elif name in self.ordered and not (node.get("order_bys") or {}).get("orders"):
            return f"{name} over rows in no order (write ORDER BY inside its parentheses)"
        return None


_FUNCTIONS = """
    SELECT lower(function_name), function_type, stability, lower(macro_definition), internal FROM duckdb_functions()
    WHERE function_type <> 'pragma'
"""


def _calls(definition: str) -> set[str]:
    """The functions that a macro calls; one that SQL spells without parentheses as ``now``."""
    return set(re.findall(r'(\w+)"?\(', definition)) | ({"now"} if _VALUES.search(definition) else set())

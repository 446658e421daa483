"""Between Python values and what DuckDB stores: clean text, JSON, Arrow batches.

Must not know: tables or connections.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calset.errors import InputError
from calset.jsonable import jsonable

if TYPE_CHECKING:
    import pyarrow as pa


def clean(text: str) -> str:
    """Text that UTF-8 can hold: a surrogate pair becomes its character, a lone surrogate U+FFFD. NULs stay."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def clean_params(params: Iterable[Any]) -> list[Any]:
    """Query parameters as DuckDB takes them: an argument of a command line may hold bytes that are no UTF-8."""
    return [clean(param) if isinstance(param, str) else param for param in params]


def dump_json(value: Any) -> str:
    """JSON text that DuckDB accepts: clean strings, NaN and infinities as null, unknown objects as their str().

    Raises:
        InputError: nested deeper than Python's stack allows.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except RecursionError as error:
        raise InputError("a value is nested too deeply to be kept as JSON; flatten it") from error
    except ValueError:
        text = json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, default=_plain)
    return clean(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def arrow_batch(columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> pa.Table:
    """Rows as an Arrow table with the given DuckDB types; strings are cleaned on the way.

    Why Arrow: measured on 256 traces of 3,000 tokens, 4 times faster than DuckDB 2's Appender, and 1.5 has none.
    """
    import pyarrow as pa

    arrays = [_arrow_array(kind, [row[i] for row in rows]) for i, kind in enumerate(columns.values())]
    return pa.Table.from_arrays(arrays, names=list(columns))


def _arrow_array(kind: str, values: list[Any]) -> pa.Array:
    import pyarrow as pa

    if kind in ("VARCHAR", "JSON"):
        # large_string: a batch of long texts may pass the 2 GiB that plain string offsets can address.
        return pa.array([None if v is None else clean(v) for v in values], pa.large_string())
    if kind == "INTEGER[]":
        parts = [np.asarray(v, dtype=np.int32) for v in values]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))
    types = {
        "INTEGER": pa.int32(),
        "BIGINT": pa.int64(),
        "DOUBLE": pa.float64(),
        "BOOLEAN": pa.bool_(),
        "TIMESTAMP": pa.timestamp("us"),
    }
    return pa.array(values, types[kind])


def chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def identifier(name: str) -> str:
    """A name as SQL takes any, in quotes."""
    return '"' + name.replace('"', '""') + '"'

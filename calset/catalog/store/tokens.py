"""Token ids of some traces among millions, in bounded memory.

DuckDB keeps every block that it has read until the file is closed, and one trace in a hundred is a trace in nearly
every block. So the table is read in parts, and closed between them. Must not know: what the tokens are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import duckdb
import numpy as np

from calset.catalog.store.values import text_array, to_arrow
from calset.errors import InputError

Key = tuple[str, int]
Open = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]

_VECTOR = 2048  # rows that DuckDB reads together
_PART = 64 << 20  # bytes of the file, texts and all, that one part may touch

# First the row numbers: DuckDB skips vectors in which it wants no row, but not those in which it wants no id.
_ROWS = "SELECT k.rowid AS row FROM trace_tokens k JOIN wanted w USING (trace_id) WHERE w.attempt = k.attempt"
_TOKENS = """
    SELECT trace_id, attempt, prompt_ids, completion_ids FROM trace_tokens WHERE rowid IN (SELECT row FROM wanted)
"""


def read_tokens(path: Path, reading: Open, keys: Sequence[Key]) -> dict[Key, tuple[list[int], list[int]]]:
    """Read prompt and completion ids by (trace id, attempt).

    Args:
        path: the catalog.
        reading: opens it.

    Raises:
        InputError: a key without token ids: a damaged catalog, or one that calset did not write.
    """
    found: dict[Key, tuple[list[int], list[int]]] = {}
    for _ in range(2):  # once more where ``compact`` has put another file there between two parts
        missing = [key for key in keys if key not in found]
        for rows in _parts(path, reading, missing) if missing else ():
            with reading() as con:
                _want(con, row=to_arrow(rows))
                for trace, attempt, prompt, completion in con.execute(_TOKENS).fetchall():
                    found[trace, attempt] = prompt, completion
    for key in keys:
        if None in found.get(key, (None,)):
            raise InputError(f"{path} has no token ids of the trace {key[0]}: use another copy of the file")
    return found


def _parts(path: Path, reading: Open, keys: Sequence[Key]) -> list[np.ndarray]:
    """Return the row numbers of some keys, divided so that each part touches few enough vectors."""
    traces, attempts = zip(*keys, strict=True)
    with reading() as con:
        _want(con, trace_id=text_array(traces), attempt=to_arrow(np.array(attempts, np.int32)))
        rows = np.sort(con.execute(_ROWS).fetchnumpy()["row"])
        ((n_rows,),) = con.execute("SELECT count(*) FROM trace_tokens").fetchall()
    vectors = np.cumsum(np.diff(rows // _VECTOR, prepend=-1) > 0)
    each = max(1, int(_PART / (path.stat().st_size / max(n_rows, 1) * _VECTOR)))
    return np.split(rows, np.flatnonzero(np.diff(vectors // each)) + 1) if len(rows) else []


def _want(con: duckdb.DuckDBPyConnection, **columns: object) -> None:
    import pyarrow as pa

    con.register("wanted", pa.Table.from_arrays(list(columns.values()), names=list(columns)))

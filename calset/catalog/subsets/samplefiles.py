"""A subset's Parquet rows: one schema for whoever writes them, and reading them back within bounds.

Files may be anybody's: no more is read than their size and the subset's counts allow for (``io.parquet``), and only
rows of calset's own types leave this module. Must not know: manifests, catalogs, the Hub.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from calset.catalog.records import Sample
from calset.catalog.store.values import arrow_array, text_array
from calset.catalog.subsets.recipes import Kind
from calset.errors import InputError, first_line
from calset.io.parquet import Bounds, read_batches

if TYPE_CHECKING:
    import pyarrow as pa

    from calset.catalog.records import Subset

_REQUIRED = ("sample_id", "kind", "problem_id", "trace_id", "input_ids", "n_prompt_tokens")
_KINDS = list(get_args(Kind))
# Row groups small enough that a viewer or a partial reader need not fetch all token ids.
_ROW_GROUP = 500


def schema(columns: Collection[str] | None = None) -> pa.Schema:
    """Return the columns of a subset's rows: the sample's own first, then what is known of it (``facts.TEXTS``).

    Args:
        columns: only those of these names.
    """
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    fields = [
        ("sample_id", pa.string()),
        ("kind", pa.string()),
        ("problem_id", pa.string()),
        ("trace_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("n_prompt_tokens", pa.int32()),
        ("n_tokens", pa.int32()),  # completion tokens, as everywhere in calset
        ("question", pa.string()),
        ("answer", pa.string()),
        ("text", pa.string()),
        ("messages", pa.list_(message)),
        ("verdict", pa.string()),
        ("difficulty", pa.float64()),
        ("finish_reason", pa.string()),
        ("source", pa.string()),
    ]
    return pa.schema([(name, kind) for name, kind in fields if columns is None or name in columns])


def write_rows(table: pa.Table, path: Path) -> None:
    """Write rows as Parquet that viewers page through and that the Hub's storage shares between versions."""
    import pyarrow.parquet as pq

    pq.write_table(
        table,
        path,
        compression="zstd",
        row_group_size=_ROW_GROUP,
        use_content_defined_chunking=True,
        write_page_index=True,
    )


def sample_columns(samples: Sequence[Sample]) -> pa.Table:
    """Return the samples' own columns, the first of ``schema()``."""
    import pyarrow as pa

    ids = [np.asarray(s.input_ids, dtype=np.int32) for s in samples]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)]).astype(np.int32)
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    token_ids = pa.Array.from_buffers(pa.int32(), len(flat), [None, pa.py_buffer(flat)])
    buffers = [None, pa.py_buffer(offsets)]
    texts = {name: [getattr(s, name) for s in samples] for name in ("sample_id", "kind", "problem_id", "trace_id")}
    numbers = {
        "n_prompt_tokens": [s.n_prompt_tokens for s in samples],
        "n_tokens": [len(s.input_ids) - s.n_prompt_tokens for s in samples],
    }
    own = schema([*texts, "input_ids", *numbers])
    arrays = {
        **{name: text_array(values).cast(pa.string()) for name, values in texts.items()},
        "input_ids": pa.Array.from_buffers(pa.list_(pa.int32()), len(ids), buffers, children=[token_ids]),
        **{name: arrow_array("INTEGER", values) for name, values in numbers.items()},
    }
    return pa.Table.from_arrays([arrays[name] for name in own.names], schema=own)


# --- reading -----------------------------------------------------------------------------------------------------


def read_samples(data: Sequence[Path], n_samples: int, n_tokens: int) -> Iterator[Sample]:
    """Yield the samples of a subset's files in order.

    Args:
        n_samples, n_tokens: what the manifest says; files that hold more are refused before a column is read.

    Raises:
        InputError: rows that are no samples, or more of them.
    """
    number = 0
    for batch in read_batches(data, _REQUIRED, Bounds.of(data, n_samples, n_tokens)):
        if missing := sorted(set(_REQUIRED) - set(batch.schema.names)):
            raise InputError(f"cannot read {data[0]}: it has no column {missing[0]}; export the subset again")
        for row in batch.to_pylist():
            yield _sample(data[0], number, row)
            number += 1


def _sample(path: Path, number: int, row: Mapping[str, Any]) -> Sample:
    """One row as a sample; checked here, so that nothing but 32-bit token ids reaches the hash and a model."""
    token_ids, n_prompt = row["input_ids"], row["n_prompt_tokens"]
    texts = (row["sample_id"], row["problem_id"] or "", row["trace_id"] or "")
    good = {
        "input_ids": isinstance(token_ids, list) and all(_is_count(i, 2**31 - 1) for i in token_ids),
        "n_prompt_tokens": isinstance(token_ids, list) and _is_count(n_prompt, len(token_ids)),
        "kind": row["kind"] in _KINDS,
        "sample_id, problem_id or trace_id": all(isinstance(text, str) for text in texts),
    }
    for column, is_good in good.items():
        if not is_good:
            raise InputError(f"cannot read {path}: row {number} has no usable {column}; export the subset again")
    return Sample(row["sample_id"], token_ids, n_prompt, row["kind"], row["trace_id"], row["problem_id"])


def read_rows(subset: Subset, columns: Collection[str] | None = None) -> pa.Table:
    """Read rows of the files that a subset was read from, with calset's types; a missing column is all nulls.

    Args:
        columns: of ``schema()``; all of them when None.

    Raises:
        InputError: a column of another type, a difficulty that is none, more than the subset's counts allow for, or
            other samples than the subset's.
    """
    import pyarrow as pa

    data = subset.data_files
    wanted = schema(columns)
    asked = schema(["sample_id", *wanted.names])
    batches = []
    try:
        for batch in read_batches(data, asked.names, Bounds.of(data, subset.n_samples, subset.n_tokens)):
            there = dict(zip(batch.schema.names, batch.columns, strict=True))
            arrays = [there.get(f.name, pa.nulls(len(batch), f.type)).cast(f.type) for f in asked]
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=asked))
    except pa.ArrowException as error:
        raise InputError(f"cannot read {data[0]}: {first_line(error)}; export the subset again") from error
    table = pa.Table.from_batches(batches, schema=asked)
    if table["sample_id"].to_pylist() != [sample.sample_id for sample in subset.samples]:
        raise InputError(f"cannot read {data[0]}: it no longer holds the samples of {subset.ref}; export it again")
    if "difficulty" in asked.names and not _are_shares(table["difficulty"]):
        raise InputError(f"cannot read {data[0]}: a difficulty is not between 0 and 1; export the subset again")
    return table.select(wanted.names)


def _are_shares(values: pa.ChunkedArray) -> bool:
    """Return True if all numbers are between 0 and 1; NaN is not."""
    numbers = values.drop_null().to_numpy()
    return bool(np.all((numbers >= 0) & (numbers <= 1)))


def _is_count(value: Any, highest: int) -> bool:
    return type(value) is int and 0 <= value <= highest

"""Answers that leave calset as a stream: JSON lines, CSV, tab-separated text, Parquet.

Why: an answer may have millions of rows, and whoever reads it may be slow. Rows go out in batches, never all in memory;
and never while the catalog is open, or a pager left open would lock out a build: what goes to standard output waits in
a temporary file first. A file appears whole or not at all. Must not know: what was asked.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from calset.errors import InputError
from calset.io import terminal
from calset.io.files import whole_file
from calset.io.jsonable import jsonable

if TYPE_CHECKING:
    from calset.catalog.catalog import Catalog

Format = Literal["table", "jsonl", "csv", "parquet"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_BATCH = 4096  # rows fetched at a time
_SPOOL = 8 << 20  # bytes of an answer that stay in memory

_Write = Callable[[IO[str], Sequence[str], Iterator[Sequence[tuple[Any, ...]]]], None]


@dataclass(frozen=True, slots=True)
class Question:
    """A SELECT, its parameters, and how many rows of it are wanted."""

    sql: str
    params: Sequence[Any] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """How many rows were written; ``truncated`` when the limit cut the answer."""

    rows: int
    truncated: bool


def format_of(path: Path | None, given: str | None) -> str:
    """The format: the one given, else what the file's name says, else a table.

    Raises:
        InputError: Parquet without a file, or a file whose name says nothing.
    """
    if given is not None:
        if given == "parquet" and path is None:
            raise InputError("parquet needs a file: add -o FILE.parquet")
        return given
    if path is None:
        return "table"
    if path.suffix not in FORMATS:
        named = ", ".join(f"*{suffix}" for suffix in FORMATS)
        raise InputError(f"{path} does not say a format: name it {named}, or add --format")
    return FORMATS[path.suffix]


def print_answer(catalog: Catalog, question: Question, form: str) -> Written:
    """Stream an answer to standard output, whose strings are made harmless to a terminal (JSON keeps them as escapes).

    Raises:
        InputError, CatalogError: as ``Catalog.query``; nothing was printed.
    """
    with tempfile.SpooledTemporaryFile(_SPOOL, "w+", encoding="utf-8", newline="", errors="replace") as spool:
        written = _write(catalog, question, form, spool, harmless=True)
        spool.seek(0)
        while part := spool.read(1 << 20):
            sys.stdout.write(part)
    return written


def save_answer(catalog: Catalog, question: Question, form: str, path: Path) -> Written:
    """Write an answer to a file, in place of one that is there; the file appears whole or not at all.

    Raises:
        InputError, CatalogError: as ``Catalog.query``, or the file cannot be written; nothing was changed.
    """
    with whole_file(path) as draft:
        if form == "parquet":
            return _parquet(catalog, question, draft)
        with draft.open("w", encoding="utf-8", newline="", errors="replace") as file:
            return _write(catalog, question, form, file, harmless=False)


def _write(catalog: Catalog, question: Question, form: str, file: IO[str], *, harmless: bool) -> Written:
    write: _Write = {"jsonl": _jsonl, "csv": _csv_harmless if harmless else _csv, "table": _tabs}[form]
    with catalog.stream(question.sql, question.params, batch=_BATCH) as (names, batches):
        counted = _Counted(batches, question.limit)
        write(file, names, iter(counted))
    return Written(counted.rows, counted.truncated)


class _Counted:
    """Batches up to a limit, and how many rows that was."""

    def __init__(self, batches: Iterable[Sequence[tuple[Any, ...]]], limit: int | None) -> None:
        self._batches, self._limit = batches, limit
        self.rows, self.truncated = 0, False

    def __iter__(self) -> Iterator[Sequence[tuple[Any, ...]]]:
        for batch in self._batches:
            left = len(batch) if self._limit is None else self._limit - self.rows
            self.truncated = left < len(batch)
            self.rows += min(left, len(batch))
            if left:
                yield batch[:left]
            if self.truncated:
                return


def _jsonl(file: IO[str], names: Sequence[str], batches: Iterator[Sequence[tuple[Any, ...]]]) -> None:
    for batch in batches:
        file.writelines(terminal.json_line(dict(zip(names, row, strict=True))) for row in batch)


def _tabs(file: IO[str], names: Sequence[str], batches: Iterator[Sequence[tuple[Any, ...]]]) -> None:
    file.write("\t".join(map(terminal.cell, names)) + "\n")
    for batch in batches:
        file.writelines("\t".join(map(terminal.cell, row)) + "\n" for row in batch)


def _csv(
    file: IO[str],
    names: Sequence[str],
    batches: Iterator[Sequence[tuple[Any, ...]]],
    text: Callable[[str], str] = str,
) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(text, names))
    for batch in batches:
        writer.writerows([text(_csv_value(value)) for value in row] for row in batch)


def _csv_harmless(file: IO[str], names: Sequence[str], batches: Iterator[Sequence[tuple[Any, ...]]]) -> None:
    _csv(file, names, batches, terminal.clean)


def _csv_value(value: Any) -> str:
    """A value as CSV readers take it: nothing for NULL, true and false, ISO times, JSON for lists and structs."""
    if value is None:
        return ""
    plain = jsonable(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _parquet(catalog: Catalog, question: Question, path: Path) -> Written:
    """Parquet as exports have it: zstd, types from DuckDB through Arrow."""
    import pyarrow.parquet as pq

    rows, truncated = 0, False
    with catalog.stream_arrow(question.sql, question.params, batch=_BATCH) as reader:
        names = reader.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"two columns are named {twice[0]}, which Parquet cannot hold: name one with AS")
        with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
            for batch in reader:
                left = batch.num_rows if question.limit is None else question.limit - rows
                truncated = left < batch.num_rows
                rows += min(left, batch.num_rows)
                if left:
                    writer.write_batch(batch.slice(0, left))
                if truncated:
                    break
    return Written(rows, truncated)

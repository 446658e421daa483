"""Data files as streams of rows: JSON lines, JSON arrays, CSV, Parquet and plain text, also gzip and zstd, and folders.

Why apart: problems and text corpora are both read from such files, local or fetched from the Hub, and neither may hold
a file in memory. Must not know: what a column means, where a file came from.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from calset.errors import InputError, first_line

ROW_TYPES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
BATCH_ROWS = 256
CHUNK_CHARS = 1 << 20
MAX_ITEM_CHARS = 1 << 27  # of a line or an item of a JSON array: beyond it the text is taken to be broken
LARGEST_RATIO = 100  # of a packed document to its file: prose packs to a third, and to a tenth where it repeats itself

Row = dict[str, Any]
# Given a Parquet file's columns (name -> whether it is nested), those to read.
Choose = Callable[[Mapping[str, bool]], list[str]]
# Told of a line that is no row, by its number and why, where the others are to be read nevertheless.
Skip = Callable[[int, str], None]


def file_type(name: str | Path) -> str:
    """What a name says its file holds: ``.jsonl`` for ``a.jsonl.gz``; "" where it says nothing that is known."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2] if packed and len(suffixes) > 1 else "" if packed or not suffixes else suffixes[-1]
    return "" if packed and kind == ".parquet" else kind


def list_files(path: Path, types: Collection[str]) -> list[Path]:
    """The file itself, or a folder's files of these types, at any depth, by name; hidden ones are left out.

    Raises:
        InputError: there is no such file, or none of these types.
    """
    if os.path.isfile(path):  # Path.is_file raises where a name is too long
        return [path]
    if not os.path.isdir(path):
        raise InputError(f"no file {path}")
    found = [
        file
        for file in path.rglob("*")
        if file_type(file) in types and file.is_file() and not _hidden(file.relative_to(path))
    ]
    if not found:
        raise InputError(f"the folder {path} holds no {', '.join(types)} file (.gz and .zst may follow)")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_rows(
    path: Path, *, label: str | None = None, choose: Choose | None = None, skip: Skip | None = None
) -> Iterator[tuple[int, Row]]:
    """A file's rows with their numbers, from 1 (a line's number in JSON lines and CSV), read as they are asked for.

    Args:
        label: what errors call the file; its path when None.
        choose: which columns of a Parquet file to read; all when None. Other formats give all of a row.
        skip: told of each line of a JSON lines file and each item of a JSON array that is no JSON object, which is then
            left out; when None, it is an error. What ends the reading of an array, or of another format, is one always.

    Raises:
        InputError: not the format that the name says; names the file and the line.
    """
    name = label or str(path)
    kind = file_type(path)
    with _readable(name):
        if kind == ".parquet":
            yield from _parquet(path, name, choose)
        elif kind == ".csv":
            with open_text(path, newline="") as file:
                yield from _csv(file, name)
        else:
            array = kind == ".json" and _is_array(path)
            with open_text(path, errors="surrogateescape" if skip and not array else "strict") as file:
                yield from _json_array(file, name, skip) if array else _json_lines(file, name, skip)


def read_document(path: Path, *, label: str | None = None) -> str:
    """A plain-text file's whole text.

    Raises:
        InputError: it cannot be read, or is not UTF-8 text.
    """
    name = label or str(path)
    with _readable(name), open_text(path, encoding="utf-8") as file:
        if path.suffix.lower() not in COMPRESSIONS:
            return file.read()
        most = MAX_ITEM_CHARS + LARGEST_RATIO * path.stat().st_size
        text = file.read(most + 1)
        if len(text) > most:
            raise InputError(f"{name} unpacks to more than {most:,} characters: unpack it, or split it into files")
        return text


def _lines(file: TextIO, name: str) -> Iterator[str]:
    """A text's lines, none of them without an end."""
    number = 0
    while line := file.readline(MAX_ITEM_CHARS + 1):
        number += 1
        if len(line) > MAX_ITEM_CHARS:
            raise InputError(f"{name}:{number} is longer than {MAX_ITEM_CHARS:,} characters: it is no row")
        yield line


def count_rows(path: Path) -> int | None:
    """How many rows a file has, where its format says it without reading them (Parquet); else None."""
    if file_type(path) != ".parquet":
        return None
    import pyarrow.parquet as pq

    with _readable(str(path)), _parquet_errors(str(path)):
        return pq.read_metadata(path).num_rows


def open_text(path: Path, *, encoding: str = "utf-8-sig", newline: str | None = None, errors: str = "strict") -> TextIO:
    """A file as text, unpacked by its last suffix."""
    packing = path.suffix.lower()
    if packing == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding=encoding, newline=newline, errors=errors))
    if packing == ".zst":
        import pyarrow as pa

        packed = pa.input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(packed, encoding=encoding, newline=newline, errors=errors)
    return path.open(encoding=encoding, newline=newline, errors=errors)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What goes wrong below a format, as one line that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error.reason}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is not a whole gzip file: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or first_line(error)}") from error


def _json_lines(file: TextIO, name: str, skip: Skip | None = None) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_lines(file, name), 1):
        if not line.strip():
            continue
        try:
            row = _json_row(line)
        except (ValueError, RecursionError) as error:
            if skip is None:
                raise InputError(f"{name}:{number} is not {first_line(error)}") from error
            skip(number, f"is not {first_line(error)}")
        else:
            yield number, row


def _json_row(line: str) -> Row:
    """One line's object; the error says what the line is not."""
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes that are no UTF-8 came through as half surrogates
        raise ValueError("UTF-8 text") from error
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON: {first_line(error)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object but a {type(row).__name__}")
    return row


def _json_array(file: TextIO, name: str, skip: Skip | None = None) -> Iterator[tuple[int, Row]]:
    for number, row in enumerate(_array_items(file, name), 1):
        if isinstance(row, list):  # columns without names: they go by their place
            row = {str(place): value for place, value in enumerate(row)}
        if isinstance(row, dict):
            yield number, row
        elif skip is None:
            raise InputError(f"{name}: row {number} is not a JSON object but a {type(row).__name__}")
        else:
            skip(number, f"is not a JSON object but a {type(row).__name__}")


def _is_array(path: Path) -> bool:
    """Whether a ``.json`` file holds one array of rows; else it is JSON lines under another name."""
    with open_text(path) as file:
        while text := file.read(4096):
            if start := text.lstrip():
                return start[0] == "["
    return False


def _array_items(file: TextIO, name: str) -> Iterator[Any]:
    """The items of a JSON array, one after another; the buffer holds little more than one of them."""
    decoder = json.JSONDecoder()
    buffer, at, n = file.read(CHUNK_CHARS).lstrip()[1:], 0, 0
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if buffer[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            # An item that the buffer holds in part; the longer it is, the more is read at once.
            more = file.read(max(CHUNK_CHARS, len(buffer) - at))
            if not more or len(buffer) - at > MAX_ITEM_CHARS:
                raise InputError(f"{name}: row {n + 1} is not JSON: {first_line(error)}") from error
            buffer, at = buffer[at:] + more, 0
            continue
        n += 1
        yield item


def _csv(file: TextIO, name: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_ITEM_CHARS)
    reader = csv.DictReader(_lines(file, name), restkey="_rest")
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{name}:{reader.line_num} is not CSV: {first_line(error)}") from error


def _parquet(path: Path, name: str, choose: Choose | None) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet as pq

    number = 0
    # pyarrow would buffer whole row groups ahead: 75 MB where these settings take 27, for 200,000 rows in one group.
    # The size of a page still counts: about 1 MB as most programs write it, a whole row group as DuckDB does.
    with _parquet_errors(name), pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        names = {field.name: _is_nested(field.type) for field in file.schema_arrow}
        columns = choose(names) if choose else list(names)
        plain = {field.name: convert for field in file.schema_arrow if (convert := _plain(field.type)) is not None}
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, row | {name: convert(row[name]) for name, convert in plain.items() if name in row}


def _is_nested(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_nested(kind)


def _plain(kind: Any) -> Callable[[Any], Any] | None:
    """How a column's values become those that JSON has: a map is an object, a float32 the number that was written (0.1,
    not 0.10000000149011612). None where they are already."""
    import pyarrow.types as kinds

    if kinds.is_float32(kind) or kinds.is_float16(kind):
        import numpy as np

        narrow = np.float32 if kinds.is_float32(kind) else np.float16
        return lambda value: None if value is None else float(str(narrow(value)))
    if kinds.is_map(kind):
        inner = _plain(kind.item_type) or (lambda value: value)
        return lambda pairs: None if pairs is None else {str(key): inner(value) for key, value in pairs}
    if kinds.is_struct(kind):
        fields = {field.name: convert for field in kind if (convert := _plain(field.type)) is not None}
        if not fields:
            return None
        return lambda row: row and {n: fields[n](value) if n in fields else value for n, value in row.items()}
    if (kinds.is_nested(kind) and hasattr(kind, "value_type")) or kinds.is_dictionary(kind):
        inside = _plain(kind.value_type)
        if inside is None:
            return None
        if kinds.is_dictionary(kind):
            return inside
        return lambda items: items and [inside(item) for item in items]
    return None


@contextmanager
def _parquet_errors(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise InputError(f"cannot read {name} as Parquet: {first_line(error)}") from error

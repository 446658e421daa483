"""Parquet files that may be anybody's, read in batches and never beyond what the reader allows for.

A few kilobytes of Parquet can hold billions of values: equal ones are stored once with a count, and pages are packed.
So all sizes are added up before a column is read. A footer's counts may be wrong, and the library goes by those of each
page: the headers of the pages are read here first. A text that is repeated stands once, in a dictionary; it counts
as often as it could be meant there.
Must not know: what the columns mean.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from calset.errors import InputError, first_line
from calset.io.files import size

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 256
# Rows of token ids and texts unpack to 2 to 20 times their file, and to 1,000 times where all of them are one loop.
SLACK_BYTES, LARGEST_RATIO = 16 << 20, 256
TEXT_SLACK_BYTES = 256 << 20  # each value in a dictionary of texts counts as the longest one
FOOTER_BYTES, FOOTER_BYTES_PER_ROW = 1 << 20, 1 << 10
HEADER_BYTES = 1 << 20  # of a page, with its statistics

_TYPES = ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE", "BYTE_ARRAY")
# Plain, dictionary, run length. The others make texts out of parts of the text before, or allocate by their own data.
_ENCODINGS = (0, 2, 3, 8)
# The numbers of parquet.thrift. A page's type -> the field of its header that is the type's own, the encoding's in it.
_OWN = {0: (5, 2), 2: (7, 2), 3: (8, 4)}
_DICTIONARY = 2
_BY_DICTIONARY = (2, 8)  # encodings
_I32, _STRUCT = 5, 12
_DEEPEST = 8  # structs in a header; the format has 3


class Excess(ValueError):
    """A file holds more than its reader allows for, or hides how much it holds."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that files may hold together: rows, values in any one column, bytes of all columns unpacked."""

    n_rows: int
    n_values: int
    n_bytes: int

    @classmethod
    def of(cls, paths: Sequence[Path], n_rows: int, n_tokens: int) -> Bounds:
        """Take the counts that a manifest gives, but no more than files of this size can hold."""
        unpacked = SLACK_BYTES + LARGEST_RATIO * sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        return cls(min(n_rows, unpacked >> 10), min(n_rows + n_tokens, unpacked >> 2), unpacked)


def read_batches(paths: Sequence[Path], columns: Collection[str], bounds: Bounds) -> Iterator[pa.RecordBatch]:
    """Yield the rows of files, one file after another.

    Args:
        columns: those to read; a batch has those that its file has.

    Raises:
        InputError: a file cannot be read, or the files hold more than the bounds; no column was read then.
    """
    used = _Used(bounds)
    checked = [_check(path, columns, used) for path in paths]
    for path, names in zip(paths, checked, strict=True):
        with _errors(path), _open(path, bounds) as file:
            n_rows = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
                n_rows += len(batch)
                batch.validate(full=True)  # texts are UTF-8, which the library takes for granted
                yield batch
            if n_rows != file.metadata.num_rows:  # pyarrow 26 loses rows of some files without a word
                raise Excess(f"it gave {n_rows:,} of the {file.metadata.num_rows:,} rows that its footer counts")


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, MemoryError, ValueError, pa.ArrowException) as error:  # Excess is a ValueError
        raise InputError(f"cannot read {path}: {first_line(error)}; export the subset again") from error


def _open(path: Path, bounds: Bounds) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    # The lists in a footer are of row groups, which have a row, and of columns.
    longest = max(1000, bounds.n_rows + 1)
    return pq.ParquetFile(path, pre_buffer=False, thrift_container_size_limit=longest)


@dataclass(slots=True)
class _Used:
    """How much of the bounds is used; each ``add`` raises ``Excess`` beyond them."""

    bounds: Bounds
    n_rows: int = 0
    n_bytes: int = 0
    n_text_bytes: int = 0
    n_values: dict[str, int] = field(default_factory=dict)

    def add_rows(self, n: int) -> None:
        self.n_rows += n
        _require(n >= 0, "a count is negative")
        _require(self.n_rows <= self.bounds.n_rows, f"it holds {self.n_rows:,} rows", self.bounds.n_rows)

    def add_page(self, what: str, n_values: int, n_bytes: int) -> None:
        _require(min(n_values, n_bytes) >= 0, "a count is negative")
        self.n_values[what] = self.n_values.get(what, 0) + n_values
        self.n_bytes += n_bytes
        found = f"it holds {self.n_values[what]:,} values in {what}"
        _require(self.n_values[what] <= self.bounds.n_values, found, self.bounds.n_values)
        _require(self.n_bytes <= self.bounds.n_bytes, f"it unpacks to {size(self.n_bytes)}", self.bounds.n_bytes)

    def add_texts(self, n: int) -> None:
        self.n_text_bytes += n
        most = self.bounds.n_bytes + TEXT_SLACK_BYTES
        _require(self.n_text_bytes <= most, f"its texts may have {size(self.n_text_bytes)}", most)


def _require(holds: bool, found: str, most: int | None = None) -> None:
    if not holds:
        allowed = "" if most is None else f", and its manifest and its size allow for {most:,}"
        raise Excess(f"{found}{allowed}")


# --- before anything is read --------------------------------------------------------------------------------------


def _check(path: Path, columns: Collection[str], used: _Used) -> list[str]:
    """Add up what the pages of a file's columns hold; returns the columns that are there."""
    with _errors(path):
        if not os.path.isfile(path):
            raise FileNotFoundError(2, "no such file", str(path))  # also no pipe and no device, which would not end
        with path.open("rb") as stream:
            _check_footer(stream, used.bounds)
            with _open(path, used.bounds) as file:
                metadata, names = file.metadata, [name for name in file.schema_arrow.names if name in columns]
            for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
                used.add_rows(group.num_rows)
                for column in (group.column(i) for i in range(group.num_columns)):
                    if column.path_in_schema.split(".")[0] in names:
                        _add_chunk(stream, column, used)
        return names


def _check_footer(stream: IO[bytes], bounds: Bounds) -> None:
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - 8))
    length = int.from_bytes(stream.read(4), "little")
    if length > (most := FOOTER_BYTES + FOOTER_BYTES_PER_ROW * bounds.n_rows):
        raise Excess(f"its footer takes {size(length)}, and its manifest allows for {size(most)}")


def _add_chunk(stream: IO[bytes], column: Any, used: _Used) -> None:
    """Add up the pages of a column chunk, at least those that the library would read."""
    what = column.path_in_schema
    if column.physical_type not in _TYPES:
        raise Excess(f"its {what} is of a type that no subset has")
    is_text = column.physical_type == "BYTE_ARRAY"
    begins = [column.data_page_offset, *([column.dictionary_page_offset] if column.has_dictionary_page else [])]
    at = min([offset for offset in begins if offset and offset > 0], default=0)
    stop, seen, repeated, longest = at + column.total_compressed_size, 0, 0, 0
    # The library ends at the chunk's end or at its count of values, whichever comes first; both may be wrong.
    while at < stop or seen < column.num_values:
        header, length = _header(stream, at)
        kind, n_unpacked, n_packed = (header.get((number, _I32), -1) for number in (1, 2, 3))
        if n_packed < 0:
            raise Excess("a page has no size")
        if kind in _OWN:
            own, place = _OWN[kind]
            page = header.get((own, _STRUCT), {})
            n_values, encoding = page.get((1, _I32), -1), page.get((place, _I32))
            if encoding not in _ENCODINGS:
                raise Excess(f"its {what} is encoded in a way that calset does not read")
            used.add_page(f"the dictionary of {what}" if kind == _DICTIONARY else what, n_values, n_unpacked)
            if kind != _DICTIONARY:
                seen += n_values
                repeated += n_values * (encoding in _BY_DICTIONARY)
            elif is_text:
                stream.seek(at + length)
                longest = max(longest, _longest(stream.read(n_packed), column.compression, n_unpacked))
        at += length + n_packed
    used.add_texts(repeated * longest)


def _longest(packed: bytes, codec: str, n_unpacked: int) -> int:
    """The length of the longest text in a dictionary's page: texts one after another, each after its length."""
    import pyarrow as pa

    name = {"LZ4": "lz4_raw"}.get(codec, codec.lower())
    data = packed if codec == "UNCOMPRESSED" else pa.Codec(name).decompress(packed, n_unpacked, asbytes=True)
    at = longest = 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return min(longest, len(data))


def _header(stream: IO[bytes], at: int) -> tuple[dict[Any, Any], int]:
    """The numbers in the header of the page at an offset, and the header's length."""
    for window in (1 << 12, HEADER_BYTES):
        stream.seek(at)
        reader = _Compact(stream.read(window))
        try:
            return reader.struct(), reader.at
        except IndexError:  # it goes on beyond the window
            continue
    raise Excess("a page is cut short")


class _Compact:
    """Thrift's compact protocol, as far as the header of a page needs it: 32-bit numbers in structs.

    Numbers wrap around and later fields replace earlier ones, as in the library, which must see the same.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            if (shift := shift + 7) > 63:
                raise Excess("a page's header is damaged")

    def number(self, bits: int) -> int:
        value = self.varint() & 0xFFFFFFFF
        value = (value >> 1) ^ -(value & 1)
        return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)

    def struct(self, depth: int = 0) -> dict[Any, Any]:
        """Read a struct: (field, type) -> the number or struct there."""
        if depth > _DEEPEST:
            raise Excess("a page's header is nested too deeply")
        found: dict[Any, Any] = {}
        last = 0
        while kind := (head := self.byte()) & 0x0F:
            last = (last + (head >> 4) + 0x8000) % 0x10000 - 0x8000 if head >> 4 else self.number(16)
            if kind == _I32:
                found[last, kind] = self.number(32)
            elif kind == _STRUCT:
                found[last, kind] = self.struct(depth + 1)
            else:
                self.skip(kind, depth)
        return found

    def skip(self, kind: int, depth: int, *, in_list: bool = False) -> None:
        if kind in (1, 2):  # a truth value, which a field has in its head
            self.at += in_list
        elif kind == 3:
            self.at += 1
        elif kind in (4, 5, 6):
            self.varint()
        elif kind == 7:
            self.at += 8
        elif kind == 8:
            n = self.varint()
            self.at += n
        elif kind in (9, 10):
            head = self.byte()
            n = self.varint() if head >> 4 == 15 else head >> 4
            for _ in range(n):
                self.skip(head & 0x0F, depth, in_list=True)
                self.require_within()
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise Excess("a page's header is damaged")
        self.require_within()

    def require_within(self) -> None:
        if self.at > len(self.data):
            raise IndexError

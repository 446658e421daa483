"""A smaller checkpoint out of a larger one: which stored tensors stay, under what names, and which rows of them.

What structured pruning keeps it keeps bit for bit, so a tensor of the new checkpoint is a list of byte ranges of the
old one's files. They are copied file by file: no model is in memory, and no dtype matters. It must not know why
something goes, nor what models are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calset.io.weights import INDEX, SINGLE
from calset.pruning.model.tensorfiles import Stored, TensorFiles

CHUNK = 16 << 20  # bytes copied at a time


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the new checkpoint: ``stored`` of the old one, or only some ``rows`` (along the first dimension)."""

    name: str
    source: str
    stored: Stored
    rows: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.rows is None else (len(self.rows), *self.stored.shape[1:])

    @property
    def n_bytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges())

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The bytes of the old file that are the tensor's, in its order."""
        if self.rows is None:
            yield self.stored.start, self.stored.stop
            return
        row = (self.stored.stop - self.stored.start) // self.stored.shape[0]
        for index in self.rows:
            yield self.stored.start + index * row, self.stored.start + (index + 1) * row


class Planned(TensorFiles):
    """The tensors of a checkpoint that is not written yet: names and shapes only."""

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        self.folder = folder
        self.stored = {p.name: Stored(p.stored.path, p.stored.dtype, p.shape, 0, p.n_bytes) for p in parts}
        self._open = {}


def shards(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """New file -> its tensors: those of one old file stay together; a file of which nothing stays is gone."""
    by_file: dict[Path, list[Part]] = {}
    for part in sorted(parts, key=lambda p: (p.stored.path, p.stored.start, p.name)):
        by_file.setdefault(part.stored.path, []).append(part)
    if len(by_file) == 1:
        return {SINGLE: next(iter(by_file.values()))}
    n = len(by_file)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": members for i, members in enumerate(by_file.values(), 1)}


def write(parts: Sequence[Part], folder: Path) -> None:
    """Write the checkpoint's weight files, and their index where they are several.

    Raises:
        OSError: they could not be written.
    """
    files = shards(parts)
    for name, members in files.items():
        _write_file(folder / name, members)
    if list(files) != [SINGLE]:
        index = {
            "metadata": {"total_size": sum(p.n_bytes for p in parts)},
            "weight_map": {p.name: name for name, members in files.items() for p in members},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, parts: Sequence[Part]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        begin, end = end, end + part.n_bytes
        header[part.name] = {"dtype": part.stored.dtype, "shape": list(part.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format recommends
    with parts[0].stored.path.open("rb") as old, path.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for block in _blocks(old.fileno(), part):
                new.write(block)


def _blocks(descriptor: int, part: Part) -> Iterator[bytes]:
    for start, stop in part.ranges():
        while start < stop:
            block = os.pread(descriptor, min(CHUNK, stop - start), start)
            if not block:
                raise OSError(f"{part.stored.path} ended before its tensor {part.source}")
            yield block
            start += len(block)


def n_differing(part: Part, written: Stored) -> int:
    """How many bytes of a written tensor are not those of the old one."""
    differing, position = 0, written.start
    with part.stored.path.open("rb") as old, written.path.open("rb") as new:
        for block in _blocks(old.fileno(), part):
            other = os.pread(new.fileno(), len(block), position)
            position += len(block)
            if block != other:
                differing += sum(a != b for a, b in zip(block, other, strict=False)) + abs(len(block) - len(other))
    return differing


def whole(files: TensorFiles, names: Mapping[str, str]) -> list[Part]:
    """Tensors that stay as they are: old name -> new name."""
    return [Part(new, old, files.stored[old]) for old, new in names.items()]

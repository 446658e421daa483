"""The tensors of a folder's safetensors files: shapes and places from the headers, values one at a time.

Why the headers are read here: pruning changes values, never names, dtypes or shapes, so a pruned checkpoint is a copy
of the dense one's files in which the bytes of some tensors are replaced. Nothing else needs a second copy of a model,
in memory or on disk. It must not know models.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, first_line
from calset.io.weights import INDEX, SINGLE, weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name -> torch's
MAX_HEADER = 100 << 20  # bytes; safetensors' own limit
HELD = 32 << 20  # bytes read of open files before they are closed


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: ``start`` and ``stop`` are the file's bytes that hold it, ``dtype`` is safetensors' name."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, DTYPES[self.dtype])


def exact_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all of these exactly, whatever a config says; float32 of none."""
    import torch

    found = set(dtypes)
    return reduce(torch.promote_types, found) if found else torch.float32


def read_headers(folder: Path) -> dict[str, Stored]:
    """Tensor name -> where it is, for every file of ``weight_files``.

    Raises:
        InputError: a file that is missing, cut short or no safetensors file.
    """
    return {name: stored for path in weight_files(folder) for name, stored in _read_header(path)}


def _read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    # The format: 8 bytes, little-endian, the header's length; the header, JSON; the tensors' bytes.
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        found = [_entry(path, 8 + length, name, e) for name, e in header.items() if name != "__metadata__"]
        size = path.stat().st_size
        if size < max((stored.stop for _, stored in found), default=0):
            raise ValueError("it is cut short")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"cannot load the weights in {path}: {first_line(error)}") from error
    yield from found


def _entry(path: Path, base: int, name: str, entry: Mapping[str, Any]) -> tuple[str, Stored]:
    start, stop = entry["data_offsets"]
    return name, Stored(path, str(entry["dtype"]), tuple(entry["shape"]), base + start, base + stop)


def copy_files(source: Path, target: Path) -> None:
    """Copy a model's weight files and their index.

    Raises:
        OSError: they could not be written.
    """
    files = weight_files(source)
    for path in files:
        shutil.copyfile(path, target / path.name)
    if files[0].name != SINGLE:
        shutil.copyfile(source / INDEX, target / INDEX)


class TensorFiles:
    """The tensors of a model folder, opened lazily; values are read when sliced. Close it, or use it in ``with``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored = read_headers(folder)
        self._open: dict[Path, Any] = {}
        self._n_read = 0  # bytes since the files were last closed

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Close the files, to be opened again when needed: pages of an open one that were read count as ours."""
        self._open.clear()
        self._n_read = 0

    def slice(self, name: str) -> Any:
        """safetensors' lazy slice of a tensor: ``slice[...]`` reads it."""
        from safetensors import safe_open

        path = self.stored[name].path
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or only its slice ``index`` (from 0) along the first dimension.

        Raises:
            IndexError: there is no such slice.
        """
        stored = self.stored[name]
        if index is None:
            value, share = self.slice(name)[...], 1
        elif not stored.shape or not 0 <= index < stored.shape[0]:
            raise IndexError(f"{name} has no slice {index}")
        else:
            value, share = self.slice(name)[index : index + 1][0], stored.shape[0]
        self._n_read += (stored.stop - stored.start) // share
        if self._n_read > HELD:
            self.release()
        return value


def write_tensor(stored: Stored, value: Tensor) -> None:
    """Put ``value`` into the bytes of a tensor that is already in a file, in the file's dtype.

    Args:
        value: as many elements as the stored tensor, in its order.

    Raises:
        OSError: the file could not be written.
    """
    import torch

    flat = value.detach().to("cpu", stored.torch_dtype).contiguous().reshape(-1)
    data: Any = memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    assert len(data) == stored.stop - stored.start, stored
    with stored.path.open("r+b") as file:
        written = 0
        while written < len(data):
            written += os.pwrite(file.fileno(), data[written:], stored.start + written)
        file.flush()
        os.fsync(file.fileno())

"""The record of a pruning, ``pruning.json``: its schema number, and the shape of all that is read back from it.

A checkpoint may be anybody's, so the file is read within a bound and refused in one line where it is not what it should
be. What nobody reads is not looked at. Must not know: how a model was pruned, how the record is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from calset.errors import InputError, first_line
from calset.io.files import size
from calset.pruning.methods.masks import BLOCK_SIZE, Group
from calset.pruning.model.checkpoint import RECORD

SCHEMA_VERSION = 2
STRUCTURED_SCHEMA_VERSION = 3  # of records that list what was dropped, not pruned matrices
MAX_BYTES = 64 << 20  # calset's own have 400 bytes a matrix: 28 MB where 60 blocks have 384 experts each

_Count = Annotated[int, Meta(ge=0)]
_Side = Annotated[int, Meta(ge=1)]


class Base(Struct, frozen=True):
    """The dense model."""

    path: str | None = None
    revision: str | None = None


class CalibrationSubset(Struct, frozen=True):
    """The subset that calibrated the pruning; older records list no ids."""

    used: bool = True
    subset: str | None = None
    content_hash: str | None = None
    sample_ids: list[str] | None = None
    problem_ids: list[str] | None = None


class MatrixRecord(Struct, frozen=True):
    """One pruned matrix; see ``report.MatrixReport``."""

    name: str
    shape: tuple[_Side, _Side]
    n_pruned: _Count
    n_zeros: _Count
    expert: _Count | None = None
    rows: tuple[_Count, _Count] | None = None
    transposed: bool = False
    asked: float | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows[0] >= self.rows[1]:
            raise ValueError("rows are no range")

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class StackRecord(Struct, frozen=True):
    """The experts of one block, or the blocks; see ``structured.report.Stack``."""

    name: str
    scores: list[float]
    n_tokens: list[_Count]
    kept: Annotated[list[_Count], Meta(min_length=1)]
    kinds: list[str] | None = None

    def __post_init__(self) -> None:
        if len(self.n_tokens) != len(self.scores) or (self.kinds is not None and len(self.kinds) != len(self.scores)):
            raise ValueError("scores, n_tokens and kinds differ in length")
        if self.kept != sorted(set(self.kept)) or self.kept[-1] >= len(self.scores):
            raise ValueError("kept does not say which of how many stay")


class ZerosRecord(Struct, frozen=True):
    """The record of a pruning that sets weights to zero."""

    matrices: Annotated[list[MatrixRecord], Meta(min_length=1)]
    sparsity: float | None = None
    pattern: str | None = None
    group: Group | None = None
    block_size: int = BLOCK_SIZE
    allocation: str = "uniform"
    left_dense: list[str] = []
    base: Base = Base()
    calibration: CalibrationSubset = CalibrationSubset()


class DropRecord(Struct, frozen=True):
    """The record of a pruning that drops experts or blocks."""

    structure: Literal["experts", "blocks"]
    stacks: Annotated[list[StackRecord], Meta(min_length=1)]
    sparsity: Annotated[float, Meta(gt=0, lt=1)]
    method: str
    base: Base = Base()
    calibration: CalibrationSubset = CalibrationSubset()

    def __post_init__(self) -> None:
        if self.structure == "blocks" and len(self.stacks) > 1:
            raise ValueError("blocks are one stack")


class _Head(Struct):
    schema_version: int
    structure: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def read_record(folder: Path) -> ZerosRecord | DropRecord:
    """Read the ``pruning.json`` of a pruned checkpoint.

    Raises:
        InputError: missing, too long, corrupt, or of a newer calset.
    """
    path = folder / RECORD
    if not os.path.isfile(path):  # a pipe or a device would not end
        raise InputError(f"{folder} has no {RECORD}: it is no checkpoint that calset pruned")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise InputError(f"{path} is too long for a pruning's record: calset reads {size(MAX_BYTES)}")
        head = msgspec.json.decode(text, type=_Head)
        if head.schema_version > (newest := max(SCHEMA_VERSION, STRUCTURED_SCHEMA_VERSION)):
            raise InputError(
                f"{path} has schema {head.schema_version}, newer than this calset's {newest}: upgrade calset"
            )
        kind = ZerosRecord if head.structure is msgspec.UNSET else DropRecord
        return msgspec.json.decode(text, type=kind)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        raise InputError(f"{path} is corrupt: {first_line(error)}") from error

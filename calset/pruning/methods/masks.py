"""Which weights go: pure functions from scores to masks, by exact rank.

Why rank: ``score <= threshold`` overshoots wherever scores tie (50.10 % for an asked 50 % in bfloat16). Here exactly
the k lowest scores of a group go, ties by index, with k = share x size of the group to the nearest whole number
(halves up). It must not know where scores come from.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from calset.errors import InputError, PruningError
from calset.pruning.blockwise.statistics import widened

if TYPE_CHECKING:
    from torch import Tensor

Group = Literal["row", "block", "matrix"]
BLOCK_SIZE = 128  # columns
CACHED = 1 << 18  # scores ranked at a time on a CPU: what is made of them stays in its cache
NARROW = 32  # values a row: below, sorting is faster than finding the k-th (measured, 1M rows of 4: 0.24 s and 0.32 s)


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M with **N kept** of every M consecutive weights of a row (other tools' N sometimes counts the pruned ones)."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4".

        Raises:
            InputError: not two whole numbers with 1 <= N < M.
        """
        found = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", text)
        if not found:
            raise InputError(f"a pattern is N:M with N weights kept of every M, such as 2:4, not {text!r}")
        n, m = int(found[1]), int(found[2])
        if not 1 <= n < m:
            raise InputError(f"pattern {n}:{m} keeps {n} of every {m} weights: N must be at least 1 and less than M")
        return cls(n, m)


@dataclass(frozen=True, slots=True)
class Selection:
    """How much of a matrix goes, and within which groups weights compete.

    Raises:
        InputError: neither or both of ``sparsity`` and ``pattern``, or a value out of range.
    """

    sparsity: float | None = None
    pattern: Pattern | None = None
    group: Group = "row"
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise InputError("give either a sparsity (0.5) or a pattern (2:4), not both and not neither")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise InputError(f"sparsity is the share of zeros, between 0 and 1, not {self.sparsity}")
        if self.group not in get_args(Group):
            raise InputError(f"group must be one of {', '.join(get_args(Group))}, not {self.group!r}")
        if self.block_size < 1:
            raise InputError(f"block_size must be a positive number of columns, not {self.block_size}")

    def check_width(self, width: int, name: str) -> None:
        """Refuse a matrix whose width a pattern does not divide.

        Raises:
            InputError: naming the matrix.
        """
        if self.pattern is not None and width % self.pattern.m:
            raise InputError(
                f"{name} has {width} inputs, which {self.pattern.m} does not divide: pattern {self.pattern} does not "
                f"fit this model"
            )

    def check_shape(self, rows: int, width: int, name: str) -> None:
        """Refuse a matrix that this selection cannot prune: see ``check_width``, or a share of no or of all weights.

        Raises:
            InputError: naming the matrix.
        """
        self.check_width(width, name)
        if self.sparsity is None:
            return
        if self.group == "row":
            groups = [(width, nearest(self.sparsity * width))]
        elif self.group == "matrix":
            groups = [(rows * width, self.n_pruned(rows, width))]
        else:
            groups = [(rows * (b - a), k) for a, b, k in blocks(rows, width, self.sparsity, self.block_size)]
        for size, k in groups:
            if not 0 < k < size:
                raise InputError(
                    f"sparsity {self.sparsity:g} of the {size} weights of a {self.group} of {name} rounds to "
                    f"{'all' if k else 'none'} of them: choose another sparsity"
                    + ("" if self.group == "matrix" else " or --group matrix")
                )

    def n_pruned(self, rows: int, width: int) -> int:
        """How many weights of a rows x width matrix go."""
        if self.pattern is not None:
            return rows * (width // self.pattern.m) * (self.pattern.m - self.pattern.n)
        assert self.sparsity is not None
        if self.group == "row":
            return rows * nearest(self.sparsity * width)
        return nearest(self.sparsity * rows * width)


def nearest(value: float) -> int:
    """The nearest whole number, halves up; what floating point makes of 0.35 x 100 counts as 35."""
    return math.floor(value + 0.5 + 1e-9)


def prune_mask(scores: Tensor, selection: Selection) -> Tensor:
    """True where a weight goes: the lowest scores of each group.

    Args:
        scores: rows x width, any float dtype; infinities are ranked, NaN refused.

    Returns:
        rows x width, bool, with exactly ``selection.n_pruned`` True.

    Raises:
        PruningError: a score is NaN.
    """
    scores = checked(scores)
    if selection.pattern is not None:
        return lowest_of_groups(scores, selection.pattern)
    assert selection.sparsity is not None
    rows, width = scores.shape
    if selection.group == "row":
        return lowest_of_rows(scores, nearest(selection.sparsity * width))
    if selection.group == "matrix":
        return lowest(scores, nearest(selection.sparsity * rows * width))
    import torch

    mask = torch.empty_like(scores, dtype=torch.bool)
    for a, b, k in blocks(rows, width, selection.sparsity, selection.block_size):
        mask[:, a:b] = lowest(scores[:, a:b], k)
    return mask


def checked(scores: Tensor) -> Tensor:
    """The scores, if they can be ranked.

    Raises:
        PruningError: a score is NaN.
    """
    if scores.sum().isnan() and scores.isnan().any():  # a NaN, or infinities of both signs, make the sum one
        raise PruningError("scores are not a number: the weights or the calibration statistics are broken")
    return scores


def gradual_mask(scores: Tensor, selection: Selection, share: float) -> Tensor:
    """The mask of ``share`` (0 to 1] of what ``selection`` prunes in the end, for methods that prune step by step.

    With a pattern: the lowest of those that the pattern would prune, over the whole matrix.
    """
    if selection.pattern is None:
        assert selection.sparsity is not None
        return prune_mask(scores, replace(selection, sparsity=share * selection.sparsity))
    candidates = prune_mask(scores, selection)
    k = nearest(share * selection.n_pruned(*scores.shape))
    return lowest(scores.masked_fill(~candidates, math.inf), k)


def blocks(rows: int, width: int, sparsity: float, block_size: int = BLOCK_SIZE) -> list[tuple[int, int, int]]:
    """(first column, column after the last, weights that go) of each block of columns.

    Counts are differences of the rounded running total, so that they sum to the whole matrix's exact count.
    """
    edges = [*range(0, width, block_size), width]
    totals = [nearest(sparsity * rows * edge) for edge in edges]
    return [(edges[i], edges[i + 1], totals[i + 1] - totals[i]) for i in range(len(edges) - 1)]


def lowest(scores: Tensor, k: int) -> Tensor:
    """The k lowest of a whole matrix, ties by row-major index."""
    return lowest_of_rows(scores.reshape(1, -1), k).reshape(scores.shape)


def lowest_of_rows(scores: Tensor, k: int) -> Tensor:
    """The k lowest of each row (last dimension), ties by index."""
    import torch

    if not 0 < k < scores.shape[-1]:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    if scores.shape[-1] <= NARROW:
        # topk leaves the order of ties open; a stable sort does not.
        order = torch.sort(scores, dim=-1, stable=True).indices[..., :k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    if scores.device.type != "cpu":
        return _up_to_the_kth(scores, k)
    rows = scores.reshape(-1, scores.shape[-1])
    mask = torch.empty(rows.shape, dtype=torch.bool)
    n = max(1, CACHED // rows.shape[1])
    for part, into in zip(rows.split(n), mask.split(n), strict=True):
        into.copy_(_up_to_the_kth(widened(part), k))  # numpy, which selects faster, knows no bfloat16
    return mask.reshape(scores.shape)


def _up_to_the_kth(scores: Tensor, k: int) -> Tensor:
    """The k lowest of each row, for 0 < k < width."""
    import torch

    edge = _kth_lowest(scores, k)
    mask = scores <= edge
    # A row has at least k such values, so all have k when the total says so.
    if int(mask.count_nonzero()) == k * edge.numel():
        return mask
    # Of those equal to the k-th the first ones fill up.
    below, ties = scores < edge, scores == edge
    missing = k - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1, dtype=torch.int32) <= missing))


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The k-th lowest value of each row (... x 1), in linear time."""
    import torch

    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return torch.kthvalue(scores, k, dim=-1, keepdim=True).values
    # numpy's selection is vectorised: 2048 rows of 8192 take 0.02 s instead of 0.13 s, 500,000 values 13 times less.
    import numpy as np

    selected = np.partition(scores.detach().numpy(), k - 1, axis=-1)[..., k - 1 : k]
    return torch.from_numpy(selected.copy())  # or all of the copy that was made stays


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """All but the N highest of each M consecutive columns, ties by index; M must divide the width."""
    rows, width = scores.shape
    grouped = scores.reshape(rows, width // pattern.m, pattern.m)
    return lowest_of_rows(grouped, pattern.m - pattern.n).reshape(rows, width)

"""Input statistics of a linear layer: raw sums over the counted tokens.

Why raw sums: they add up over batches (and over ranks) exactly as they would over one batch; whoever compares layers
divides by the weight of the tokens at the end. It must not know models or methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from calset.pruning.model.memory import square_of_zeros

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 24  # numbers turned to float32 at a time: 64 MB, and of 20,000 inputs still 800 tokens
FINE = 1 << 18  # numbers turned to float64 at a time: they stay in a CPU's cache, which is three times as fast
TILE = 512  # columns of a Gram computed at a time; on a CPU as fast as any, from 576 inputs to 8192


class Needs(Flag):
    """What a method asks of the inputs: norms, means and variances of each (MOMENTS), or products of all pairs (GRAM).

    Apart, since the moments would cost a method that needs the Gram alone 0.4 times as much again (a CPU, bfloat16).
    """

    NOTHING = 0
    MOMENTS = auto()
    GRAM = auto()


@dataclass(slots=True)
class InputStatistics:
    """Sums over counted tokens x (each of ``width`` inputs) with weights w (1 unless the calibration says otherwise).

    ``n_tokens``: how many; ``weight``: the sum of w. ``squares`` and ``total`` (width, float64 where the device has
    it): the sums of w x_i^2 and w x. ``gram`` (width x width, float32): the sum of w x x^T, of which only the lower
    triangle and whole TILE x TILE tiles on the diagonal are right (``mirror`` fills the rest): hardly anything reads
    both, and a solve keeps its factor there. None: not asked for.

    Why float64: the variance is a difference of the two, and where the mean is a thousand times the deviation, as in
    some channels of large models, float32 sums leave nothing of it.
    """

    n_tokens: int
    squares: Tensor | None = None
    total: Tensor | None = None
    gram: Tensor | None = None
    weight: float = 0.0

    @classmethod
    def zeros(cls, width: int, needs: Needs, device: torch.device | str = "cpu") -> InputStatistics:
        import torch

        statistics = cls(0)
        if Needs.MOMENTS in needs:
            wide = wide_dtype(device)
            statistics.squares, statistics.total = (torch.zeros(width, dtype=wide, device=device) for _ in range(2))
        if Needs.GRAM in needs:
            statistics.gram = square_of_zeros(width, device)
        return statistics

    def add(self, inputs: Tensor, counted: Tensor, weights: Tensor | None = None) -> None:
        """Add the counted rows of ``inputs`` (tokens x width, any float dtype).

        Args:
            counted: tokens, bool.
            weights: tokens, float32, not negative; None: each weighs 1.
        """
        chosen = inputs if bool(counted.all()) else inputs[counted]
        chosen_weights = None if weights is None else weights[counted].float()
        chunk = max(1, CHUNK // chosen.shape[1])
        for start in range(0, len(chosen), chunk):
            rows = chosen[start : start + chunk]
            self.n_tokens += len(rows)
            if chosen_weights is None:
                self.weight += len(rows)
                self._add_sums(rows, None)
                scaled = rows
            else:
                w = chosen_weights[start : start + chunk]
                self.weight += float(w.sum(dtype=wide_dtype(w.device)))
                self._add_sums(rows, w)
                scaled = rows.float() * w.sqrt()[:, None]
            if self.gram is not None:
                add_gram(self.gram, scaled)

    def _add_sums(self, rows: Tensor, weights: Tensor | None) -> None:
        if self.squares is None or self.total is None:
            return
        wide = self.total.dtype
        step = max(1, FINE * (16 if rows.is_cuda else 1) // rows.shape[1])
        for start in range(0, len(rows), step):
            x = rows[start : start + step].to(wide)
            weighted = x if weights is None else x * weights[start : start + step].to(wide)[:, None]
            self.total += weighted.sum(0)
            self.squares += (weighted * x).sum(0)

    @property
    def diagonal(self) -> Tensor:
        """The sum of w x_i^2 (width, float32)."""
        if self.squares is not None:
            return self.squares.float()
        assert self.gram is not None
        return self.gram.diagonal()

    @property
    def mean(self) -> Tensor:
        """E[x], float32."""
        assert self.total is not None
        return (self.total / max(self.weight, 1e-30)).float()

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2, float32, never negative."""
        assert self.squares is not None
        assert self.total is not None
        share = max(self.weight, 1e-30)
        return (self.squares / share - (self.total / share).square()).clamp(min=0).float()

    def is_finite(self) -> bool:
        """False when an activation was infinite, NaN or too large to square."""
        return is_finite(self.diagonal if self.gram is None else self.gram)


def is_finite(values: Tensor) -> bool:
    """Whether all of them are finite. A finite sum has no other terms, and takes a fraction of the time."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def widened(values: Tensor) -> Tensor:
    """As float32, in which 16-bit floats are exact; float32 and float64 as they are."""
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """For sums that cancel: float64, or float32 where there is no other (Apple's GPUs)."""
    import torch

    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add X^T X to the lower triangle of ``gram`` (width x width, float32), X the ``inputs`` (tokens x width).

    Tile by tile from the diagonal down: little more than half the operations of the whole product. Above the diagonal
    only its own tiles are right. Inputs of any float dtype are summed in float32, in which products of 16-bit numbers
    are exact; a 16-bit result would be off by 2e-3.
    """
    import torch

    is_16_bits = inputs.dtype in (torch.bfloat16, torch.float16)
    on_tensor_cores = inputs.is_cuda and is_16_bits  # which read 16 bits and add up in float32
    # oneDNN does that too (AVX-512, AMX), from a float32 copy and for bfloat16; several times as fast, and as exact.
    in_bfloat16 = _bfloat16_products() if inputs.dtype == torch.bfloat16 and not inputs.is_cuda else nullcontext()
    inputs = inputs if on_tensor_cores else inputs.float()
    with in_bfloat16:
        for start in range(0, len(gram), TILE):
            stop = start + TILE
            left, right = inputs[:, start:].T, inputs[:, start:stop]
            if on_tensor_cores:
                gram[start:, start:stop] += torch.mm(left, right, out_dtype=torch.float32)
            else:
                gram[start:, start:stop].addmm_(left, right)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let oneDNN round what it multiplies to bfloat16, where this torch and this CPU know how."""
    import torch

    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    if before is None:  # an older torch
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def mirror(matrix: Tensor) -> Tensor:
    """Fill what is above the diagonal of a square matrix from below it, in place; returns it."""
    for start in range(0, len(matrix), TILE):
        stop = start + TILE
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix

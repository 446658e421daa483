"""Input statistics of a linear layer: raw sums over the counted tokens.

Why raw sums: they add up over batches (and over ranks) exactly as they would over one batch; whoever compares layers
divides by the weight of the tokens at the end. It must not know models or methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Needs = Literal["nothing", "diagonal", "gram"]
CHUNK = 8192  # tokens turned to float32 at a time
FINE = 256  # tokens turned to float64 at a time: they stay in a CPU's cache, which is three times as fast
TILE = 256  # columns of a Gram computed at a time; on a CPU as fast as any, from 576 inputs to 8192


@dataclass(slots=True)
class InputStatistics:
    """Sums over counted tokens x (each of ``width`` inputs) with weights w (1 unless the calibration says otherwise).

    ``n_tokens``: how many; ``weight``: the sum of w. ``squares`` and ``total`` (width, float64 where the device has
    it): the sums of w x_i^2 and w x. ``gram`` (width x width, float32): the sum of w x x^T, or None when not needed.

    Why float64: the variance is a difference of the two, and where the mean is a thousand times the deviation, as in
    some channels of large models, float32 sums leave nothing of it.
    """

    n_tokens: int
    squares: Tensor
    total: Tensor
    gram: Tensor | None = None
    weight: float = 0.0

    @classmethod
    def zeros(cls, width: int, needs: Needs, device: torch.device | str = "cpu") -> InputStatistics:
        import torch

        gram = torch.zeros(width, width, dtype=torch.float32, device=device) if needs == "gram" else None
        wide = torch.float32 if torch.device(device).type == "mps" else torch.float64  # Apple's GPUs have no other
        squares, total = (torch.zeros(width, dtype=wide, device=device) for _ in range(2))
        return cls(0, squares, total, gram)

    def add(self, inputs: Tensor, counted: Tensor, weights: Tensor | None = None) -> None:
        """Add the counted rows of ``inputs`` (tokens x width, any float dtype).

        Args:
            counted: tokens, bool.
            weights: tokens, float32, not negative; None: each weighs 1.
        """
        chosen = inputs if bool(counted.all()) else inputs[counted]
        chosen_weights = None if weights is None else weights[counted].float()
        for start in range(0, len(chosen), CHUNK):
            rows = chosen[start : start + CHUNK]
            if not self._takes_16_bits(rows):
                rows = rows.float()  # once, for every sum
            self.n_tokens += len(rows)
            if chosen_weights is None:
                self.weight += len(rows)
                self._add_sums(rows, None)
                self._add_gram(rows)
            else:
                w = chosen_weights[start : start + CHUNK]
                self.weight += float(w.sum(dtype=self.total.dtype))
                self._add_sums(rows, w)
                self._add_gram(rows.float() * w.sqrt()[:, None])

    def _add_sums(self, rows: Tensor, weights: Tensor | None) -> None:
        wide = self.total.dtype
        step = FINE * 4 if rows.is_cuda else FINE
        for start in range(0, len(rows), step):
            x = rows[start : start + step].to(wide)
            weighted = x if weights is None else x * weights[start : start + step].to(wide)[:, None]
            self.total += weighted.sum(0)
            self.squares += (weighted * x).sum(0)

    def _takes_16_bits(self, rows: Tensor) -> bool:
        """Whether 16-bit inputs go into the products as they are."""
        import torch

        return self.gram is not None and rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)

    def _add_gram(self, rows: Tensor) -> None:
        import torch

        if self.gram is None:
            return
        if self._takes_16_bits(rows):
            # Tensor cores take 16-bit inputs and add up in float32, without a float32 copy of the inputs.
            self.gram += torch.mm(rows.T, rows, out_dtype=torch.float32)
        else:
            # 16-bit products are exact in float32; a bfloat16 result would be off by 2e-3.
            add_gram(self.gram, rows.float())

    @property
    def diagonal(self) -> Tensor:
        """The sum of w x_i^2 (width, float32)."""
        return self.squares.float()

    @property
    def mean(self) -> Tensor:
        """E[x], float32."""
        return (self.total / max(self.weight, 1e-30)).float()

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2, float32, never negative."""
        share = max(self.weight, 1e-30)
        return (self.squares / share - (self.total / share).square()).clamp(min=0).float()

    def is_finite(self) -> bool:
        """False when an activation was infinite, NaN or too large to square."""
        return bool((self.diagonal if self.gram is None else self.gram).isfinite().all())


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add X^T X to a symmetric ``gram`` (width x width), X the ``inputs`` (tokens x width) of its dtype.

    Tile by tile from the diagonal down, and mirrored: little more than half the operations of the whole product.
    """
    for start in range(0, len(gram), TILE):
        stop = start + TILE
        gram[start:, start:stop].addmm_(inputs[:, start:].T, inputs[:, start:stop])
        gram[start:stop, stop:] = gram[stop:, start:stop].T

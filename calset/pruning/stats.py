"""Input statistics of a linear layer: raw sums over the counted tokens.

Why raw sums: they add up over batches (and over ranks) exactly as they would over one batch; whoever compares layers
divides by the tokens at the end. It must not know models or methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Needs = Literal["nothing", "diagonal", "gram"]
CHUNK = 8192  # tokens turned to float32 at a time


@dataclass(slots=True)
class InputStatistics:
    """Sums over counted tokens x (each of ``width`` inputs), float32.

    ``diagonal`` (width): the sum of x_i^2. ``gram`` (width x width): the sum of x x^T, or None when not needed.
    """

    n_tokens: int
    diagonal: Tensor
    gram: Tensor | None = None

    @classmethod
    def zeros(cls, width: int, needs: Needs, device: torch.device | str = "cpu") -> InputStatistics:
        import torch

        gram = torch.zeros(width, width, dtype=torch.float32, device=device) if needs == "gram" else None
        return cls(0, torch.zeros(width, dtype=torch.float32, device=device), gram)

    def add(self, inputs: Tensor, counted: Tensor) -> None:
        """Add the counted rows of ``inputs`` (tokens x width, any float dtype); ``counted`` (tokens, bool)."""
        for rows in inputs[counted].split(CHUNK):
            # bfloat16 products are exact in float32; in bfloat16 they would be off by 2e-3.
            x = rows.float()
            self.n_tokens += len(x)
            if self.gram is None:
                self.diagonal += x.square().sum(0)
            else:
                self.gram.addmm_(x.T, x)
        if self.gram is not None:
            self.diagonal = self.gram.diagonal().clone()

    def is_finite(self) -> bool:
        """False when an activation was infinite, NaN or too large to square."""
        return bool((self.diagonal if self.gram is None else self.gram).isfinite().all())

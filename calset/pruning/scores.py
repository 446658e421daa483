"""Scores: how much a weight matters. Pure functions of a weight matrix and its input statistics; the lowest go.

Each takes ``weight`` (outputs x inputs, float32) and returns scores of its shape, float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.stats import InputStatistics


def magnitude(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """|W|; needs no data (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs()


def wanda(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """|W_ij| x ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, equation 1)."""
    assert statistics is not None
    return weight.abs() * statistics.diagonal.sqrt()

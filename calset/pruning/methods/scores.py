"""Scores: how much a weight matters. Pure functions of a weight matrix and its input statistics; the lowest go.

Each takes ``weight`` (outputs x inputs, float32) and returns scores of its shape, float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.blockwise.statistics import InputStatistics

RIA_POWER = 0.5  # of the activation norm: a, the authors' choice


def magnitude(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """|W|; needs no data (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs()


def wanda(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """|W_ij| x ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, equation 1)."""
    assert statistics is not None
    return weight.abs().mul_(statistics.diagonal.sqrt())


def ria(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """(|W_ij| / sum |W_*j| + |W_ij| / sum |W_i*|) x ||X_j||_2^a (Zhang et al., ICLR 2024, "Plug-and-Play").

    Relative importance and activations: a weight counts by its share of its input's and of its output's weights, so
    that no row or column goes as a whole. Rows and columns of zeros score 0.
    """
    assert statistics is not None
    size = weight.abs()
    tiny = 1e-30
    shares = size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return shares * statistics.diagonal.sqrt() ** RIA_POWER

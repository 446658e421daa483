"""Weight updates: methods that choose a mask and move the kept weights to make up for the pruned ones.

Pure functions on float32 tensors; the caller casts once, at the end. They must not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calset.errors import PruningError
from calset.pruning.masks import Selection, blocks, lowest, lowest_of_groups, prune_mask

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.stats import InputStatistics

MAX_RAISES = 4  # of the damping, by 10 each


@dataclass(frozen=True, slots=True)
class Factor:
    """What one Gram gives to every matrix that shares it.

    ``upper`` (inputs x inputs): U with H^-1 = U^T U. ``dead`` (inputs, bool): inputs that were always zero.
    ``damping``: the share of the mean diagonal that was added in the end.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def factorise(statistics: InputStatistics, damping: float = 0.01) -> Factor:
    """The upper Cholesky factor of H^-1, H = X^T X / tokens + damping x mean diagonal.

    Dead inputs get H = 1; they stay out of the mean, which would otherwise depend on the activations' scale. When H is
    not positive definite the damping is raised tenfold, and the caller records the one that held.

    U comes from one Cholesky of the flipped H and one triangular inverse (2/3 d^3 rather than 4/3 d^3 flops, and H^-1
    is never formed): flip(H) = L L^T gives H^-1 = U^T U with U = flip(L^-1).

    Raises:
        PruningError: no damping up to 10^4 times the asked one makes H positive definite.
    """
    import torch

    assert statistics.gram is not None
    hessian = statistics.gram / max(1, statistics.n_tokens)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 0.0
    diagonal[dead] = 1.0
    tried = damping
    for _ in range(MAX_RAISES + 1):
        damped = hessian.clone()
        damped.diagonal().add_(tried * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(info) and bool(lower.isfinite().all()):
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            return Factor(upper.contiguous(), dead, tried)
        tried *= 10
    raise PruningError(
        f"the input statistics are not positive definite even with a damping of {tried / 10:g}: "
        f"use more calibration tokens or raise --damping"
    )


def sparsegpt(weight: Tensor, factor: Factor, selection: Selection) -> tuple[Tensor, Tensor]:
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

    Weights are removed column by column in blocks of ``selection.block_size``; the error of each goes to the columns
    after it. The mask is by w^2 / diag(U)^2 on updated weights: over the whole rows x block for group ``block``, at
    each M columns for N:M. Groups ``row`` and ``matrix`` span blocks, so their mask is chosen on the weights as given.

    Args:
        weight: outputs x inputs, float32; left as it is.

    Returns:
        (new weight, mask of pruned ones), the weight exactly zero under the mask and at dead inputs.

    Raises:
        PruningError: a score is NaN.
    """
    import torch

    updated = weight.clone()
    updated[:, factor.dead] = 0
    rows, width = updated.shape
    saliency = factor.upper.diagonal().square()
    mask = torch.zeros_like(updated, dtype=torch.bool)
    up_front = selection.pattern is None and selection.group != "block"
    if up_front:
        mask = prune_mask(updated.square() / saliency, selection)
    for start, stop, k in _column_blocks(rows, width, selection):
        if not up_front and selection.pattern is None:
            mask[:, start:stop] = lowest(_checked(updated[:, start:stop].square() / saliency[start:stop]), k)
        errors = _prune_block(
            updated[:, start:stop], factor.upper[start:stop, start:stop], mask[:, start:stop], selection
        )
        updated[:, stop:].addmm_(errors, factor.upper[start:stop, stop:], alpha=-1)
    updated[mask] = 0
    updated[:, factor.dead] = 0
    return updated, mask


def _column_blocks(rows: int, width: int, selection: Selection) -> list[tuple[int, int, int]]:
    if selection.pattern is None:
        assert selection.sparsity is not None
        return blocks(rows, width, selection.sparsity, selection.block_size)
    # A group of M columns must not straddle two blocks: the second half's weights would not be up to date.
    m = selection.pattern.m
    size = max(m, selection.block_size // m * m)
    return [(start, min(start + size, width), 0) for start in range(0, width, size)]


def _prune_block(block: Tensor, upper: Tensor, mask: Tensor, selection: Selection) -> Tensor:
    """Prune a block's columns in order, in place; for N:M fill in ``mask`` on the way. Returns the scaled errors."""
    import torch

    errors = torch.zeros_like(block)
    saliency = upper.diagonal().square()
    pattern = selection.pattern
    for column in range(block.shape[1]):
        if pattern is not None and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            mask[:, group] = lowest_of_groups(_checked(block[:, group].square() / saliency[group]), pattern)
        error = torch.where(mask[:, column], block[:, column], 0.0) / upper[column, column]
        block[:, column:].addr_(error, upper[column, column:], alpha=-1)
        errors[:, column] = error
    return errors


def _checked(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise PruningError("scores are not a number: the weights or the calibration statistics are broken")
    return scores


def relative_error(weight: Tensor, pruned: Tensor, statistics: InputStatistics) -> float | None:
    """||X (W - W')^T||^2 / ||X W^T||^2 on the calibration inputs; None without a Gram or with outputs all zero."""
    if statistics.gram is None:
        return None
    change = weight - pruned
    whole = float(((weight @ statistics.gram) * weight).sum())
    return max(0.0, float(((change @ statistics.gram) * change).sum())) / whole if whole > 0 else None

"""Weight updates: methods that choose a mask and move the kept weights to make up for the pruned ones.

Here: the damped Hessian that all of them share, and SparseGPT; ``splitting`` has ADMM and ALPS. Pure functions on
float32 tensors; the caller casts once, at the end. They must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from calset.errors import PruningError
from calset.pruning.masks import Pattern, Selection, blocks, lowest, lowest_of_groups, prune_mask
from calset.pruning.stats import TILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calset.pruning.stats import InputStatistics

CANCELLED = 1e-2  # of a sum of float32 errors: a smaller difference is computed anew
MAX_RAISES = 4  # of the damping, by 10 each
KERNEL_WIDTH = 256  # columns of a block that the Triton kernel holds in registers
SYSTEM_BYTES = 256 << 20  # of triangular systems solved at once
STEP = 16  # columns updated one by one before their errors go to the rest of the block at once


@dataclass(frozen=True, slots=True)
class Stack:
    """The matrices that read one input, one under the other: one solve for q/k/v, one for gate/up.

    ``weight``: all outputs x inputs, float32. ``sizes``: outputs of each matrix. ``selections``: one a matrix; they may
    differ in sparsity, never in pattern, group or block size.
    """

    weight: Tensor
    sizes: Sequence[int]
    selections: Sequence[Selection]

    @classmethod
    def of(cls, weights: Sequence[Tensor], selections: Sequence[Selection]) -> Stack:
        import torch

        stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0]  # a copy can take hundreds of MB
        return cls(stacked, [len(w) for w in weights], selections)

    @property
    def pattern(self) -> Pattern | None:
        return self.selections[0].pattern

    def split(self, stacked: Tensor) -> list[Tensor]:
        return list(stacked.split(list(self.sizes)))

    def mask(self, scores: Tensor, choose: Callable[[Tensor, Selection], Tensor] = prune_mask) -> Tensor:
        """Each matrix's mask by its own selection, stacked."""
        import torch

        parts = zip(self.split(scores), self.selections, strict=True)
        return torch.cat([choose(part, selection) for part, selection in parts])


@dataclass(frozen=True, slots=True)
class Updated:
    """What an update made of a stack: new weights and mask, stacked, and the damping that held.

    ``errors``: each matrix's ``squared_error``, when the update knows it without a product with the Gram.
    """

    weight: Tensor
    mask: Tensor
    damping: float
    errors: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Hessian:
    """H = X^T X / token weight, with dead inputs at 1. ``mean``: of the live diagonal. ``dead``: inputs, bool."""

    matrix: Tensor
    mean: float
    dead: Tensor


@dataclass(frozen=True, slots=True)
class Factor:
    """What one Gram gives to every matrix that shares it: U, upper triangular, with H^-1 = U^T U.

    ``flipped`` (inputs x inputs): U with rows and columns in reverse, so lower triangular; it is read a few rows at a
    time, since turning it round whole would take as much memory again. ``dead`` (inputs, bool): inputs that were
    always zero. ``damping``: the share of the mean diagonal that was added in the end, ``ridge`` what that came to.
    """

    flipped: Tensor
    dead: Tensor
    damping: float
    ridge: float

    @property
    def diagonal(self) -> Tensor:
        """Of U (inputs)."""
        return self.flipped.diagonal().flip(0)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of U, from column ``start`` on: what is left of it is zero."""
        width = len(self.flipped)
        return self.flipped[width - stop : width - start, : width - start].flip(0, 1).contiguous()


def hessian(statistics: InputStatistics) -> Hessian:
    """H = X^T X / token weight. Dead inputs get H = 1 and stay out of the mean diagonal.

    Counted in, they would make the damping depend on the activations' scale.
    """
    assert statistics.gram is not None
    matrix = statistics.gram / (statistics.weight or 1.0)
    diagonal = matrix.diagonal()
    dead, mean = _live(diagonal)
    diagonal[dead] = 1.0
    return Hessian(matrix, mean, dead)


def damp(matrix: Tensor, mean: float, damping: float) -> tuple[Tensor, Tensor, float]:
    """Add damping x mean to the diagonal, ten times as much as long as the sum is not positive definite.

    Returns:
        (the damped matrix, the Cholesky factor L of its flip, the damping that held).

    Raises:
        PruningError: no damping up to 10^4 times the asked one makes it positive definite.
    """
    import torch

    for tried in _raised(damping):
        damped = matrix.clone()
        damped.diagonal().add_(tried * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(info) and bool(lower.isfinite().all()):
            return damped, lower, tried
    raise _indefinite(damping)


def _raised(damping: float) -> list[float]:
    """What is tried, in order."""
    return [damping * 10**i for i in range(MAX_RAISES + 1)]


def _indefinite(damping: float) -> PruningError:
    return PruningError(
        f"the input statistics are not positive definite even with a damping of {_raised(damping)[-1]:g}: "
        f"use more calibration tokens or raise --damping"
    )


def factorise(statistics: InputStatistics, damping: float = 0.01) -> Factor:
    """The upper Cholesky factor of H^-1, H = X^T X / token weight + damping x mean diagonal.

    When H is not positive definite the damping is raised tenfold, and the caller records the one that held.

    U comes from one Cholesky of the flipped H and one triangular inverse (2/3 d^3 rather than 4/3 d^3 flops, and H^-1
    is never formed): flip(H) = L L^T gives H^-1 = U^T U with U = flip(L^-1). All of it happens in one matrix beside the
    Gram.

    Raises:
        PruningError: no damping up to 10^4 times the asked one makes H positive definite.
    """
    import torch

    assert statistics.gram is not None
    dead, mean = _live(statistics.gram.diagonal() / (statistics.weight or 1.0))
    for tried in _raised(damping):
        # A symmetric matrix is its own transpose, which is the order of elements that LAPACK works on in place.
        lower = statistics.gram.flip(0, 1).mT
        lower /= statistics.weight or 1.0
        diagonal = lower.diagonal()
        diagonal[dead.flip(0)] = 1.0
        diagonal += tried * mean
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        # What is not finite in a row of it is not finite on its diagonal.
        if not int(info) and bool(lower.diagonal().isfinite().all()):
            invert_lower(lower)
            return Factor(lower, dead, tried, tried * mean)
    raise _indefinite(damping)


def _live(diagonal: Tensor) -> tuple[Tensor, float]:
    """Which inputs were always zero (bool), and the mean over the others."""
    dead = diagonal == 0
    return dead, float(diagonal[~dead].mean()) if bool((~dead).any()) else 0.0


def invert_lower(lower: Tensor, smallest: int = 256) -> None:
    """Invert a lower triangular matrix in place: its halves are inverted, and what is below them follows.

    1/3 d^3 flops, where a solve against the identity takes d^3.
    """
    import torch

    if len(lower) <= smallest:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = len(lower) // 2
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    below.copy_(torch.linalg.solve_triangular(first, below, upper=False, left=False))
    below.copy_(torch.linalg.solve_triangular(second, below, upper=False)).neg_()
    invert_lower(first, smallest)
    invert_lower(second, smallest)


def sparsegpt(stack: Stack, statistics: InputStatistics, damping: float = 0.01) -> Updated:
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

    Weights are removed column by column in blocks of ``block_size``; the error of each goes to the columns after it.
    The mask is by w^2 / diag(U)^2 on updated weights: over the whole rows x block for group ``block``, at each M
    columns for N:M. Groups ``row`` and ``matrix`` span blocks, so their mask is chosen on the weights as given.

    Raises:
        PruningError: a score is NaN, or the Gram cannot be damped.
    """
    import torch

    factor = factorise(statistics, damping)
    saliency = factor.diagonal.square()[:, None]
    # Inputs first: the work goes input by input, and those lie together this way.
    columns = stack.weight.T.clone(memory_format=torch.contiguous_format)
    columns[factor.dead] = 0
    mask = torch.zeros_like(columns, dtype=torch.bool)
    by_block = stack.pattern is None and stack.selections[0].group == "block"
    if stack.pattern is None and not by_block:
        mask = stack.mask((columns.square() / saliency).T).T.contiguous()
    damped = torch.zeros(columns.shape[1], dtype=statistics.total.dtype, device=columns.device)
    for start, stop, counts in _column_blocks(stack, len(columns)):
        part = slice(start, stop)
        if by_block:
            mask[part] = _block_mask(columns[part].square() / saliency[part], counts, stack.sizes)
        upper = factor.rows(start, stop)
        errors = _block_errors(columns[part], upper[:, : stop - start], mask[part], stack.pattern)
        columns[stop:].addmm_(upper[:, stop - start :].T, errors, alpha=-1)
        damped += errors.square().sum(0)
    dead, ridge, used = factor.dead, factor.ridge, factor.damping
    del factor  # as large as the Gram; what follows needs room for weights
    columns[mask] = 0
    columns[dead] = 0
    new = columns.T.contiguous()
    del columns
    return Updated(new, mask.T.contiguous(), used, _errors(stack, new, dead, ridge, damped, statistics))


def _errors(
    stack: Stack, new: Tensor, dead: Tensor, ridge: float, damped: Tensor, statistics: InputStatistics
) -> list[float] | None:
    """Each matrix's squared error from the errors of its columns, whose squares sum to that under the damped Hessian.

    None where the damping is nearly all of it, and the difference of two such numbers would say little.
    """
    change = (stack.weight - new).masked_fill_(dead, 0.0)
    added = ridge * change.square_().sum(1, dtype=damped.dtype)
    sums = [(float(a.sum()), float(b.sum())) for a, b in zip(stack.split(damped), stack.split(added), strict=True)]
    if any(whole - part < CANCELLED * whole for whole, part in sums):
        return None
    return [(whole - part) * statistics.weight for whole, part in sums]


def _column_blocks(stack: Stack, width: int) -> list[tuple[int, int, list[int]]]:
    """(first column, column after the last, how many weights of each matrix go) of each block."""
    if stack.pattern is None:
        each = [
            blocks(rows, width, selection.sparsity or 0.0, selection.block_size)
            for rows, selection in zip(stack.sizes, stack.selections, strict=True)
        ]
        return [(found[0][0], found[0][1], [k for _, _, k in found]) for found in zip(*each, strict=True)]
    # A group of M columns must not straddle two blocks: the second half's weights would not be up to date.
    m = stack.pattern.m
    size = max(m, stack.selections[0].block_size // m * m)
    return [(start, min(start + size, width), []) for start in range(0, width, size)]


def _block_mask(scores: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The lowest of each matrix's part of a block; scores and mask are block columns x outputs."""
    import torch

    parts = zip(_checked(scores).split(list(sizes), dim=1), counts, strict=True)
    return torch.cat([lowest(part.T, k).T for part, k in parts], dim=1)


def _block_errors(columns: Tensor, upper: Tensor, mask: Tensor, pattern: Pattern | None) -> Tensor:
    """Prune a block's columns in order (columns x outputs, in place); returns the scaled errors, of its shape.

    For N:M ``mask`` is filled in on the way.
    """
    if not columns.is_cuda:
        return loop_errors(columns, upper, mask, pattern)
    if len(columns) <= KERNEL_WIDTH and has_triton(columns.device):
        from calset.pruning.kernels import block_errors

        errors = block_errors(columns, upper, mask, pattern)
        # It cannot raise; an error that is not a number spreads to all columns after it.
        return _checked(errors)
    return loop_errors(columns, upper, mask, pattern) if pattern else solve_errors(columns, upper, mask)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernel runs on a device: tried once, since that takes a C compiler and a GPU it knows."""
    import torch

    try:
        from calset.pruning.kernels import block_errors

        upper = torch.eye(16, device=device)
        block_errors(upper.clone(), upper, upper.bool(), None)
    except Exception:  # a broken installation raises what it likes; the other ways need none
        return False
    return True


def loop_errors(columns: Tensor, upper: Tensor, mask: Tensor, pattern: Pattern | None) -> Tensor:
    """Column by column within steps, and step by step within the block, which keeps most of the work in products.

    On one CPU core 4 times as fast as whole-block updates at each column (1024 outputs x 128 columns).
    """
    import torch

    errors = torch.zeros_like(columns)
    saliency = upper.diagonal().square()[:, None]
    # A group's weights must all be up to date when its mask is chosen.
    step = STEP if pattern is None else max(pattern.m, STEP // pattern.m * pattern.m)
    for start in range(0, len(columns), step):
        stop = min(start + step, len(columns))
        for i in range(start, stop):
            if pattern is not None and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                scores = _checked(columns[group].square() / saliency[group])
                mask[group] = lowest_of_groups(scores.T.contiguous(), pattern).T
            errors[i] = torch.where(mask[i], columns[i], 0.0) / upper[i, i]
            columns[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors


def solve_errors(columns: Tensor, upper: Tensor, mask: Tensor, chunk: int | None = None) -> Tensor:
    """The same errors for a mask known before: one batched triangular solve.

    The errors e of an output satisfy sum_(i <= j) e_i U_ij = w_j where j is pruned and e_j = 0 elsewhere. For GPUs,
    where the loop's many small launches cost more than the solve's memory; ``columns`` is left as it is.

    Args:
        chunk: outputs at a time; default: as many as ``SYSTEM_BYTES`` hold the systems of.
    """
    import torch

    chunk = chunk or max(1, SYSTEM_BYTES // (upper.numel() * upper.element_size()))
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    parts = []
    for weights, pruned in zip(columns.T.split(chunk), mask.T.split(chunk), strict=True):
        system = torch.where(pruned[:, None, :], upper, identity).transpose(1, 2)
        wanted = torch.where(pruned, weights, 0.0)[:, :, None]
        parts.append(torch.linalg.solve_triangular(system, wanted, upper=False)[:, :, 0])
    return torch.where(mask, torch.cat(parts).T, 0.0)


def _checked(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise PruningError("scores are not a number: the weights or the calibration statistics are broken")
    return scores


def squared_error(change: Tensor, statistics: InputStatistics) -> float:
    """||X change^T||^2 over the calibration inputs, each by its weight."""
    gram, total = statistics.gram, 0.0
    assert gram is not None
    for start in range(0, len(gram), TILE):
        stop = start + TILE
        part = change[:, start:stop]
        # The Gram is symmetric: what stands below its diagonal counts twice, what stands above is not read.
        product = 2 * (change[:, stop:] @ gram[stop:, start:stop])
        product.addmm_(part, gram[start:stop, start:stop])
        total += float((product * part).sum(dtype=statistics.total.dtype))
    return max(0.0, total)


def errs_at_most(change: Tensor, statistics: InputStatistics, limit: float) -> float | None:
    """The squared error of a change, or None as soon as some of its outputs err more than ``limit`` already."""
    error = 0.0
    for part in change.split(max(1, len(change) // 8)):
        error += squared_error(part, statistics)
        if error > limit:
            return None
    return error


def relative_error(
    weight: Tensor, pruned: Tensor, statistics: InputStatistics, bias_shift: Tensor | None = None
) -> float | None:
    """||X (W - W')^T - shift||^2 / ||X W^T||^2 on the calibration inputs; None without a Gram or with outputs all zero.

    Args:
        bias_shift: the mean of X (W - W')^T (outputs), when a bias makes up for it.
    """
    if statistics.gram is None:
        return None
    whole = squared_error(weight, statistics)
    error = squared_error(weight - pruned, statistics)
    if bias_shift is not None:
        error = max(0.0, error - statistics.weight * float(bias_shift.square().sum(dtype=statistics.total.dtype)))
    return error / whole if whole > 0 else None

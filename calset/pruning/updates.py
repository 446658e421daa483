"""Weight updates: methods that choose a mask and move the kept weights to make up for the pruned ones.

Here: the damping of the Hessian that all of them share, and SparseGPT; ``splitting`` has ADMM and ALPS. Pure functions
on float32 tensors; the caller casts once, at the end. They must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from calset.errors import PruningError
from calset.pruning.masks import Pattern, Selection, blocks, lowest, lowest_of_groups, prune_mask
from calset.pruning.stats import TILE, is_finite, wide_dtype

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
class Factor:
    """What one Gram gives to every matrix that shares it: R, upper triangular, with H = R R^T.

    SparseGPT speaks of U, with H^-1 = U^T U. That is R^-1, and of it only the blocks on the diagonal are needed: what
    is above them comes from R (``earlier``), so that H is never inverted.

    ``flipped`` (inputs x inputs): R with rows and columns in reverse, so lower triangular, as the Cholesky leaves it.
    ``dead`` (inputs, bool): inputs that were always zero. ``damping``: the share of the mean diagonal that was added
    in the end, ``ridge`` what that came to.
    """

    flipped: Tensor
    dead: Tensor
    damping: float
    ridge: float

    @property
    def saliency(self) -> Tensor:
        """diag(U)^2 (inputs)."""
        return self.flipped.diagonal().flip(0).square().reciprocal()

    def upper(self, start: int, stop: int) -> Tensor:
        """U's block on the diagonal: rows and columns ``start`` to ``stop``."""
        import torch

        width = len(self.flipped)
        part = slice(width - stop, width - start)
        identity = torch.eye(stop - start, dtype=self.flipped.dtype, device=self.flipped.device)
        inverse = torch.linalg.solve_triangular(self.flipped[part, part], identity, upper=False)
        return inverse.flip(0, 1).contiguous()

    def earlier(self, start: int, stop: int) -> Tensor:
        """R above that block, transposed: columns ``start`` to ``stop`` x the inputs before ``start``."""
        width = len(self.flipped)
        return self.flipped[width - start :, width - stop : width - start].mT.flip(0, 1)


def factorise(statistics: InputStatistics, damping: float = 0.01) -> Factor:
    """R, upper triangular, with H = R R^T, H = X^T X / token weight + damping x mean diagonal.

    When H is not positive definite the damping is raised tenfold, and the caller records the one that held. Dead inputs
    get H = 1 and stay out of the mean diagonal: with them the damping would depend on the activations' scale.

    R is the Cholesky factor L of the flipped H, flipped back: flip(H) = L L^T. That is 1/3 d^3 flops; the authors'
    code, which forms H^-1, takes 4/3 d^3. All of it happens in one matrix beside the Gram.

    Raises:
        PruningError: no damping up to 10^4 times the asked one makes H positive definite.
    """
    import torch

    assert statistics.gram is not None
    diagonal = statistics.gram.diagonal() / (statistics.weight or 1.0)
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 0.0
    for tried in (damping * 10**i for i in range(MAX_RAISES + 1)):
        # The Gram's lower triangle, flipped and transposed, is a lower one again, in LAPACK's order of elements: it
        # works in place.
        lower = statistics.gram.flip(0, 1).mT
        lower /= statistics.weight or 1.0
        add_ridge(lower, dead.flip(0), tried * mean)
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        # What is not finite in a row of it is not finite on its diagonal.
        if not int(info) and is_finite(lower.diagonal()):
            return Factor(lower, dead, tried, tried * mean)
    raise PruningError(
        f"the input statistics are not positive definite even with a damping of {damping * 10**MAX_RAISES:g}: "
        f"use more calibration tokens or raise --damping"
    )


def add_ridge(matrix: Tensor, dead: Tensor, ridge: float) -> None:
    """Make X^T X / token weight the H of a method, in place: 1 for dead inputs, and the damping."""
    diagonal = matrix.diagonal()
    diagonal[dead] = 1.0
    diagonal += ridge


def sparsegpt(stack: Stack, statistics: InputStatistics, damping: float = 0.01) -> Updated:
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

    Weights are removed column by column in blocks of ``block_size``; the error of each goes to the columns after it.
    The mask is by w^2 / diag(U)^2 on updated weights: over the whole rows x block for group ``block``, at each M
    columns for N:M. Groups ``row`` and ``matrix`` span blocks, so their mask is chosen on the weights as given.

    The authors' code hands a block's errors E to all columns after it, W := W - E U, for which it needs all of U. Here
    a block B catches up with what the columns P before it lost, D = W - W', when its turn comes. Their errors are
    E_P = D_P R_PP, and U = R^-1 makes R_PP U_PB = -R_PB U_BB; so W_B := W_B + D_P R_PB U_BB.

    Raises:
        PruningError: a score is NaN, or the Gram cannot be damped.
    """
    import torch

    factor = factorise(statistics, damping)
    dead, ridge, used = factor.dead, factor.ridge, factor.damping
    saliency = factor.saliency[:, None]
    # Inputs first: the work goes input by input, and those lie together this way.
    width, n_outputs = stack.weight.shape[::-1]
    mask = torch.zeros(width, n_outputs, dtype=torch.bool, device=dead.device)
    by_block = stack.pattern is None and stack.selections[0].group == "block"
    if stack.pattern is None and not by_block:
        mask = stack.mask((stack.weight.square() / saliency.T).masked_fill_(dead, 0.0)).T.contiguous()
    lost = torch.empty(width, n_outputs, dtype=stack.weight.dtype, device=dead.device)
    wide = wide_dtype(dead.device)
    damped, added = (torch.zeros(n_outputs, dtype=wide, device=dead.device) for _ in range(2))
    for start, stop, counts in _column_blocks(stack, width):
        part = slice(start, stop)
        # Two copies: torch turns round what lies together several times as fast.
        given = stack.weight[:, part].contiguous().T.clone(memory_format=torch.contiguous_format)
        given[dead[part]] = 0
        upper = factor.upper(start, stop)
        columns = given.addmm(upper.T, factor.earlier(start, stop) @ lost[:start])
        if by_block:
            mask[part] = _block_mask(columns.square() / saliency[part], counts, stack.sizes)
        errors = _block_errors(columns, upper, mask[part], stack.pattern)
        columns[mask[part]] = 0
        torch.sub(given, columns, out=lost[part])
        # Under the damped Hessian the squares of the errors sum to the squared error of what was lost.
        damped += errors.square().sum(0)
        added += ridge * lost[part].square().sum(0)
    del factor  # as large as the Gram; what follows needs room for weights
    new, gone = lost.T.contiguous(), mask.T.contiguous()
    del lost, mask
    new.neg_().add_(stack.weight).masked_fill_(gone | dead, 0.0)
    return Updated(new, gone, used, _errors(stack, damped, added, statistics))


def _errors(stack: Stack, damped: Tensor, added: Tensor, statistics: InputStatistics) -> list[float] | None:
    """Each matrix's squared error: what its outputs' are under the damped Hessian, less what the damping ``added``.

    None where the damping is nearly all of it, and the difference of two such numbers would say little.
    """
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
    where the loop's many small launches cost more than the solve's memory.

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
    errors = torch.where(mask, torch.cat(parts).T, 0.0)
    columns.addmm_(upper.T, errors, alpha=-1)
    return errors


def _checked(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise PruningError("scores are not a number: the weights or the calibration statistics are broken")
    return scores


def squared_error(change: Tensor, statistics: InputStatistics) -> float:
    """||X change^T||^2 over the calibration inputs, each by its weight."""
    gram, total, wide = statistics.gram, 0.0, wide_dtype(change.device)
    assert gram is not None
    for start in range(0, len(gram), TILE):
        stop = start + TILE
        part = change[:, start:stop]
        # The Gram is symmetric: what stands below its diagonal counts twice, what stands above is not read.
        product = 2 * (change[:, stop:] @ gram[stop:, start:stop])
        product.addmm_(part, gram[start:stop, start:stop])
        total += float((product * part).sum(dtype=wide))
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
        shifted = float(bias_shift.square().sum(dtype=wide_dtype(bias_shift.device)))
        error = max(0.0, error - statistics.weight * shifted)
    return error / whole if whole > 0 else None

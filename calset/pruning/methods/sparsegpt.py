"""Weight updates: methods that choose a mask and move the kept weights to make up for the pruned ones.

Here: the damping of the Hessian that all of them share, and SparseGPT; ``admm`` has ADMM and ALPS. Functions of
weights in any float dtype, computed with in float32, and of a Gram, on the unused half of which they write; weights are
rounded once, at the end. They must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from calset.errors import PruningError
from calset.pruning.blockwise.statistics import TILE, is_finite, wide_dtype, widened
from calset.pruning.methods.masks import Pattern, Selection, blocks, checked, lowest, lowest_of_groups, prune_mask
from calset.pruning.model.memory import forget_above, give_back

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calset.pruning.blockwise.statistics import InputStatistics

CANCELLED = 1e-2  # of a sum of float32 errors: a smaller difference is computed anew
MAX_RAISES = 4  # of the damping, by 10 each
KERNEL_WIDTH = 256  # columns of a block that the Triton kernel holds in registers
SYSTEM_BYTES = 256 << 20  # of triangular systems solved at once
SLAB = 8 * TILE  # a multiple of TILE; inputs whose changes lie together, and are let go together
ROWS = 1024  # outputs whose error is computed at a time
STEP = 16  # columns updated one by one before their errors go to the rest of the block at once


@dataclass(frozen=True, slots=True)
class Stack:
    """The matrices that read one input, one under the other: one solve for q/k/v, one for gate/up.

    ``matrices``: each outputs x inputs, of any float dtype, the caller's: never written on. ``selections``: one a
    matrix; they may differ in sparsity, never in pattern, group or block size.
    """

    matrices: Sequence[Tensor]
    selections: Sequence[Selection]

    @property
    def sizes(self) -> list[int]:
        """Outputs of each matrix."""
        return [len(matrix) for matrix in self.matrices]

    @property
    def shape(self) -> tuple[int, int]:
        """(All outputs, inputs)."""
        return sum(self.sizes), self.matrices[0].shape[1]

    def weight(self) -> Tensor:
        """All outputs x inputs, float32 or wider; a copy only where it must be, which can take hundreds of MB."""
        import torch

        weights = [widened(matrix) for matrix in self.matrices]
        return torch.cat(weights) if len(weights) > 1 else weights[0]

    def columns(self, start: int, stop: int) -> Tensor:
        """Inputs ``start`` to ``stop`` x all outputs, float32 or wider, a copy."""
        import torch

        # Two copies: torch turns round what lies together several times as fast.
        parts = torch.cat([matrix[:, start:stop] for matrix in self.matrices])
        return widened(parts.T.clone(memory_format=torch.contiguous_format))

    @property
    def pattern(self) -> Pattern | None:
        return self.selections[0].pattern

    def split(self, stacked: Tensor) -> list[Tensor]:
        return list(stacked.split(self.sizes))

    def mask(self, scores: Tensor, choose: Callable[[Tensor, Selection], Tensor] = prune_mask) -> Tensor:
        """Each matrix's mask by its own selection, stacked."""
        import torch

        parts = zip(self.split(scores), self.selections, strict=True)
        return torch.cat([choose(part, selection) for part, selection in parts])


@dataclass(frozen=True, slots=True)
class Updated:
    """What an update made of a stack: new weights and mask, stacked, and the damping that held.

    ``weight``: float32, or in the dtype of the matrices where an update has rounded them already. ``errors``: each
    matrix's ``squared_error``, before any rounding, when the update knows it without a product with the Gram.
    """

    weight: Tensor
    mask: Tensor
    damping: float
    errors: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Factor:
    """What one Gram gives to every matrix that shares it: R, upper triangular, with H = R R^T.

    SparseGPT speaks of U, with H^-1 = U^T U. That is R^-1, and of it only the blocks on the diagonal are needed: what
    is above them comes from R, so that H is never inverted.

    ``gram`` (inputs x inputs): R above its tiles on the diagonal, in the half of the Gram's memory that nobody reads;
    below them it is the Gram still. ``tiles``: those tiles of R, each TILE x TILE, the last one smaller. ``dead``
    (inputs, bool): inputs that were always zero. ``damping``: the share of the mean diagonal that was added in the end,
    ``ridge`` what that came to.
    """

    gram: Tensor
    tiles: Sequence[Tensor]
    dead: Tensor
    damping: float
    ridge: float

    @property
    def saliency(self) -> Tensor:
        """diag(U)^2 (inputs)."""
        import torch

        return torch.cat([tile.diagonal() for tile in self.tiles]).square().reciprocal()

    def upper(self, start: int, stop: int) -> Tensor:
        """U's block on the diagonal: rows and columns ``start`` to ``stop``."""
        import torch

        block = self.gram[start:stop, start:stop].triu()
        for number, first, last in _pieces(start, stop, TILE):
            left = number * TILE
            rows = slice(first - left, last - left)
            block[first - start : last - start, first - start : last - start] = self.tiles[number][rows, rows]
        identity = torch.eye(stop - start, dtype=block.dtype, device=block.device)
        return torch.linalg.solve_triangular(block, identity, upper=True).contiguous()

    def above(self, start: int, stop: int, changes: Sequence[Tensor]) -> Tensor:
        """R above that block, transposed, times what the inputs before it have lost (columns x outputs).

        Args:
            changes: inputs x outputs, in slabs of SLAB inputs.
        """
        import torch

        total = torch.zeros(stop - start, changes[0].shape[1], dtype=changes[0].dtype, device=changes[0].device)
        for number, left, right in _pieces(start, stop, TILE):
            part, tile = total[left - start : right - start], number * TILE
            for slab, first, last in _pieces(0, min(tile, start), SLAB):
                part.addmm_(self.gram[first:last, left:right].T, changes[slab][: last - first])
            if tile < start:  # of the block's first tile, which lies in one slab
                slab, rows = tile // SLAB, self.tiles[number][: start - tile, left - tile : right - tile]
                part.addmm_(rows.T, changes[slab][tile - slab * SLAB : start - slab * SLAB])
        return total


def _pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int, int]]:
    """What of ``start`` to ``stop`` lies in each piece of ``size``: (the piece's number, from, to)."""
    while start < stop:
        number = start // size
        end = min(stop, (number + 1) * size)
        yield number, start, end
        start = end


def factorise(statistics: InputStatistics, damping: float = 0.01) -> Factor:
    """R, upper triangular, with H = R R^T, H = X^T X / token weight + damping x mean diagonal.

    When H is not positive definite the damping is raised tenfold, and the caller records the one that held. Dead inputs
    get H = 1 and stay out of the mean diagonal: with them the damping would depend on the activations' scale.

    A Cholesky from the last input to the first, TILE columns at a time (left-looking): 1/3 d^3 flops, where the
    authors' code, which forms H^-1, takes 4/3 d^3. It reads the Gram's lower triangle and writes to the upper one, so
    that a second matrix as large is not needed.

    Raises:
        PruningError: no damping up to 10^4 times the asked one makes H positive definite.
    """
    assert statistics.gram is not None
    diagonal = statistics.gram.diagonal() / (statistics.weight or 1.0)
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 0.0
    for tried in (damping * 10**i for i in range(MAX_RAISES + 1)):
        tiles = _cholesky(statistics.gram, statistics.weight or 1.0, dead, tried * mean)
        if tiles is not None:
            return Factor(statistics.gram, tiles, dead, tried, tried * mean)
    raise PruningError(
        f"the input statistics are not positive definite even with a damping of {damping * 10**MAX_RAISES:g}: "
        f"use more calibration tokens or raise --damping"
    )


def _cholesky(gram: Tensor, weight: float, dead: Tensor, ridge: float) -> list[Tensor] | None:
    """R's tiles on the diagonal, what is above them left in ``gram``; None where H is not positive definite."""
    import torch

    tiles = []
    for start in reversed(range(0, len(gram), TILE)):
        stop = min(start + TILE, len(gram))
        # H's columns, transposed, less what later columns of R account for.
        rows = gram[start:stop, :stop] / weight
        add_ridge(rows[:, start:], dead[start:stop], ridge)
        if stop < len(gram):
            rows.addmm_(gram[start:stop, stop:], gram[:stop, stop:].T, alpha=-1)
        lower, info = torch.linalg.cholesky_ex(rows[:, start:].flip(0, 1))
        # What is not finite in a row of it is not finite on its diagonal.
        if int(info) or not is_finite(lower.diagonal()):
            return None
        tiles.append(lower.flip(0, 1))
        if start:
            gram[:start, start:stop] = torch.linalg.solve_triangular(tiles[-1], rows[:, :start], upper=True).T
    return tiles[::-1]


def add_ridge(matrix: Tensor, dead: Tensor, ridge: float) -> None:
    """Make X^T X / token weight the H of a method, in place: 1 for dead inputs, and the damping."""
    diagonal = matrix.diagonal()
    diagonal[dead] = 1.0
    diagonal += ridge


def sparsegpt(stack: Stack, statistics: InputStatistics, damping: float = 0.01) -> Updated:
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

    Weights are removed column by column in blocks of ``block_size``; the error of each goes to the columns after it.
    The mask is by w^2 / diag(U)^2 on updated weights: over the whole rows x block for group ``block``, at each M
    columns for N:M. Groups ``row`` and ``matrix`` span blocks, so their mask is chosen on the weights as block.

    The authors' code hands a block's errors E to all columns after it, W := W - E U, for which it needs all of U. Here
    a block B catches up with what the columns P before it lost, D = W - W', when its turn comes. Their errors are
    E_P = D_P R_PP, and U = R^-1 makes R_PP U_PB = -R_PB U_BB; so W_B := W_B + D_P R_PB U_BB.

    Raises:
        PruningError: a score is NaN, or the Gram cannot be damped.
    """
    import torch

    factor = factorise(statistics, damping)
    give_back(factor.gram)
    dead, ridge, used = factor.dead, factor.ridge, factor.damping
    saliency = factor.saliency[:, None]
    # Inputs first: the work goes input by input, and those lie together this way.
    n_outputs, width = stack.shape
    mask = torch.zeros(width, n_outputs, dtype=torch.bool, device=dead.device)
    by_block = stack.pattern is None and stack.selections[0].group == "block"
    if stack.pattern is None and not by_block:
        mask = stack.mask(stack.weight().square().div_(saliency.T).masked_fill_(dead, 0.0)).T.contiguous()
    like = {"dtype": saliency.dtype, "device": dead.device}
    changes = [torch.empty(last - first, n_outputs, **like) for _, first, last in _pieces(0, width, SLAB)]
    wide = wide_dtype(dead.device)
    damped, added = (torch.zeros(n_outputs, dtype=wide, device=dead.device) for _ in range(2))
    for start, stop, counts in _column_blocks(stack, width):
        part = slice(start, stop)
        block = stack.columns(start, stop)
        block[dead[part]] = 0
        upper = factor.upper(start, stop)
        columns = block.addmm(upper.T, factor.above(start, stop, changes))
        if by_block:
            mask[part] = _block_mask(columns.square() / saliency[part], counts, stack.sizes)
        errors = _block_errors(columns, upper, mask[part], stack.pattern)
        columns.masked_fill_(mask[part], 0.0)
        block -= columns
        for slab, first, last in _pieces(start, stop, SLAB):
            changes[slab][first - slab * SLAB : last - slab * SLAB] = block[first - start : last - start]
        # Under the damped Hessian the squares of the errors sum to the squared error of what was lost.
        damped += errors.square().sum(0)
        added += ridge * block.square().sum(0)
        if stop == width or stop // SLAB > start // SLAB:  # of R, blocks to come read only their own columns
            forget_above(factor.gram, TILE, stop)
    # Rounded here, and not by the caller, and a slab at a time: beside a Gram every copy of the weights counts.
    new = torch.empty(n_outputs, width, dtype=stack.matrices[0].dtype, device=dead.device)
    for _, start, stop in _pieces(0, width, SLAB):
        change = changes.pop(0)
        for first in range(start, stop, TILE):
            part = slice(first, min(first + TILE, stop))
            # What goes lost all that it was, so that exactly 0 is left.
            kept = stack.columns(part.start, part.stop).sub_(change[part.start - start : part.stop - start])
            kept[dead[part]] = 0
            new[:, part] = kept.to(new.dtype).T.contiguous()
    return Updated(new, mask.T, used, _errors(stack, damped, added, statistics))


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

    parts = zip(checked(scores).split(list(sizes), dim=1), counts, strict=True)
    return torch.cat([lowest(part.T, k).T for part, k in parts], dim=1)


def _block_errors(columns: Tensor, upper: Tensor, mask: Tensor, pattern: Pattern | None) -> Tensor:
    """Prune a block's columns in order (columns x outputs, in place); returns the scaled errors, of its shape.

    For N:M ``mask`` is filled in on the way.
    """
    if not columns.is_cuda:
        return loop_errors(columns, upper, mask, pattern)
    if len(columns) <= KERNEL_WIDTH and has_triton(columns.device):
        from calset.pruning.methods.kernels import block_errors

        errors = block_errors(columns, upper, mask, pattern)
        # It cannot raise; an error that is not a number spreads to all columns after it.
        return checked(errors)
    return loop_errors(columns, upper, mask, pattern) if pattern else solve_errors(columns, upper, mask)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernel runs on a device: tried once, since that takes a C compiler and a GPU it knows."""
    import torch

    try:
        from calset.pruning.methods.kernels import block_errors

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

    errors = torch.empty_like(columns)
    diagonal = upper.diagonal()[:, None]
    saliency = diagonal.square()
    scale = mask / diagonal  # a pruned weight's error is the weight times that; a kept one's is 0
    # A group's weights must all be up to date when its mask is chosen.
    step = STEP if pattern is None else max(pattern.m, STEP // pattern.m * pattern.m)
    for start in range(0, len(columns), step):
        stop = min(start + step, len(columns))
        for i in range(start, stop):
            if pattern is not None and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                scores = checked(columns[group].square() / saliency[group])
                mask[group] = lowest_of_groups(scores.T.contiguous(), pattern).T
                scale[group] = mask[group] / diagonal[group]
            torch.mul(columns[i], scale[i], out=errors[i])
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


def squared_error(change: Tensor, statistics: InputStatistics) -> float:
    """||X change^T||^2 over the calibration inputs, each by its weight; ``change`` of any float dtype."""
    gram, total, wide = statistics.gram, 0.0, wide_dtype(change.device)
    assert gram is not None
    for rows in change.split(ROWS):
        block = widened(rows)
        for start in range(0, len(gram), TILE):
            stop = start + TILE
            part = block[:, start:stop]
            # The Gram is symmetric: what stands below its diagonal counts twice, what stands above is not read.
            product = 2 * (block[:, stop:] @ gram[stop:, start:stop])
            product.addmm_(part, gram[start:stop, start:stop])
            total += float((product * part).sum(dtype=wide))
    return max(0.0, total)


def change_error(weight: Tensor, new: Tensor, statistics: InputStatistics) -> float:
    """||X (weight - new)^T||^2, without a third matrix of their size."""
    pairs = zip(weight.split(ROWS), new.split(ROWS), strict=True)
    return sum(squared_error(widened(old) - changed, statistics) for old, changed in pairs)


def errs_at_most(weight: Tensor, mask: Tensor, statistics: InputStatistics, limit: float) -> float | None:
    """The squared error of removing what is under ``mask``; None as soon as some outputs err more than ``limit``."""
    error, n = 0.0, max(1, min(ROWS, len(weight) // 8))
    for rows, gone in zip(weight.split(n), mask.split(n), strict=True):
        error += squared_error(rows.masked_fill(~gone, 0.0), statistics)
        if error > limit:
            return None
    return error


def relative_error(weight: Tensor, pruned: Tensor, statistics: InputStatistics) -> float | None:
    """Return ||X (W - W')^T||^2 / ||X W^T||^2 on the calibration inputs; None without a Gram or outputs of zeros."""
    if statistics.gram is None:
        return None
    whole = squared_error(weight, statistics)
    error = change_error(weight, pruned, statistics)
    return error / whole if whole > 0 else None

"""SparseGPT's walk over a block of columns as one Triton kernel, for CUDA.

Why: PyTorch needs three launches a column, each of microseconds of work. Here a program holds some outputs' columns of
the block in registers and goes through them at once, for any pattern. It must compute what ``sparsegpt.loop_errors``
does, and nothing else; the tests run it through Triton's interpreter, which needs no GPU.
"""

# Triton gives a kernel's code and its constants meanings of their own, which type checkers do not know.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.methods.masks import Pattern

TILE = 4096  # weights that a program holds


@triton.jit
def _row(tile, rows, i):
    """Row i of a tile in registers. The sum is of one number and zeros, so it is exact."""
    return tl.sum(tl.where(rows[:, None] == i, tile, 0), axis=0)


@triton.jit
def _block_kernel(
    columns,
    upper,
    mask,
    errors,
    width,
    n_outputs,
    columns_step,
    upper_step,
    mask_step,
    errors_step,
    PRUNED: tl.constexpr,  # of each M; 0: the mask is given
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    rows = tl.arange(0, WIDTH)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    here = (rows[:, None] < width) & (outputs[None, :] < n_outputs)
    at = rows[:, None]
    tile = tl.load(columns + at * columns_step + outputs[None, :], mask=here, other=0.0)
    gone = tl.load(mask + at * mask_step + outputs[None, :], mask=here, other=0).to(tl.int32)
    saliency = tl.load(upper + rows * (upper_step + 1), mask=rows < width, other=1.0)
    saliency = saliency * saliency
    for i in range(width):
        if PRUNED > 0:  # noqa: SIM102 - known when compiled, and so a branch of its own
            if i % M == 0:
                scores = tile * tile / saliency[:, None]
                lower = tl.zeros([WIDTH, OUTPUTS], dtype=tl.int32)
                for other in range(i, i + M):
                    score = _row(scores, rows, other)[None, :]
                    before = (score < scores) | ((score == scores) & (rows[:, None] > other))
                    lower += before.to(tl.int32)
                group = (rows[:, None] >= i) & (rows[:, None] < i + M)
                gone = tl.where(group, (lower < PRUNED).to(tl.int32), gone)
        to_columns = tl.load(upper + i * upper_step + rows, mask=(rows >= i) & (rows < width), other=0.0)
        own = tl.sum(tl.where(rows == i, to_columns, 0.0), axis=0)
        error = tl.where(_row(gone, rows, i) > 0, _row(tile, rows, i), 0.0) / own
        tl.store(errors + i * errors_step + outputs, error, mask=outputs < n_outputs)
        tile = tl.where(rows[:, None] > i, tile - to_columns[:, None] * error[None, :], tile)
    tl.store(columns + at * columns_step + outputs[None, :], tile, mask=here)
    if PRUNED > 0:
        tl.store(mask + at * mask_step + outputs[None, :], gone.to(tl.int8), mask=here)


def block_errors(columns: Tensor, upper: Tensor, mask: Tensor, pattern: Pattern | None) -> Tensor:
    """What ``sparsegpt.loop_errors`` gives, for at most ``sparsegpt.KERNEL_WIDTH`` columns.

    Args:
        columns: columns x outputs, float32, pruned in place; a row's numbers lie together, as in ``mask``.
        upper: columns x columns, float32: the block of U on the diagonal.
        mask: columns x outputs, bool; filled in on the way for N:M.

    Returns:
        The scaled errors (columns x outputs, float32).
    """
    width, n_outputs = columns.shape
    errors = torch.empty_like(columns)
    held = triton.next_power_of_2(width)
    outputs = max(1, TILE // held)
    place = torch.cuda.device(columns.device) if columns.is_cuda else nullcontext()
    with place:
        _block_kernel[(triton.cdiv(n_outputs, outputs),)](
            columns,
            upper,
            mask.view(torch.int8),
            errors,
            width,
            n_outputs,
            columns.stride(0),
            upper.stride(0),
            mask.stride(0),
            errors.stride(0),
            PRUNED=pattern.m - pattern.n if pattern else 0,
            M=pattern.m if pattern else 1,
            WIDTH=held,
            OUTPUTS=outputs,
        )
    return errors

"""ADMM and ALPS: operator splitting, which lets mask and weights settle together over many cheap steps.

The layer's problem, min ||X (W' - W)^T||^2 over W' with a mask, is split into a ridge problem for the weights and a
projection onto the mask, tied by a penalty rho. Both work on inputs scaled to one norm, so that plain size ranks
weights. Pure functions; they must not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calset.errors import PruningError
from calset.pruning.blockwise.statistics import mirror
from calset.pruning.methods.masks import gradual_mask, prune_mask
from calset.pruning.methods.sparsegpt import Stack, Updated, add_ridge, factorise

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.blockwise.statistics import InputStatistics

# Of Boža's reference code: 20 steps, the mask moving for the first 15.
ADMM_RHO, ADMM_STEPS, ADMM_MASK_STEPS = 1.0, 20, 15
# Of Meng et al.: rho from 0.1 up by 1.3, 1.2 or 1.1 every 3 steps as the mask moves by 10 %, 0.5 % or at all.
ALPS_RHO, ALPS_STEPS, ALPS_EVERY, ALPS_MAX_RHO = 0.1, 300, 3, 1e6
ALPS_MOVING = 0.005  # of the kept weights
ALPS_RAISES = ((0.1, 1.3), (ALPS_MOVING, 1.2), (0.0, 1.1))
ALPS_SETTLED, ALPS_SETTLED_STEPS = 0.0003, 30  # the reference code's early stop
CG_STEPS = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """A stack's problem on scaled inputs.

    ``matrix`` (inputs x inputs): the damped Hessian with unit diagonal. ``scale`` (inputs): what inputs were divided
    by. ``target`` (outputs x inputs): the dense weights times ``scale``, zero at dead inputs. ``pull``: their product.
    """

    matrix: Tensor
    scale: Tensor
    target: Tensor
    pull: Tensor
    damping: float

    def weights(self, scaled: Tensor) -> Tensor:
        return scaled / self.scale


def pose(weight: Tensor, statistics: InputStatistics, damping: float) -> Problem:
    """Damp the Hessian by a share of its mean diagonal, then scale each input to unit diagonal.

    Raises:
        PruningError: a Gram that no damping cures.
    """
    assert statistics.gram is not None
    factor = factorise(statistics, damping)  # for the damping that makes it positive definite
    dead, ridge, used = factor.dead, factor.ridge, factor.damping
    del factor
    damped = mirror(statistics.gram / (statistics.weight or 1.0))
    add_ridge(damped, dead, ridge)
    scale = damped.diagonal().sqrt()
    matrix = damped / scale / scale[:, None]
    target = (weight * scale).masked_fill(dead, 0.0)
    return Problem(matrix, scale, target, target @ matrix, used)


def admm(stack: Stack, statistics: InputStatistics, damping: float = 0.01) -> Updated:
    """ADMM with gradual masks (Boža 2024, arXiv 2401.02938, section 3 and the reference code).

    W = (H + rho I)^-1 (H W0 + rho (Z - U)), Z = W + U under the mask, U = U + W - Z. The share of zeros grows as
    1 - (1 - t / 15)^3 of the asked one, for every mask group and pattern; then the mask stays and the weights settle.
    The damping is that of the other methods, before scaling; the reference code adds 0.1 after it.

    Raises:
        PruningError: scores that are not a number, or a Gram that no damping cures.
    """
    import torch

    problem = pose(stack.weight(), statistics, damping)
    inverse = _inverse(problem.matrix, ADMM_RHO)
    weight, dual = problem.target, torch.zeros_like(problem.target)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for step in range(1, ADMM_STEPS + 1):
        moved = weight + dual
        if step <= ADMM_MASK_STEPS:
            share = 1 - (1 - step / ADMM_MASK_STEPS) ** 3
            mask = stack.mask(moved.abs(), lambda s, selection, share=share: gradual_mask(s, selection, share))
        kept = moved.masked_fill(mask, 0.0)
        dual = moved - kept
        weight = (problem.pull + ADMM_RHO * (kept - dual)) @ inverse
    return Updated(problem.weights((weight + dual).masked_fill(mask, 0.0)), mask, problem.damping)


def alps(stack: Stack, statistics: InputStatistics, damping: float = 0.01) -> Updated:
    """ALPS (Meng et al. 2024, arXiv 2406.07831): algorithm 1 for the mask, algorithm 2 for its weights.

    Matrices go one by one, since the penalty's path depends on how the mask of each moves; they share the Hessian.

    Raises:
        PruningError: scores that are not a number, or a Gram that no damping cures.
    """
    import torch

    whole = pose(stack.weight(), statistics, damping)
    first = _inverse(whole.matrix, ALPS_RHO)
    weights, masks = [], []
    for target, pull, selection in zip(
        stack.split(whole.target), stack.split(whole.pull), stack.selections, strict=True
    ):
        problem = Problem(whole.matrix, whole.scale, target, pull, whole.damping)
        weight, mask = _alps_mask(problem, first, lambda w, s=selection: prune_mask(w.abs(), s))
        weights.append(problem.weights(conjugate_gradient(problem, weight.masked_fill(mask, 0.0), mask)))
        masks.append(mask)
    return Updated(torch.cat(weights), torch.cat(masks), whole.damping)


def _alps_mask(problem: Problem, inverse: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Algorithm 1: (dense weights, mask), when the mask has settled.

    ``inverse``: of H + 0.1 I. The paper takes inverses for later rho from an eigendecomposition; a Cholesky of H +
    rho I is half the flops of putting one together from eigenvectors.
    """
    import torch

    rho, started = ALPS_RHO, False
    weight, dual = problem.target, torch.zeros_like(problem.target)
    mask = settled = choose(weight)
    first = kept = weight.masked_fill(mask, 0.0)
    n_kept = max(1, int((~mask).sum()))
    for step in range(1, ALPS_STEPS + 1):
        weight = (problem.pull - dual + rho * kept) @ inverse
        moved = weight + dual / rho
        mask = choose(moved)
        kept = moved.masked_fill(mask, 0.0)
        dual = rho * (moved - kept)
        if step % ALPS_EVERY:
            continue
        # Weights that swapped sides, both ways, as the reference code counts them.
        n_moved, settled = int((mask ^ settled).sum()), mask
        started = started or n_moved > ALPS_MOVING * n_kept
        if started and n_moved == 0:
            break
        if started:
            rho = min(ALPS_MAX_RHO, rho * next(factor for share, factor in ALPS_RAISES if n_moved > share * n_kept))
        else:
            # So stiff that hardly anything moves from the start: softer, and from the start again.
            rho /= 5
            if n_moved:
                kept, dual = first, torch.zeros_like(first)
        if step >= ALPS_SETTLED_STEPS and n_moved < ALPS_SETTLED * n_kept:
            break
        inverse = _inverse(problem.matrix, rho)
    return weight, choose(weight)


def conjugate_gradient(problem: Problem, start: Tensor, mask: Tensor, steps: int = CG_STEPS) -> Tensor:
    """The kept weights that err least under a mask (ALPS, algorithm 2), from ``start``; all on scaled inputs.

    Every output is its own system, all go at once, and each step projects the residual onto what is kept. The unit
    diagonal of the Hessian is the Jacobi preconditioner. The damped error falls with every step.

    Returns:
        outputs x inputs, exactly zero under the mask.
    """
    import torch

    weight = start
    residual = (problem.pull - weight @ problem.matrix).masked_fill(mask, 0.0)
    direction = residual
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        through = direction @ problem.matrix
        curvature = (direction * through).sum(1, keepdim=True)
        # An output that is solved has nothing left to divide by.
        length = torch.where(curvature > 0, size / curvature, 0.0)
        weight = weight + length * direction
        residual = (residual - length * through).masked_fill(mask, 0.0)
        left = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(size > 0, left / size, 0.0) * direction
        size = left
    return weight


def refit(weight: Tensor, mask: Tensor, statistics: InputStatistics, damping: float) -> Tensor:
    """The kept weights that make up best for those under ``mask``: conjugate gradients from the dense ones.

    Raises:
        PruningError: a Gram that no damping cures.
    """
    problem = pose(weight, statistics, damping)
    return problem.weights(conjugate_gradient(problem, problem.target.masked_fill(mask, 0.0), mask))


def _inverse(matrix: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1.

    Raises:
        PruningError: it is not positive definite, which ``pose`` made sure of but for rounding.
    """
    import torch

    shifted = matrix.clone()
    shifted.diagonal().add_(rho)
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise PruningError("the input statistics are too close to singular: use more calibration tokens or --damping")
    return torch.cholesky_inverse(lower)

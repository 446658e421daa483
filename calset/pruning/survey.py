"""Measure every decoder block of the dense model before any is pruned, for allocations that need to know.

One walk with dense inputs; a block's weights and statistics are gone when the next one's are there. Measures are pure
functions of a block's matrices and the statistics of what they read, by name; what becomes of them is ``allocate``'s
business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from calset.pruning import allocate, methods, scores
from calset.pruning.masks import Selection
from calset.pruning.stats import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.distributed import Team
    from calset.pruning.layout import Matrix
    from calset.pruning.stats import InputStatistics
    from calset.pruning.walk import Walk

# Matrices (outputs x inputs, any float dtype) and the statistics of what each reads, by name.
Function = Callable[[Mapping[str, "Tensor"], Mapping[str, "InputStatistics"]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Measure:
    """``adds_up``: a block's is the sum over its inputs, so that several processes can share them out."""

    function: Function
    needs: Needs
    adds_up: bool


def needs_of(rule: str, method: methods.Method) -> Needs:
    """The statistics that a rule asks for: ``search`` tries the method, and measures its errors."""
    if rule == "search":
        return method.needs | Needs.GRAM
    return Needs.MOMENTS if rule == "owl" else Needs.NOTHING


def measure_of(
    rule: str, method: methods.Method, selection: Selection, damping: float, can_have_bias: Set[str] = frozenset()
) -> Measure:
    """What a measured allocation asks of each block.

    Args:
        can_have_bias: names of matrices.
    """
    if rule == "owl":
        return Measure(outliers, needs_of(rule, method), adds_up=False)
    function = partial(errors, method=method, selection=selection, damping=damping, can_have_bias=can_have_bias)
    return Measure(function, needs_of(rule, method), adds_up=True)


def survey(
    walk: Walk,
    matrices: Sequence[Sequence[Matrix]],
    measure: Measure,
    team: Team,
    tell: Callable[[int], None] = lambda index: None,
) -> dict[str, Sequence[float]]:
    """``measure`` of each block that has matrices to prune, by the block's name; the model is left as it was.

    Matrices that no calibration token reached are left out: nothing can be known of them.

    Args:
        matrices: of each block, those to prune.
        tell: called with each block's number before it is run.

    Raises:
        PruningError: see ``Walk.statistics``.
    """
    measured = {}
    for index, (block, chosen) in enumerate(zip(walk.decoder.blocks, matrices, strict=True)):
        tell(index)
        is_last = index + 1 == len(matrices)
        if not chosen and is_last:
            break
        found = walk.statistics(index, measure.needs, keep=not is_last, only={m.reads for m in chosen})
        found = team.add_up(found, {m.reads: m.shape[1] for m in chosen}, measure.needs, walk.device)
        if chosen:
            reached = [m for m in chosen if m.reads in found and found[m.reads].weight]
            weights = {m.label: m.values() for m in reached}
            shared = {m.label: found[m.reads] for m in reached}
            measured[block.name] = _measured(weights, shared, measure, team)
        walk.finish(index)
    return measured


def _measured(
    weights: Mapping[str, Tensor], shared: Mapping[str, InputStatistics], measure: Measure, team: Team
) -> Sequence[float]:
    if not measure.adds_up:
        return team.agree(measure.function(weights, shared))
    groups = grouped(shared)
    costs = [float(sum(weights[name].numel() * weights[name].shape[1] for name in names)) for names in groups]
    parts: dict[int, Sequence[float]] = {-1: measure.function({}, {})}
    for i, owner in enumerate(team.owners(costs)):
        if owner == team.rank:
            own = groups[i]
            parts[i] = measure.function({n: weights[n] for n in own}, {n: shared[n] for n in own})
    parts = team.gather(parts)
    return [sum(values) for values in zip(*(parts[i] for i in sorted(parts)), strict=True)]


@dataclass(frozen=True, slots=True)
class _Scores:
    """Wanda's scores of a block's matrices, made one by one as they are gone through: all are too many to hold."""

    weights: Mapping[str, Tensor]
    shared: Mapping[str, InputStatistics]

    def __iter__(self) -> Iterator[Tensor]:
        for name, weight in self.weights.items():
            statistics = self.shared[name]
            # Per token: experts see fewer of them, and that must not make the others look like outliers.
            yield scores.wanda(weight.float(), statistics) / max(statistics.weight, 1e-30) ** 0.5


def outliers(weights: Mapping[str, Tensor], shared: Mapping[str, InputStatistics]) -> Sequence[float]:
    """The share of a block's weights with an outlying Wanda score, for OWL."""
    return [allocate.outlier_share(_Scores(weights, shared))]


def errors(
    weights: Mapping[str, Tensor],
    shared: Mapping[str, InputStatistics],
    method: methods.Method,
    selection: Selection,
    damping: float,
    can_have_bias: Set[str] = frozenset(),
) -> Sequence[float]:
    """What a block errs at each sparsity of ``allocate.grid``: its matrices' relative errors, summed."""
    assert selection.sparsity is not None
    found = []
    for sparsity in allocate.grid(selection.sparsity):
        total = 0.0
        for names in grouped(shared):
            results = methods.prune_shared(
                method,
                [weights[name] for name in names],
                shared[names[0]],
                replace(selection, sparsity=sparsity),
                damping,
                can_have_bias=[name in can_have_bias for name in names],
            )
            total += sum(result.error or 0.0 for result in results)
        found.append(total)
    return found


def grouped(shared: Mapping[str, InputStatistics]) -> list[list[str]]:
    """The names that share one input."""
    together: dict[int, list[str]] = {}
    for name, statistics in shared.items():
        together.setdefault(id(statistics), []).append(name)
    return list(together.values())

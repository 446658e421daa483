"""Measure every decoder block of the dense model before any is pruned, for OWL.

One walk with dense inputs; a block's weights and statistics are gone when the next one's are there. The measure is a
pure function of a block's matrices and the statistics of what they read, by name; what becomes of it is
``allocation``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calset.pruning.blockwise.statistics import Needs
from calset.pruning.methods import allocation, scores

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.blockwise.distributed import Team
    from calset.pruning.blockwise.phases import Phase
    from calset.pruning.blockwise.statistics import InputStatistics
    from calset.pruning.blockwise.walk import Walk
    from calset.pruning.model.layout import Matrix

NEEDS = Needs.MOMENTS  # Wanda's


def measure_blocks(
    walk: Walk,
    matrices: Sequence[Sequence[Matrix]],
    team: Team,
    phase: Phase,
) -> dict[str, float]:
    """Return ``outliers`` of each block that has matrices to prune, by the block's name; the model is left as it was.

    Matrices that no calibration token reached are left out: nothing can be known of them.

    Args:
        matrices: of each block, those to prune.
        phase: takes a step before each block.

    Raises:
        PruningError: see ``Walk.statistics``.
    """
    measured = {}
    for index, (block, chosen) in enumerate(zip(walk.decoder.blocks, matrices, strict=True)):
        phase.step(index, len(matrices))
        is_last = index + 1 == len(matrices)
        if not chosen and is_last:
            break
        found = walk.statistics(index, NEEDS, keep=not is_last, only={m.reads for m in chosen})
        found = team.add_up(found, {m.reads: m.shape[1] for m in chosen}, NEEDS, walk.device)
        if chosen:
            reached = [m for m in chosen if m.reads in found and found[m.reads].weight]
            weights = {m.label: m.values() for m in reached}
            measured[block.name] = team.broadcast_object(outliers(weights, {m.label: found[m.reads] for m in reached}))
        walk.finish(index)
    return measured


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


def outliers(weights: Mapping[str, Tensor], shared: Mapping[str, InputStatistics]) -> float:
    """Return the share of a block's weights with an outlying Wanda score, for OWL.

    Args:
        weights: matrices (outputs x inputs, any float dtype) by name.
        shared: the statistics of what each of them reads, by its name.
    """
    return allocation.outlier_share(_Scores(weights, shared))

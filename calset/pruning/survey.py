"""Measure every decoder block of the dense model before any is pruned, for allocations that need to know.

One walk with dense inputs; a block's statistics are gone when the next one's are there. Measures are pure functions of
a block's weights and their input statistics, by name; what becomes of them is ``allocate``'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from calset.pruning import allocate, methods, scores
from calset.pruning.masks import Selection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from calset.pruning.calibration import Batch
    from calset.pruning.stats import InputStatistics, Needs
    from calset.pruning.walk import Decoder

# A block's matrices (outputs x inputs, any float dtype) and the statistics of what each reads, by name.
Measure = Callable[[Mapping[str, "Tensor"], Mapping[str, "InputStatistics"]], Sequence[float]]


def measure_of(
    rule: str, method: methods.Method, selection: Selection, damping: float, can_have_bias: Set[str] = frozenset()
) -> tuple[Measure, Needs]:
    """What a measured allocation asks of each block, and the statistics for it."""
    if rule == "owl":
        return outliers, "diagonal"
    measure = partial(errors, method=method, selection=selection, damping=damping, can_have_bias=can_have_bias)
    return measure, "gram"


def survey(
    model: nn.Module,
    decoder: Decoder,
    batches: Sequence[Batch],
    device: torch.device,
    needs: Needs,
    measure: Measure,
) -> list[Sequence[float]]:
    """``measure`` of each block, in the model's order; the model is left as it was.

    Raises:
        PruningError: see ``Walk.statistics``.
    """
    from calset.pruning.walk import Walk

    measured = []
    with Walk(model, decoder, batches, device) as walk:
        for index, block in enumerate(decoder.blocks):
            statistics = walk.statistics(index, needs, keep=index + 1 < len(decoder.blocks))
            weights = {name: linear.weight.detach().to(device) for name, linear in block.linears.items()}
            measured.append(measure(weights, statistics))
            walk.finish(index)
    return measured


def outliers(weights: Mapping[str, Tensor], shared: Mapping[str, InputStatistics]) -> Sequence[float]:
    """The share of a block's weights with an outlying Wanda score, for OWL."""
    found = []
    for name, weight in weights.items():
        statistics = shared[name]
        # Per token: experts see fewer of them, and that must not make the others look like outliers.
        found.append(scores.wanda(weight.float(), statistics) / max(statistics.weight, 1e-30) ** 0.5)
    return [allocate.outlier_share(found)]


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
                [weights[name].float() for name in names],
                shared[names[0]],
                replace(selection, sparsity=sparsity),
                damping,
                can_have_bias=[name in can_have_bias for name in names],
            )
            total += sum(result.error or 0.0 for result in results)
        found.append(total)
    return found


def grouped(shared: Mapping[str, InputStatistics | None]) -> list[list[str]]:
    """The names that share one input; each alone where there are no statistics."""
    together: dict[int, list[str]] = {}
    for name, statistics in shared.items():
        together.setdefault(id(statistics) if statistics is not None else len(together), []).append(name)
    return list(together.values())

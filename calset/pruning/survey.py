"""Measure every decoder block of the dense model before any is pruned, for allocations that need to know.

One walk with dense inputs; a block's statistics are gone when the next one's are there. It must not know how measures
become sparsities (``allocate``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from calset.pruning import allocate, methods, scores
from calset.pruning.masks import Selection

if TYPE_CHECKING:
    import torch
    from torch import nn

    from calset.pruning.calibration import Batch
    from calset.pruning.stats import InputStatistics, Needs
    from calset.pruning.walk import Decoder

Linears = Mapping[str, "nn.Linear"]
Shared = Mapping[str, "InputStatistics | None"]
T = TypeVar("T")


def survey(
    model: nn.Module,
    decoder: Decoder,
    batches: Sequence[Batch],
    device: torch.device,
    needs: Needs,
    measure: Callable[[Linears, Shared], T],
) -> list[T]:
    """``measure`` of each block's linears and input statistics, in the model's order.

    Raises:
        PruningError: see ``Walk.statistics``.
    """
    from calset.pruning.walk import Walk

    measured = []
    with Walk(model, decoder, batches, device) as walk:
        for index, block in enumerate(decoder.blocks):
            statistics = walk.statistics(index, needs, keep=index + 1 < len(decoder.blocks))
            measured.append(measure(block.linears, statistics))
            walk.finish(index)
    return measured


def outliers(linears: Linears, shared: Shared) -> float:
    """The share of a block's weights with an outlying Wanda score, for OWL."""
    found = []
    for name, linear in linears.items():
        statistics = shared[name]
        assert statistics is not None
        # Token counts differ between experts, and must not look like outliers.
        size = scores.wanda(linear.weight.detach().float().to(statistics.diagonal.device), statistics)
        found.append(size / max(statistics.weight, 1e-30) ** 0.5)
    return allocate.outlier_share(found)


def errors(
    linears: Linears,
    shared: Shared,
    method: methods.Method,
    selection: Selection,
    damping: float,
    can_have_bias: Set[str] = frozenset(),
) -> list[float]:
    """What a block errs at each sparsity of ``allocate.grid``: its matrices' relative errors, summed."""
    assert selection.sparsity is not None
    together = grouped(shared)
    found = []
    for sparsity in allocate.grid(selection.sparsity):
        total = 0.0
        for names in together:
            statistics = shared[names[0]]
            assert statistics is not None
            weights = [linears[name].weight.detach().float().to(statistics.diagonal.device) for name in names]
            at = replace(selection, sparsity=sparsity)
            carriers = [name in can_have_bias for name in names]
            results = methods.prune_shared(method, weights, statistics, at, damping, can_have_bias=carriers)
            total += sum(result.error or 0.0 for result in results)
        found.append(total)
    return found


def grouped(shared: Shared) -> list[list[str]]:
    """The names that share one input; each alone where there are no statistics."""
    together: dict[int, list[str]] = {}
    for name, statistics in shared.items():
        together.setdefault(id(statistics) if statistics is not None else len(together), []).append(name)
    return list(together.values())

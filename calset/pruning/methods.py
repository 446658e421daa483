"""The pruning methods: one pure function and one registry line each.

A new method is a score in ``scores.py`` or an update in ``updates.py`` and a line in ``METHODS``; the tests, the
command line and ``prune`` pick it up from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calset.errors import InputError
from calset.pruning import scores, updates
from calset.pruning.masks import Group, Selection, prune_mask

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.stats import InputStatistics, Needs

Score = Callable[["Tensor", "InputStatistics | None"], "Tensor"]
Update = Callable[["Tensor", updates.Factor, Selection], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prune a matrix: a score whose lowest go, or an update that also moves what stays.

    ``needs``: the input statistics it asks for. ``group``: within what weights compete unless the caller says.
    """

    name: str
    summary: str
    needs: Needs
    group: Group
    score: Score | None = None
    update: Update | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("magnitude", "the smallest weights go; no data", "nothing", "matrix", score=scores.magnitude),
        Method("wanda", "the smallest |weight| x input norm go", "diagonal", "row", score=scores.wanda),
        Method("sparsegpt", "the kept weights make up for the pruned", "gram", "block", update=updates.sparsegpt),
    )
}


@dataclass(frozen=True, slots=True)
class Pruned:
    """One pruned matrix: ``weight`` (float32, zero under ``mask``), and how it went."""

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    error: float | None = None  # relative, on the calibration inputs


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"there is no pruning method {name!r}: choose {', '.join(METHODS)}")
    return METHODS[name]


def prune_shared(
    method: Method,
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    selection: Selection,
    damping: float = 0.01,
) -> list[Pruned]:
    """Prune the matrices that read one input (q/k/v, gate/up): what depends on the Gram alone is computed once.

    Args:
        weights: each outputs x inputs, float32, with one number of inputs.

    Raises:
        PruningError: statistics or scores that cannot be used.
    """
    if method.update is None:
        assert method.score is not None
        return [_by_score(method.score, weight, statistics, selection) for weight in weights]
    assert statistics is not None
    factor = updates.factorise(statistics, damping)
    results = []
    for weight in weights:
        new, mask = method.update(weight, factor, selection)
        results.append(Pruned(new, mask, factor.damping, updates.relative_error(weight, new, statistics)))
    return results


def _by_score(score: Score, weight: Tensor, statistics: InputStatistics | None, selection: Selection) -> Pruned:
    mask = prune_mask(score(weight, statistics), selection)
    new = weight.masked_fill(mask, 0.0)
    return Pruned(new, mask, error=updates.relative_error(weight, new, statistics) if statistics else None)

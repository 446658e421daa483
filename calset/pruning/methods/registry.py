"""The pruning methods: one pure function and one registry line each.

A new method is a score in ``scores.py`` or an update (``sparsegpt.py``, ``admm.py``) and a line in ``METHODS``; the
tests, the command line and ``prune`` pick it up from there. ``NAME+dsnot`` is one of them with its mask refined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from calset.errors import InputError
from calset.pruning.blockwise.statistics import Needs, widened
from calset.pruning.methods import admm, scores, sparsegpt
from calset.pruning.methods.dsnot import dsnot
from calset.pruning.methods.masks import Group, Selection, prune_mask
from calset.pruning.model.memory import give_back

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.blockwise.statistics import InputStatistics

Score = Callable[["Tensor", "InputStatistics | None"], "Tensor"]
Update = Callable[[sparsegpt.Stack, "InputStatistics", float], sparsegpt.Updated]
Candidate = tuple[float, "Tensor", "Tensor", "str | None"]  # squared error, weight, mask, what it is instead
Structure = Literal["experts", "blocks"]
REFINEMENT = "+dsnot"


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prune a matrix: a score whose lowest go, or an update that also moves what stays.

    ``needs``: the input statistics it asks for. ``group``: within what weights compete unless the caller says.
    ``refinable``: DSnoT lowers its loss (measured, see docs/pruning.md); ``refined``: its masks go through DSnoT. For
    estimates, of an update: how many ``products`` of the weights with a
    matrix of the Gram's size and ``inverses`` of one, beside a Cholesky of the Gram, it takes at most.
    """

    name: str
    summary: str
    needs: Needs
    group: Group
    score: Score | None = None
    update: Update | None = None
    refinable: bool = False
    refined: bool = False
    products: float = 0
    inverses: int = 0


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "magnitude",
            "the smallest weights go; no data",
            Needs.NOTHING,
            "matrix",
            score=scores.magnitude,
            refinable=True,
        ),
        Method("wanda", "the smallest |weight| x input norm go", Needs.MOMENTS, "row", score=scores.wanda),
        Method(
            "sparsegpt",
            "the kept weights make up for the pruned",
            Needs.GRAM,
            "block",
            update=sparsegpt.sparsegpt,
            products=0.5,
            refinable=True,
        ),
        Method("ria", "the smallest shares of their row and column go", Needs.MOMENTS, "matrix", score=scores.ria),
        Method(
            "admm",
            "mask and weights settle together",
            Needs.GRAM,
            "matrix",
            update=admm.admm,
            products=admm.ADMM_STEPS + 1,
            inverses=1,
        ),
        Method(
            "alps",
            "as admm, more slowly to a better end",
            Needs.GRAM,
            "matrix",
            update=admm.alps,
            products=admm.ALPS_STEPS + admm.CG_STEPS + 2,
            inverses=admm.ALPS_STEPS // admm.ALPS_EVERY + 1,
        ),
    )
}

REFINED = tuple(f"{method.name}{REFINEMENT}" for method in METHODS.values() if method.refinable)
# Methods that drop whole parts of the model, by name.
STRUCTURED: dict[str, Structure] = {
    "reap": "experts",  # those that give their tokens the least
    "depth": "blocks",  # those that change the hidden states least
}


@dataclass(frozen=True, slots=True)
class Pruned:
    """One pruned matrix: ``weight`` (zero under ``mask``; in float32 or the given dtype), and how it went.

    ``instead``: "magnitude" where that erred less than the method did, and its result was kept.
    """

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    error: float | None = None  # relative, on the calibration inputs
    instead: str | None = None


def find(name: str) -> Method:
    """The method of that name, or NAME+dsnot.

    Raises:
        InputError: there is none, or DSnoT does not lower its loss.
    """
    base = name.removesuffix(REFINEMENT)
    if base not in METHODS:
        raise InputError(
            f"there is no pruning method {name!r}: choose {', '.join((*METHODS, *REFINED))}, or reap or depth, which "
            f"drop experts or blocks"
        )
    method = METHODS[base]
    if base == name:
        return method
    if name not in REFINED:
        raise InputError(f"{REFINEMENT} does not lower the loss of {base}: use {base}, or {' or '.join(REFINED)}")
    needs = method.needs | Needs.MOMENTS
    refit = admm.CG_STEPS + 2 if method.update else 0
    return replace(method, name=name, needs=needs, refined=True, products=method.products + refit)


def prune_shared(
    method: Method,
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    selection: Selection | Sequence[Selection],
    damping: float = 0.01,
) -> list[Pruned]:
    """Prune the matrices that read one input (q/k/v, gate/up): what depends on the Gram alone is computed once.

    Args:
        weights: each outputs x inputs, any float dtype, with one number of inputs; computed with in float32.
        selection: one for all, or one a matrix (of one pattern, group and block size).

    Raises:
        PruningError: statistics or scores that cannot be used.
    """
    weights = [w.float() if w.element_size() > 4 else w for w in weights]  # float64, but Grams are float32
    selections = [selection] * len(weights) if isinstance(selection, Selection) else list(selection)
    if method.update is not None:
        assert statistics is not None
        return _by_update(method, method.update, weights, statistics, selections, damping)
    return [_by_score(method, weight, statistics, own) for weight, own in zip(weights, selections, strict=True)]


def _by_score(method: Method, weight: Tensor, statistics: InputStatistics | None, selection: Selection) -> Pruned:
    assert method.score is not None
    mask = prune_mask(method.score(widened(weight), statistics), selection)
    if method.refined:
        assert statistics is not None
        mask = dsnot(widened(weight), mask, statistics, selection.pattern)
    new = weight.masked_fill(mask, 0.0)
    error = sparsegpt.relative_error(weight, new, statistics) if statistics else None
    return Pruned(new, mask, error=error)


def _by_update(
    method: Method,
    update: Update,
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    selections: Sequence[Selection],
    damping: float,
) -> list[Pruned]:
    stack = sparsegpt.Stack(weights, selections)
    done = update(stack, statistics, damping)
    assert statistics.gram is not None
    give_back(statistics.gram)
    results = []
    for i, (weight, new, mask) in enumerate(
        zip(weights, stack.split(done.weight), stack.split(done.mask), strict=True)
    ):
        error = done.errors[i] if done.errors else sparsegpt.change_error(weight, new, statistics)
        best: Candidate = (error, new, mask, None)
        if method.refined:
            refined = _refined(widened(weight), mask, statistics, selections[i], done.damping)
            best = min(best, refined, key=lambda c: c[0])
        best = _or_magnitude(best, weight, statistics, selections[i])
        whole = sparsegpt.squared_error(weight, statistics)
        error, new, mask, instead = best
        results.append(Pruned(new, mask, done.damping, error / whole if whole > 0 else None, instead=instead))
    return results


def _refined(
    weight: Tensor, mask: Tensor, statistics: InputStatistics, selection: Selection, damping: float
) -> Candidate:
    """DSnoT's mask of the dense weights, and the weights that suit it best."""
    mask = dsnot(weight, mask, statistics, selection.pattern)
    new = admm.refit(weight, mask, statistics, damping)
    return sparsegpt.change_error(weight, new, statistics), new, mask, None


def _or_magnitude(best: Candidate, weight: Tensor, statistics: InputStatistics, selection: Selection) -> Candidate:
    """No update is sure to err less than magnitude on few tokens or odd statistics; keeping the better of both is."""
    mask = prune_mask(weight.abs(), selection)
    error = sparsegpt.errs_at_most(weight, mask, statistics, best[0])
    if error is None or not error < best[0]:  # nor when that one is not a number: the caller refuses it
        return best
    return error, weight.masked_fill(mask, 0.0), mask, "magnitude"

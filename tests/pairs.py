"""Cases that stand for a product: any two values of two factors meet in one of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import combinations, product
from typing import Any

import pytest

Case = tuple[Hashable, ...]


def all_pairs(cases: Iterable[Case]) -> list[Case]:
    """Choose cases, greedily, so that any two values which a case has together, a chosen case has together."""
    left = {case: set(combinations(enumerate(case), 2)) for case in cases}
    chosen = []
    while any(left.values()):
        best = max(left, key=lambda case: len(left[case]))
        chosen.append(best)
        met = left.pop(best)
        left = {case: pairs - met for case, pairs in left.items()}
    return chosen


def pairwise(
    *factors: Iterable[Hashable], fast: Iterable[Case] = (), allowed: Callable[..., bool] = lambda *case: True
) -> Iterator[Any]:
    """Yield a product as pytest's parameters: some fast, what covers all pairs slow, and the rest nightly."""
    fast = list(fast)
    cases = [*fast, *(case for case in product(*factors) if allowed(*case) and case not in fast)]
    chosen = all_pairs(cases)
    for case in cases:
        marks = [] if case in fast else [pytest.mark.slow if case in chosen else pytest.mark.nightly]
        yield pytest.param(*case, marks=marks)

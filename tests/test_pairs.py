"""What stands for a product of cases."""

from __future__ import annotations

from itertools import combinations, product

from pairs import all_pairs


def test_fewer_cases_than_the_product_hold_every_pair_of_values():
    cases = list(product("ab", "cd", "efg", range(4)))
    chosen = all_pairs(cases)
    assert len(chosen) < len(cases) / 2
    assert set(chosen) <= set(cases)
    pairs = {pair for case in cases for pair in combinations(enumerate(case), 2)}
    assert {pair for case in chosen for pair in combinations(enumerate(case), 2)} == pairs

"""What a recipe takes of candidates: as the textbook takes it, and by laws in exact arithmetic."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import textbook_selection as textbook
from hypothesis import given
from hypothesis import strategies as st

from calset import ids
from calset.catalog.store.values import text_array
from calset.catalog.subsets.recipes import RECIPES, Recipe
from calset.catalog.subsets.take import (
    Candidate,
    Candidates,
    Taken,
    apportion,
    nearest_rank,
    seeded_order,
    spend,
    spend_by_stratum,
    standard_error,
    take,
    tie_break,
    window_start,
)
from calset.errors import InputError


@st.composite
def some_candidates(draw: st.DrawFn) -> list[Candidate]:
    """Traces of a few problems, each problem with one k, one number of wrong traces and one stratum."""
    found = []
    for problem in range(draw(st.integers(0, 8))):
        k = draw(st.integers(0, 6))
        wrong = draw(st.integers(0, k))
        stratum = draw(st.sampled_from("abc"))
        for index in range(draw(st.integers(1, 6))):
            n_tokens = draw(st.integers(0, 20))
            found.append(
                Candidate(
                    sample_id=ids.digest(problem, index),
                    problem_id=f"p{problem}",
                    sample_index=index,
                    correct=draw(st.booleans()),
                    finished=draw(st.booleans()),
                    difficulty=wrong / k if k else None,
                    k=k,
                    n_tokens=n_tokens,
                    size=n_tokens + draw(st.integers(1, 5)),
                    stratum=stratum,
                )
            )
    return found


@st.composite
def some_recipe(draw: st.DrawFn) -> Recipe:
    def band(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | st.tuples(values, values).map(lambda ends: tuple(sorted(ends))))

    tenths = st.integers(0, 10).map(lambda n: n / 10)
    quantiles = band(tenths)
    budget = draw(st.sampled_from([None, "samples", "tokens"]))
    return Recipe(
        "drawn",
        correct=draw(st.booleans()),
        finished=draw(st.booleans()),
        difficulty=band(tenths),
        min_k=draw(st.none() | st.integers(1, 6)),
        length_quantiles=quantiles,
        length_tokens=None if quantiles else band(st.integers(0, 20)),
        order=draw(st.sampled_from(["harder", "random", "catalog"])),
        per_problem=draw(st.none() | st.integers(1, 3)),
        window=draw(st.sampled_from([None, None, 4, 11, 10**12])),
        stratify=draw(st.sampled_from([None, "source"])),
        shares=draw(st.sampled_from(["equal", "proportional"])),
        **({budget: draw(st.integers(1, 80))} if budget else {}),
    )


def samples_of(candidates: list[Candidate], taken: Taken) -> list[tuple[Candidate, int, int]]:
    return [
        (candidates[i], start, size)
        for i, start, size in zip(taken.at.tolist(), taken.start.tolist(), taken.size.tolist(), strict=True)
    ]


def agrees(candidates: list[Candidate], recipe: Recipe, seed: int) -> None:
    """Take the same samples as the textbook, in the same order, for the same reasons."""
    expected = textbook.take(candidates, recipe, seed)
    if all(expected.stages.values()) and not expected.samples:
        with pytest.raises(InputError, match="the smallest candidate has"):
            take(Candidates.of(candidates), recipe, seed)
        return
    taken = take(Candidates.of(candidates), recipe, seed)
    assert list(taken.stages.items()) == list(expected.stages.items())
    assert samples_of(candidates, taken) == expected.samples
    assert list(taken.facts.items()) == list(expected.facts.items())
    assert taken.warnings == expected.warnings


# -- the textbook ---------------------------------------------------------------------------------------------------


@given(some_candidates(), some_recipe(), st.integers(-(2**63), 2**63 - 1), st.randoms())
def test_a_recipe_takes_what_the_textbook_takes_whatever_the_order_of_candidates(
    candidates: list[Candidate], recipe: Recipe, seed: int, shuffler: random.Random
) -> None:
    agrees(candidates, recipe, seed)
    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    agrees(shuffled, recipe, seed)


def many(n: int) -> list[Candidate]:
    """Traces of ``n // 8`` problems, a few of them not judged."""
    rng = random.Random(n)
    found = []
    for i in range(n):
        k = i // 8 % 9
        difficulty = (i // 8 * 7 % (k + 1)) / k if k else None
        n_tokens = rng.randrange(1, 400)
        found.append(
            Candidate(
                ids.digest(i), f"p{i // 8:06}", i % 8, rng.random() < 0.6, rng.random() < 0.9, difficulty, k, n_tokens,
                n_tokens + 7, "abcd"[i // 8 % 4],
            )
        )  # fmt: skip
    rng.shuffle(found)
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rac", {"tokens": 300_000}),
        ("rac", {"tokens": 10**9, "window": 50}),
        ("random", {"per_problem": 2, "samples": 900}),
        ("ssgr", {"per_problem": None, "tokens": 12_345}),
        ("rac", {"order": "harder", "stratify": "source", "shares": "proportional", "tokens": 99_999}),
        ("random", {"order": "catalog", "stratify": "source"}),
    ],
)
def test_of_so_many_that_duckdb_hashes_them_it_takes_the_same(name: str, options: dict[str, Any]) -> None:
    agrees(many(12_000), RECIPES[name].with_options(**options), 3)


@pytest.mark.parametrize("digits", [1, 3, 16])
def test_many_are_ordered_by_their_whole_hash_where_its_beginning_is_shared(digits: int) -> None:
    names = [ids.digest(i) for i in range(12_000)]
    at = np.arange(0, len(names), 2)
    order = seeded_order(-5, text_array(names), at, digits)
    assert [names[i] for i in at[order]] == sorted(names[::2], key=lambda name: tie_break(-5, name))


# -- laws -----------------------------------------------------------------------------------------------------------


@given(some_candidates(), some_recipe(), st.integers(0, 5))
def test_without_a_budget_a_recipe_takes_exactly_what_the_filters_and_bands_say(
    candidates: list[Candidate], recipe: Recipe, seed: int
) -> None:
    recipe = recipe.with_options(samples=None, tokens=None, stratify=None, window=None)
    taken = take(Candidates.of(candidates), recipe, seed)
    order = [candidate for candidate, *_ in samples_of(candidates, taken)]
    passed = [
        c
        for c in candidates
        if c.k >= (recipe.min_k or 0)
        and (c.correct or not recipe.correct)
        and (c.finished or not recipe.finished)
        and (recipe.difficulty is None or _inside(c, recipe.difficulty))
    ]
    band = taken.facts.get("length_band") or recipe.length_tokens
    if recipe.length_quantiles and order:
        lengths = sorted(c.n_tokens for c in passed)
        # The nearest-rank definition, said the other way round: the least length that at least q of all do not exceed.
        for q, end in zip(recipe.length_quantiles, band, strict=True):
            reached = [x for x in lengths if sum(y <= x for y in lengths) >= Fraction(str(q)) * len(lengths)]
            assert end == min(reached)
    inside = [c for c in passed if band is None or band[0] <= c.n_tokens <= band[1]]
    cap = recipe.per_problem or len(candidates)
    there = Counter(c.problem_id for c in inside)
    assert Counter(c.problem_id for c in order) == Counter({p: min(n, cap) for p, n in there.items()})
    assert set(order) <= set(inside)
    if recipe.order == "harder":
        hardness = [-1.0 if c.difficulty is None else c.difficulty for c in order]
        assert hardness == sorted(hardness, reverse=True)


def _inside(candidate: Candidate, band: tuple[float, float]) -> bool:
    """The band in exact arithmetic."""
    if candidate.difficulty is None:
        return False
    exact = Fraction(round(candidate.difficulty * candidate.k), candidate.k)
    return Fraction(str(band[0])) <= exact <= Fraction(str(band[1]))


@given(some_candidates(), st.integers(0, 5))
def test_another_seed_changes_the_order_of_equals_only(candidates: list[Candidate], seed: int) -> None:
    every = Recipe("all", order="harder", per_problem=None)
    one, two = (
        [c for c, *_ in samples_of(candidates, take(Candidates.of(candidates), every, seed + i))] for i in range(2)
    )
    assert [c.difficulty for c in one] == [c.difficulty for c in two]
    assert set(one) == set(two)


@given(st.integers(0, 1000), st.integers(1, 500))
def test_nearest_rank_is_exact_where_floats_are_not(thousandths: int, n: int) -> None:
    assert nearest_rank(thousandths / 1000, n) == max(1, -(-thousandths * n // 1000))


# -- budgets --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50)), st.integers(1, 200))
def test_a_token_budget_is_never_passed_and_takes_all_that_fit(sizes: list[int], tokens: int) -> None:
    taken = spend(np.array(sizes, int), samples=None, tokens=tokens).tolist()
    total = sum(sizes[i] for i in taken)
    assert total <= tokens
    assert taken == sorted(set(taken))
    left_out = [size for i, size in enumerate(sizes) if i not in taken]
    assert all(size > tokens - total for size in left_out)


@pytest.mark.parametrize("tokens", [3, 5_000, 400_000, 1_999_999, 10**30])
def test_a_token_budget_passes_over_what_does_not_fit_among_many(tokens: int) -> None:
    rng = random.Random(tokens)
    sizes = [rng.choice([3, 40, 300]) for _ in range(15_000)]
    assert spend(np.array(sizes, np.int32), samples=None, tokens=tokens).tolist() == textbook.spend(sizes, None, tokens)


@given(st.lists(st.integers(0, 50)), st.integers(1, 20))
def test_a_budget_in_samples_is_exact(sizes: list[int], samples: int) -> None:
    assert spend(np.array(sizes), samples=samples, tokens=None).tolist() == list(range(min(samples, len(sizes))))
    assert spend(np.array(sizes), samples=None, tokens=None).tolist() == list(range(len(sizes)))


# -- strata ---------------------------------------------------------------------------------------------------------


def _shares(n: int) -> st.SearchStrategy[tuple[int, list[int], list[int]]]:
    counts = st.lists(st.integers(0, 30), min_size=n, max_size=n)
    return st.tuples(st.integers(0, 60), counts, counts)


@given(st.integers(1, 5).flatmap(_shares))
def test_shares_use_up_the_total_and_never_pass_a_cap(case: tuple[int, list[int], list[int]]) -> None:
    total, weights, caps = case
    given_ = apportion(total, weights, caps)
    assert all(0 <= share <= cap for share, cap in zip(given_, caps, strict=True))
    assert sum(given_) == min(total, sum(cap for cap, weight in zip(caps, weights, strict=True) if weight))
    assert given_ == apportion(total, weights, caps)


@given(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_no_whole_shares_are_nearer_to_the_exact_ones(total: int, weights: list[int]) -> None:
    exact = [Fraction(total * weight, sum(weights)) for weight in weights]

    def distance(shares: tuple[int, ...]) -> Fraction:
        return sum((abs(share - e) for share, e in zip(shares, exact, strict=True)), Fraction(0))

    found = tuple(apportion(total, weights, [total] * len(weights)))
    every = (s for s in itertools.product(range(total + 1), repeat=len(weights)) if sum(s) == total)
    assert distance(found) == min(map(distance, every))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), min_size=1, max_size=30),
    st.sampled_from(["equal", "proportional"]),
    st.none() | st.integers(1, 120),
    st.booleans(),
)
def test_a_stratified_budget_is_exact(
    items: list[tuple[str, int]], shares: str, budget: int | None, in_tokens: bool
) -> None:
    strata, sizes = [s for s, _ in items], [n for _, n in items]
    options: dict[str, Any] = {"tokens" if in_tokens else "samples": budget}
    recipe = Recipe("r", stratify="source", shares=shares, **options)  # type: ignore[arg-type]
    taken = spend_by_stratum(np.array(sizes), np.array(["abc".index(name) for name in strata]), recipe).tolist()
    assert taken == sorted(set(taken))
    counts, there = Counter(strata[i] for i in taken), Counter(strata)
    if budget is None:
        least = min(there.values())
        expected = dict.fromkeys(there, least) if shares == "equal" else dict(there)
        assert dict(counts) == expected
    elif in_tokens:
        assert sum(sizes[i] for i in taken) <= budget
    else:
        assert len(taken) == min(budget, len(items))
        if shares == "proportional" and budget <= len(items):
            for name, n in there.items():
                assert abs(counts[name] - Fraction(budget * n, len(items))) < 1
        if shares == "equal":
            # Nobody has more than another that still had some to give, but for the one of the remainder.
            for one, other in itertools.permutations(there, 2):
                assert counts[other] == there[other] or counts[one] <= counts[other] + 1
    # Within a stratum the first in order that fit, whatever the others do.
    for name in there:
        mine = [i for i in taken if strata[i] == name]
        if not in_tokens:
            assert mine == [i for i, s in enumerate(strata) if s == name][: len(mine)]


# -- windows and errors ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.text(max_size=20), st.integers(1, 200), st.integers(1, 100))
def test_a_window_lies_inside_its_trace(seed: int, sample_id: str, size: int, window: int) -> None:
    start = window_start(seed, sample_id, size, window)
    assert 0 <= start <= max(0, size - window)
    assert start == window_start(seed, sample_id, size, window)


def test_windows_begin_anywhere() -> None:
    starts = Counter(window_start(seed, "trace", 30, 21) for seed in range(2000))
    assert set(starts) == set(range(10))  # both ends too
    assert max(starts.values()) < 2 * min(starts.values())


@given(st.integers(1, 64).flatmap(lambda k: st.tuples(st.integers(0, k), st.just(k))))
def test_the_standard_error_is_that_of_a_pass_rate_and_never_zero(counts: tuple[int, int]) -> None:
    wrong, k = counts
    error, mirrored = standard_error(np.array([wrong, k - wrong]) / k, np.array([k, k]))
    assert 0 < error <= 0.5 / k**0.5 * (1 + 1e-12)
    assert error == pytest.approx(mirrored)
    if k >= 8 and wrong * 2 == k:
        assert error == pytest.approx((0.25 / k) ** 0.5)

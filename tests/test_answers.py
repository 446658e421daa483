r"""What an answer says, read whole: labelled pairs of a reference and a response, and laws that need no label.

``data/reported_pairs.jsonl`` are verdicts that were wrong on commit 9b80513. ``data/published_pairs.jsonl`` were
written and labelled by somebody who knew no grader's code, in the styles of published question sets and models,
before any grader ran on them; the rules were changed with an eye on those marked "tuning" alone.
``data/attack_pairs.jsonl`` were written afterwards to break the rules, half of them by somebody who had read the code;
``known`` is the verdict where it stays another than wanted.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from calset.builder.grading import Outcome, grade_response
from calset.builder.grading.pool import GradingPool

DATA = Path(__file__).parent / "data"
FILES = ("reported_pairs", "published_pairs", "attack_pairs")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def graded() -> dict[str, list[tuple[dict[str, Any], Outcome]]]:
    with GradingPool(1, background=False) as pool:
        waiting = {
            name: [
                (row, pool.submit(row["grader"], row["answer"], row["response"], {"choices": row.get("choices")}))
                for row in rows(name)
            ]
            for name in FILES
        }
        return {name: [(row, found.result(timeout=120)) for row, found in both] for name, both in waiting.items()}


@pytest.mark.parametrize("name", FILES)
def test_each_verdict_is_as_wanted_or_known(graded, name: str):
    missed = [
        (row["kind"], row["grader"], row["answer"], row["response"], outcome)
        for row, outcome in graded[name]
        if "known" not in row and (outcome.verdict == "correct") != (row["want"] == "correct")
    ]
    assert missed == []
    assert [pair for pair in graded[name] if "known" in pair[0] and pair[1].verdict != pair[0]["known"]] == []


def test_no_answer_is_an_error_of_the_grader(graded):
    found = [(row, outcome) for both in graded.values() for row, outcome in both]
    assert [pair for pair in found if pair[1].verdict in ("error", "timeout")] == []


def test_the_lists_hold_what_they_say():
    assert [len(rows(name)) >= n for name, n in zip(FILES, (120, 500, 1_200), strict=True)] == [True] * 3
    assert sum("known" in row for name in FILES for row in rows(name)) <= 60
    assert not any("known" in row for name in FILES[:2] for row in rows(name))
    published = rows("published_pairs")
    assert {row["grader"] for row in published} == {"math", "exact", "choice"}
    assert min(sum(row["want"] == want for row in published) for want in ("correct", "wrong")) >= 150
    assert min(sum(row["part"] == part for row in published) for part in ("tuning", "held out")) >= 150


def verdict(answer: str, boxed: str) -> str:
    return grade_response("math", answer, rf"So it is \boxed{{{boxed}}}.", {}).verdict


# --- what is not read whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        r"n \equiv 1 \pmod 3 \text{ or } n \equiv 2 \pmod 5",
        r"\begin{cases} 1 & n = 1 \\ 2n & n \ge 2 \end{cases}",
        r"1, 3, \ldots, 2n-1",
        r"\forall n \ge 5",
        r"\frac{\partial f}{\partial x}",
        r"\text{the line through } (0,1) \text{ with slope } 2",
    ],
)
@pytest.mark.parametrize("answer", ["1", "2", "3", "5", "0", r"\frac{1}{2}"])
def test_a_number_inside_a_statement_is_no_answer(reference: str, answer: str):
    assert verdict(reference, answer) != "correct"
    assert verdict(answer, reference) != "correct"
    assert verdict(reference, reference) == "correct"


def test_the_verdict_says_which_side_was_not_read():
    assert verdict(r"\forall n \ge 5", "5") == "gold_unparsable"
    assert verdict("5", r"\forall n \ge 5") == "pred_unparsable"


# --- laws ---------------------------------------------------------------------------------------------------------

integers = st.integers(-(10**12), 10**12)
decimals = st.decimals(-(10**6), 10**6, allow_nan=False, allow_infinity=False, places=8)
UNITS = ["", r" \text{ m}", r"\text{ C}", " kg", r"^\circ", r"\%", r" \text{ apples}", r" \mathrm{~km/h}"]


@given(integers, integers, st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_two_numbers_are_one_only_if_their_units_make_them_so(one: int, two: int, unit: str, other: str):
    assume(one != two)
    if unit == other or not (unit and other):
        percent = r"\%" in (unit, other) and unit != other and Fraction(one) in (100 * two, Fraction(two, 100))
        assert (verdict(f"{one}{unit}", f"{two}{other}") == "correct") == percent
    assert verdict(f"{one}{unit}", f"{one}{unit}") == "correct"


@given(decimals, decimals, st.integers(-40, 40))
def test_decimals_are_compared_exactly(one, two, exponent: int):
    assert (verdict(f"{one:f}", f"{two:f}") == "correct") == (one == two)
    left, right = (rf"{x:f} \times 10^{{{exponent}}} \text{{ J}}" for x in (one, two))
    assert (verdict(left, right) == "correct") == (one == two)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=4), st.lists(st.integers(-20, 20), min_size=2, max_size=4))
def test_a_list_has_each_part_as_often(one: list[int], two: list[int]):
    said = verdict(", ".join(map(str, one)), " and ".join(map(str, two)))
    assert (said == "correct") == (sorted(one) == sorted(two))


@given(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from("(["), st.sampled_from(")]"), st.sampled_from("(["))
def test_an_interval_has_its_ends_and_its_brackets(low: int, high: int, opened: str, closed: str, other: str):
    assume(low < high)
    signs = {"(": "<", ")": "<", "[": r"\le", "]": r"\le"}
    inequality = f"{low} {signs[other]} x {signs[closed]} {high}"
    assert (verdict(f"{opened}{low},{high}{closed}", inequality) == "correct") == (opened == other)
    assert verdict(f"{opened}{low},{high}{closed}", f"{opened}{low},{high + 1}{closed}") == "incorrect"


@given(st.fractions(-50, 50, max_denominator=60), st.fractions(-50, 50, max_denominator=60))
def test_a_formula_is_equal_for_all_values_of_its_letters(one: Fraction, two: Fraction):
    def square(root: Fraction) -> str:
        return rf"x^2 - 2\left({root}\right)x + {root**2}"

    factored = rf"\left(x-\left({one}\right)\right)^2"
    assert (verdict(square(two), factored) == "correct") == (one == two)
    assert (verdict(rf"\sqrt{{{two**2 + 2}}}", rf"\left({one**2 + 2}\right)^{{1/2}}") == "correct") == (
        one**2 == two**2
    )

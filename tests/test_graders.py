"""What ``choice`` and ``exact`` take for the same answer, and what they do not."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.grading import grade_response, grader_version
from calset.builder.grading.exact import read_number
from calset.builder.grading.extract import boxes, last_boxed, last_tagged, stated

LETTERS = st.sampled_from("ABCDEFGHIJ")
FORMS = st.sampled_from(
    [r"\boxed{%s}", r"\boxed{\text{%s}}", r"\boxed{\textbf{(%s)}}", "The answer is %s.", "The answer is (%s) 12",
     "**Answer:** %s", "Answer: **%s**", "I choose option (%s)", "%s", "(%s)", "%s.", "**%s**", "%s is correct.",
     "Let me see.\n\n%s", "<answer>%s</answer>"]
)  # fmt: skip


def verdict(grader: str, answer: str, response: str, **metadata) -> str:
    return grade_response(grader, answer, response, metadata).verdict


@given(LETTERS, LETTERS, FORMS)
def test_a_stated_letter_is_correct_exactly_when_it_is_the_references(gold: str, said: str, form: str):
    assert verdict("choice", gold, form % said) == ("correct" if gold == said else "incorrect")


@given(
    LETTERS, LETTERS, FORMS.filter(lambda form: "answer is" in form or "boxed" in form), st.sampled_from(["\n", " "])
)
def test_the_last_statement_counts(first: str, last: str, form: str, between: str):
    response = form % first + between + "No. " + form % last
    outcome = grade_response("choice", last, response, {})
    assert (outcome.verdict, outcome.extracted) == ("correct", last)


@given(LETTERS, st.sampled_from(["A train leaves.", "I think so.", "Vitamin C is in it.", "See figure B and table D."]))
def test_no_letter_is_taken_out_of_prose(gold: str, prose: str):
    assert verdict("choice", gold, prose) == "no_answer"


@pytest.mark.parametrize("choices", [["5", "7", "9"], {"A": "5", "B": "7", "C": "9"}, {"a": "5", "b": "7", "c": "9"}])
def test_an_options_text_counts_as_its_letter(choices):
    for response in (r"\boxed{7}", "The answer is 7.", "7", "B", "The answer is B) 7", "(B) 7"):
        assert verdict("choice", "B", response, choices=choices) == "correct", response
        assert verdict("choice", "7", response, choices=choices) == "correct", response
    assert verdict("choice", "B", "The answer is 9.", choices=choices) == "incorrect"
    assert verdict("choice", "D", "B", choices=choices) == "gold_unparsable"
    assert verdict("choice", "B", r"\boxed{8}", choices=choices) == "pred_unparsable"


def test_two_options_with_one_text_are_told_apart_by_letter_alone():
    assert verdict("choice", "A", r"\boxed{5}", choices=["5", "5"]) == "pred_unparsable"
    assert verdict("choice", "A", r"\boxed{A}", choices=["5", "5"]) == "correct"


@given(st.fractions(max_denominator=10**6), st.integers(1, 10**6))
def test_a_fraction_equals_itself_however_it_is_written(value: Fraction, factor: int):
    top, below = value.numerator, value.denominator
    for text in (f"{top}/{below}", f"{top * factor}/{below * factor}", rf"\boxed{{{top * factor}/{below * factor}}}"):
        assert verdict("exact", f"{top}/{below}", f"Answer: {text}") == "correct"


@given(st.decimals(-(10**9), 10**9, places=6), st.decimals(-(10**9), 10**9, places=6))
def test_decimals_are_equal_exactly_when_their_values_are(one, two):
    expected = "correct" if one == two else "incorrect"
    assert verdict("exact", f"{one}", f"Answer: {two}") == expected
    assert verdict("exact", f"{one}", f"Answer: {one}0") == "correct"
    assert verdict("exact", f"{one:f}", f"Answer: {one:,}") == "correct"


@given(st.text(max_size=60))
def test_no_text_crashes_either(text: str):
    for grader in ("exact", "choice"):
        for answer in ("7", "B", text):
            verdict(grader, answer, text, choices=["5", text])
    read_number(text)


def test_a_difference_is_allowed_only_where_the_problem_says_so():
    assert verdict("exact", "3.14", "Answer: 3.1416") == "incorrect"
    assert verdict("exact", "3.14", "Answer: 3.1416", tolerance=0.01) == "correct"
    assert verdict("exact", "3.14", "Answer: 3.15", tolerance="0.01") == "correct"
    assert verdict("exact", "3.14", "Answer: 3.1501", tolerance=0.01) == "incorrect"
    assert verdict("exact", "200", "Answer: 202", tolerance="1%") == "correct"
    assert verdict("exact", "200", "Answer: 202.1", tolerance="1%") == "incorrect"
    assert verdict("exact", "200", "Answer: 201", tolerance="about") == "incorrect"


def test_a_unit_may_be_missing_only_where_the_reference_has_none():
    assert verdict("exact", "18", "Answer: 18 cm") == "correct"
    assert verdict("exact", "18 cm", "Answer: 18 cm") == "correct"
    assert verdict("exact", "18 cm", "Answer: 18") == "incorrect"
    assert verdict("exact", "18 cm", "Answer: 18 m") == "incorrect"
    assert verdict("exact", "$18", "Answer: €18") == "incorrect"


def test_a_mixed_number_is_a_sum_and_a_superscript_no_digit():
    assert read_number("3½") == read_number("3 1/2") == read_number("7/2")
    assert verdict("exact", "102", "Answer: 10²") == "incorrect"


def test_a_box_may_stand_apart_from_its_brace_but_a_longer_command_is_none():
    assert last_boxed(r"\boxed {7}") == last_boxed("\\boxed\n{7}") == last_boxed(r"\boxed 7") == "7"
    assert last_boxed(r"\boxedx") is None
    assert last_boxed(r"\boxed 78") is None


def test_thousands_of_boxes_and_tags_that_never_close_take_no_time():
    import time

    began = time.process_time()
    assert list(boxes(r"\boxed{" * 50_000)) == []
    assert last_tagged("<answer>" * 50_000) is None
    assert stated("The answer is " * 3_000) is not None
    assert time.process_time() - began < 2


def test_the_versions_say_what_can_change_a_verdict():
    assert grader_version("choice") == "2"
    assert grader_version("exact") == "2"
    assert grader_version("math").startswith("4+math-verify-")


FENCE = "```"


@pytest.mark.parametrize("grader", ["math", "exact"])
@pytest.mark.parametrize("language", ["", "text", "json"])
@pytest.mark.parametrize(
    "heading",
    ["**Final answer:**\n\n", "### Final Answer\n\n", "Answer:\n", "The answer is:\n\n", "The final answer is\n", ""],
)
def test_a_code_block_below_a_heading_is_the_answer(grader: str, language: str, heading: str):
    block = f"{FENCE}{language}\n156\n{FENCE}"
    assert verdict(grader, "156", f"We add.\n\n{heading}{block}" if heading else block) == "correct"
    assert verdict(grader, "156", f"{heading}{block.replace('156', '157')}") == "incorrect"
    if heading:
        assert verdict(grader, "156", f"{heading}{block}\n\nThis satisfies all the constraints.") == "correct"


def test_a_box_that_is_withdrawn_states_nothing():
    assert verdict("math", "156", "\\boxed{156}\n\nNo, that is wrong; I do not know.") == "no_answer"
    assert verdict("math", "156", "\\boxed{156}. Wait, that is a mistake: \\boxed{157}") == "incorrect"
    assert verdict("math", "156", "\\boxed{156}\n\nNo, 155 would be too small: this is right.") == "correct"


def test_an_answer_of_several_thousand_characters_is_stated_whole():
    text = "word " * 1_000 + "end"
    assert stated(f"**Answer:** {text}").text == text


def test_a_word_below_a_heading_is_no_part_of_it():
    assert stated("### Final Answer\n\nis one of us").text == "is one of us"

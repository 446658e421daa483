"""Thinking of imported traces: kept wherever a file has it, and no unfinished thought is ever an answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from test_import import ASKED, OPENR1, run
from test_import import r1_style as r1_style  # a fixture

from calset import bundled
from calset.builder.importing.layouts import Columns, Draft, RowError, drafts
from calset.builder.importing.tokenize import Tokenization
from calset.builder.model.info import ModelInfo, inspect
from calset.builder.model.reasoning import FOREIGN, MARKS, holds_marks
from calset.catalog.catalog import Catalog
from calset.errors import InputError

USER = {"role": "user", "content": "What is 1 + 2?"}


def answer(**keys: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **keys}]}


APART: list[dict[str, Any]] = [
    answer(content="3", reasoning="1 + 2"),
    answer(content="3", reasoning_content="1 + 2"),
    answer(content="3", thinking="1 + 2"),
    answer(content="3", reasoning_details=[{"type": "reasoning.text", "text": "1 + 2", "signature": "x"}]),
    answer(content="3", reasoning_details=[{"type": "reasoning.summary", "summary": "1 + 2"}]),
    answer(content="3", reasoning_details=json.dumps([{"type": "reasoning.text", "text": "1 + 2"}])),
    answer(content="3", reasoningContent={"reasoningText": {"text": "1 + 2", "signature": "x"}}),
    answer(content=[{"type": "thinking", "thinking": "1 + 2", "signature": "x"}, {"type": "text", "text": "3"}]),
    answer(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "1 + 2"}]},
                    {"type": "text", "text": "3"}]),
    answer(content=[{"type": "reasoning", "text": "1 + 2"}, {"type": "text", "text": "3"}]),
    answer(content=[{"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "1 + 2"}]},
                    {"type": "output_text", "text": "3"}]),
    answer(content=[{"reasoningContent": {"reasoningText": {"text": "1 + 2"}}}, {"text": "3"}]),
    answer(content=[{"text": "1 + 2", "thought": True}, {"text": "3"}]),
    answer(content=json.dumps([{"type": "thinking", "thinking": "1 + 2"}, {"type": "text", "text": "3"}])),
    {"messages": [USER, {"role": "reasoning", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]},
    {"messages": [USER, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "1 + 2"}]},
                  {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "3"}]}]},
    {**answer(content="3"), "reasoning": "1 + 2"},
    {**answer(content="3"), "reasoning_content": "1 + 2"},
    {**ASKED, "generations": ["3"], "reasoning_content": ["1 + 2"]},
    {**ASKED, "generations": [{"content": "3", "reasoning_content": "1 + 2"}]},
    {"prompt": USER["content"], "completion": "3", "reasoning": "1 + 2"},
]  # fmt: skip


@pytest.mark.parametrize("row", APART)
def test_thinking_is_found_wherever_a_row_keeps_it(row: dict[str, Any]) -> None:
    (draft,) = drafts(row, Columns())
    assert (draft.reasoning, draft.text) == ("1 + 2", "3")


def test_thinking_apart_becomes_the_models_own_and_is_counted(tmp_path: Path) -> None:
    report, traces = run(tmp_path, [{**row, "answer": "3"} for row in APART])
    assert (report.n_traces, report.n_bad) == (len(APART), 0)
    assert {t["text"] for t in traces} == {"<think>\n1 + 2\n</think>\n\n3"}
    assert {t["verdict"] for t in traces} == {"correct"}
    assert all(t["n_reasoning_tokens"] > 0 for t in traces)


@pytest.mark.parametrize(
    ("row", "text", "reasoning"),
    [
        ({**answer(content="<think>1 + 2</think>3"), "reasoning": "on"}, "<think>1 + 2</think>3", None),
        ({**answer(content="3"), "reasoning": "off"}, "3", None),
        ({**answer(content="3"), "reasoning": {"effort": "high", "summary": None}}, "3", None),
        ({**answer(content="3"), "thinking": True}, "3", None),
        (
            {**answer(content="<think>1 + 2</think>3"), "reasoning": "A person's own words"},
            "<think>1 + 2</think>3",
            None,
        ),
    ],
)
def test_a_switch_or_a_remark_is_no_thinking(row: dict[str, Any], text: str, reasoning: str | None) -> None:
    (draft,) = drafts(row, Columns())
    assert (draft.text, draft.reasoning) == (text, reasoning)


def test_each_generation_has_its_own_thinking() -> None:
    row = {**ASKED, "generations": ["3", "4"], "reasoning_content": ["1 + 2", "2 + 2"]}
    assert [(d.text, d.reasoning) for d in drafts(row, Columns())] == [("3", "1 + 2"), ("4", "2 + 2")]


@pytest.mark.parametrize(
    "row",
    [
        answer(content=[{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "3"}]),
        answer(content="3", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]),
    ],
)
def test_thinking_that_nobody_can_read_leaves_the_row_out(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="holds encrypted thinking"):
        list(drafts(row, Columns()))


def test_the_same_thinking_in_both_places_is_written_once(tmp_path: Path) -> None:
    rows = [answer(content="<think>1 + 2</think>3", reasoning_content="1 + 2"),
            answer(content="4", reasoning_content="<think>\n2 + 2\n</think>")]  # fmt: skip
    _, traces = run(tmp_path, rows)
    assert [t["text"] for t in traces] == ["<think>\n2 + 2\n</think>\n\n4", "<think>1 + 2</think>3"]


@pytest.mark.parametrize("style", ["plain", "r1"])
def test_thinking_without_an_answer_is_not_closed(tmp_path: Path, r1_style: Path, style: str) -> None:
    rows = [{**answer(content=text, reasoning_content="maybe \\boxed{3}", **end), "answer": "3"}
            for text in (None, "") for end in ({}, {"finish_reason": "length"}, {"finish_reason": "stop"})]  # fmt: skip
    _, traces = run(tmp_path, rows, model=r1_style if style == "r1" else bundled.MODEL)
    assert {t["verdict"] for t in traces} == {"truncated", "no_answer"}
    assert not any("</think>" in t["text"] for t in traces)


# --- marks of other formats ----------------------------------------------------------------------------------------

# Named ones, and others of their kind.
PAIRS = MARKS | FOREIGN | {
    "a": ("<|think|>", "<|/think|>"), "b": ("<|thinking|>", "</thinking>"),
    "c": ("<|start_of_thought|>", "<|end_thought|>"),
    "d": ("&lt;think&gt;", "&lt;/think&gt;"), "e": ("<inner_thoughts>", "</inner_thoughts>"),
    "f": ("<chain_of_thought>", "</chain_of_thought>"), "g": ('<thinking mode="slow">', "</thinking>"),
    "h": ("<|begin_reasoning|>", "<|end_of_reasoning|>"),
}  # fmt: skip


def spelled(mark: str, chance: random.Random) -> str:
    """A mark in any case; a tag with blanks too."""
    mark = "".join(c.upper() if chance.random() < 0.5 else c.lower() for c in mark)
    if mark.startswith("<") and mark.strip("</>").replace(":", "").isalpha() and chance.random() < 0.5:
        return mark.replace("<", "< ").replace(">", " >")
    return mark


thoughts = st.text(st.sampled_from("ab 1+2=3\n{}\\boxed"), max_size=12)


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return inspect(bundled.MODEL)


@pytest.fixture(scope="module")
def plain_and_r1(r1_style: Path) -> list[Tokenization]:
    return [Tokenization(inspect(bundled.MODEL)), Tokenization(inspect(r1_style))]


@given(st.sampled_from(sorted(PAIRS)), st.randoms(use_true_random=False), thoughts, st.sampled_from(["", " ", "\n\n"]))
@fewer(2)
def test_an_unfinished_thought_in_any_marks_has_no_answer(
    plain_and_r1: list[Tokenization], name: str, chance: random.Random, thought: str, before: str
) -> None:
    opening = spelled(PAIRS[name][0], chance)
    text = f"{before}{opening}{thought} so \\boxed{{3}}"
    for tokenization in plain_and_r1:
        found = tokenization(Draft(question="1 + 2?", text=text))
        assert (found.parts.answer_start, found.parts.response) == (-1, ""), text
        assert found.finish_reason == "length"


@given(st.sampled_from(sorted(PAIRS)), st.randoms(use_true_random=False), thoughts)
@fewer(2)
def test_a_finished_thought_in_any_marks_is_parted_from_its_answer(
    plain_and_r1: list[Tokenization], name: str, chance: random.Random, thought: str
) -> None:
    opening, closing = (spelled(mark, chance) for mark in PAIRS[name])
    for tokenization in plain_and_r1:
        if PAIRS[name][0] == "<think>" and ("<think>" in opening) != ("</think>" in closing):
            continue  # half the model's own
        found = tokenization(Draft(question="1 + 2?", text=f"{opening}{thought}{closing} So 42."))
        assert found.parts.response.strip() == "So 42."
        assert found.finish_reason == "stop"


@pytest.mark.parametrize("before", ["Sure! ", "The answer is \\boxed{3}. "])
@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_thought_that_opens_later_and_never_ends_is_no_answer_either(
    info: ModelInfo,
    name: str,
    before: str,
) -> None:
    found = Tokenization(info)(Draft(question="q", text=f"{before}{FOREIGN[name][0]} is it \\boxed{{3}}"))
    assert found.parts.answer_start == -1
    again = Tokenization(info)(Draft(question="q", text=f"<think>a</think>\n{FOREIGN[name][0]} is it \\boxed{{3}}"))
    assert again.parts.answer_start == -1


def test_other_marks_inside_a_thought_or_quoted_do_not_count(info: ModelInfo, r1_style: Path) -> None:
    recover = Tokenization(info)
    for text in ("<think>I use <thinking> here</think>3", "<think>a</think>In `<thinking>` one thinks: 3"):
        found = recover(Draft(question="q", text=text))
        assert found.parts.response.endswith("3"), text
        assert found.other_mark is None
    nested = recover(Draft(question="q", text="<thinking>a <reasoning>b</reasoning> maybe \\boxed{7}"))
    assert nested.parts.answer_start == -1
    # The prompt has opened the thinking: what a cut thought holds is no answer.
    cut = Tokenization(inspect(r1_style))(Draft(question="q", text="so <scratchpad>1</scratchpad> \\boxed{7}"))
    assert cut.parts.answer_start == -1


@pytest.mark.parametrize("piece", ["<", "< ", "<think", "<|", "<think ", "think", "<a", "&lt;", "[", "begin_of_"])
def test_a_long_text_of_half_marks_is_looked_through_once(piece: str) -> None:
    for text in (piece * 50_000, "<" + piece * 50_000, "<" + " " * 100_000 + piece):
        assert not holds_marks(text)


def test_other_marks_are_reported_and_can_be_named(tmp_path: Path) -> None:
    begin, end = FOREIGN["begin_of_thought"]
    whole = f"{begin}\n1 + 2 = \\boxed{{4}}\n{end}\n<|begin_of_solution|>\\boxed{{3}}<|end_of_solution|>"
    rows = [{**OPENR1, "generations": [whole, f"{begin} maybe \\boxed{{3}}"]}]
    report, traces = run(tmp_path, rows)
    assert sorted(t["verdict"] for t in traces) == ["correct", "truncated"]
    assert any(
        "2 traces mark their thinking with <|begin_of_thought|>" in w and "--reasoning" in w for w in report.warnings
    )
    (found,) = (t for t in traces if t["verdict"] == "correct")
    assert "4" not in found["response"]
    assert found["n_reasoning_tokens"] > 0
    (tmp_path / "c.duckdb").unlink()
    report, again = run(tmp_path, rows, reasoning="begin_of_thought")
    assert [t["verdict"] for t in again] == [t["verdict"] for t in traces]
    assert not any("mark their thinking" in w for w in report.warnings)
    assert {r.reasoning_format for r in Catalog(tmp_path / "c.duckdb").runs()} == {"begin_of_thought"}


def test_a_named_format_is_written_around_thinking_that_stands_apart(tmp_path: Path) -> None:
    _, (trace,) = run(tmp_path, [answer(content="3", reasoning="1 + 2")], reasoning="thinking")
    assert trace["text"] == "<thinking>\n1 + 2\n</thinking>\n\n3"
    assert trace["response"].strip() == "3"


def test_no_format_grades_the_whole_text(tmp_path: Path, r1_style: Path) -> None:
    rows = [{**OPENR1, "generations": ["1 + 2, so \\boxed{3}"]}]
    _, (trace,) = run(tmp_path, rows, model=r1_style)
    assert trace["verdict"] == "truncated"  # the prompt opens a thought that the text does not close
    (tmp_path / "c.duckdb").unlink()
    _, (trace,) = run(tmp_path, rows, model=r1_style, reasoning="none")
    assert (trace["verdict"], trace["n_reasoning_tokens"]) == ("correct", 0)


def test_an_unknown_format_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown reasoning format 'nope'; there are none, think, .*begin_of_thought"):
        run(tmp_path, [{**ASKED, "generations": ["x"]}], reasoning="nope")
    assert not (tmp_path / "c.duckdb").exists()

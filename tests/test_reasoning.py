"""Where thinking ends: on the bundled model's tokenizer, on marks of several tokens, and as laws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.model.reasoning import ReasoningFormat, detect, split

# Toy ids: 1 opens, 2 closes, 9 is a special end token; others are letters.
SINGLE = ReasoningFormat("think", "<think>", "</think>", open_id=1, close_id=2)
TEMPLATE = ReasoningFormat("think", "<think>", "</think>", open_id=1, close_id=2, opened_by_template=True)
PIECES = {1: "<think>", 2: "</think>", 9: ""}


def toy_decode(ids):
    return "".join(PIECES.get(i, chr(96 + i)) for i in ids)


@pytest.mark.parametrize(
    ("form", "ids", "expected", "response"),
    [
        (SINGLE, [1, 3, 4, 2, 5, 9], (1, 3, 4), "e"),  # the model opens and closes
        (TEMPLATE, [3, 4, 2, 5, 9], (0, 2, 3), "e"),  # R1 style: the prompt opened it
        (TEMPLATE, [1, 3, 2, 5], (0, 2, 3), "e"),  # it opens once more: a mark inside the thinking
        (SINGLE, [3, 4, 2, 5], (0, 2, 3), "e"),  # closed, never opened: thinking all the same
        (SINGLE, [1, 3, 4], (1, 3, -1), ""),  # never closed
        (TEMPLATE, [3, 4, 9], (0, 3, -1), ""),
        (SINGLE, [3, 4, 9], (-1, -1, 0), "cd"),  # never opened
        (SINGLE, [], (-1, -1, 0), ""),
        (TEMPLATE, [], (0, 0, -1), ""),
        (SINGLE, [1, 3, 1, 4, 2, 5, 2, 6], (1, 4, 5), "e</think>f"),  # nested: the first close ends thinking
        (SINGLE, [1, 3, 2, 5, 1, 6, 2, 7], (1, 6, 7), "g"),  # it thinks again: the answer follows the last thinking
        (SINGLE, [1, 3, 2, 5, 1, 6], (1, 6, -1), ""),  # and never ends: no answer
        (SINGLE, [5, 1, 6, 2, 7], (2, 3, 4), "g"),  # text before the thinking is no answer
        (SINGLE, [1, 2, 5], (1, 1, 2), "e"),  # empty thinking
        (SINGLE, [1, 3, 2], (1, 2, 3), ""),
        (ReasoningFormat(), [1, 3, 2, 5], (-1, -1, 0), "<think>c</think>e"),
    ],
)
def test_thinking_is_cut_at_its_marks(form, ids, expected, response):
    parts = split(ids, form, toy_decode)
    assert (parts.reasoning_start, parts.reasoning_end, parts.answer_start) == expected
    assert parts.response == response


@given(st.lists(st.sampled_from([1, 2, 3, 4, 9]), max_size=40), st.booleans())
def test_spans_partition_the_completion_and_the_answer_holds_no_thinking(ids, opened):
    form = TEMPLATE if opened else SINGLE
    parts = split(ids, form, toy_decode)
    if parts.reasoning_start >= 0:
        end = len(ids) if parts.answer_start < 0 else parts.answer_start
        assert 0 <= parts.reasoning_start <= parts.reasoning_end <= end <= len(ids)
    if parts.answer_start >= 0:
        assert parts.response == toy_decode(ids[parts.answer_start :])
        assert 1 not in ids[parts.answer_start :]
    else:
        assert parts.response == ""


@given(st.text(alphabet="<think>/a \n", max_size=60), st.integers(1, 5))
def test_marks_of_several_tokens_are_found_in_the_text(text, width):
    """Tokens of ``width`` characters, so that marks straddle tokens at every offset."""
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    form = ReasoningFormat("think", "<think>", "</think>")
    parts = split(list(range(len(pieces))), form, lambda ids: "".join(pieces[i] for i in ids))
    if "<think>" not in text and "</think>" not in text:
        assert parts.response == text
    elif parts.answer_start >= 0:
        assert text.endswith(parts.response)
        assert text[: len(text) - len(parts.response)].endswith("</think>")
        assert "".join(pieces[: parts.answer_start]).find("</think>") >= 0


def test_the_bundled_model_opens_its_own_thinking(tiny_model: Path):
    from calset.builder.model.info import inspect

    form = inspect(tiny_model).reasoning
    assert (form.name, form.opened_by_template) == ("think", False)
    assert form.open_id is not None
    assert form.close_id is not None


def test_a_template_that_opens_thinking_is_seen_and_a_question_that_says_think_is_not(tiny_model: Path):
    from calset.builder.model.info import inspect

    tokenizer = inspect(tiny_model).tokenizer
    plain = tokenizer.chat_template
    tokenizer.chat_template = plain.replace("assistant\n' }}{%- endif", "assistant\n<think>\n' }}{%- endif")
    assert tokenizer.chat_template != plain
    assert detect(tokenizer, tokenizer.chat_template).opened_by_template
    tokenizer.chat_template = plain.replace(
        "assistant\n' }}{%- endif", "assistant\n<think>\n\n</think>\n\n' }}{%- endif"
    )
    assert not detect(tokenizer, tokenizer.chat_template).opened_by_template


def test_a_tokenizer_and_template_without_marks_have_no_reasoning():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0})
    assert detect(tokenizer, "{{ messages }}") == ReasoningFormat()


def test_the_real_tokenizer_round_trips_a_thought(tiny_model: Path):
    from calset.builder.model.info import inspect

    info = inspect(tiny_model)
    ids = info.tokenizer(
        "<think>\n1+1=2\n</think>\nThe answer is \\boxed{2}.<|im_end|>", add_special_tokens=False
    ).input_ids
    parts = split(ids, info.reasoning, info.decode)
    assert parts.response.strip() == "The answer is \\boxed{2}."
    assert info.decode(ids[parts.reasoning_start : parts.reasoning_end]).strip() == "1+1=2"

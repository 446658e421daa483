"""How an imported completion ended: a reason that is no proper end never lets a verdict count as correct."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_import import ASKED, GOOD, OPENR1, run

from calset.builder.grading import verdict_without_grading
from calset.builder.importing.ends import KNOWN, End, end_of

PROPER = ["stop", "STOP", " stop ", "eos", "eos_token", "EOS_TOKEN", "end_turn", "endTurn", "stop_sequence", "COMPLETE",
          "FinishReason.STOP", "<FinishReason.STOP: 1>", "FINISH_REASON_STOP", {"type": "stop", "matched": 151645},
          '{"type": "stop"}', "{'type': 'stop', 'matched': 2}"]  # fmt: skip
CUT = [{"type": "length", "length": 40}, '{"type": "length", "length": 40}', "{'type': 'length'}", "length", " length",
       "Length", "MAX_TOKENS", "FinishReason.MAX_TOKENS", "FINISH_REASON_MAX_TOKENS", "<FinishReason.MAX_TOKENS: 2>",
       "max-tokens", "maxTokens", "max_length", "model_length", "max_output_tokens", "incomplete", "truncated",
       "ERROR_LIMIT", "model_context_window_exceeded", "not_finished", {"reason": "max_output_tokens"}]  # fmt: skip
BROKEN = ["abort", {"type": "abort", "message": "gone"}, "timeout", "TIMEOUT", "content_filter", "tool_calls",
          "function_call", "cancelled", "SAFETY", "refusal", "insufficient_system_resource"]  # fmt: skip
FAILED = ["error", "failed", "MALFORMED_FUNCTION_CALL"]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [*((r, "stop") for r in PROPER), *((r, "length") for r in CUT), *((r, "abort") for r in BROKEN),
     *((r, "error") for r in FAILED), ("repetition", "repetition")],
)  # fmt: skip
def test_reasons_of_all_servers_are_read(reason: Any, expected: str) -> None:
    assert end_of([{"finish_reason": reason}]) == End(expected)


@pytest.mark.parametrize("reason", ["banana", "stop!", "unknown", "non-stop", "стоп", True, 1, {"kind": 3}, ["banana"]])
def test_a_reason_that_nobody_knows_is_no_proper_end_and_is_named(reason: Any) -> None:
    found = end_of([{"finish_reason": reason}])
    assert found is not None
    assert found.reason == "abort"
    assert found.unknown


@pytest.mark.parametrize("reason", [None, "", "  ", "None", "null", float("nan"), {}, []])
def test_a_row_that_says_nothing_says_nothing(reason: Any) -> None:
    assert end_of([{"finish_reason": reason}]) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"stop_reason": "max_tokens"}, "length"),
        ({"stop_reason": 151_643, "finish_reason": "stop"}, "stop"),  # vLLM's: the token that it stopped at
        ({"stop_reason": "</answer>", "finish_reason": "stop"}, "stop"),  # or the text
        ({"stop_reason": "</answer>", "finish_reason": "length"}, "length"),
        ({"meta_info": {"finish_reason": {"type": "length", "length": 3}}}, "length"),
        ({"meta_info": '{"finish_reason": {"type": "length"}}'}, "length"),
        ({"meta_info": {"finish_reason": {"type": "stop"}}, "finish_reason": "length"}, "length"),
        ({"is_truncated": True}, "length"),
        ({"is_truncated": "True", "finish_reason": "stop"}, "length"),
        ({"is_truncated": 1, "finish_reason": "stop"}, "length"),
        ({"is_truncated": False, "finish_reason": "stop"}, "stop"),
        ({"is_reasoning_complete": False, "finish_reason": "stop"}, "length"),
        ({"is_reasoning_complete": True, "finish_reason": "length"}, "length"),
        ({"finish_reason": "stop", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"finish_reason": "length", "stop_reason": "content_filter"}, "abort"),  # the worst counts
        ({"done_reason": "length"}, "length"),
        ({"finishReason": "MAX_TOKENS"}, "length"),
        ({"details": {"finish_reason": "length"}}, "length"),  # TGI
        ({"metadata": {"finish_reason": "length"}}, "length"),
        ({"status": "incomplete"}, "length"),  # OpenAI's Responses
        ({"done": False}, "length"),  # Ollama
    ],
)
def test_every_field_that_says_how_it_ended_counts(row: dict[str, Any], expected: str) -> None:
    found = end_of([row])
    assert found is not None
    assert found.reason == expected


@pytest.mark.parametrize(
    "row",
    [
        {"finish_reasons": ["stop", "length", None]},
        {"finish_reasons": '["stop", "length", null]'},
        {"finish_reason": [{"type": "stop"}, {"type": "length"}, None]},
        {"meta_info": [{"finish_reason": {"type": "stop"}}, {"finish_reason": {"type": "length"}}, {}]},
        {"is_truncated": [False, True, None], "finish_reasons": ["stop", "stop"]},
        {"is_reasoning_complete": [True, False, None], "finish_reasons": ["stop", "stop"]},
    ],
)
def test_a_list_has_an_end_for_each_generation(row: dict[str, Any]) -> None:
    found = [end_of([row], place) for place in range(3)]
    assert [end and end.reason for end in found] == ["stop", "length", None]


SPELLINGS: tuple[Callable[[str], Any], ...] = (
    str, str.upper, str.title, " {} \n".format, "FinishReason.{}".format, "<FinishReason.{}: 2>".format,
    "FINISH_REASON_{}".format, lambda word: {"type": word, "length": 4}, '{{"type": "{}"}}'.format,
    "{{'reason': '{}'}}".format, lambda word: [word], lambda word: {"finish_reason": {"type": word}},
)  # fmt: skip
FIELDS = ("finish_reason", "finish_reasons", "stop_reason", "done_reason", "stopReason")
unfinished = st.sampled_from(sorted(word for word, reason in KNOWN.items() if reason != "stop"))


@given(unfinished, st.sampled_from(SPELLINGS), st.sampled_from(FIELDS), st.sampled_from(["", "_", "-", " "]), st.data())
def test_no_spelling_of_an_unfinished_reason_is_graded(
    word: str, spell: Callable[[str], Any], field: str, joint: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(word))) if joint else len(word)
    said = spell(word[:cut] + joint * (cut < len(word)) + word[cut:])
    found = end_of([{field: said}, {"meta_info": {"finish_reason": "stop"}}])
    assert found is not None
    assert verdict_without_grading("3", found.reason, True) is not None


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_only_a_word_that_is_known_is_a_proper_end(said: str) -> None:
    found = end_of([{"finish_reason": said}])
    if found is not None and found.reason == "stop":
        letters = "".join(c for c in said.casefold() if c.isalpha())
        assert any(letters.endswith(word) for word, reason in KNOWN.items() if reason == "stop")
    elif found is not None:
        assert verdict_without_grading("3", found.reason, True) is not None


# --- in an import --------------------------------------------------------------------------------------------------


def test_no_cut_trace_of_an_import_is_correct_and_unknown_reasons_are_reported(tmp_path: Path) -> None:
    wrong = [*CUT, *BROKEN, *FAILED, "banana", "banana"]
    rows = [{**OPENR1, "problem": f"What is 1 + 2? ({n})", "generations": [GOOD], "finish_reason": reason}
            for n, reason in enumerate(wrong)]  # fmt: skip
    messages = [{"role": "user", "content": "What is 2 + 1?"},
                {"role": "assistant", "content": GOOD, "stop_reason": "max_tokens"}]  # fmt: skip
    rows += [{"messages": messages, "answer": "3"}, {**OPENR1, "generations": [GOOD], "finish_reason": "stop"}]
    report, traces = run(tmp_path, rows)
    assert report.n_bad == 0
    assert report.verdicts["correct"] == 1
    assert report.verdicts["truncated"] == len(CUT) + 1
    assert report.verdicts["error"] == len(BROKEN) + len(FAILED) + 2
    assert any("2 traces ended for a reason that calset does not know, 'banana'" in w for w in report.warnings)
    assert {t["finish_reason"] for t in traces} == {"stop", "length", "abort", "error"}


def test_token_ids_with_sglangs_finish_reason_stay_cut(tmp_path: Path) -> None:
    ids = {"input_ids": [1, 311, 19, 20, 21], "num_prompt_tokens": 2}
    rows = [
        {**ids, "finish_reason": {"type": "length", "length": 3}},
        {**ids, "meta_info": {"finish_reason": "length"}},
    ]
    _, traces = run(tmp_path, rows)
    assert [t["finish_reason"] for t in traces] == ["length"] * 2


def test_generations_as_objects_say_how_each_ended(tmp_path: Path) -> None:
    generations = [{"text": GOOD, "finish_reason": "stop"}, {"text": GOOD, "meta_info": {"finish_reason": "length"}},
                   {"message": {"role": "assistant", "content": GOOD}, "finish_reason": "length"}]  # fmt: skip
    _, traces = run(tmp_path, [{**ASKED, "generations": generations}])
    assert sorted(t["finish_reason"] for t in traces) == ["length", "length", "stop"]

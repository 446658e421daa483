"""Where thinking ends and the answer begins.

Why it exists: a grader must see only what follows the thinking (a truncated ``<think>maybe \\boxed{7}`` must never
count as an answer), and calibration counts reasoning tokens. Works on the engine's own token ids and never encodes
text again. Must not know: engines, graders, the catalog.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# The first pair that the tokenizer or the chat template knows is the model's.
MARKS: dict[str, tuple[str, str]] = {"think": ("<think>", "</think>")}

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its thinking. ``open_id`` and ``close_id`` are None for marks of several tokens."""

    name: str = "none"
    open_mark: str = ""
    close_mark: str = ""
    open_id: int | None = None
    close_id: int | None = None
    opened_by_template: bool = False  # the prompt ends inside the thinking (R1 style): the completion only closes it


@dataclass(frozen=True, slots=True)
class Parts:
    """A completion cut into [0, reasoning_start) opening, [.., reasoning_end) thinking, [.., answer_start) closing
    mark, [answer_start, n) answer. Both reasoning offsets are -1 when the model did not think; ``answer_start`` is -1
    when thinking never ended."""

    reasoning_start: int
    reasoning_end: int
    answer_start: int
    response: str


def detect(tokenizer: Any, chat_template: str) -> ReasoningFormat:
    """The reasoning format of a model, from its tokenizer's vocabulary and its chat template."""
    vocabulary = tokenizer.get_vocab()
    for name, (open_mark, close_mark) in MARKS.items():
        if close_mark not in vocabulary and close_mark not in chat_template:
            continue
        opening = _generation_prompt(tokenizer)
        return ReasoningFormat(
            name=name,
            open_mark=open_mark,
            close_mark=close_mark,
            open_id=vocabulary.get(open_mark),
            close_id=vocabulary.get(close_mark),
            opened_by_template=opening.rfind(open_mark) > opening.rfind(close_mark),
        )
    return ReasoningFormat()


def _generation_prompt(tokenizer: Any) -> str:
    """What the template adds for the model's turn. A question that itself says ``<think>`` must not count, so this
    renders a neutral one and keeps only the difference."""
    messages = [{"role": "user", "content": "Hello"}]
    without = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    with_it = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return with_it[len(without) :] if with_it.startswith(without) else with_it[-200:]


def split(completion_ids: Sequence[int], form: ReasoningFormat, decode: Decode) -> Parts:
    """Cut a completion at its thinking marks.

    The first closing mark ends thinking (no model is trained to nest them), and one without an opening mark closes a
    thinking that began with the completion. An opening mark after the answer has begun opens thinking again: then the
    answer is what follows the last thinking. A closing mark inside the answer is text. Thinking that is open at the
    end has no answer, whatever it holds: the response is empty.
    """
    n = len(completion_ids)
    if form.name == "none":
        return Parts(-1, -1, 0, decode(completion_ids))
    text = decode(completion_ids) if form.open_id is None or form.close_id is None else ""
    marks = [(*m, "open") for m in _find(completion_ids, form.open_id, form.open_mark, text, decode)]
    marks += [(*m, "close") for m in _find(completion_ids, form.close_id, form.close_mark, text, decode)]
    marks.sort()
    thinking = form.opened_by_template or (bool(marks) and marks[0][-1] == "close")
    begin = 0 if thinking else -1
    last: tuple[int, int, int] | None = None
    for start, end, text_end, kind in marks:
        if kind == "open" and not thinking:
            thinking = True
            begin = end if begin < 0 else begin
        elif kind == "close" and thinking:
            thinking, last = False, (start, end, text_end)
    if thinking:
        return Parts(begin, n, -1, "")
    if last is None:
        return Parts(-1, -1, 0, decode(completion_ids))
    start, end, text_end = last
    return Parts(begin, max(begin, start), end, decode(completion_ids[end:]) if text_end < 0 else text[text_end:])


def _find(ids: Sequence[int], mark_id: int | None, mark: str, text: str, decode: Decode) -> list[tuple[int, int, int]]:
    """(first token, token after, end in ``text`` or -1) of each mark.

    A mark of several tokens may share its last one with the text behind it (``>\\n``), so it is looked for in the
    text and its tokens found by bisection over decoded prefixes.
    """
    if mark_id is not None:
        return [(i, i + 1, -1) for i, token in enumerate(ids) if token == mark_id]
    found = []
    at = text.find(mark)
    while at >= 0:
        end = at + len(mark)
        prefixes = range(len(ids) + 1)
        first = bisect_right(prefixes, at, key=lambda k: len(decode(ids[:k]))) - 1
        after = bisect_left(prefixes, end, key=lambda k: len(decode(ids[:k])))
        found.append((max(first, 0), min(after, len(ids)), end))
        at = text.find(mark, end)
    return found

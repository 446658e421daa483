"""Where thinking ends and the answer begins.

Why it exists: a grader must see only what follows the thinking (a truncated ``<think>maybe \\boxed{7}`` must never
count as an answer), and calibration counts reasoning tokens. Works on the engine's own token ids and never encodes
text again. Must not know: engines, graders, the catalog.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from calset.builder.model.templates import render
from calset.errors import InputError

# Each pair as the model's vendor or vLLM's parser of that model spells it (docs/models.md names the sources).
MARKS: dict[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),  # DeepSeek-R1 and distillations, Qwen3, QwQ, Phi-4-reasoning, GLM, OLMo, ...
    "mistral": ("[THINK]", "[/THINK]"),  # Magistral from 2507 on; 2506 says <think> in plain text
    "seed": ("<seed:think>", "</seed:think>"),  # Seed-OSS
    "gemma": ("<|channel>", "<channel|>"),  # Gemma 4; the word "thought" after the mark is counted as thinking
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    "minimax": ("<mm:think>", "</mm:think>"),  # MiniMax-M3
}
# Marks that files have and no model here is known by: of data sets, of prompts that ask for them, of other tokenizers.
FOREIGN: dict[str, tuple[str, str]] = {
    "begin_of_thought": ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts-114k, Sky-T1
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "reason": ("<reason>", "</reason>"),
    "thoughts": ("<thoughts>", "</thoughts>"),
    "cot": ("<cot>", "</cot>"),
    "scratchpad": ("<scratchpad>", "</scratchpad>"),
    "longcat": ("<longcat_think>", "</longcat_think>"),  # LongCat-Flash-Thinking
    "kimi": ("◁think▷", "◁/think▷"),  # Kimi-VL
    "s1": ("<|im_start|>think", "<|im_start|>answer"),  # s1
    "channels": ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss, in another tokenizer
}
FINAL = "final"  # the harmony channel whose message is the answer

Decode = Callable[[Sequence[int]], str]


def _spelled_out(name: str, opening: str, closing: str) -> str:
    return rf"(?P<{name}>{re.escape(opening)})|(?P<not_{name}>{re.escape(closing)})"


@dataclass(frozen=True, slots=True)
class Channels:
    """The special tokens of gpt-oss's harmony format (github.com/openai/harmony, docs/format.md).

    A completion is ``<|channel|>analysis<|message|>...<|end|>`` and then
    ``<|start|>assistant<|channel|>final<|message|>...<|return|>``, with any number of analysis and commentary messages
    before the final one; ``<|call|>`` ends it at a tool call.
    """

    start: int
    channel: int
    message: int
    end: int
    constrain: int | None = None
    stop: int | None = None  # <|return|>
    call: int | None = None

    @property
    def closing(self) -> frozenset[int]:
        """What ends a message."""
        return frozenset(i for i in (self.end, self.stop, self.call) if i is not None)

    @property
    def all(self) -> frozenset[int]:
        return self.closing | {self.start, self.channel, self.message}


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its thinking: a pair of marks, harmony channels, or not at all (``none``).

    ``open_id`` and ``close_id`` are None where the tokenizer has no token for either mark: the marks are then looked
    for in the text, in any spelling (``< Think >``) where ``any_case``.

    Raises:
        ValueError: one id without the other.
    """

    name: str = "none"
    open_mark: str = ""
    close_mark: str = ""
    open_id: int | None = None
    close_id: int | None = None
    opened_by_template: bool = False  # the prompt ends inside the thinking (R1 style): the completion only closes it
    channels: Channels | None = None
    prompt_channel: str | None = None  # harmony: the prompt ends inside a message of this channel
    any_case: bool = False

    def __post_init__(self) -> None:
        if (self.open_id is None) != (self.close_id is None):
            raise ValueError("both marks of a reasoning format are tokens, or neither is")


@dataclass(frozen=True, slots=True)
class Parts:
    """A completion cut into [0, reasoning_start) opening, [.., reasoning_end) thinking, [.., answer_start) closing
    mark, [answer_start, n) answer. Both reasoning offsets are -1 when the model did not think; ``answer_start`` is -1
    when thinking never ended."""

    reasoning_start: int
    reasoning_end: int
    answer_start: int
    response: str


# --- which format a model has ------------------------------------------------------------------------------------


def detect(
    tokenizer: Any, chat_template: str, template_options: Mapping[str, Any] | None = None, model: str | Path = ""
) -> ReasoningFormat:
    """The reasoning format of a model, from its tokenizer's vocabulary and its chat template.

    A pair that is both in the template and in the vocabulary goes before one that only the template spells, and that
    before one that only the vocabulary holds: tokenizers are shared within a family, templates are the model's own.

    Args:
        template_options: what the template is rendered with (``enable_thinking``, ...); they decide whether the prompt
            ends inside the thinking.
        model: whose template it is, for messages.

    Raises:
        InputError: see ``render``.
    """
    vocabulary = tokenizer.get_vocab()
    channels = _channels(vocabulary)
    if channels is not None and "<|channel|>" in chat_template:
        opened = _open_channel(generation_prompt(tokenizer, template_options, model))
        return ReasoningFormat(
            name="harmony",
            opened_by_template=opened not in (None, FINAL),
            channels=channels,
            prompt_channel=opened,
        )
    known = {
        name: 2 * (close_mark in chat_template) + (close_mark in vocabulary) for name, (_, close_mark) in MARKS.items()
    }
    name = max(known, key=lambda name: known[name])  # among equals the first
    if not known[name]:
        return ReasoningFormat()
    open_mark, close_mark = MARKS[name]
    single = open_mark in vocabulary and close_mark in vocabulary
    opening = generation_prompt(tokenizer, template_options, model)
    return ReasoningFormat(
        name=name,
        open_mark=open_mark,
        close_mark=close_mark,
        open_id=vocabulary[open_mark] if single else None,
        close_id=vocabulary[close_mark] if single else None,
        opened_by_template=opening.rfind(open_mark) > opening.rfind(close_mark),
    )


def named(name: str, own: ReasoningFormat, tokenizer: Any) -> ReasoningFormat:
    """Return the reasoning format of this name, for completions that are not in the model's own.

    Args:
        own: the model's, which a name may name too.

    Raises:
        InputError: no format has this name.
    """
    if name == own.name:
        return own
    if name == "none":
        return ReasoningFormat()
    marks = (MARKS | FOREIGN).get(name)
    if marks is None:
        listed = ", ".join(("none", *MARKS, *FOREIGN))
        raise InputError(f"unknown reasoning format {name!r}; there are {listed}, and {own.name}, the model's own")
    vocabulary = tokenizer.get_vocab()
    if all(mark in vocabulary for mark in marks):
        return ReasoningFormat(name, *marks, *(vocabulary[mark] for mark in marks))
    return ReasoningFormat(name, *marks, any_case=True)


def _channels(vocabulary: Mapping[str, int]) -> Channels | None:
    ids = [vocabulary.get(f"<|{name}|>") for name in ("start", "channel", "message", "end")]
    if None in ids:
        return None
    others = {"constrain": "<|constrain|>", "stop": "<|return|>", "call": "<|call|>"}
    return Channels(*ids, **{name: vocabulary.get(token) for name, token in others.items()})  # type: ignore[arg-type]


def generation_prompt(tokenizer: Any, template_options: Mapping[str, Any] | None = None, model: str | Path = "") -> str:
    """What the template adds for the model's turn. A question that itself says ``<think>`` must not count, so this
    renders a neutral one and keeps only the difference."""
    messages = [{"role": "user", "content": "Hello"}]
    without, with_it = (
        render(tokenizer, [messages], options=template_options, add_generation_prompt=added, model=model)[0]
        for added in (False, True)
    )
    # Some templates end a conversation with a token that they leave out before the model's turn.
    return with_it[shared_prefix(without, with_it) :]


def shared_prefix(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _open_channel(opening: str) -> str | None:
    """The channel of the message that the text ends in, or None."""
    header, mark, _ = opening.rpartition("<|message|>")
    if not mark or "<|end|>" in opening[len(header) :] or "<|channel|>" not in header:
        return None
    words = header.rpartition("<|channel|>")[2].split()
    return words[0] if words else None


# --- cutting a completion ----------------------------------------------------------------------------------------


def split(completion_ids: Sequence[int], form: ReasoningFormat, decode: Decode) -> Parts:
    """Cut a completion at its thinking marks.

    The first closing mark ends thinking (no model is trained to nest them), and one without an opening mark closes a
    thinking that began with the completion. An opening mark after the answer has begun opens thinking again: then the
    answer is what follows the last thinking. A closing mark inside the answer is text. Thinking that is open at the
    end has no answer, whatever it holds: the response is empty.

    Of harmony channels the answer is the last message, if it is on the final channel; all messages before it are
    thinking, and a completion that ends in or after any other message has no answer.

    Args:
        completion_ids: as the engine returned them, the end token included.
        decode: ids to text, special tokens left out (``ModelInfo.decode``); the marks are found before it drops them.
    """
    if form.channels is not None:
        return _split_channels(completion_ids, form, form.channels, decode)
    if form.name == "none":
        return Parts(-1, -1, 0, decode(completion_ids))
    if form.open_id is not None:
        return _split_ids(completion_ids, form, decode)
    return _split_text(completion_ids, form, decode)


def _walk(marks: Iterator[tuple[int, int, bool]], opened: bool) -> tuple[int, tuple[int, int] | None, bool]:
    """Follow marks (start, end, whether it opens) in order.

    Returns:
        where the thinking begins (-1: never), the last closing mark that ended one, and whether thinking is open at
        the end.
    """
    begin = 0 if opened else -1
    thinking, last, first = opened, None, True
    for start, end, opens in marks:
        if first and not opens and not thinking:
            thinking, begin = True, 0
        first = False
        if opens and not thinking:
            thinking = True
            begin = end if begin < 0 else begin
        elif not opens and thinking:
            thinking, last = False, (start, end)
    return begin, last, thinking


def _split_ids(ids: Sequence[int], form: ReasoningFormat, decode: Decode) -> Parts:
    pair = (form.open_id, form.close_id)
    marks = ((i, i + 1, token == form.open_id) for i, token in enumerate(ids) if token in pair)
    begin, last, thinking = _walk(marks, form.opened_by_template)
    if thinking:
        return Parts(begin, len(ids), -1, "")
    if last is None:
        return Parts(-1, -1, 0, decode(ids))
    start, end = last
    return Parts(begin, max(begin, start), end, decode(ids[end:]))


def _split_text(ids: Sequence[int], form: ReasoningFormat, decode: Decode) -> Parts:
    text = decode(ids)
    marks = _matched(_marks(text, (_kind(form.name),))) if form.any_case else _text_marks(text, form)
    return _cut(ids, text, marks, form.opened_by_template, decode)


def _cut(ids: Sequence[int], text: str, marks: Iterator[tuple[int, int, bool]], opened: bool, decode: Decode) -> Parts:
    """Cut at marks of several tokens. One may share its last token with the text behind it (``>\\n``), so they are
    found in the text, and the few that count are brought to token offsets by bisection over decoded prefixes."""
    begin, last, thinking = _walk(marks, opened)
    prefixes = range(len(ids) + 1)

    def length(k: int) -> int:
        """Characters of a prefix; one whose bytes are not all there is none yet."""
        return len(decode(ids[:k]).rstrip("\ufffd"))

    def after(at: int) -> int:
        """The first offset whose prefix holds all of text[:at]."""
        return min(bisect_left(prefixes, at, key=length), len(ids)) if at > 0 else 0

    def before(at: int) -> int:
        """The last offset whose prefix holds nothing of text[at:]."""
        return max(bisect_right(prefixes, at, key=length) - 1, 0)

    reasoning_start = after(begin) if begin >= 0 else -1
    if thinking:
        return Parts(reasoning_start, len(ids), -1, "")
    if last is None:
        return Parts(-1, -1, 0, text)
    start, end = last
    answer_start = max(after(end), reasoning_start)
    return Parts(reasoning_start, min(max(reasoning_start, before(start)), answer_start), answer_start, text[end:])


def _text_marks(text: str, form: ReasoningFormat) -> Iterator[tuple[int, int, bool]]:
    at = 0
    while True:
        opening, closing = text.find(form.open_mark, at), text.find(form.close_mark, at)
        if opening < 0 and closing < 0:
            return
        opens = closing < 0 or 0 <= opening < closing
        start = opening if opens else closing
        at = start + len(form.open_mark if opens else form.close_mark)
        yield start, at, opens


# --- marks of other formats --------------------------------------------------------------------------------------

_PREFIX = r"(?:begin|start|end)_?(?:of_?)?"
# A tag with a word of thinking in its name, in any case, with blanks, bars or attributes, or escaped for HTML:
# <Think>, < thinking >, <|start_of_thought|>, </reasoning>, <seed:think>. Every repetition has a bound: a text of
# nothing but blanks or letters takes no longer than another.
_TAG = (
    r"(?:<|&lt;)\|?\s{0,3}(?P<slash>/?)\s{0,3}"
    r"(?P<tag>[a-z_:]{0,20}(?:think|thought|reason)[a-z_]{0,20}|(?:begin_|start_|end_)?(?:of_)?(?:scratchpad|cot))"
    r"(?:\s[^<>]{0,80})?\s{0,3}\|?(?:>|&gt;)"
)
_UNTAGGED = {n: marks for n, marks in (MARKS | FOREIGN).items() if not re.fullmatch(_TAG, marks[0], re.IGNORECASE)}
# Quoted by a backtick, a mark is talk about marks. The first characters of all marks: elsewhere one look is enough.
_ANY = re.compile(
    rf"(?<!`)(?=[<&\[◁])(?:{'|'.join(_spelled_out(n, *marks) for n, marks in _UNTAGGED.items())}|{_TAG})", re.IGNORECASE
)


class _Mark(NamedTuple):
    start: int
    end: int
    opens: bool
    kind: str  # what closes it is of the same kind


def _marks(text: str, kinds: Collection[str] | None = None) -> Iterator[_Mark]:
    """The thinking marks in a text, of all formats or of some kinds."""
    for found in _ANY.finditer(text):
        if found["tag"]:
            name = found["tag"].lower()
            opens, kind = not (found["slash"] or name.startswith("end_")), re.sub(f"^{_PREFIX}", "", name)
        else:
            kind = next(n for n in _UNTAGGED if found[n] or found[f"not_{n}"])
            opens = bool(found[kind])
        if kinds is None or kind in kinds:
            yield _Mark(found.start(), found.end(), opens, kind)


def _matched(marks: Iterable[_Mark]) -> Iterator[tuple[int, int, bool]]:
    """The marks that count: inside thinking only the one that closes it does."""
    inside = None
    for start, end, opens, kind in marks:
        if inside is None:
            inside = kind if opens else None
            yield start, end, opens
        elif not opens and kind == inside:
            inside = None
            yield start, end, False


def _kind(name: str) -> str:
    """The kind of a named format's marks."""
    return next(_marks((MARKS | FOREIGN)[name][0])).kind


def holds_marks(text: str) -> bool:
    """Return True if a text holds a thinking mark of any known format."""
    return _ANY.search(text) is not None


def _holds_own(ids: Sequence[int], form: ReasoningFormat, spell: Decode) -> bool:
    if form.channels is not None:
        return form.channels.channel in ids
    if form.open_id is not None:
        return form.open_id in ids or form.close_id in ids
    text = spell(ids)
    if form.any_case:
        return any(_marks(text, (_kind(form.name),)))
    return bool(form.open_mark) and (form.open_mark in text or form.close_mark in text)


def split_any(
    completion_ids: Sequence[int], form: ReasoningFormat, decode: Decode, spell: Decode
) -> tuple[Parts, str | None]:
    """Cut a completion as ``split`` does, and where it marks its thinking in another format, as that one does.

    A thought that other marks open and nothing closes has no answer. Other marks count at the start of what the model's
    own marks leave as the answer and, where the completion has none of its own, anywhere: but if the prompt has opened
    the thinking, they must come first, since a thought may hold any text.

    Args:
        spell: ids to text, special tokens and all: what is a mark elsewhere may be a special token here.

    Returns:
        The parts, and the first other mark where there was one.
    """
    parts, at = split(completion_ids, form, decode), 0
    if _holds_own(completion_ids, form, spell):
        if parts.answer_start < 0:
            return parts, None
        at = parts.answer_start
    text = spell(completion_ids[at:])
    first = next(_marks(text), None)
    if first is None:
        return parts, None
    if (at or form.opened_by_template) and (text[: first.start].strip() or not first.opens):
        return parts, None
    ids = completion_ids[at:]
    found = _cut(ids, text, _matched(_marks(text)), False, spell)
    response = found.response
    if found.answer_start >= 0:  # without special tokens
        tail = ids[found.answer_start :]
        response = response[: max(0, len(response) - len(spell(tail)))] + decode(tail)
    begins = parts.reasoning_start if at and parts.reasoning_start >= 0 else at + max(0, found.reasoning_start)
    answer = -1 if found.answer_start < 0 else at + found.answer_start
    return Parts(begins, at + found.reasoning_end, answer, response), text[first.start : first.end]


@dataclass(slots=True)
class _Message:
    """A harmony message: its channel, and its content's [begin, end); ``ended`` when a token closed it."""

    channel: str
    begin: int
    end: int = -1


def _split_channels(ids: Sequence[int], form: ReasoningFormat, channels: Channels, decode: Decode) -> Parts:
    messages, in_header = _messages(ids, form.prompt_channel, channels, decode)
    if not messages:
        # Not one harmony token: the model left its format, and what it said is all there is to grade.
        plain = not channels.all.intersection(ids[:-1]) and not in_header
        return Parts(-1, -1, 0, decode(ids)) if plain else Parts(-1, -1, -1, "")
    last = messages[-1]
    answered = last.channel == FINAL and not in_header
    thoughts = messages[:-1] if answered else messages
    start = thoughts[0].begin if thoughts else -1
    end = thoughts[-1].end if thoughts else -1
    if not answered:
        return Parts(start, end if in_header else len(ids), -1, "")
    return Parts(start, end, last.begin, decode(ids[last.begin : last.end]))


def _messages(
    ids: Sequence[int], prompt_channel: str | None, channels: Channels, decode: Decode
) -> tuple[list[_Message], bool]:
    """The messages of a completion, and whether another one's header had begun when it ended."""
    messages = [] if prompt_channel is None else [_Message(prompt_channel, 0)]
    inside, header = bool(messages), -1  # header: where the channel's name begins
    begun = False
    for i, token in enumerate(ids):
        if inside and (token in channels.closing or token in (channels.start, channels.channel)):
            messages[-1].end, inside, header = i, False, -1
        if inside:
            continue
        if token in (channels.start, channels.channel):
            begun = True
            header = i + 1 if token == channels.channel else header
        elif token == channels.message:
            messages.append(_Message(_channel_name(ids[header:i], channels, decode) if header > 0 else "", i + 1))
            inside, header, begun = True, -1, False
    if inside:
        messages[-1].end = len(ids)
    return messages, begun


def _channel_name(header: Sequence[int], channels: Channels, decode: Decode) -> str:
    """``commentary to=functions.f <|constrain|>json`` -> ``commentary``."""
    cut = next((i for i, token in enumerate(header) if token == channels.constrain), len(header))
    words = decode(header[:cut]).split()
    return words[0] if words else ""

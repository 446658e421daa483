"""Rows of other programs' trace files, brought to one shape: what was asked, what the model said, as text or token ids.

Known are open-r1's ``generations`` (OpenR1-Math), chat ``messages`` (Mixture-of-Thoughts, OpenAI's, also ShareGPT's
``conversations``), the token ids of SGLang's RAC collector and of calset's own exports, and the ``prompt`` and
``completion`` of DeepSpeed's. A row is told by its columns alone, so a file may mix them. Must not know: tokenizers,
chat templates, the catalog.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from calset.builder.problems.columns import MAX_METADATA_CHARS, look_up
from calset.io.jsonable import jsonable
from calset.io.rows import Row

QUESTIONS = ("problem", "question")
ANSWERS = ("answer", "reference_answer", "expected_answer", "ground_truth", "final_answer")
# Prompt ids, then completion ids; of input_ids the count of prompt tokens.
ID_PAIRS = (
    ("prompt_ids", "completion_ids"),
    ("prompt_token_ids", "token_ids"),
    ("prompt_token_ids", "output_token_ids"),
    ("prompt_ids", "output_ids"),
)
PROMPT_COUNTS = ("n_prompt_tokens", "num_prompt_tokens")
HAVE = "generations, messages, conversations, prompt and completion, or input_ids and num_prompt_tokens"
# ShareGPT's names of the roles.
ROLES = {"human": "user", "gpt": "assistant"}
_NOT_KEPT = {
    "messages", "conversations", "generations", "text", "completion", "prompt", "input_ids", "finish_reason", "model",
    "dataset", "max_tokens", "system", *PROMPT_COUNTS, *(name for pair in ID_PAIRS for name in pair),
}  # fmt: skip


class RowError(ValueError):
    """A row that holds no trace that calset can keep; the message says why."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the question and the reference answer are; None looks for the usual names. Dots look inside."""

    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """One trace as a file gives it: ``text``, or ``prompt_ids`` and ``completion_ids``."""

    question: str | None = None
    answer: str | None = None
    system_prompt: str | None = None
    text: str | None = None  # of the completion, thinking and all
    reasoning: str | None = None  # the thinking, where it is apart from ``text``
    prompt_text: str | None = None  # as the model got it, rendered or not
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    whole_text: str | None = None  # what the file says its token ids decode to
    finish_reason: str | None = None
    max_tokens: int | None = None
    model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def drafts(row: Row, columns: Columns) -> Iterator[Draft]:
    """The traces of a row; several where it holds several generations.

    Raises:
        RowError: none that can be kept.
    """
    base = Draft(
        question=_column(row, columns.question, QUESTIONS, "question"),
        answer=_column(row, columns.answer, ANSWERS, "answer"),
        finish_reason=_text(row.get("finish_reason"), "finish_reason"),
        max_tokens=row["max_tokens"] if _is_whole(row.get("max_tokens")) else None,
        model=row["model"] if isinstance(row.get("model"), str) else None,
        metadata=_metadata(row, columns),
    )
    if ids := _ids(row):
        with suppress(RowError):  # whatever the conversation is, the token ids are the trace
            base = _asked(base, _chat(row), row, columns)
        prompt_ids, completion_ids = ids
        said = _text(row.get("text"), "text")
        yield replace(base, prompt_ids=prompt_ids, completion_ids=completion_ids, whole_text=said)
    elif row.get("generations") is not None:
        yield from _generations(row, base if base.question else _asked(base, _chat(row), row, columns))
    elif chat := _chat(row):
        yield _said(_asked(base, chat, row, columns), chat[-1])
    elif row.get("completion") is not None and row.get("prompt") is not None:
        yield replace(base, prompt_text=_required(row, "prompt"), text=_required(row, "completion"))
    else:
        raise RowError(f"holds no trace: it has none of {HAVE}")


# --- token ids ---------------------------------------------------------------------------------------------------


def _ids(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    for prompt, completion in ID_PAIRS:
        if row.get(prompt) is not None and row.get(completion) is not None:
            return _split(row[prompt], prompt), _split(row[completion], completion)
    if row.get("input_ids") is None:
        return None
    both = _split(row["input_ids"], "input_ids")
    n = next((row[name] for name in PROMPT_COUNTS if row.get(name) is not None), None)
    if n is None or not _is_whole(n):
        raise RowError(f"has input_ids, but no {' or '.join(PROMPT_COUNTS)} to say where the completion begins")
    if not 0 < n < len(both):
        raise RowError(f"has {len(both)} tokens, of which {n} are the prompt: there must be a prompt and a completion")
    return both[:n], both[n:]


def _split(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(_is_whole(item) for item in value):
        raise RowError(f"has no list of token ids in {name}")
    if not value:
        raise RowError(f"has no tokens in {name}")
    return tuple(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


# --- text --------------------------------------------------------------------------------------------------------


def _generations(row: Row, base: Draft) -> Iterator[Draft]:
    """open-r1's: several completions, and lists beside them that say how each ended."""
    texts = row["generations"]
    if not isinstance(texts, list) or not texts:
        raise RowError("has no list in generations")
    reasons, complete = _list(row.get("finish_reasons")), _list(row.get("is_reasoning_complete"))
    for i, text in enumerate(texts):
        reason = reasons[i] if i < len(reasons) and isinstance(reasons[i], str) else None
        if reason is None and i < len(complete) and complete[i] is False:
            reason = "length"
        yield replace(base, text=_required({"generations": text}, "generations"), finish_reason=reason)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _chat(row: Row) -> list[Mapping[str, Any]]:
    """A conversation as OpenAI's messages, whatever it is called in the row; empty where there is none."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("messages"), list):
        turns = row["messages"]
    elif isinstance(row.get("conversations"), list):
        turns = row["conversations"]
    elif isinstance(prompt, list):
        turns = [
            *prompt,
            *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
        ]
    else:
        return []
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise RowError("has a message that is no object")
        role = turn.get("role") or turn.get("from")
        found.append({**turn, "role": ROLES.get(str(role), role), "content": turn.get("content", turn.get("value"))})
    return found


def _asked(base: Draft, chat: Sequence[Mapping[str, Any]], row: Row, columns: Columns) -> Draft:
    """The question and the system prompt of a conversation of one question and one answer."""
    roles, system = [turn["role"] for turn in chat], row.get("system")
    if roles and roles[0] in ("system", "developer"):
        system, roles, chat = _content(chat[0]), roles[1:], chat[1:]
    if roles != ["user", "assistant"]:
        turns = ", ".join(map(str, roles)) or "nobody"
        raise RowError(f"is a conversation of {turns}: calset keeps one question and one answer")
    asked = base.question if columns.question else _content(chat[0]) or base.question
    return replace(base, question=asked, system_prompt=_text(system, "system"))


def _said(base: Draft, turn: Mapping[str, Any]) -> Draft:
    reasoning = next((turn[name] for name in ("reasoning", "reasoning_content") if turn.get(name)), None)
    text = _content(turn)
    if not text and reasoning is None:
        raise RowError("has an empty answer")
    return replace(base, text=text, reasoning=_text(reasoning, "reasoning"))


def _content(turn: Mapping[str, Any]) -> str:
    """A message's text: a string, or OpenAI's list of parts."""
    content = turn["content"]
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise RowError("has a message with more than text")
        content = "".join(part["text"] for part in content)
    return _text(content, "content") or ""


def _column(row: Row, named: str | None, usual: Sequence[str], what: str) -> str | None:
    if named is not None:
        if named.partition(".")[0] not in row and named not in row:
            raise RowError(f"has no column {named!r} (--{what})")
        return _text(look_up(row, named), named)
    return next((text for name in usual if (text := _text(row.get(name), name)) is not None), None)


def _required(row: Mapping[str, Any], name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text:
        raise RowError(f"has no text in {name}")
    return _text(text, name) or ""


def _text(value: Any, name: str) -> str | None:
    """A value as text, numbers as they are written; None where there is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"holds half a surrogate pair in {name}") from error
    return value


def _metadata(row: Row, columns: Columns) -> dict[str, Any]:
    """What is kept of a problem beside question and answer: short plain values, and any ``solution``."""
    used = {*_NOT_KEPT, *QUESTIONS, *ANSWERS, columns.question, columns.answer}
    return {
        name: jsonable(value)
        for name, value in row.items()
        if name not in used
        and (
            isinstance(value, (bool, int, float))
            or (isinstance(value, str) and (_is_short(value) or name == "solution"))
        )
    }


def _is_short(text: str) -> bool:
    return 0 < len(text) <= MAX_METADATA_CHARS

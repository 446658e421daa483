"""Conversations as files spell them: OpenAI's messages, ShareGPT's turns, objects of lists, JSON text.

Must not know: which column holds one, tokenizers, chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from calset.builder.problems.values import Unreadable, structure, text_of

# The roles' names at ShareGPT and Google.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
SYSTEM = ("system", "developer")
CONTENTS = ("content", "value", "parts")
# Keys and types under which an answer's thinking stands: vLLM's and DeepSeek's, OpenRouter's, Anthropic's, Bedrock's.
THINKING = ("reasoning", "reasoning_content", "thinking", "reasoning_details", "reasoningContent")
_THINKING_PARTS = {*THINKING, "reasoning_text", "summary_text", "thought"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_HIDDEN = ("data", "redactedContent", "encrypted_content")  # thinking that only its server can read
_INSIDE = (*THINKING, "text", "reasoningText", "content", "summary")  # where an object of thinking keeps its text
# A column of such a name may say whether, or how long, the model was to think.
_SWITCHES = {"on", "off", "true", "false", "yes", "no", "none", "minimal", "low", "medium", "high", "auto", "enabled",
             "disabled"}  # fmt: skip

Message = Mapping[str, Any]


class Said(NamedTuple):
    """A message's text, and the thinking that stands apart from it."""

    text: str
    thinking: str | None = None


class Question(NamedTuple):
    """A question and the system prompt that it was asked under."""

    text: str | None
    system: str | None = None


def messages_of(value: Any) -> list[Message] | None:
    """Return a conversation's messages with ``role`` and ``content``; None where the value is no conversation.

    Raises:
        Unreadable: a list with something else among the messages.
    """
    value = structure(value)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = items_of(value) if any(isinstance(value.get(n), (list, tuple)) for n in ("role", "from")) else [value]
    if not isinstance(value, (list, tuple)) or not value:
        return None
    turns = [_turn(item) for item in value]
    if not any(turn is not None and turn["role"] is not None for turn in turns):
        return None
    if None in turns:
        raise Unreadable("a message that is no object")
    return _folded([turn for turn in turns if turn is not None])


def _folded(turns: Sequence[dict[str, Any]]) -> list[Message]:
    """With thinking that is a turn of its own (OpenAI's Responses) in the answer that follows it."""
    found: list[Message] = []
    thoughts: list[str] = []
    for turn in turns:
        if str(turn["role"] or turn.get("type")) in _THINKING_PARTS:
            thoughts.append(thought_of(turn) or "")
        elif thoughts and turn["role"] == "assistant":
            found.append({**turn, "reasoning": "\n\n".join([*thoughts, thinking_apart(turn) or ""]).strip() or None})
            thoughts = []
        else:
            found.append(turn)
    if thoughts:
        found.append({"role": "assistant", "content": None, "reasoning": "\n\n".join(thoughts)})
    return found


def items_of(value: Any) -> Any:
    """Return the objects of an object of lists (``{"role": [...], "content": [...]}``); any other value as it is."""
    if not isinstance(value, Mapping):
        return value
    lists = {name: item for name, item in value.items() if isinstance(item, (list, tuple))}
    longest = max(map(len, lists.values()), default=0)
    return [{name: item[i] for name, item in lists.items() if i < len(item)} for i in range(longest)] or value


def _turn(item: Any) -> dict[str, Any] | None:
    item = structure(item)
    if isinstance(item, (list, tuple)) and item and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in item):
        item = {str(name): value for name, value in item}  # a map of Parquet, as lists of pairs
    if not isinstance(item, Mapping):
        return None
    role = item.get("role") or item.get("from")
    content = next((item[name] for name in CONTENTS if item.get(name) is not None), None)
    return {**item, "role": ROLES.get(str(role), role), "content": content}


def said_of(turn: Message) -> Said:
    """Return a message's text and thinking, in whichever key or part the file has them.

    Raises:
        Unreadable: a part that is neither text nor thinking, or thinking that only its server can read.
    """
    content = turn["content"]
    content = structure(content) if is_parts(content) else content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, (list, tuple)):
        return Said(text_of(content) or "", thinking_apart(turn))
    texts, thoughts = [], []
    for part in content:
        if part is None:
            continue
        if isinstance(part, Mapping) and _thinks(part):
            thoughts.append(thought_of(part))
        elif isinstance(text := part.get("text") if isinstance(part, Mapping) else part, str):
            texts.append(text)
        else:
            raise Unreadable("a message with more than text")
    thinking = "\n\n".join(filter(None, thoughts)) or thinking_apart(turn)
    return Said(text_of("".join(texts)) or "", thinking)


def is_parts(content: Any) -> bool:
    """Return True if the value is a list of a message's parts, or JSON text of parts of a known type.

    Other JSON is what an answer says.
    """
    found = structure(content)
    if not isinstance(found, list) or not found or not all(isinstance(p, Mapping) and "type" in p for p in found):
        return False
    return not isinstance(content, str) or all(p["type"] in _TEXT_PARTS or _thinks(p) for p in found)


def _thinks(part: Message) -> bool:
    kind = str(part.get("type") or "")
    return (
        kind in _THINKING_PARTS
        or kind.startswith(("reasoning.", "redacted_thinking"))
        or part.get("thought") is True
        or (not isinstance(part.get("text"), str) and any(name in part for name in THINKING))
    )


def thinking_apart(row: Mapping[str, Any], names: Sequence[str] = THINKING) -> str | None:
    """Return the thinking that an object keeps under a key of its own.

    Raises:
        Unreadable: thinking that only its server can read.
    """
    return next((text for name in names if (text := thought_of(row.get(name)))), None)


def thought_of(value: Any) -> str | None:
    """Return thinking as text: a text, a list of texts or objects, or an object that holds one.

    Raises:
        Unreadable: thinking that only its server can read.
    """
    if isinstance(value, str):
        found = structure(value)
        inside = None if isinstance(found, str) else thought_of(found)
        return inside or (None if value.strip().lower() in (*_SWITCHES, "[]", "{}") else text_of(value))
    if isinstance(value, (list, tuple)):
        readable = [item for item in value if not _is_hidden(item)]
        return "\n\n".join(filter(None, map(thought_of, readable or value))) or None
    if not isinstance(value, Mapping):
        return None
    if _is_hidden(value):
        raise Unreadable("encrypted thinking")
    return next((text for name in _INSIDE if (text := thought_of(value.get(name)))), None)


def _is_hidden(value: Any) -> bool:
    """An object of thinking whose text only its server can read; some stand beside the text."""
    return (
        isinstance(value, Mapping)
        and any(value.get(name) for name in _HIDDEN)
        and not any(value.get(name) for name in _INSIDE)
    )


def question_of(value: Any) -> Question:
    """Return the question that a value asks: a text, or a conversation of one question under a system prompt or none.

    Raises:
        Unreadable: several turns, or neither.
    """
    turns = messages_of(value) if not isinstance(value, str) or value.lstrip()[:1] in ("[", "{") else None
    if turns is None:
        return Question(text_of(value))
    system, turns = system_of(turns)
    if [turn["role"] for turn in turns] != ["user"]:
        raise Unreadable(f"a conversation of {', '.join(str(turn['role']) for turn in turns) or 'nobody'}")
    return Question(said_of(turns[0]).text or None, system)


def system_of(turns: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """Return a conversation's system prompt, and the conversation without it."""
    if turns and turns[0]["role"] in SYSTEM:
        return said_of(turns[0]).text or None, turns[1:]
    return None, turns

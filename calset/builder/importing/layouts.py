"""Rows of other programs' trace files, brought to one shape: what was asked, what the model said, as text or token ids.

Known are open-r1's ``generations`` (OpenR1-Math), chat ``messages`` (Mixture-of-Thoughts, OpenAI's, also ShareGPT's
``conversations``), the token ids of SGLang's RAC collector and of calset's own exports, the ``prompt`` and
``completion`` of DeepSpeed's, and any column that the user names as the completion. A row is told by its columns alone,
so a file may mix them. Must not know: tokenizers, chat templates, the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from calset.builder.importing.ends import FIELDS, End, end_of
from calset.builder.model.reasoning import holds_marks
from calset.builder.problems.choices import read_choices
from calset.builder.problems.columns import MAX_METADATA_CHARS
from calset.builder.problems.messages import (
    THINKING,
    Message,
    Question,
    Said,
    is_parts,
    items_of,
    messages_of,
    question_of,
    said_of,
    system_of,
    thinking_apart,
    thought_of,
)
from calset.builder.problems.values import Unreadable, look_up, reference_of, structure, text_of, walk
from calset.io.jsonable import jsonable
from calset.io.rows import Row

QUESTIONS = ("problem", "question")
ANSWERS = (
    "answer", "reference_answer", "expected_answer", "ground_truth", "final_answer", "reward_model.ground_truth",
)  # fmt: skip
SYSTEMS = ("system", "system_prompt")
# Prompt ids, then completion ids; of input_ids the count of prompt tokens.
ID_PAIRS = (
    ("prompt_ids", "completion_ids"),
    ("prompt_token_ids", "token_ids"),
    ("prompt_token_ids", "output_token_ids"),
    ("prompt_ids", "output_ids"),
)
PROMPT_COUNTS = ("n_prompt_tokens", "num_prompt_tokens")
CHATS = ("messages", "conversations")
# Where an object of several generations keeps its text.
TEXTS = ("content", "text", "completion", "output", "response", "generated_text")
HAVE = (
    "generations, messages, conversations, prompt and completion, or input_ids and num_prompt_tokens; --completion "
    "COLUMN names another one"
)
_NOT_KEPT = {
    *CHATS, *FIELDS, *THINKING, *SYSTEMS, "generations", "text", "completion", "prompt", "input_ids", "model",
    "dataset", "max_tokens", "choices", *PROMPT_COUNTS, *(name for pair in ID_PAIRS for name in pair),
}  # fmt: skip

LeaveOut = Callable[[str], None]


class RowError(ValueError):
    """A row that holds no trace that calset can keep; the message says why."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the parts of a trace are; None and () look for the usual names. A name with dots is a path (``look_up``).

    Args:
        completion: what the model said; several columns are several generations.
        thinking: the thinking that stands apart from it: one column, or one for each of ``completion``.
    """

    question: str | None = None
    answer: str | None = None
    completion: tuple[str, ...] = ()
    thinking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """One trace as a file gives it: ``text``, or ``prompt_ids`` and ``completion_ids``."""

    question: str | None = None
    answer: str | None = None
    unread_answer: str | None = None  # a reference that is no text: what it is, and where
    system_prompt: str | None = None
    text: str | None = None  # of the completion, thinking and all
    reasoning: str | None = None  # the thinking, where it is apart from ``text``
    prompt_text: str | None = None  # as the model got it, rendered or not
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    whole_text: str | None = None  # what the file says its token ids decode to
    end: End | None = None
    max_tokens: int | None = None
    model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def drafts(row: Row, columns: Columns, leave_out: LeaveOut | None = None) -> Iterator[Draft]:
    """The traces of a row; several where it holds several generations.

    Args:
        leave_out: told why one of several generations is left out.

    Raises:
        RowError: none that can be kept.
    """
    try:
        yield from _drafts(row, columns, leave_out or (lambda why: None))
    except Unreadable as error:
        raise RowError(f"holds {error}") from error
    except RecursionError as error:
        raise RowError("nests too deep") from error


def _drafts(row: Row, columns: Columns, leave_out: LeaveOut) -> Iterator[Draft]:
    base = _base(row, columns)
    if columns.completion:
        base = _with_question(base, row)
        if base.question is None:
            base = replace(base, prompt_text=_text(row, "prompt"))
        if base.question is None and base.prompt_text is None:
            raise RowError(
                f"has no question in {', '.join(QUESTIONS)}, messages or prompt: name its column (--question)"
            )
        yield from _each(row, base, _named(row, columns), leave_out, apart=bool(columns.thinking))
    elif ids := _ids(row):
        base = _with_question(base, row, again=columns.question is None)
        said = _text(row, "text")
        yield replace(base, prompt_ids=ids[0], completion_ids=ids[1], whole_text=said, end=end_of([row]))
    elif row.get("generations") is not None:
        base = base if base.question else _asked(base, _chat(row), columns)
        texts = items_of(structure(row["generations"]))
        if not isinstance(texts, (list, tuple)) or not texts:
            raise RowError("has no list in generations")
        yield from _each(row, base, [_Item("generations", text) for text in texts], leave_out)
    elif chat := _chat(row):
        yield from _each(row, _asked(base, chat, columns), [_Item("messages", [chat[-1]])], leave_out)
    elif row.get("completion") is not None and row.get("prompt") is not None:
        base = replace(base, prompt_text=_required(row, "prompt"))
        yield from _each(row, base, [_Item("completion", row["completion"])], leave_out)
    else:
        raise RowError(f"holds no trace: it has none of {HAVE}")


def _base(row: Row, columns: Columns) -> Draft:
    """What all traces of a row share."""
    asked = _question(row, columns.question)
    answer, unread = _answer(row, columns.answer)
    choices = read_choices(row.get("choices"))
    if choices is not None and answer is not None:
        answer = choices.letter(answer)
    metadata = _metadata(row, columns) | ({} if choices is None else {"choices": choices.options})
    return Draft(
        question=asked.text,
        answer=answer,
        unread_answer=unread,
        system_prompt=asked.system or next((text for name in SYSTEMS if (text := _text(row, name))), None),
        max_tokens=row["max_tokens"] if _is_whole(row.get("max_tokens")) else None,
        model=row["model"] if isinstance(row.get("model"), str) else None,
        metadata=metadata,
    )


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


# --- completions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Item:
    """A completion as the row has it: in which column, what on the way there may say how it ended."""

    column: str
    value: Any
    objects: Sequence[Mapping[str, Any]] = ()
    thinking: str | None = None  # of the column that the user names for it


def _named(row: Row, columns: Columns) -> list[_Item]:
    """The completions in the columns that the user names; one column may hold a list of them."""
    named, thinking = columns.completion, columns.thinking
    if len(thinking) not in (0, 1, len(named)):
        raise RowError(f"has {len(named)} columns of completions and {len(thinking)} of thinking: name one for each")
    items = []
    if not any(_is_there(row, name) for name in named):
        _column(row, named[0], "completion")
    for i, name in enumerate(named):
        value, objects = walk(row, name)
        thought = None
        if thinking:
            apart, around = _column(row, thinking[min(i, len(thinking) - 1)], "thinking")
            thought, objects = thought_of(apart), [*objects, *around]
        if isinstance(value, list) and value and not (thinking or is_parts(value) or messages_of(value)):
            items += [_Item(name, item, objects) for item in value]
        else:
            items.append(_Item(name, value, objects, thought))
    return items


def _each(
    row: Row, base: Draft, items: Sequence[_Item], leave_out: LeaveOut, *, apart: bool = False
) -> Iterator[Draft]:
    """The trace of each completion; one that cannot be read costs only itself.

    Args:
        apart: the user named the column of the thinking, so no other one is looked for.
    """
    good, bad = 0, []
    for place, item in enumerate(items):
        try:
            said, inside = _said(item.value, item.column, empty=item.thinking is not None)
            if apart:
                said = Said(said.text, item.thinking or said.thinking)
            elif said.thinking is None:
                said = Said(said.text, _beside(row, said.text, place, len(items)))
            yield replace(
                base, text=said.text, reasoning=said.thinking, end=end_of([*item.objects, *inside, row], place)
            )
            good += 1
        except (RowError, Unreadable) as error:
            why = str(error) if isinstance(error, RowError) else f"holds {error} in {item.column}"
            bad.append(f"{why} ({place + 1} of {len(items)})" if len(items) > 1 else why)
    if not good:  # then the row is one bad row
        raise RowError(bad[0])
    for why in bad:
        leave_out(why)


def _said(value: Any, name: str, *, empty: bool = False) -> tuple[Said, list[Mapping[str, Any]]]:
    """A completion's text and thinking, and the objects inside that may say how it ended.

    Args:
        empty: it may be: its thinking is in another column, and nothing followed.
    """
    found = value if isinstance(value, str) and messages_of(value) is None and not is_parts(value) else structure(value)
    if isinstance(found, str) and found.strip():
        return Said(_required({name: found}, name)), []
    if isinstance(found, Mapping) and isinstance(found.get("message"), Mapping):  # a choice of OpenAI's
        said, inside = _said(found["message"], name, empty=empty)
        return said, [found, *inside]
    if (turns := messages_of(found)) is not None:
        return _turn_of(turns[-1]), [turns[-1]]
    if isinstance(found, Mapping):
        text = next((found[key] for key in TEXTS if found.get(key) is not None), None)
        return _turn_of({**found, "content": text}), [found]
    if isinstance(found, list) and found:
        return _turn_of({"content": found}), []
    if empty:
        return Said(""), []
    raise RowError(f"has no text in {name}")


def _beside(row: Row, text: str, place: int, n: int) -> str | None:
    """The thinking in the row's own columns, unless the text marks thinking itself.

    Args:
        place, n: which of how many completions: a list of as many thoughts has one for each.
    """
    if holds_marks(text):
        return None
    found = {name: structure(row[name]) for name in THINKING if row.get(name)}
    own = {name: v[place] if isinstance(v, list) and n > 1 and len(v) == n else v for name, v in found.items()}
    return thinking_apart(own)


def _turn_of(turn: Message) -> Said:
    said = said_of(turn)
    if not said.text and said.thinking is None:
        raise RowError("has an empty answer")
    return said


# --- questions and answers ---------------------------------------------------------------------------------------


def _chat(row: Row) -> list[Message]:
    """A conversation, whatever it is called in the row; empty where there is none."""
    for name in CHATS:
        if (turns := messages_of(row.get(name))) is not None:
            return turns
        if isinstance(row.get(name), list) and row[name]:
            raise RowError("has a message that is no object")
        if isinstance(row.get(name), str) and row[name].strip():
            raise RowError(f"has {name} that are text, and not JSON of messages")
    if not isinstance(row.get("prompt"), str) and (asked := messages_of(row.get("prompt"))) is not None:
        said = messages_of(row.get("completion"))
        return [*asked, *(said or [{"role": "assistant", "content": row.get("completion")}])]
    return []


def _asked(base: Draft, chat: Sequence[Message], columns: Columns) -> Draft:
    """The question and the system prompt of a conversation of one question and one answer."""
    system, turns = system_of(chat)
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"]:
        listed = ", ".join(map(str, roles)) or "nobody"
        raise RowError(f"is a conversation of {listed}: calset keeps one question and one answer")
    asked = base.question if columns.question else said_of(turns[0]).text or base.question
    return replace(base, question=asked, system_prompt=system or base.system_prompt)


def _with_question(base: Draft, row: Row, *, again: bool = False) -> Draft:
    """With the question of the row's conversation, where no column of the row holds it.

    Args:
        again: the conversation's, even if a column holds one.
    """
    if base.question is not None and not again:
        return base
    for name in (*CHATS, "prompt"):
        try:
            system, turns = system_of(messages_of(row.get(name)) or [])
            answered = [turn["role"] for turn in turns[1:]] == ["assistant"]
            asked = question_of([turns[0]] if answered else list(turns)).text if turns else None
        except Unreadable:  # whatever the conversation is, the completion is the trace
            continue
        if asked:
            return replace(base, question=asked, system_prompt=system or base.system_prompt)
    return base


def _question(row: Row, named: str | None) -> Question:
    for name in QUESTIONS if named is None else (named,):
        value = row.get(name) if named is None else _column(row, name, "question")[0]
        try:
            found = question_of(value)
        except Unreadable as error:
            if named is not None or isinstance(value, str):
                raise RowError(f"holds {error} in {name}") from error
            continue
        if found.text is not None:
            return found
    return Question(None)


def _answer(row: Row, named: str | None) -> tuple[str | None, str | None]:
    """The reference answer; or why the first one that is there cannot be read."""
    unread = None
    for name in ANSWERS if named is None else (named,):
        value = look_up(row, name) if named is None else _column(row, name, "answer")[0]
        try:
            if (text := reference_of(value)) is not None:
                return text, None
        except Unreadable as error:
            unread = unread or f"{error} in {name}"
    return None, unread


def _column(row: Row, name: str, option: str) -> tuple[Any, list[Mapping[str, Any]]]:
    if not _is_there(row, name):
        raise RowError(f"has no column {name!r} (--{option})")
    return walk(row, name)


def _is_there(row: Row, name: str) -> bool:
    return name in row or name.partition(".")[0] in row


def _required(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    text = _text(row, name) if isinstance(value, str) else None
    if not text:
        raise RowError(f"has no text in {name}")
    return text


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """A column's text, numbers as they are written; None where it holds something else."""
    value = row.get(name)
    try:
        return text_of(value)
    except Unreadable as error:
        if isinstance(value, str):
            raise RowError(f"holds {error} in {name}") from error
        return None


def _metadata(row: Row, columns: Columns) -> dict[str, Any]:
    """What is kept of a problem beside question and answer: short plain values, and any ``solution``."""
    used = {*_NOT_KEPT, *QUESTIONS, *ANSWERS, columns.question, columns.answer, *columns.completion, *columns.thinking}
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

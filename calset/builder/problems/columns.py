"""Rows of data files as problems: which column is the question, which the reference answer, what is kept beside.

Must not know: where the files came from, nor their formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from calset import ids
from calset.builder.problems.choices import read_choices
from calset.builder.problems.messages import Question, question_of
from calset.builder.problems.source import BadRows
from calset.builder.problems.values import Unreadable, look_up, reference_of
from calset.catalog.records import Problem, Source
from calset.errors import InputError
from calset.io.jsonable import jsonable
from calset.io.rows import Row, read_rows

MAX_METADATA_CHARS = 1000  # of a text beside the question, where nobody named the columns to keep


class Draft(NamedTuple):
    """What a row says, not checked yet."""

    question: Any
    answer: Any
    metadata: Mapping[str, Any]


Convert = Callable[[Row], Draft | None]


class Place(NamedTuple):
    """A file, what errors call it, and what its rows' keys begin with."""

    path: Path
    label: str
    key: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns make a problem. A name with dots is a path (``look_up``): ``1.ground_truth.value``.

    Args:
        question, answer: the columns of the question and of the reference answer.
        metadata: the columns to keep beside them, where a row has them. None keeps all.
        short: of all the columns keep only plain values, no text longer than 1,000 characters (but any ``solution`` and
            ``choices``): a dataset of traces has megabytes a row that no problem needs.
        needed: further columns that ``convert`` cannot do without.
        convert: makes a problem of a row where columns alone do not, or None of a row that holds none.
    """

    question: str = "question"
    answer: str = "answer"
    metadata: tuple[str, ...] | None = None
    short: bool = False
    needed: tuple[str, ...] = ()
    convert: Convert | None = None

    def choose(self, names: Mapping[str, bool], label: str) -> list[str]:
        """Of a file's columns (name -> nested) those to read.

        Raises:
            InputError: one is missing; names what there is.
        """
        needed = {_top(column, names) for column in (self.question, self.answer, *self.needed)}
        for column in needed:
            if (why := _missing(column, names)) is not None:
                raise InputError(f"{label} {why}")
        if self.metadata is None:
            return [
                name
                for name, nested in names.items()
                if name in needed or name == "choices" or not (self.short and nested)
            ]
        return [name for name in names if name in needed or name in self.metadata]

    def draft(self, row: Row) -> Draft | None:
        """A row's question, answer and metadata; None where it holds no problem.

        Raises:
            Unreadable: a column is missing.
        """
        for column in (self.question, self.answer, *self.needed):
            if (why := _missing(_top(column, row), row)) is not None:
                raise Unreadable(why)
        if self.convert:
            return self.convert(row)
        tops = {_top(self.question, row), _top(self.answer, row)}
        kept = {name: value for name, value in row.items() if name not in tops and self._keeps(name, value)}
        answer = look_up(row, self.answer)
        if (choices := read_choices(kept.get("choices"))) is not None:
            kept["choices"] = choices.options
            answer = choices.letter(answer) if isinstance(answer, str) else answer
        elif self.short:
            kept.pop("choices", None)
        return Draft(look_up(row, self.question), answer, kept)

    def _keeps(self, name: str, value: Any) -> bool:
        if value is None or (self.metadata is not None and name not in self.metadata):
            return False
        if self.metadata is not None or not self.short or name in ("solution", "choices"):
            return True
        return not isinstance(value, (list, dict)) and not (isinstance(value, str) and len(value) > MAX_METADATA_CHARS)


def read_problems(
    source: Source, places: Iterable[Place], columns: Columns, bad: BadRows | None = None
) -> Iterator[Problem]:
    """The problems of files, one file after the other.

    Args:
        bad: where rows that hold no problem go; when None, the first is an error.

    Raises:
        InputError: a file that cannot be read, or a row that holds no problem.
    """
    for path, label, key in places:

        def leave_out(number: int, why: str, at: str = label) -> None:
            if bad is None:
                raise InputError(f"{at}:{number} {why}; skip_bad= leaves such rows out")
            bad.add(f"{at}:{number}", why)

        rows = read_rows(
            path,
            label=label,
            choose=lambda names, at=label: columns.choose(names, at),
            skip=None if bad is None else leave_out,
        )
        for number, row in rows:
            try:
                problem = _problem(source, f"{key}{number}", row, columns)
            except Unreadable as error:
                leave_out(number, str(error))
            else:
                if problem is not None:
                    yield problem


def _problem(source: Source, source_row: str, row: Row, columns: Columns) -> Problem | None:
    """The problem that a row holds; None where a preset takes none from it."""
    try:
        draft = columns.draft(row)
        if draft is None:
            return None
        asked = _asked(draft.question, columns.question)
        answer = _reference(draft.answer, columns.answer)
        kept = draft.metadata if asked.system is None else {**draft.metadata, "system_prompt": asked.system}
        metadata = jsonable({name: value for name, value in kept.items() if value is not None})
    except RecursionError as error:
        raise Unreadable("nests too deep") from error
    question = asked.text or ""
    return Problem(
        problem_id=ids.problem_id(source.name, question, answer),
        source_id=source.source_id,
        source=source.name,
        source_row=source_row,
        question=question,
        answer=answer,
        grader=source.grader,
        metadata=metadata,
    )


def _asked(value: Any, column: str) -> Question:
    try:
        found = question_of(value)
    except Unreadable as error:
        raise _unread(error, column, "text, or a conversation of one question,") from error
    if found.text is None:
        raise _unread("nothing", column, "text")
    return found


def _reference(value: Any, column: str) -> str:
    try:
        found = reference_of(value)
    except Unreadable as error:
        hint = f"one answer ({column}.0 names the first of a list)" if isinstance(value, (list, tuple)) else "text"
        raise _unread(error, column, hint) from error
    if found is None:
        raise _unread("nothing", column, "text")
    return found


def _unread(what: str | Unreadable, column: str, needs: str) -> Unreadable:
    return Unreadable(f"holds {what} in column {column!r}; each problem needs {needs} there")


def _top(column: str, names: Iterable[str]) -> str:
    """The column that a dotted name looks into."""
    return column if column in names else column.partition(".")[0]


def _missing(column: str, names: Iterable[str]) -> str | None:
    if column in names:
        return None
    have = ", ".join(map(str, names)) or "none"
    return f"has no column {column!r}; its columns: {have} (choose with --question, --answer)"

"""Rows of data files as problems: which column is the question, which the reference answer, what is kept beside.

Must not know: where the files came from, nor their formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from calset import ids
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
    """Which columns make a problem. A name with dots looks inside: ``1.ground_truth.value``.

    Args:
        question, answer: the columns of the question and of the reference answer.
        metadata: the columns to keep beside them, where a row has them. None keeps all.
        short: of all the columns keep only plain values, no text longer than 1,000 characters (but any ``solution``):
            a dataset of traces has megabytes a row that no problem needs.
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
            _require(column, names, label)
        if self.metadata is None:
            return [name for name, nested in names.items() if name in needed or not (self.short and nested)]
        return [name for name in names if name in needed or name in self.metadata]

    def draft(self, row: Row, label: str) -> Draft | None:
        """A row's question, answer and metadata; None where it holds no problem."""
        for column in (self.question, self.answer, *self.needed):
            _require(_top(column, row), row, label)
        if self.convert:
            return self.convert(row)
        tops = {_top(self.question, row), _top(self.answer, row)}
        kept = {name: value for name, value in row.items() if name not in tops and self._keeps(name, value)}
        return Draft(look_up(row, self.question), look_up(row, self.answer), kept)

    def _keeps(self, name: str, value: Any) -> bool:
        if value is None or (self.metadata is not None and name not in self.metadata):
            return False
        if self.metadata is not None or not self.short or name == "solution":
            return True
        return not isinstance(value, (list, dict)) and not (isinstance(value, str) and len(value) > MAX_METADATA_CHARS)


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """A column's value, or what a dotted name leads to; None where the path ends early."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def read_problems(source: Source, places: Iterable[Place], columns: Columns) -> Iterator[Problem]:
    """The problems of files, one file after the other."""
    for path, label, key in places:
        for number, row in read_rows(path, label=label, choose=lambda names, at=label: columns.choose(names, at)):
            draft = columns.draft(row, f"{label}:{number}")
            if draft is None:
                continue
            question = _text(draft.question, f"{label}:{number}", columns.question)
            answer = _text(draft.answer, f"{label}:{number}", columns.answer)
            yield Problem(
                problem_id=ids.problem_id(source.name, question, answer),
                source_id=source.source_id,
                source=source.name,
                source_row=f"{key}{number}",
                question=question,
                answer=answer,
                grader=source.grader,
                metadata=_metadata(draft, f"{label}:{number}"),
            )


def _metadata(draft: Draft, label: str) -> Any:
    try:
        return jsonable({name: value for name, value in draft.metadata.items() if value is not None})
    except RecursionError as error:
        raise InputError(f"{label} nests too deep") from error


def _top(column: str, names: Iterable[str]) -> str:
    """The column that a dotted name looks into."""
    return column if column in names else column.partition(".")[0]


def _require(column: str, names: Iterable[str], label: str) -> None:
    if column not in names:
        have = ", ".join(map(str, names)) or "none"
        raise InputError(f"{label} has no column {column!r}; its columns: {have} (choose with --question, --answer)")


def _text(value: Any, label: str, column: str) -> str:
    """A value as text; numbers as they are written."""
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        what = "nothing" if value is None or isinstance(value, str) else f"a {type(value).__name__}"
        raise InputError(f"{label} holds {what} in column {column!r}; each problem needs text there")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{label} holds half a surrogate pair in column {column!r}; repair the text") from error
    return value

"""A source of problems as something to iterate over, any number of times, without holding it in memory.

Must not know: where the problems come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from calset.catalog.records import Problem, Source
from calset.errors import InputError

MAX_NAMED = 20  # bad rows that a report quotes


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: ``where`` is file:line."""

    where: str
    why: str


class BadRows:
    """Rows that a source leaves out: each counted once, however often the source is read; the first are named."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.first: list[BadRow] = []

    def add(self, where: str, why: str) -> None:
        """Count a row."""
        if hash(where) not in self._seen:
            self._seen.add(hash(where))
            if len(self.first) < MAX_NAMED:
                self.first.append(BadRow(where, why))

    def __len__(self) -> int:
        return len(self._seen)


@dataclass(frozen=True)
class ProblemSource:
    """Problems of one source: each iteration reads it anew and gives the same ones in the same order.

    Equal problems come once. What is kept of each for that is its id as a number, 40 bytes and a place in a set.

    Args:
        source: where they come from, at which revision.
        size: how many there are at most, where that is known without reading them; else None. Fewer come where equal
            ones collapse or a preset leaves rows out.
        read: gives the problems, equal ones as often as they are there.
        limit: only the first that many.
        bad: the rows without a problem that reading has left out so far; always empty unless asked to leave them out.
    """

    source: Source
    size: int | None
    read: Callable[[], Iterable[Problem]] = field(repr=False)
    limit: int | None = None
    bad: BadRows = field(default_factory=BadRows, repr=False, compare=False)

    def __iter__(self) -> Iterator[Problem]:
        """The problems.

        Raises:
            InputError: a row that holds no problem, naming it; or no problem at all.
        """
        seen: set[int] = set()
        for problem in self.read():
            key = int(problem.problem_id, 16)
            if key in seen:
                continue
            if problem.grader == "gym" and "task" not in problem.metadata:
                raise InputError(
                    f"the gym grader needs problems of a gym: source, and {self.source.spec} is none; use --grader math"
                )
            seen.add(key)
            yield problem
            if len(seen) == self.limit:
                return
        if not seen:
            why = f": {self.bad.first[0].where} {self.bad.first[0].why}" if self.bad.first else ""
            raise InputError(f"{self.source.spec} holds no problems{why}")

    def preview(self, limit: int, *, count: bool = False) -> tuple[list[Problem], int | None]:
        """The first problems, and how many there are: None where that is not known from what was read for them.

        Args:
            count: read them all, to know.
        """
        problems = iter(self)
        rows = list(islice(problems, limit))
        if count:
            return rows, len(rows) + sum(1 for _ in problems)
        return rows, len(rows) if len(rows) < limit else None

    def graded_by(self, grader: str) -> ProblemSource:
        """The same problems for another grader than the source's own."""
        return replace(
            self,
            source=replace(self.source, grader=grader),
            read=lambda: (replace(problem, grader=grader) for problem in self.read()),
        )

    def first(self, limit: int) -> ProblemSource:
        """Only the first problems."""
        return replace(self, limit=limit, size=None if self.size is None else min(self.size, limit))


def bad_rows_of(sources: Iterable[ProblemSource]) -> tuple[int, tuple[BadRow, ...]]:
    """Return how many rows the sources have left out so far, and the first of them."""
    found = [source.bad for source in sources]
    return sum(map(len, found)), tuple([row for bad in found for row in bad.first][:MAX_NAMED])

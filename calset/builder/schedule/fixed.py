"""Which (problem, sample) to generate next.

Why apart: a build with a fixed number of samples and an adaptive one differ in this alone. Must not know: engines,
grading, progress. ``take`` belongs to the thread that feeds the engine, ``settle`` to the one that collects verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from calset import ids
from calset.catalog.records import Attempt, Decision, Problem, Trace


@dataclass(frozen=True, slots=True)
class Opened:
    """A problem as a build opens it.

    Args:
        existing: sample index -> its newest attempt in the catalog.
        decided: the last decision that an adaptive build kept of it.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    existing: Mapping[int, Attempt]
    decided: Decision | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """One request to make: a sample of a problem. ``attempt`` is 0 unless it is run again."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    sample_index: int
    trace_id: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Retry:
    """Which existing attempts are to be superseded.

    Args:
        what: ``truncated``, those that a smaller limit than ``max_tokens`` cut; ``error``, those that the engine failed
            on.
    """

    what: frozenset[str] = frozenset()
    max_tokens: int = 0

    def wants(self, attempt: Attempt) -> bool:
        cut = attempt.finish_reason == "length" and attempt.max_tokens < self.max_tokens
        return ("truncated" in self.what and cut) or ("error" in self.what and attempt.broken)


NO_RETRY = Retry()


class Schedule(Protocol):
    """The work list of a build, made while it runs."""

    def take(self, timeout: float = 0.0) -> Unit | None:
        """The next unit; None when there is none now, after up to ``timeout`` seconds of waiting for a verdict."""
        ...

    @property
    def finished(self) -> bool:
        """Whether ``take`` will give no more."""
        ...

    @property
    def satisfied(self) -> bool:
        """Whether the purpose is reached, so that what is in flight is better dropped than finished."""
        ...

    def reopen(self, dropped: Iterable[Unit]) -> bool:
        """Take back units that were dropped in flight; whether there is more to generate after all."""
        ...

    def settle(self, unit: Unit, trace: Trace, verdict: str | None) -> None:
        """What came of a unit; ``verdict`` is None in a build that does not grade."""
        ...

    def decisions(self) -> list[Decision]:
        """What was decided since the last call; for the catalog."""
        ...

    def facts(self) -> dict[str, int]:
        """What progress and report show of it; empty for a plain schedule."""
        ...

    def warnings(self) -> list[str]:
        """What the user must know of how it ended."""
        ...


class FixedSchedule:
    """``samples`` of every problem, minus what is there, plus what is asked to be run again.

    Samples of a problem stand together: an engine with a prefix cache prefills their prompt once.
    """

    def __init__(self, opened: Iterator[Opened], key: str, samples: int, retry: Retry = NO_RETRY) -> None:
        self._key, self._samples, self._retry = key, samples, retry
        self._units = self._all(opened)
        self._finished = False

    def _all(self, opened: Iterator[Opened]) -> Iterator[Unit]:
        for one in opened:
            for index in range(self._samples):
                there = one.existing.get(index)
                if there is None or self._retry.wants(there):
                    trace_id = ids.trace_id(one.problem.problem_id, self._key, index)
                    yield Unit(one.problem, one.prompt_ids, index, trace_id, 0 if there is None else there.attempt + 1)

    def take(self, timeout: float = 0.0) -> Unit | None:
        unit = next(self._units, None)
        self._finished = unit is None
        return unit

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def satisfied(self) -> bool:
        return False

    def reopen(self, dropped: Iterable[Unit]) -> bool:
        return False

    def settle(self, unit: Unit, trace: Trace, verdict: str | None) -> None:
        """Nothing depends on it."""

    def decisions(self) -> list[Decision]:
        return []

    def facts(self) -> dict[str, int]:
        return {}

    def warnings(self) -> list[str]:
        return []

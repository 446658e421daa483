"""Adaptive sampling: spend tokens where they decide something.

A problem gets a few samples first; it is stopped when it is confidently outside the recipe's difficulty band (see
``stopping``), and gets all its samples otherwise. Problems in hand go before new ones, and no new problem is opened
while those in hand can be expected to give the recipe what it needs. Only problems with all their samples count for the
recipe, so that a selected problem's difficulty is the one that a build without stopping gives it. Every decision is
kept in the catalog. Must not know: engines, the catalog's file, progress bars.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calset import ids
from calset.builder.schedule import Opened, Unit
from calset.builder.stopping import Prior, StoppingRule, fit_prior
from calset.catalog.recipes import Candidate, Recipe, get_recipe, rank
from calset.catalog.records import JUDGED, Attempt, Decision, Trace
from calset.errors import InputError

# A refit of the prior each time that the problems heard from grew by a tenth, or by so many.
REFIT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Target:
    """What an adaptive build is for: a recipe, and how much it must be able to take.

    Raises:
        InputError: a recipe that takes no traces, both needs or none, or a value out of range.
    """

    recipe: Recipe
    need: int | None = None  # samples
    need_tokens: int | None = None  # prompt and completion tokens of samples
    confidence: float = 0.95  # of stopping a problem

    @classmethod
    def of(cls, recipe: str | Path | Recipe, **options: Any) -> Target:
        """A target by the recipe's name or file."""
        return cls(get_recipe(recipe), **options)

    def __post_init__(self) -> None:
        if self.recipe.kind != "trace":
            raise InputError(f"recipe {self.recipe.name} takes no traces: an adaptive build has nothing to decide")
        if (self.need is None) == (self.need_tokens is None):
            raise InputError("an adaptive build needs one of need (samples) and need_tokens")
        for name in ("need", "need_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")

    @property
    def wanted(self) -> int:
        """The need, in samples or in tokens."""
        return self.need or self.need_tokens or 0

    @property
    def unit(self) -> str:
        return "samples" if self.need is not None else "tokens"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the need, which ``AdaptiveSchedule.facts`` has beside what is met."""
        return {"recipe": self.recipe.name, "unit": self.unit, "confidence": self.confidence}


@dataclass(slots=True)
class _Open:
    """A problem in hand. ``settled`` samples are in the catalog or on their way there, judged or not."""

    opened: Opened
    queue: deque[int] = field(default_factory=deque)  # sample indices to hand out now
    flying: int = 0
    settled: int = 0
    k: int = 0
    n_correct: int = 0
    seen: tuple[int, int] | None = None  # (k, n_correct) as the prior knows this problem
    probability: float = 0.0
    traces: list[tuple[str, int, str | None, bool, int, int]] = field(default_factory=list)

    @property
    def problem_id(self) -> str:
        return self.opened.problem.problem_id

    @property
    def unjudged(self) -> int:
        return self.settled - self.k


class AdaptiveSchedule:
    """See the module; a ``Schedule``."""

    def __init__(
        self,
        opened: Iterator[Opened],
        key: str,
        samples: int,
        target: Target,
        *,
        seed: int = 0,
        first: int | None = None,
    ) -> None:
        recipe = target.recipe
        options = {} if first is None else {"first": first}
        self._rule = StoppingRule(recipe.difficulty, samples, target.confidence, **options)
        min_k = samples if recipe.difficulty is not None else None
        self._recipe = recipe.with_options(samples=None, tokens=None, min_k=min_k)
        self._source, self._key, self._samples, self._target, self._seed = opened, key, samples, target, seed
        self._changed = threading.Condition()
        self._prior = Prior.uniform()
        self._probabilities: dict[tuple[int, int, int], float] = {}
        self._at_once: dict[tuple[int, int], int] = {}
        self._observed: Counter[tuple[int, int]] = Counter()
        self._heard = self._next_fit = 0
        self._open: dict[str, _Open] = {}
        self._queued: deque[_Open] = deque()
        self._candidates: list[Candidate] = []
        self._ranked: list[Candidate] = []
        self._sizes: dict[str, int] = {}
        self._n_flying = self._n_stopped = self._n_complete = self._n_in_band = 0
        self._met, self._dirty = 0, False
        self._exhausted = self._finished = False
        self._decisions: list[Decision] = []

    # -- the feeding thread -----------------------------------------------------------------------------------------

    def take(self, timeout: float = 0.0) -> Unit | None:
        waited = timeout <= 0
        while True:
            with self._changed:
                if self._is_met() or not (self._queued or self._wants_more()):
                    # What is under way can still move the length band, and so what the recipe can take.
                    self._finished = not self._n_flying
                    if self._finished or waited:
                        return None
                    waited = True
                    self._changed.wait(timeout)
                    continue
                if self._queued:
                    return self._hand_out()
            # Reading the next problem may look into the catalog: not while verdicts wait for the lock.
            following = next(self._source, None)
            with self._changed:
                if following is None:
                    self._exhausted = True
                else:
                    self._take_in(following)

    @property
    def finished(self) -> bool:
        return self._finished

    def _hand_out(self) -> Unit:
        one = self._queued[0]
        index = one.queue.popleft()
        if not one.queue:
            self._queued.popleft()
        one.flying += 1
        self._n_flying += 1
        problem = one.opened.problem
        return Unit(problem, one.opened.prompt_ids, index, ids.trace_id(problem.problem_id, self._key, index))

    def _wants_more(self) -> bool:
        """Whether the problems in hand are not expected to be enough, and there may be others."""
        if self._exhausted:
            return False
        share = (len(self._ranked) + 1) / (self._n_in_band + 2)  # of problems in the band that give a sample
        expected = share * sum(one.probability for one in self._open.values())
        if self._target.unit == "tokens":
            expected *= self._met / len(self._ranked) if self._ranked else self._mean_size()
        return self._met + expected < self._target.wanted

    def _mean_size(self) -> float:
        return sum(self._sizes.values()) / len(self._sizes) if self._sizes else 1.0

    # -- verdicts: the collecting thread ----------------------------------------------------------------------------

    def settle(self, unit: Unit, trace: Trace, verdict: str | None) -> None:
        with self._changed:
            one = self._open[unit.problem.problem_id]
            one.flying -= 1
            self._n_flying -= 1
            size = len(trace.prompt_ids) + trace.n_tokens
            finished = trace.finish_reason == "stop"
            self._count(one, trace.trace_id, unit.sample_index, verdict, finished, trace.n_tokens, size)
            if not one.flying and not one.queue:
                self._decide(one)
            self._changed.notify_all()

    def _take_in(self, opened: Opened) -> None:
        one = self._open[opened.problem.problem_id] = _Open(opened)
        for index, there in sorted(opened.existing.items()):
            if index < self._samples:
                self._count_existing(one, index, there)
        one.probability = self._probability(one)
        first = min(self._rule.first, self._samples)
        if one.settled >= first:
            self._decide(one)
        else:
            self._queue(one, first - one.settled)

    def _count_existing(self, one: _Open, index: int, there: Attempt) -> None:
        finished = there.finish_reason == "stop"
        size = there.n_prompt_tokens + there.n_tokens
        self._count(one, there.trace_id, index, there.verdict, finished, there.n_tokens, size)

    @staticmethod
    def _count(
        one: _Open, trace_id: str, index: int, verdict: str | None, finished: bool, n_tokens: int, size: int
    ) -> None:
        one.settled += 1
        one.k += verdict in JUDGED
        one.n_correct += verdict == "correct"
        one.traces.append((trace_id, index, verdict, finished, n_tokens, size))

    def _queue(self, one: _Open, n: int) -> None:
        """Have the next ``n`` samples of a problem drawn that it has not; there are so many."""
        drawn = {index for _, index, *_ in one.traces}
        one.queue.extend([index for index in range(self._samples) if index not in drawn][:n])
        self._queued.append(one)

    def _decide(self, one: _Open) -> None:
        """With no sample under way: those that come back first are the short ones, which are more often right."""
        self._observe(one)
        one.probability = self._probability(one)
        if one.settled >= self._samples:
            self._complete(one)
        elif self._rule.decide(one.k, one.n_correct, self._prior, one.unjudged) == "stop":
            self._note(one, "stop", "some sample could not be judged" if one.unjudged else "outside the band")
            self._n_stopped += 1
            del self._open[one.problem_id]
        else:
            n = min(self._samples_at_once(one.k, one.n_correct), self._samples - one.settled)
            self._note(one, "continue", f"no outcome of {n} more would stop it before" if n > 1 else "open")
            self._queue(one, n)

    def _complete(self, one: _Open) -> None:
        difficulty = (one.k - one.n_correct) / one.k if one.k else None
        band = self._recipe.difficulty
        inside = band is None or (
            difficulty is not None and one.k >= self._samples and band[0] <= difficulty <= band[1]
        )
        self._note(one, "complete", "inside the band" if inside else "outside the band")
        self._n_complete += 1
        self._n_in_band += inside
        for trace_id, index, verdict, finished, n_tokens, size in one.traces:
            self._candidates.append(
                Candidate(trace_id, one.problem_id, index, verdict == "correct", finished, difficulty, one.k, n_tokens)
            )
            self._sizes[trace_id] = size
        self._dirty = True
        del self._open[one.problem_id]

    # -- what is known ----------------------------------------------------------------------------------------------

    def _observe(self, one: _Open) -> None:
        if one.seen is not None:
            self._observed[one.seen] -= 1
        one.seen = (one.k, one.n_correct)
        self._observed[one.seen] += 1
        self._heard += 1
        if self._heard >= self._next_fit:
            self._next_fit = self._heard + max(REFIT_EVERY, self._heard // 10)
            self._prior = fit_prior(self._observed)
            self._probabilities.clear()
            self._at_once.clear()
            for other in self._open.values():
                other.probability = self._probability(other)

    def _probability(self, one: _Open) -> float:
        """That all samples put a problem inside the band, given those so far."""
        counts = (one.k, one.n_correct, one.unjudged)
        found = self._probabilities.get(counts)
        if found is None:
            found = self._probabilities[counts] = self._rule.probability(
                one.k, one.n_correct, self._prior, one.unjudged
            )
        return found

    def _samples_at_once(self, k: int, n_correct: int) -> int:
        """How many samples must come before any outcome of them can stop the problem: no decision lies between."""
        found = self._at_once.get((k, n_correct))
        if found is None:
            left = self._samples - k
            found = next(
                (
                    n
                    for n in range(1, left)
                    if any(self._rule.decide(k + n, n_correct + i, self._prior) == "stop" for i in range(n + 1))
                ),
                left,
            )
            self._at_once[k, n_correct] = found
        return max(1, found)

    def _is_met(self) -> bool:
        """Whether the recipe has what it needs. Its length band moves with every problem: counted anew each time."""
        if self._dirty:
            self._dirty = False
            self._ranked = rank(self._candidates, self._recipe, self._seed).order
            counts = self._target.unit == "samples"
            self._met = len(self._ranked) if counts else sum(self._sizes[c.sample_id] for c in self._ranked)
        return self._met >= self._target.wanted

    def _note(self, one: _Open, action: str, reason: str) -> None:
        self._decisions.append(
            Decision(
                run_id="",
                generation_key=self._key,
                problem_id=one.problem_id,
                action=action,
                reason=reason,
                k=one.k,
                n_correct=one.n_correct,
                samples=self._samples,
                probability=one.probability,
                confidence=self._rule.confidence,
                recipe=self._target.recipe.name,
            )
        )

    def decisions(self) -> list[Decision]:
        with self._changed:
            found, self._decisions = self._decisions, []
            return found

    def facts(self) -> dict[str, int]:
        with self._changed:
            self._is_met()
            return {
                "need": self._target.wanted,
                "met": self._met,
                "samples": self._samples,
                "complete": self._n_complete,
                "in_band": self._n_in_band,
                "stopped": self._n_stopped,
                "open": len(self._open),
            }

    def warnings(self) -> list[str]:
        with self._changed:
            if not self._exhausted or self._is_met():
                return []
            name, aim = self._target.recipe.name, self._target
            return [
                f"the problems ran out: {name} can take {self._met} of {aim.wanted} {aim.unit}; add problems, or raise "
                "--samples"
            ]

"""Adaptive sampling: spend tokens where they decide something.

A problem gets a few samples first; it is stopped when it is confidently outside the recipe's difficulty band, put off
while others are more promising, and otherwise gets all its samples (see ``stopping``). Only problems with all their
samples count for the recipe, so that a selected problem's difficulty is the one that a build without stopping gives it.
Every decision is kept in the catalog. Must not know: engines, the catalog's file, progress bars.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calset import ids
from calset.builder.schedule.fixed import NO_RETRY, Opened, Retry, Unit
from calset.builder.schedule.prior import Priors, State
from calset.builder.schedule.stopping import CONFIDENCE, StoppingRule, stratum
from calset.catalog.records import JUDGED, Decision, Problem, Trace
from calset.catalog.subsets.recipes import Recipe, get_recipe
from calset.catalog.subsets.take import Candidate, Candidates, take
from calset.errors import InputError


@dataclass(frozen=True, slots=True)
class Target:
    """What an adaptive build is for: a recipe, and how much it must be able to take.

    Raises:
        InputError: a recipe that takes no traces, both needs or none, or a value out of range.
    """

    recipe: Recipe
    need: int | None = None  # samples
    need_tokens: int | None = None  # prompt and completion tokens of samples
    confidence: float = CONFIDENCE  # of stopping a problem

    @classmethod
    def of(
        cls,
        recipe: str | Path | Recipe,
        *,
        need: int | None = None,
        need_tokens: int | None = None,
        confidence: float | None = None,
    ) -> Target:
        """Make a target by the recipe's name or file; ``confidence`` is 0.95 when None."""
        return cls(get_recipe(recipe), need, need_tokens, CONFIDENCE if confidence is None else confidence)

    def __post_init__(self) -> None:
        if self.recipe.kind != "trace":
            raise InputError(f"recipe {self.recipe.name} takes no traces: an adaptive build has nothing to decide")
        if self.recipe.window is not None or self.recipe.stratify is not None:
            raise InputError(
                f"recipe {self.recipe.name} cuts windows or divides its budget, and an adaptive build counts whole "
                "traces of one budget: leave window and stratify to calset select"
            )
        if (self.need is None) == (self.need_tokens is None):
            given = "neither" if self.need is None else "both"
            raise InputError(f"an adaptive build takes one of need (samples) and need_tokens, not {given}")
        for name in ("need", "need_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")

    def rule(self, samples: int) -> StoppingRule:
        """When a problem of at most so many samples is stopped.

        Raises:
            InputError: too few samples, or too many, or a confidence out of range.
        """
        if (self.recipe.min_k or 0) > samples:
            raise InputError(
                f"recipe {self.recipe.name} wants problems with {self.recipe.min_k} judged traces, more than samples "
                f"({samples})"
            )
        return StoppingRule(self.recipe.difficulty, samples, self.confidence)

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


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample that is in the catalog, or on its way there. ``size`` counts its prompt too."""

    trace_id: str
    sample_index: int
    verdict: str | None
    finished: bool
    n_tokens: int
    size: int


@dataclass(slots=True, eq=False)
class _Open:
    """A problem that has not all its samples, and is not stopped."""

    problem: Problem
    decided: Decision | None  # see Opened
    stratum: str
    # None while it is put off: of thousands that are, and may never be needed, the prompts would fill the memory.
    prompt_ids: tuple[int, ...] | None
    samples: dict[int, _Sample] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)  # of samples that are run again
    flying: int = 0  # handed out, or about to be
    n_correct: int = 0
    k: int = 0

    @property
    def problem_id(self) -> str:
        return self.problem.problem_id

    @property
    def unjudged(self) -> int:
        return len(self.samples) - self.k

    @property
    def state(self) -> State:
        return self.stratum, self.k, self.n_correct

    def add(self, sample: _Sample) -> None:
        self.samples[sample.sample_index] = sample
        self.k += sample.verdict in JUDGED
        self.n_correct += sample.verdict == "correct"


class AdaptiveSchedule:
    """The lowest index goes first, a fresh problem's among them, until the recipe has what it needs; a ``Schedule``."""

    def __init__(
        self,
        opened: Iterator[Opened],
        key: str,
        samples: int,
        target: Target,
        *,
        render: Callable[[Problem], tuple[int, ...]],
        retry: Retry = NO_RETRY,
        seed: int = 0,
        priors: Priors | None = None,
    ) -> None:
        """``render`` gives a problem's prompt again, as ``opened`` did; ``priors`` stand in for the target's own."""
        self._render, self._retry = render, retry
        self._priors_of = priors or Priors(target.rule(samples))
        self._rule = self._priors_of.rule
        self._recipe = target.recipe.with_options(samples=None, tokens=None, min_k=samples)
        self._source, self._key, self._samples, self._target, self._seed = opened, key, samples, target, seed
        self._changed = threading.Condition()
        self._open: dict[str, _Open] = {}
        self._ready: dict[State, list[_Open]] = defaultdict(list)
        self._sending: deque[tuple[_Open, int]] = deque()
        self._again: deque[tuple[_Open, int]] = deque()  # to be run again, before all others
        self._n_owed = 0  # of these, and under way
        self._candidates: list[Candidate] = []
        self._n_flying = self._n_stopped = self._n_complete = self._n_inside = self._met = 0
        self._dirty = self._exhausted = False
        self._read = self._caught_up = False  # what an earlier build left; see _catch_up
        self._ranked_at = 0.0
        self._n_unjudged = 0  # stopped because a sample has no verdict
        self._decisions: list[Decision] = []
        self._earlier: list[_Open] = []  # to be decided when caught up

    # -- the feeding thread -----------------------------------------------------------------------------------------

    def take(self, timeout: float = 0.0) -> Unit | None:
        waited = timeout <= 0
        while True:
            with self._changed:
                if self._is_done():
                    return None
                if self._read and self._again:
                    return self._hand_out(self._again)
                if self._caught_up and (self._sending or self._next_batch()):
                    return self._hand_out(self._sending)
                if self._exhausted or (self._read and not self._caught_up):
                    if waited or not self._n_flying:
                        return None
                    waited = True
                    self._changed.wait(timeout)
                    continue
            # Reading the next problem may look into the catalog: not while verdicts wait for the lock.
            following = next(self._source, None)
            with self._changed:
                self._exhausted = following is None
                # Problems are opened in the source's order: those of an earlier build come first.
                self._read = self._read or following is None or not following.existing
                self._catch_up()
                if following is not None:
                    self._take_in(following)

    @property
    def finished(self) -> bool:
        with self._changed:
            waiting = self._again or self._n_flying or self._sending or self._ready
            return self._is_done() or (self._exhausted and not waiting)

    @property
    def satisfied(self) -> bool:
        with self._changed:
            return self._is_done()

    def reopen(self, dropped: Iterable[Unit]) -> bool:
        with self._changed:
            for unit in dropped:
                self._n_flying -= 1
                queue = self._again if unit.attempt else self._sending
                queue.append((self._open[unit.problem.problem_id], unit.sample_index))
            return not self.finished

    def _next_batch(self) -> bool:
        """Send the samples of the open problem of the lowest index; False when a fresh one is cheaper, or none is open.

        A problem dearer than a fresh one is put off: it comes back when there are no fresh ones left. Whichever's turn
        it is, is decided again, for the prior has moved while it waited.
        """
        limit = math.inf if self._exhausted else self._priors_of.limit
        while self._ready:
            first = min(self._ready, key=self._priors_of.index_of)
            if self._priors_of.index_of(first) > limit:
                return False
            one = self._ready[first].pop()
            if not self._ready[first]:
                del self._ready[first]
            if not self._stop(one):
                self._send(one, self._rule.patience(one.k, one.n_correct, self._priors_of.indices(one.stratum), limit))
                return True
        return False

    def _send(self, one: _Open, n: int) -> None:
        """The next ``n`` samples of a problem that it has not, together: an engine may share their prompt's prefill."""
        missing = [index for index in range(self._samples) if index not in one.samples][:n]
        one.flying += len(missing)
        self._sending.extend((one, index) for index in missing)

    def _hand_out(self, queue: deque[tuple[_Open, int]]) -> Unit:
        one, index = queue.popleft()
        self._n_flying += 1
        if one.prompt_ids is None:
            one.prompt_ids = self._render(one.problem)
        trace_id = ids.trace_id(one.problem_id, self._key, index)
        return Unit(one.problem, one.prompt_ids, index, trace_id, one.attempts.get(index, 0))

    def _take_in(self, opened: Opened) -> None:
        kind = stratum(opened.problem.source, len(opened.prompt_ids))
        one = _Open(opened.problem, opened.decided, kind, opened.prompt_ids)
        self._open[one.problem_id] = one
        for index, there in sorted(opened.existing.items()):
            if index >= self._samples:
                continue
            if self._retry.wants(there):
                one.attempts[index] = there.attempt + 1
            else:
                finished, size = there.finish_reason == "stop", there.n_prompt_tokens + there.n_tokens
                one.add(_Sample(there.trace_id, index, there.verdict, finished, there.n_tokens, size))
        if one.attempts:
            self._run_again(one)
        elif not one.samples:
            limit = self._priors_of.limit
            self._send(one, self._rule.patience(0, 0, self._priors_of.indices(one.stratum), limit))
        else:
            self._decide(one)

    def _run_again(self, one: _Open) -> None:
        """Samples to be superseded count for nothing from now on; the problem is decided when they are back."""
        one.prompt_ids = None
        one.flying += len(one.attempts)
        self._n_owed += len(one.attempts)
        self._again.extend((one, index) for index in one.attempts)

    def _catch_up(self) -> None:
        """Once all problems of an earlier build are read, and all is back that is run again, decide on them.

        Not sooner: the prior is that of all of them, and what is back may be all that the recipe needs.
        """
        if self._caught_up or not self._read or self._n_owed:
            return
        self._caught_up = True
        earlier, self._earlier = self._earlier, []
        for one in earlier:
            self._decide(one)

    # -- verdicts: the collecting thread ----------------------------------------------------------------------------

    def settle(self, unit: Unit, trace: Trace, verdict: str | None) -> None:
        with self._changed:
            one = self._open[unit.problem.problem_id]
            one.flying -= 1
            self._n_flying -= 1
            self._n_owed -= unit.attempt > 0
            size, finished = len(trace.prompt_ids) + trace.n_tokens, trace.finish_reason == "stop"
            one.add(_Sample(trace.trace_id, unit.sample_index, verdict, finished, trace.n_tokens, size))
            if not one.flying:
                self._decide(one)
            self._catch_up()
            self._changed.notify_all()

    def _decide(self, one: _Open) -> None:
        """With no sample of it under way."""
        self._priors_of.see(one.problem_id, one.state)
        if len(one.samples) >= self._samples:
            self._complete(one)
            return
        one.prompt_ids = None
        if not self._caught_up:
            self._earlier.append(one)
        elif not self._stop(one):
            self._note(one, "continue", "open")
            self._ready[one.state].append(one)

    def _stop(self, one: _Open) -> bool:
        """Stop a problem that has no sample under way, if the rule says so by the prior of now."""
        prior = self._priors_of.prior(one.stratum)
        if self._rule.decide(one.k, one.n_correct, prior, one.unjudged) != "stop":
            return False
        self._note(one, "stop", "a sample has no verdict" if one.unjudged else "outside the band")
        self._n_stopped += 1
        self._n_unjudged += one.unjudged > 0
        del self._open[one.problem_id]
        return True

    def _complete(self, one: _Open) -> None:
        inside = one.k >= self._samples and self._rule.in_band(one.n_correct)
        self._note(one, "complete", "inside the band" if inside else "outside the band")
        self._n_complete += 1
        self._n_inside += inside
        difficulty = (one.k - one.n_correct) / one.k if one.k else None
        for sample in one.samples.values():
            self._candidates.append(
                Candidate(
                    sample.trace_id,
                    one.problem_id,
                    sample.sample_index,
                    sample.verdict == "correct",
                    sample.finished,
                    difficulty,
                    one.k,
                    sample.n_tokens,
                    sample.size,
                )
            )
        self._dirty = True
        del self._open[one.problem_id]

    def _note(self, one: _Open, action: str, reason: str) -> None:
        prior = self._priors_of.prior(one.stratum)
        decision = Decision(
            run_id="",
            generation_key=self._key,
            problem_id=one.problem_id,
            action=action,
            reason=reason,
            k=one.k,
            n_correct=one.n_correct,
            samples=self._samples,
            probability=self._rule.probability(one.k, one.n_correct, prior, one.unjudged),
            confidence=self._rule.confidence,
            recipe=self._target.recipe.name,
        )
        last, one.decided = one.decided, decision
        # A build that goes on decides of the same samples again; what it decides as before is there already.
        if last is None or decision != replace(
            last, run_id="", probability=decision.probability, decided_at=decision.decided_at
        ):
            self._decisions.append(decision)

    # -- what is known ----------------------------------------------------------------------------------------------

    def _is_met(self) -> bool:
        """Whether the recipe has what it needs. Its length band moves with every problem: counted anew each time."""
        by_sample = self._target.unit == "samples"
        # Where a problem gives one sample at most, too few inside the band need no ranking to tell.
        possible = not by_sample or self._recipe.per_problem != 1 or self._n_inside >= self._target.wanted
        if self._dirty and (possible or not self._n_flying or time.monotonic() > self._ranked_at + 1):
            self._dirty, self._ranked_at = False, time.monotonic()
            taken = take(Candidates.of(self._candidates), self._recipe, self._seed)
            self._met = len(taken.at) if by_sample else int(taken.size.sum())
        return self._met >= self._target.wanted

    def _is_done(self) -> bool:
        """Whether the recipe has what it needs, all counted that an earlier build left."""
        return self._caught_up and self._is_met()

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
                "in_band": self._n_inside,
                "stopped": self._n_stopped,
                "open": len(self._open),
            }

    def warnings(self) -> list[str]:
        with self._changed:
            found = []
            name, aim = self._target.recipe.name, self._target
            if self._n_unjudged:
                found.append(
                    f"{self._n_unjudged} problems were stopped because a sample of theirs has no verdict: calset "
                    "grade, or the same command with --retry error (of what the engine failed on), may give it one"
                )
            if self._exhausted and not self._is_met():
                found.append(
                    f"the problems ran out: {name} can take {self._met} of {aim.wanted} {aim.unit}; add problems, or "
                    "raise --samples"
                )
            return found

"""From a trace to the pool and back to a grade's row: what a build and a re-grading share."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from calset.builder.grading import Outcome, grader_version, verdict_without_grading
from calset.builder.grading.pool import GradingPool
from calset.catalog.records import Grade, Problem


class Gradable(Protocol):
    """What grading needs of a trace: a ``Trace`` that a build has just made, or a stored one without its tokens."""

    @property
    def trace_id(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def response(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def answer_start(self) -> int: ...


def submit(pool: GradingPool, trace: Gradable, problem: Problem, grader: str) -> Future[Outcome]:
    """The verdict of a trace, later; at once where its end already says it."""
    known = verdict_without_grading(trace.response, trace.finish_reason, trace.answer_start >= 0)
    if known is None:
        return pool.submit(grader, problem.answer, trace.response, {**problem.metadata, "question": problem.question})
    done: Future[Outcome] = Future()
    done.set_result(known)
    return done


def grade_row(trace: Gradable, grader: str, outcome: Outcome) -> Grade:
    """What the catalog keeps of an outcome."""
    return Grade(
        trace_id=trace.trace_id,
        attempt=trace.attempt,
        grader=grader,
        grader_version=grader_version(grader),
        verdict=outcome.verdict,
        extracted=outcome.extracted,
        detail=outcome.detail,
    )

"""What a grader says of a trace, and the verdicts that need no grader: truncated, broken, thinking that never ended.

Must not know: graders.
"""

from __future__ import annotations

from typing import NamedTuple

from calset.catalog.records import BROKEN, UNFINISHED, Verdict


class Outcome(NamedTuple):
    """What a grader says: the verdict, the answer as it read it, and why in a line."""

    verdict: Verdict
    extracted: str | None = None
    detail: str | None = None


def verdict_without_grading(response: str, finish_reason: str, thinking_ended: bool) -> Outcome | None:
    """What a trace's end already says, or None for the grader to judge.

    A truncated trace is never graded, whatever it holds: math-verify finds ``\\boxed{7}`` in the middle of a thought.
    """
    if finish_reason in UNFINISHED:
        return Outcome("truncated", detail=f"finish reason {finish_reason}")
    if finish_reason in BROKEN:
        return Outcome("error", detail=f"finish reason {finish_reason}")
    if not thinking_ended:
        return Outcome("no_answer", detail="thinking never ended")
    if not response.strip():
        return Outcome("no_answer", detail="nothing after the thinking")
    return None

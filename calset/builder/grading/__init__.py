"""Graders by name, and what is decided before any of them sees a trace.

A grader is a module with ``version() -> str`` and ``grade(answer, response, metadata) -> Outcome``. It runs in a
killable worker process (pool.py), so it may be slow, hang or crash.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from calset.catalog.records import BROKEN, UNFINISHED, Verdict
from calset.errors import InputError

GRADERS: dict[str, str] = {
    "math": "calset.builder.grading.math",
    "gym": "calset.builder.grading.gym",
}
# Longer responses are cut to their end, where the answer is: parsers are not linear.
MAX_RESPONSE_CHARS = 50_000


class Outcome(NamedTuple):
    """What a grader says: the verdict, the answer as it read it, and why in a line."""

    verdict: Verdict
    extracted: str | None = None
    detail: str | None = None


def check_grader(name: str) -> str:
    """The name itself.

    Raises:
        InputError: no such grader; names the ones there are.
    """
    if name not in GRADERS:
        close = difflib.get_close_matches(name, GRADERS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose {' or '.join(sorted(GRADERS))}"
        raise InputError(f"unknown grader {name!r}; {hint}")
    return name


def grader_version(name: str) -> str:
    """The version that a grade records: the grader's own and its library's. Imports no grading library."""
    return import_module(GRADERS[check_grader(name)]).version()


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


def grade_response(grader: str, answer: str, response: str, metadata: Mapping[str, Any]) -> Outcome:
    """Grade in this process and thread, without a deadline; builds go through ``GradingPool``."""
    module = import_module(GRADERS[check_grader(grader)])
    return module.grade(answer, response[-MAX_RESPONSE_CHARS:], metadata)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` (or ``\fbox``), braces balanced; None when there is none.

    Escaped braces do not count. A box that never closes is skipped: its content is not known.
    """
    spans = [(text.rfind(mark), len(mark)) for mark in (r"\boxed{", r"\fbox{")]
    at, width = max(spans)
    while at >= 0:
        content = _balanced(text, at + width)
        if content is not None:
            return content
        spans = [(text.rfind(mark, 0, at), len(mark)) for mark in (r"\boxed{", r"\fbox{")]
        at, width = max(spans)
    return None


def _balanced(text: str, start: int) -> str | None:
    depth, i = 1, start
    while i < len(text):
        character = text[i]
        if character == "\\":
            i += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:i]
        i += 1
    return None

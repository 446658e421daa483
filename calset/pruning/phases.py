"""Phases of a pruning or a verification: how far each is, for whoever waits, and its seconds, for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Events: {"done": how many, "total": of how many or None, "phase": of what kind, the caller documents which}
OnProgress = Callable[[Mapping[str, Any]], None]
OnStep = Callable[[int, int], None]  # done, of how many

EVENTS = 100  # of a phase at most: a checkpoint can have a hundred thousand tensors


def silent(event: Mapping[str, Any]) -> None:
    """Tells nobody."""


def steps(tell: OnProgress, phase: str) -> OnStep:
    """Tells how far a phase is, whenever a hundredth of it is done."""

    def step(done: int, total: int) -> None:
        if done in (0, total) or done * EVENTS // total != (done - 1) * EVENTS // total:
            tell({"done": done, "total": total, "phase": phase})

    return step


@contextmanager
def timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of a ``with`` block to a phase."""
    began = time.monotonic()
    try:
        yield
    finally:
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - began

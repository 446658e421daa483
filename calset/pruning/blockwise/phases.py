"""Phases of a pruning or a verification: events of how far each is, and its seconds for the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from calset.io.progress import OnProgress, Progress, silent

EVENTS = 100  # of a phase at most: a checkpoint can have a hundred thousand tensors


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a longer work, which sends an event whenever a hundredth of it is done."""

    name: str = ""
    progress: OnProgress = silent

    def step(self, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` units are done."""
        if done in (0, total) or done * EVENTS // total != (done - 1) * EVENTS // total:
            self.progress(Progress(self.name, done, total))


@contextmanager
def timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds of a ``with`` block to a phase."""
    began = time.monotonic()
    try:
        yield
    finally:
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - began

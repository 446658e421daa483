"""Seconds by phase of a pruning, for its report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of a ``with`` block to a phase."""
    began = time.monotonic()
    try:
        yield
    finally:
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - began

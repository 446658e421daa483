"""The one progress event, which every ``progress=`` parameter of calset takes a function of.

Must not know: what is being done, how an event is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """Event of a running piece of work, sent in the thread that called for the work.

    Attributes:
        phase: name of what is being done; the last event's is "done", or "stopped" after an orderly stop.
        done: units that are done, such as traces, rows or blocks; those that were there before count.
        total: units in all; None when unknown.
        existing: units of ``done`` that were there before this call.
        eta_seconds: expected seconds to the end; None when unknown.
        facts: further counts (int), shares (float from 0 to 1) and texts, by the name to show them under.
        final: True for the last event.
    """

    phase: str
    done: int = 0
    total: int | None = None
    existing: int = 0
    eta_seconds: float | None = None
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    final: bool = False

    @property
    def saved(self) -> int:
        """Units that this call has done."""
        return self.done - self.existing


OnProgress = Callable[[Progress], None]


def silent(event: Progress) -> None:
    """Ignore the event."""

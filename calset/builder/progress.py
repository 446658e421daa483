"""Progress of a build or an import: counts of what is saved, their rate, and the events that report them.

Must not know: engines, the catalog but for its records.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calset.catalog.records import JUDGED, Grade, Trace
from calset.io.progress import OnProgress, Progress

RECENT_SECONDS = 15.0


class Rate:
    """Tokens a second over the last commits.

    The time runs from the commit before the oldest one kept: its tokens were made since then, however rare commits are.
    """

    def __init__(self, began: float) -> None:
        self._since = began
        self._kept: deque[tuple[float, int]] = deque()

    def add(self, now: float, tokens: int) -> None:
        self._kept.append((now, tokens))
        while len(self._kept) > 1 and self._kept[0][0] < now - RECENT_SECONDS:
            self._since = self._kept.popleft()[0]

    def per_second(self, now: float) -> float:
        return sum(tokens for _, tokens in self._kept) / max(now - self._since, 1e-9)


@dataclass(slots=True)
class Saved:
    """Counts of the traces that are saved so far."""

    n_traces: int = 0
    n_tokens: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)

    def add(self, traces: Sequence[Trace], grades: Sequence[Grade] | None) -> int:
        """Count saved traces and return their tokens; ``grades`` is None where nothing is graded."""
        n_tokens = sum(trace.n_tokens for trace in traces)
        self.n_traces += len(traces)
        self.n_tokens += n_tokens
        self.verdicts.update(["ungraded"] * len(traces) if grades is None else (grade.verdict for grade in grades))
        self.finish_reasons.update(trace.finish_reason for trace in traces)
        return n_tokens

    @property
    def truncated(self) -> float | None:
        """Share of the traces that the token limit cut; None without traces."""
        return self.finish_reasons["length"] / self.n_traces if self.n_traces else None

    def shares(self) -> dict[str, float]:
        """Shares of the traces that did not stop by themselves, by finish reason, and of the judged ones correct."""
        reasons = {reason: n for reason, n in sorted(self.finish_reasons.items()) if reason != "stop"}
        shares = {reason: n / self.n_traces for reason, n in reasons.items()}
        if judged := sum(self.verdicts[verdict] for verdict in JUDGED):
            shares["correct"] = self.verdicts["correct"] / judged
        return shares


class Meter:
    """Counts, rate and events of one build.

    Args:
        total: traces asked for; None when an adaptive build decides it on the way.
    """

    def __init__(self, total: int | None, progress: OnProgress | None) -> None:
        self.saved = Saved()
        self._total, self._progress = total, progress
        self._met_before = 0
        self._began = time.monotonic()
        self._rate = Rate(self._began)

    def begin(self, met: int = 0) -> None:
        """Start the clock; ``met`` is what earlier builds have of an adaptive build's target."""
        self._met_before = met
        self._began = time.monotonic()
        self._rate = Rate(self._began)

    @property
    def seconds(self) -> float:
        """Seconds since ``begin``."""
        return time.monotonic() - self._began

    def add(self, traces: Sequence[Trace], grades: Sequence[Grade] | None) -> None:
        """Count traces that are saved now; see ``Saved.add``."""
        n_tokens = self.saved.add(traces, grades)
        self._rate.add(time.monotonic(), n_tokens)

    def emit(self, phase: str, existing: int, target: Mapping[str, int]) -> None:
        """Send an event.

        Args:
            existing: traces that were there before.
            target: need and met of an adaptive build, else empty.
        """
        if self._progress is None:
            return
        rates = {
            "tokens/s": round(self._rate.per_second(time.monotonic())),
            "overall": round(self.saved.n_tokens / max(self.seconds, 1e-9)),
        }
        aim = {"target": f"{target['met']:,}/{target['need']:,}"} if target else {}
        self._progress(
            Progress(
                phase,
                existing + self.saved.n_traces,
                self._total,
                existing,
                self._eta_seconds(existing, target),
                {**aim, **(rates if self.saved.n_tokens else {}), **self.saved.shares()},
                final=phase in ("done", "stopped"),
            )
        )

    def _eta_seconds(self, existing: int, target: Mapping[str, int]) -> float | None:
        n = self.saved.n_traces
        if not n:
            return None
        if self._total is not None:
            return (self._total - existing - n) * self.seconds / n
        met, need = target.get("met", 0), target.get("need", 0)
        gained = met - self._met_before
        return max(0, need - met) * self.seconds / gained if gained > 0 else None

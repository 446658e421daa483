"""What a build or an import has saved so far, counted, and how fast.

Must not know: engines, the catalog but for its records.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from calset.catalog.records import JUDGED, Grade, Trace

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
class Tally:
    """What is saved so far."""

    saved: int = 0
    tokens: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)

    def add(self, traces: Sequence[Trace], grades: Sequence[Grade] | None) -> int:
        """Count saved traces; returns their tokens. ``grades`` is None where nothing is graded."""
        tokens = sum(trace.n_tokens for trace in traces)
        self.saved += len(traces)
        self.tokens += tokens
        self.verdicts.update(["ungraded"] * len(traces) if grades is None else (grade.verdict for grade in grades))
        self.finish_reasons.update(trace.finish_reason for trace in traces)
        return tokens

    @property
    def truncated(self) -> int:
        return self.finish_reasons["length"]

    @property
    def correct(self) -> int:
        return self.verdicts["correct"]

    @property
    def judged(self) -> int:
        return sum(self.verdicts[verdict] for verdict in JUDGED)

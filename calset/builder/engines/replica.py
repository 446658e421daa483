"""State of one server among several: whether it is alive, how much it takes, and how long it is left alone.

Must not know: HTTP, which request is sent.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, fields

from calset.builder.engines.base import Request
from calset.errors import InputError
from calset.io.retry import Backoff

QUEUE_SECONDS = 600.0  # that a request may wait in the server's own queue, on top of its tokens' time
PAUSE_SECONDS = 60.0  # between two tries of a failing server at most
ASKED_PAUSE_SECONDS = 600.0  # what a server may ask for by Retry-After at most


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for, and how often it may fail. Seconds, but for ``failures``.

    Raises:
        InputError: a value that is no positive number.
    """

    connect_timeout: float = 10.0
    read_timeout: float | None = None  # of one completion; by default ten minutes and its max_tokens at the next
    slowest_tokens_per_second: float = 1.0  # of one trace, on a server that is busy but well
    probe_every: float = 15.0  # between two looks at each server's health
    backoff: float = 2.0  # the longest first pause of a failing server; each further one may be twice as long
    failures: int = 6  # in a row, one a pause, before a server is dropped
    restart_timeout: float = 300.0  # for one to come back when none is left

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.name == "read_timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"{entry.name} must be a positive number, not {value!r}")

    def read_seconds(self, max_tokens: int) -> float:
        """How long the answer to one request may take."""
        return self.read_timeout or QUEUE_SECONDS + max_tokens / self.slowest_tokens_per_second


class Unavailable(Exception):
    """No answer: no connection, one that broke, a timeout, an answer too long or compressed, HTTP 5xx, or a request
    that the server aborted."""

    def __init__(self, why: str, *, pause: float | None = None, timed_out: bool = False) -> None:
        super().__init__(why)
        self.pause, self.timed_out = pause, timed_out


class Busy(Exception):
    """HTTP 429, and how long the server asked to be left alone."""

    def __init__(self, pause: float | None) -> None:
        super().__init__("HTTP 429")
        self.pause = pause


@dataclass(slots=True)
class Job:
    request: Request
    failures: int = 0
    refused_since: float | None = None  # by HTTP 429


@dataclass(slots=True, eq=False)
class Server:
    """What is known of one server. Lives in the loop's thread."""

    url: str
    most: int  # requests at once
    limit: float  # the same, less where the server said 429
    served: str = ""
    version: str = "unknown"
    alive: bool = True
    why: str = ""  # it was dropped
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    trial: asyncio.Task[None] | None = None
    row: int = 0  # failures in a row, one a pause
    turned_away: int = 0  # 429s in a row
    paused_until: float = 0.0  # on the monotonic clock

    def takes(self, now: float) -> bool:
        """Whether it may be sent a request; one at a time while it is in doubt."""
        if not self.alive or now < self.paused_until or len(self.tasks) >= int(self.limit):
            return False
        return not self.row or self.trial is None

    def succeeded(self) -> None:
        self.row = 0
        self.turned_away = 0
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def failed(self, sent: float, patience: Patience, asked: float | None = None) -> None:
        """One more failure in a row, and a pause; what was sent before the last pause ended tells nothing new."""
        now = time.monotonic()
        if sent < self.paused_until:
            return
        self.row += 1
        self.paused_until = now + _pause(patience, self.row, asked)

    def busy(self, patience: Patience, asked: float | None) -> None:
        """Half as much from now on; each success lets it take a little more."""
        now = time.monotonic()
        if now >= self.paused_until:
            self.limit = max(1.0, self.limit / 2)
            self.turned_away += 1
            self.paused_until = now + _pause(patience, self.turned_away, asked)
        elif asked is not None:
            self.paused_until = max(self.paused_until, now + _pause(patience, self.turned_away, asked))

    def back(self) -> None:
        self.alive, self.limit, self.paused_until = True, float(self.most), 0.0
        self.row = 0


def _pause(patience: Patience, times: int, asked: float | None) -> float:
    backoff = Backoff(patience.backoff, PAUSE_SECONDS)
    return backoff.seconds(times, None if asked is None else min(asked, ASKED_PAUSE_SECONDS))

"""One back-off: how long to wait before something is tried again, and when to give up.

Pauses grow exponentially and have jitter, so that those who failed together do not come back together. What a server
asks for counts, in ``Retry-After`` or in the Hub's ``ratelimit`` header. Must not know: what is tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")
_DIGITS = 9  # of a number of seconds that is taken for one


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter: pause n lasts between half and all of ``first * factor ** (n - 1)`` seconds.

    Attributes:
        first: seconds of the first pause at most.
        longest: seconds of any pause at most.
        factor: by which a pause may be longer than the one before it.
        longest_asked: seconds that a server may ask for; one that asks for more is not waited for.
    """

    first: float
    longest: float
    factor: float = 2.0
    longest_asked: float = 300.0  # the window of the Hub's rate limits

    def seconds(self, times: int, asked: float | None = None) -> float:
        """Return the seconds to wait after so many failures in a row (1, 2, ...), beside what a server asked for."""
        grown = self.first * self.factor ** min(times - 1, 64)  # a float ends at 2 ** 1024
        return (asked or 0.0) + min(self.longest, grown) * random.uniform(0.5, 1.0)


def retried(
    work: Callable[[], T],
    backoff: Backoff,
    may_pass: Callable[[Exception], bool],
    *,
    attempts: int | None = None,
    deadline: float | None = None,
    waiting: Callable[[], object] = lambda: None,
) -> T:
    """Return what ``work`` returns, tried again while its errors may pass; the last error is raised as it is.

    Args:
        may_pass: return True for an error after which another attempt can help.
        attempts: how often to try at most.
        deadline: on the monotonic clock; no attempt begins after it.
        waiting: called before each pause.
    """
    times = 0
    while True:
        try:
            return work()
        except Exception as error:
            times += 1
            asked = asked_seconds(getattr(getattr(error, "response", None), "headers", {}), time.time())
            late = deadline is not None and time.monotonic() >= deadline
            if late or times == attempts or (asked or 0.0) > backoff.longest_asked or not may_pass(error):
                raise
        waiting()
        pause = backoff.seconds(times, asked)
        time.sleep(pause if deadline is None else min(pause, max(0.0, deadline - time.monotonic())))


def asked_seconds(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that an answer asks to be left alone for; None when it does not.

    Args:
        headers: ``Retry-After`` has seconds or a date (RFC 9110); ``ratelimit`` is the Hub's, which is on every answer
            and counts when nothing is left of the limit.
        now: Unix time.
    """
    given = {name.lower(): value.strip() for name, value in headers.items()}
    if said := given.get("retry-after"):
        if said.isascii() and said.isdigit():
            return float(said) if len(said) <= _DIGITS else None
        try:
            date = parsedate_to_datetime(said)
            return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now)
        except (ValueError, OverflowError):
            return None
    if "ratelimit" in given:
        from huggingface_hub.utils import parse_ratelimit_headers

        with suppress(ValueError):  # of a number with thousands of digits
            window = parse_ratelimit_headers(given)
            return float(window.reset_in_seconds) if window and window.remaining == 0 else None
    return None

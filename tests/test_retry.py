"""The one back-off: as long as asked, growing with jitter, not beyond a deadline, and only after what may pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calset.io import retry
from calset.io.retry import Backoff, asked_seconds, retried

QUICK = Backoff(first=1.0, longest=8.0, longest_asked=60.0)


class Refused(Exception):
    """An answer of a server that may be asked again."""

    def __init__(self, **headers: str) -> None:
        super().__init__("refused")
        self.response = SimpleNamespace(headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, none of which is slept; the monotonic clock runs by them."""
    pauses: list[float] = []
    began = time.monotonic()
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    monkeypatch.setattr(retry.time, "monotonic", lambda: began + sum(pauses))
    return pauses


def failing(errors: list[Exception]) -> Callable[[], str]:
    left = iter(errors)

    def work() -> str:
        for error in left:
            raise error
        return "done"

    return work


def test_pauses_grow_with_jitter_up_to_the_longest(clock: list[float]) -> None:
    assert retried(failing([Refused() for _ in range(7)]), QUICK, lambda error: True) == "done"
    for pause, most in zip(clock, (1, 2, 4, 8, 8, 8, 8), strict=True):
        assert most / 2 <= pause <= most
    assert len(set(clock)) == len(clock)
    assert Backoff(1.0, 8.0).seconds(10**9) <= 8.0


def test_the_last_attempt_and_what_does_not_pass_raise_the_error_itself(clock: list[float]) -> None:
    errors = [Refused(), Refused(), ValueError("no")]
    with pytest.raises(Refused) as caught:
        retried(failing(list(errors)), QUICK, lambda error: True, attempts=2)
    assert caught.value is errors[1]
    with pytest.raises(ValueError, match="no"):
        retried(failing(list(errors)), QUICK, lambda error: isinstance(error, Refused))
    with pytest.raises(KeyboardInterrupt):
        retried(failing([KeyboardInterrupt()]), QUICK, lambda error: True)  # type: ignore[list-item]
    assert len(clock) == 3


def test_no_pause_goes_beyond_the_deadline_and_one_attempt_is_made_at_it(clock: list[float]) -> None:
    told: list[int] = []
    deadline = retry.time.monotonic() + 10
    with pytest.raises(Refused):
        retried(
            failing([Refused() for _ in range(99)]), QUICK, lambda error: True, deadline=deadline,
            waiting=lambda: told.append(len(clock)),
        )  # fmt: skip
    assert sum(clock) == pytest.approx(10)
    assert told == list(range(len(clock)))


def test_a_server_that_asks_for_time_gets_it_unless_it_asks_for_too_much(clock: list[float]) -> None:
    retried(failing([Refused(Retry_After="30"), Refused(ratelimit='"api";r=0;t=55')]), QUICK, lambda error: True)
    assert 30.5 <= clock[0] <= 31
    assert 56 <= clock[1] <= 57
    with pytest.raises(Refused):
        retried(failing([Refused(Retry_After="61")]), QUICK, lambda error: True)
    assert len(clock) == 2


NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": " 7 "}, 7.0),
        ({"RETRY-AFTER": format_datetime(NOW + timedelta(seconds=90), usegmt=True)}, 90.0),
        ({"retry-after": format_datetime(NOW - timedelta(seconds=90), usegmt=True)}, 0.0),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 +" + "9" * 30}, None),
        ({"retry-after": "9" * 5000}, None),
        ({"retry-after": "-1"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=10;t=55'}, None),  # of a limit that is not used up
        ({"ratelimit": '"api";r=0;t=' + "9" * 5000}, None),
        ({"retry-after": "3", "ratelimit": '"api";r=0;t=55'}, 3.0),
    ],
)  # fmt: skip
def test_what_an_answer_asks_for(headers: Mapping[str, str], seconds: float | None) -> None:
    assert asked_seconds(headers, NOW.timestamp()) == seconds


@given(st.text(), st.text())
def test_no_header_breaks_anything(retry_after: str, ratelimit: str) -> None:
    found = asked_seconds({"Retry-After": retry_after, "ratelimit": ratelimit}, time.time())
    assert found is None or found >= 0

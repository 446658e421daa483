"""Giving way to an engine on the same cores: whose priority falls, and who gets it back."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from calset.builder import priority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")


def nice(thread: threading.Thread | None = None) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread.native_id if thread else threading.get_native_id())


@pytest.fixture
def idle() -> Iterator[dict[str, threading.Thread]]:
    """A thread of calset's and one of somebody else."""
    over = threading.Event()
    threads = {name: threading.Thread(target=over.wait, name=name, daemon=True) for name in ("calset-pump", "theirs")}
    for thread in threads.values():
        thread.start()
    yield threads
    over.set()


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who is not root: a priority can be lowered only."""
    real = os.setpriority

    def lower_only(which: int, who: int, value: int) -> None:
        if value < os.getpriority(which, who):
            raise PermissionError
        real(which, who, value)

    monkeypatch.setattr(os, "setpriority", lower_only)


def test_the_caller_gets_its_priority_back_and_calsets_own_threads_stay_low(idle):
    before, possible = nice(), priority._can_be_raised()
    with suppress(ZeroDivisionError), priority.giving_way():
        assert nice() == (priority.LOWEST if possible else before)
        assert nice(idle["calset-pump"]) == priority.LOWEST
        assert nice(idle["theirs"]) == before
        raise ZeroDivisionError
    assert nice() == before
    assert nice(idle["calset-pump"]) == priority.LOWEST


def test_a_caller_that_could_not_get_it_back_keeps_it(forbidden, idle):
    before = nice()
    with priority.giving_way():
        assert nice() == before
        assert nice(idle["calset-pump"]) == priority.LOWEST
    assert nice() == before


def test_a_command_of_its_own_need_not_get_it_back(forbidden, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(priority, "_ends_with_command", False)
    priority.never_mind_restoring()
    seen = []

    def command() -> None:
        with priority.giving_way():
            seen.append(nice())

    thread = threading.Thread(target=command)  # whose priority is lost
    thread.start()
    thread.join()
    assert seen == [priority.LOWEST]


def test_a_thread_that_has_ended_is_passed_over(idle):
    ended = threading.Thread(target=lambda: None, name="calset-feed")
    ended.start()
    ended.join()
    priority.lower_own_threads()
    assert nice(idle["calset-pump"]) == priority.LOWEST

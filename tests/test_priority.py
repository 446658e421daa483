"""Giving way to an engine on the same cores: whose priority falls, and who gets it back."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

import calset
from calset.builder import priority
from calset.builder.engines import Completion
from calset.builder.model_info import inspect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")


def nice(thread: threading.Thread | None = None) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread.native_id if thread else threading.get_native_id())


@pytest.fixture
def idle() -> Iterator[dict[str, threading.Thread]]:
    """A thread of a build's and one of somebody else."""
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


def test_threads_that_feed_an_engine_are_lowered_and_no_others(idle):
    before = nice()
    priority.lower_feeding_threads()
    assert nice(idle["calset-pump"]) == priority.LOWEST
    assert nice(idle["theirs"]) == nice() == before


def test_the_caller_gets_its_priority_back():
    before, possible = nice(), priority._can_be_raised()
    with suppress(ZeroDivisionError), priority.caller_lowered():
        assert nice() == (priority.LOWEST if possible else before)
        raise ZeroDivisionError
    assert nice() == before


def test_a_caller_that_could_not_get_it_back_keeps_it(forbidden):
    before = nice()
    with priority.caller_lowered():
        assert nice() == before
    assert nice() == before


@pytest.mark.parametrize("shares", [True, False])
def test_a_build_gives_way_to_an_engine_on_its_cores_and_to_no_other(shares, tiny_model, tmp_path):
    class Double:
        name, version, max_model_len = "double", "1", 1024
        loaded, shares_cores = inspect(tiny_model).revision, shares

        def stream(self, requests, sampling):
            for request in requests:
                time.sleep(0.2)  # the pump is lowered as soon as it has started
                seen.append(nice())
                yield Completion(request.key, (31, 2), "stop", 0.0)

        def cancel(self) -> None: ...
        def load_weights(self, model, revision) -> None: ...
        def close(self) -> None: ...

    seen: list[int] = []
    before = nice()
    calset.build(
        tiny_model, "gym:chain_sum?size=3", samples=1, catalog=tmp_path / "c.duckdb", engine=Double(), graded=False
    )
    assert set(seen) == {priority.LOWEST if shares else before}
    assert nice() == before


def test_a_command_of_its_own_need_not_get_it_back(forbidden, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(priority, "_ends_with_command", False)
    priority.never_mind_restoring()
    seen = []

    def command() -> None:
        with priority.caller_lowered():
            seen.append(nice())

    thread = threading.Thread(target=command)  # whose priority is lost
    thread.start()
    thread.join()
    assert seen == [priority.LOWEST]

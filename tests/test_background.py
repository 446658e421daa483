"""Threads beside an engine on the same cores: which do not interrupt it, and which may again."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from conftest import ScriptedEngine

import calset
from calset.builder import background
from calset.builder.background import PatientSelector, drain, linger_seconds, step_seconds
from calset.builder.engines import Completion
from calset.builder.model_info import inspect

has_policies = pytest.mark.skipif(sys.platform != "linux", reason="threads have no policy of their own")


def policy(thread: threading.Thread | None = None) -> int:
    return os.sched_getscheduler((thread.native_id or 0) if thread else 0)


@pytest.fixture
def idle() -> Iterator[dict[str, threading.Thread]]:
    """A thread of a build's and one of somebody else."""
    over = threading.Event()
    threads = {name: threading.Thread(target=over.wait, name=name, daemon=True) for name in ("calset-vllm", "theirs")}
    for thread in threads.values():
        thread.start()
    yield threads
    over.set()


@has_policies
def test_a_builds_threads_do_not_interrupt_and_others_may_and_the_caller_again_afterwards(idle):
    with suppress(ZeroDivisionError), background.not_interrupting():
        assert policy() == policy(idle["calset-vllm"]) == os.SCHED_BATCH
        assert policy(idle["theirs"]) == os.SCHED_OTHER
        raise ZeroDivisionError
    assert policy() == os.SCHED_OTHER


@has_policies
def test_a_policy_that_somebody_chose_stays():
    found = []

    def chosen() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with background.not_interrupting():
            found.append(policy())
        found.append(policy())

    thread = threading.Thread(target=chosen)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE] * 2


@has_policies
def test_where_the_system_does_not_let_it_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    def forbidden(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with background.not_interrupting():
        assert policy() == os.SCHED_OTHER


@has_policies
@pytest.mark.parametrize("shares", [True, False])
def test_a_build_does_not_interrupt_an_engine_on_its_cores(shares, tiny_model, tmp_path):
    class Double:
        name, version, max_model_len = "double", "1", 1024
        loaded, shares_cores = inspect(tiny_model).revision, shares

        def stream(self, requests, sampling):
            for request in requests:
                seen.append(policy())
                yield Completion(request.key, (31, 2), "stop", 0.0)

        def cancel(self) -> None: ...
        def load_weights(self, model, revision) -> None: ...
        def close(self) -> None: ...

    seen: list[int] = []
    told: list[int] = []
    calset.build(
        tiny_model, "gym:chain_sum?size=3", samples=1, catalog=tmp_path / "c.duckdb", engine=Double(), graded=False,
        progress=lambda event: told.append(policy()) if event.phase == "generating" and event.saved else None,
    )  # fmt: skip
    expected = os.SCHED_BATCH if shares else os.SCHED_OTHER
    assert set(seen) == set(told) == {expected}
    assert policy() == os.SCHED_OTHER


def test_beside_an_engine_on_its_cores_a_build_waits_for_more_before_it_deals_with_a_completion(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(background, "LINGER_SECONDS", 0.7)
    engine = ScriptedEngine(inspect(tiny_model).revision)
    engine.shares_cores = True  # type: ignore[attr-defined]
    told: list[tuple[int, float]] = []
    calset.build(
        tiny_model, "gym:chain_sum?size=3", samples=1, catalog=tmp_path / "c.duckdb", engine=engine, graded=False,
        progress=lambda event: told.append((event.saved, time.monotonic())) if event.phase == "generating" else None,
    )  # fmt: skip
    began, saved = (next(at for n, at in told if (n > 0) == some) for some in (False, True))
    assert saved - began >= 0.7


def drained(source: queue.SimpleQueue[int], **how: float) -> list[int]:
    return list(drain(source, **how))


def test_a_drained_queue_gives_all_in_order_and_waits_no_longer_than_told():
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    began = time.monotonic()
    assert drained(source, timeout=0.05, linger=60) == []
    for i in range(5):
        source.put(i)
    assert drained(source, linger=0.0) == [0, 1, 2, 3, 4]
    assert source.empty()
    for i in range(5):
        source.put(i)
    assert next(drain(source)) == 0
    assert source.qsize() == 4
    assert time.monotonic() - began < 30


def test_who_lingers_takes_what_comes_meanwhile_too():
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    source.put(0)
    later = threading.Timer(0.2, source.put, [1])
    later.start()
    assert drained(source, linger=2.0) == [0, 1]
    later.join()


def test_only_beside_an_engine_on_its_cores_does_a_build_linger():
    class OnCores:
        shares_cores = True

    assert linger_seconds(OnCores()) == background.LINGER_SECONDS
    assert step_seconds(OnCores()) == background.STEP_SECONDS
    assert linger_seconds(object()) == step_seconds(object()) == 0


@pytest.fixture
def patient() -> Iterator[tuple[asyncio.AbstractEventLoop, PatientSelector]]:
    """A loop in a thread of its own, and its selector."""
    selector = PatientSelector()
    loop = asyncio.SelectorEventLoop(selector)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop, selector
    selector.seconds = 0.0
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def heard_after(loop: asyncio.AbstractEventLoop, n: int = 1) -> list[float]:
    """Seconds until the loop has heard each of the things that it is told from outside."""
    began, heard, over = time.monotonic(), [], threading.Event()

    def hear() -> None:
        heard.append(time.monotonic() - began)
        if len(heard) == n:
            over.set()

    for _ in range(n):
        loop.call_soon_threadsafe(hear)
    assert over.wait(60)
    return heard


def test_a_patient_loop_hears_later_of_all_that_came_meanwhile(patient):
    loop, selector = patient
    assert heard_after(loop)[0] < 1.9
    time.sleep(0.5)  # until it is idle again
    selector.seconds = 2.0
    heard = heard_after(loop, n=20)
    assert min(heard) >= 1.9
    assert max(heard) < 10
    selector.seconds = 0.0
    assert heard_after(loop)[0] < 1.9


def test_what_a_patient_loop_has_ready_does_not_wait(patient):
    loop, selector = patient

    async def steps() -> float:
        began, selector.seconds = time.monotonic(), 30.0
        for _ in range(100):
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        selector.seconds = 0.0
        return time.monotonic() - began

    assert asyncio.run_coroutine_threadsafe(steps(), loop).result(60) < 10

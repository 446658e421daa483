"""Beside an engine on the same cores: who does not interrupt it and who may again, and what is dealt with in one go."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ScriptedEngine

import calset
from calset.builder.engines import Completion, cpu_sharing
from calset.builder.model.info import inspect

has_policies = pytest.mark.skipif(sys.platform != "linux", reason="threads have no policy of their own")
HERE, ELSEWHERE = SimpleNamespace(shares_cores=True), SimpleNamespace()


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


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What happens while somebody waits for the sake of the engine; nobody really waits."""
    happens: list[Callable[[], Any]] = []

    def wait(seconds: float) -> None:
        while happens:
            happens.pop()()

    monkeypatch.setattr(cpu_sharing, "sleep", wait)
    return happens


@has_policies
def test_a_builds_threads_do_not_interrupt_and_others_may_and_the_caller_again_afterwards(idle):
    with suppress(ZeroDivisionError), cpu_sharing.beside(HERE).giving_way():
        assert policy() == policy(idle["calset-vllm"]) == os.SCHED_BATCH
        assert policy(idle["theirs"]) == os.SCHED_OTHER
        raise ZeroDivisionError
    assert policy() == os.SCHED_OTHER


@has_policies
def test_a_policy_that_somebody_chose_stays():
    found = []

    def chosen() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with cpu_sharing.beside(HERE).giving_way():
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
    with cpu_sharing.beside(HERE).giving_way():
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


@pytest.mark.parametrize("shares", [True, False])
def test_beside_an_engine_on_its_cores_a_build_waits_for_more_before_it_deals_with_a_completion(
    shares, tiny_model, tmp_path, monkeypatch
):
    waits: list[float] = []
    monkeypatch.setattr(cpu_sharing, "sleep", waits.append)
    engine = ScriptedEngine(inspect(tiny_model).revision)
    engine.shares_cores = shares  # type: ignore[attr-defined]
    report = calset.build(
        tiny_model, "gym:chain_sum?size=3", samples=1, catalog=tmp_path / "c.duckdb", engine=engine, graded=False
    )
    assert report.n_new == 3
    assert set(waits) == ({cpu_sharing.LINGER_SECONDS} if shares else set())


def test_a_drained_queue_gives_all_in_order_and_keeps_what_is_not_taken():
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    beside = cpu_sharing.beside(ELSEWHERE)
    assert list(beside.drain(source, timeout=0.01)) == []
    for i in range(5):
        source.put(i)
    assert list(beside.drain(source)) == [0, 1, 2, 3, 4]
    assert source.empty()
    for i in range(5):
        source.put(i)
    assert next(beside.drain(source)) == 0
    assert source.qsize() == 4


@pytest.mark.parametrize(("engine", "taken"), [(HERE, [0, 1]), (ELSEWHERE, [0])])
def test_only_beside_an_engine_on_its_cores_what_comes_meanwhile_is_taken_too(engine, taken, meanwhile):
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    source.put(0)
    meanwhile.append(lambda: source.put(1))
    assert list(cpu_sharing.beside(engine).drain(source)) == taken


def test_a_loop_leaves_a_steps_outputs_for_a_moment_and_then_hears_of_all_that_came(meanwhile):
    loop, heard = cpu_sharing.beside(HERE).event_loop(), []
    (read, write), (read_too, write_too) = os.pipe(), os.pipe()

    def hear(descriptor: int) -> None:
        os.read(descriptor, 1)
        heard.append(descriptor)
        if {read, read_too} <= set(heard):
            loop.stop()

    loop.add_reader(read, hear, read)
    loop.add_reader(read_too, hear, read_too)
    loop.call_soon(os.write, write, b"1")  # then it has nothing else to do, as between two steps
    meanwhile.append(lambda: (heard.append("waited"), os.write(write_too, b"2")))
    loop.run_forever()
    loop.close()
    for descriptor in (read, write, read_too, write_too):
        os.close(descriptor)
    assert heard[0] == "waited"
    assert set(heard[1:]) == {read, read_too}


def test_what_a_loop_has_ready_does_not_wait(monkeypatch):
    async def steps() -> None:
        asyncio.get_running_loop().call_soon_threadsafe(lambda: None)
        for _ in range(100):
            await asyncio.sleep(0)

    monkeypatch.setattr(cpu_sharing, "sleep", lambda seconds: pytest.fail("it waited"))
    loop = cpu_sharing.beside(HERE).event_loop()
    loop.run_until_complete(steps())
    loop.close()

"""Give way to an engine that computes on this machine's own cores; beside any other engine, do nothing.

vLLM's processes on a CPU never sleep: while one of them computes, the others poll, and offer their core to whoever
wants it. So Linux lets a thread that wakes up interrupt them at once, and what wakes this process, the outputs of a
step, comes just as they prepare the next one: then every core waits. On 2 cores a build therefore

- runs its threads under the policy SCHED_BATCH (sched(7)): a thread that wakes up waits for its turn, and gets no less
  of the cores. It takes no privilege, and can be undone. Linux only. (7 points of the throughput, measured)
- deals with completions every 0.05 s in one go. (3 to 7 points)
- leaves a step's outputs for 8 ms, until the engine has sent off the next step. (2 to 6 points)

``docs/engines.md`` has the measurements, ``benchmarks/throughput.py --ablate`` makes them again.
"""

from __future__ import annotations

import asyncio
import os
import queue
import selectors
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import sleep
from typing import Any, TypeVar

T = TypeVar("T")

POLICY: int | None = getattr(os, "SCHED_BATCH", None)  # None: the system has no policies
LINGER_SECONDS = 0.05  # short beside a trace, and as long as two to five steps of a small model
# Longer than vLLM takes from one step's outputs to the next step's begin; of 2, 4, 5, 8, 11 and 20 ms the best.
STEP_SECONDS = 0.008
# What the names of the threads begin with that may run before a build generates: an engine's, and those that wait for
# graders. All others of a build are started by these or by the caller, and inherit the policy.
STARTED_BEFORE = ("calset-vllm", "calset-grading")


def beside(engine: Any) -> CpuSharing:
    """Return how to behave beside an engine; ``Engine.shares_cores`` says where it computes."""
    return CpuSharing(getattr(engine, "shares_cores", False))


@dataclass(frozen=True, slots=True)
class CpuSharing:
    """How threads behave beside an engine. ``shared``: the engine computes on this machine's own cores."""

    shared: bool

    @property
    def linger_seconds(self) -> float:
        """Seconds to wait for more, once there is something to deal with."""
        return LINGER_SECONDS if self.shared else 0.0

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Keep the calling thread from interrupting the engine.

        A build's own threads, and what any of them starts from now on, do not interrupt it either, and keep to that.
        """
        if not self.shared or POLICY is None:
            yield
            return
        for thread in threading.enumerate():
            if thread.name.startswith(STARTED_BEFORE) and thread.native_id is not None:
                _set_policy(thread.native_id, POLICY)
        before = os.sched_getscheduler(0)
        _set_policy(0, POLICY)
        try:
            yield
        finally:
            _set_policy(0, before)

    def drain(self, source: queue.SimpleQueue[T], timeout: float | None = None) -> Iterator[T]:
        """Yield what is in a queue that nobody else reads, in order. What is not taken from here stays in it.

        Args:
            timeout: seconds to wait for the first item (None: until there is one); with none in time, nothing comes.
        """
        try:
            first = source.get(timeout=timeout)
        except queue.Empty:
            return
        if self.shared:
            sleep(LINGER_SECONDS)
        yield first
        for _ in range(source.qsize()):
            yield source.get()

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """Return a new event loop for the thread that hears of each step of the engine."""
        return asyncio.SelectorEventLoop(_PatientSelector() if self.shared else None)


class _PatientSelector(selectors.DefaultSelector):
    """Waits before it says that something has come.

    An engine core sends off a step's outputs just before it prepares the next step, for which its workers wait. Whoever
    deals with them at once takes the core that it needs. What the loop has ready does not wait; a timer may be late by
    as much.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(timeout)
        if events and timeout != 0:  # 0: the loop has other work to do
            sleep(STEP_SECONDS)
            events = super().select(0) or events
        return events


def _set_policy(thread: int, policy: int) -> None:
    """Set the policy of a thread (by its native id; 0: the calling one) that has a usual one."""
    with suppress(OSError):  # not allowed in this container, or the thread has ended
        if os.sched_getscheduler(thread) in (os.SCHED_OTHER, os.SCHED_BATCH):  # not what a user chose otherwise
            os.sched_setscheduler(thread, policy, os.sched_param(0))

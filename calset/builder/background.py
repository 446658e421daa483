"""Do not interrupt an engine that computes on this machine's own cores.

vLLM's processes on a CPU never sleep: while one of them computes, the others poll, and offer their core to whoever
wants it. So Linux lets a thread that wakes up interrupt them at once, and what wakes this process, the outputs of a
step, comes just as they prepare the next one: then every core waits. Under the policy SCHED_BATCH (sched(7)) a thread
that wakes up waits for its turn, and gets no less of the cores. It takes no privilege, and can be undone. Linux only:
elsewhere that part does nothing.

And the fewer the better: whoever deals with completions lingers, to deal with many in one go. And not at once: the loop
that takes a step's outputs first lets the engine send off the next step, see ``PatientSelector``.
"""

from __future__ import annotations

import os
import queue
import selectors
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

# What the names of the threads begin with that may run before a build generates: an engine's, and those that wait for
# graders. All others of a build are started by these or by the caller, and inherit the policy.
STARTED_BEFORE = ("calset-vllm", "calset-grading")
LINGER_SECONDS = 0.05  # short beside a trace, and as long as two to five steps of a small model
# Longer than vLLM takes from one step's outputs to the next step's begin; of 2, 4, 5, 8, 11 and 20 ms the best.
STEP_SECONDS = 0.008


def do_not_interrupt(thread: int = 0) -> None:
    """A thread (by its native id; 0: the calling one), and what it starts from now on, interrupts nobody."""
    if sys.platform == "linux":
        _set(thread, os.SCHED_BATCH)


@contextmanager
def not_interrupting() -> Iterator[None]:
    """The calling thread does not meanwhile; nor, from now on, do a build's threads, nor what any of them starts."""
    if sys.platform != "linux":
        yield
        return
    for thread in threading.enumerate():
        if thread.name.startswith(STARTED_BEFORE) and thread.native_id is not None:
            do_not_interrupt(thread.native_id)
    before = os.sched_getscheduler(0)
    do_not_interrupt()
    try:
        yield
    finally:
        _set(0, before)


def shares_cores(engine: Any) -> bool:
    """Whether an engine computes on this machine's own cores: see ``Engine``."""
    return getattr(engine, "shares_cores", False)


def linger_seconds(engine: Any) -> float:
    """How long whoever deals with an engine's completions waits for more of them; 0 unless it ``shares_cores``."""
    return LINGER_SECONDS if shares_cores(engine) else 0.0


def step_seconds(engine: Any) -> float:
    """How long a loop that takes the outputs of an engine's steps leaves them; 0 unless it ``shares_cores``."""
    return STEP_SECONDS if shares_cores(engine) else 0.0


def drain(source: queue.SimpleQueue[T], *, timeout: float | None = None, linger: float = 0.0) -> Iterator[T]:
    """What is in a queue that nobody else reads, in order. What is not taken from here stays in it.

    Args:
        timeout: seconds to wait for the first item (None: until there is one); with none in time, nothing comes.
        linger: seconds to wait for more once there is one.
    """
    try:
        first = source.get(timeout=timeout)
    except queue.Empty:
        return
    if linger:
        time.sleep(linger)
    yield first
    for _ in range(source.qsize()):
        yield source.get()


class PatientSelector(selectors.DefaultSelector):
    """For an event loop that hears of each step of an engine: once something has come, it waits before it says so.

    An engine core sends off a step's outputs just before it prepares the next step, for which its workers wait. Whoever
    deals with them at once takes the core that it needs.

    Attributes:
        seconds: to wait; 0, as at first, tells at once. It may change while the loop runs. What the loop has ready does
            not wait; a timer may be late by as much.
    """

    seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(timeout)
        if events and self.seconds and timeout != 0:  # 0: the loop has other work to do
            time.sleep(self.seconds)
            events = super().select(0) or events
        return events


def _set(thread: int, policy: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # not allowed in this container, or the thread has ended
            if os.sched_getscheduler(thread) in (os.SCHED_OTHER, os.SCHED_BATCH):  # not what a user chose otherwise
                os.sched_setscheduler(thread, policy, os.sched_param(0))

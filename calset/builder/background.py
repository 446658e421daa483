"""Do not interrupt an engine that computes on this machine's own cores.

vLLM's processes on a CPU never sleep: while one of them computes, the others poll, and offer their core to whoever
wants it. So Linux lets a thread that wakes up interrupt them at once, and what wakes this process, the outputs of a
step, comes just as they prepare the next one: then every core waits. Under the policy SCHED_BATCH (sched(7)) a thread
that wakes up waits for its turn, and gets no less of the cores. It takes no privilege, and can be undone. Linux only:
elsewhere nothing happens.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# What the names of the threads begin with that feed an engine, and that wait for it and for graders.
FEEDING = ("calset-vllm", "calset-feed", "calset-pump", "calset-grading")


def do_not_interrupt() -> None:
    """The calling thread, and what it starts from now on, interrupts nobody."""
    if sys.platform == "linux":
        _set(0, os.SCHED_BATCH)


def feeding_threads_do_not_interrupt() -> None:
    """Nor do this process's threads that feed an engine or wait for graders, from now on."""
    if sys.platform == "linux":
        for thread in threading.enumerate():
            if thread.name.startswith(FEEDING) and thread.native_id is not None:
                _set(thread.native_id, os.SCHED_BATCH)


@contextmanager
def caller_does_not_interrupt() -> Iterator[None]:
    """Nor does the calling thread meanwhile, nor what it starts meanwhile, for good."""
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0)
    do_not_interrupt()
    try:
        yield
    finally:
        _set(0, before)


def _set(thread: int, policy: int) -> None:
    """On Linux a thread's number stands for that thread alone, 0 for the calling one."""
    if sys.platform == "linux":
        with suppress(OSError):  # not allowed in this container, or the thread has ended
            if os.sched_getscheduler(thread) in (os.SCHED_OTHER, os.SCHED_BATCH):  # not what a user chose otherwise
                os.sched_setscheduler(thread, policy, os.sched_param(0))

"""Give way to an engine that computes on this machine's own cores.

vLLM's processes on a CPU keep every core busy and wait for each other: what this process takes of a core in the middle
of a step, all of them wait for. At the lowest priority it does its work between steps. Linux only: elsewhere a thread
has no priority of its own that could be set, and nothing happens.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOWEST = 19  # at 5 and at 10 the engine got less: there is little to do, but it must not come at the wrong moment
# What the names of the threads begin with that feed an engine, and that wait for it and for graders. Graders themselves
# fall behind at the lowest priority, and are started by a thread that is none of these.
FEEDING = ("calset-vllm", "calset-feed", "calset-pump", "calset-grading")

_ends_with_command = False


def never_mind_restoring() -> None:
    """The process runs one command and ends with it: its main thread need not get its priority back."""
    global _ends_with_command
    _ends_with_command = True


def lower_feeding_threads() -> None:
    """Give this process's threads that feed an engine, or wait for graders, the lowest priority, for good."""
    for thread in threading.enumerate():
        if thread.name.startswith(FEEDING) and thread.native_id is not None:
            _set(thread.native_id, LOWEST)


@contextmanager
def caller_lowered() -> Iterator[None]:
    """Lower the calling thread meanwhile; what it starts inherits that.

    It stays as it is where it could not have its priority back: the system lets only root, and those whom ``ulimit -e``
    allows it, raise one.
    """
    if sys.platform != "linux" or not (_ends_with_command or _can_be_raised()):
        yield
        return
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    _set(thread, LOWEST)
    try:
        yield
    finally:
        _set(thread, before)


def _set(thread: int, nice: int) -> bool:
    """Whether the system let it. On Linux alone a thread's number stands for that thread."""
    if sys.platform != "linux":
        return False
    with suppress(OSError):  # not allowed, or the thread has ended
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        return True
    return False


def _can_be_raised() -> bool:
    """Tried in a thread that ends at once."""
    found: list[bool] = []

    def attempt() -> None:
        me = threading.get_native_id()
        before = os.getpriority(os.PRIO_PROCESS, me)
        found.append(_set(me, LOWEST) and _set(me, before))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found == [True]

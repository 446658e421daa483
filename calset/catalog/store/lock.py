"""Taking turns: processes that want one file stand in line for it, so that steady readers cannot keep a writer out.

DuckDB's lock lets any number of readers in while one is there: measured, two processes that query in a loop kept a
writer waiting for 22 s. Here whoever opens the file first takes a lock on its folder, and lets go when the file is
open; a writer that waits for the readers to finish thereby holds back new ones. Nothing depends on it but the order:
where folders cannot be locked, or somebody holds a turn for too long, everybody goes on without.
Must not know: DuckDB, what the file is.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None

LONGEST_WAIT = 5.0  # seconds, for a turn
LONGEST_TURN = 2.0  # seconds; somebody who reads for an hour must not make other readers wait for a writer


class Turn:
    """A turn that may be held or not; ``tick`` gives it back once it has been held for too long."""

    def __init__(self, folder: int | None = None) -> None:
        self._folder, self._since = folder, time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self._since > LONGEST_TURN:
            self.give_back()

    def give_back(self) -> None:
        if self._folder is not None and fcntl is not None:
            with suppress(OSError):
                fcntl.flock(self._folder, fcntl.LOCK_UN)
            os.close(self._folder)
            self._folder = None


@contextmanager
def turn(folder: Path, deadline: float) -> Iterator[Turn]:
    """Hold the folder's turn for a block, or nothing when it cannot be had in time."""
    mine = _take(folder, min(deadline, time.monotonic() + LONGEST_WAIT))
    try:
        yield mine
    finally:
        mine.give_back()


def _take(folder: Path, deadline: float) -> Turn:
    if fcntl is None:  # pragma: no cover - Windows
        return Turn()
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return Turn()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Turn(descriptor)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
        except OSError:
            break
        time.sleep(random.uniform(0.001, 0.01))
    os.close(descriptor)
    return Turn()

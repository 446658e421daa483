"""Ctrl-C while DuckDB answers a question.

Why: Python delivers a signal between two of its own instructions, and a question is one call of DuckDB's, which looks
for signals only now and then, in several runs never. A thread that the signal wakes interrupts the question instead
(``interrupt`` is the one method of a connection that another thread may call). Must not know: catalogs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

import duckdb

# DuckDB forgets an interrupt that comes before it has begun, so it is told again for a while.
_TELLING_SECONDS = 5.0
_PAUSE_SECONDS = 0.02


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Let a question that Ctrl-C ended leave as what Python raises for Ctrl-C."""
    try:
        yield
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # DuckDB saw the signal by itself
            raise KeyboardInterrupt from None
        raise


@contextmanager
def interruptible(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Let Ctrl-C end what the connection does in the block; use it inside ``as_keyboard_interrupt``.

    Does nothing outside the main thread, and where somebody else handles the signal.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch.current or _Watch()
    watch.connections.append(con)
    try:
        yield
    except BaseException:
        with suppress(duckdb.Error):
            con.interrupt()  # closing it would wait for what its threads are still doing
        raise
    finally:
        watch.leave(con)


class _Watch:
    """The thread that a signal wakes, for all connections that are open: streams end in any order."""

    current: ClassVar[_Watch | None] = None

    def __init__(self) -> None:
        self.connections: list[duckdb.DuckDBPyConnection] = []
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        _Watch.current = self

    def leave(self, con: duckdb.DuckDBPyConnection) -> None:
        """Forget a connection; after the last one whoever waited for signals before does so again."""
        self.connections = [other for other in self.connections if other is not con]
        if self.connections:
            return
        _Watch.current = None
        with suppress(ValueError):  # a stream that another thread lets go
            signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _run(self) -> None:
        """Interrupt the connections when a SIGINT comes, and pass all signals on to whoever was waiting for them."""
        while signals := os.read(self._reader, 512):
            if self._before >= 0:
                with suppress(OSError):
                    os.write(self._before, signals)
            until, told = time.monotonic() + _TELLING_SECONDS, list(self.connections)
            while signal.SIGINT in signals and time.monotonic() < until:
                told = [con for con in told if any(con is other for other in self.connections)]
                if not told:
                    break
                for con in told:
                    with suppress(duckdb.Error):
                        con.interrupt()
                time.sleep(_PAUSE_SECONDS)

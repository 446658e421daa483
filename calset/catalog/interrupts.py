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
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, before, con, ended), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        with suppress(duckdb.Error):
            con.interrupt()  # closing it would wait for what its threads are still doing
        raise
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        ended.set()
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, before: int, con: duckdb.DuckDBPyConnection, ended: threading.Event) -> None:
    """Interrupt the connection when a SIGINT comes, and pass all signals on to whoever was waiting for them."""
    while signals := os.read(reader, 512):
        if before >= 0:
            with suppress(OSError):
                os.write(before, signals)
        until = time.monotonic() + _TELLING_SECONDS
        while signal.SIGINT in signals and not ended.is_set() and time.monotonic() < until:
            with suppress(duckdb.Error):
                con.interrupt()
            ended.wait(_PAUSE_SECONDS)

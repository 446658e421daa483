"""Grading in worker processes that can be killed.

Why it exists: sympy can loop for ever inside one C call (a power tower), where neither an alarm nor a
ProcessPoolExecutor can reach it. Each worker is a bare interpreter that imports nothing but the grader it is asked
for, talks JSON lines over pipes, and is killed and replaced when it passes the deadline or dies.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from calset.builder.grading import MAX_RESPONSE_CHARS, Outcome, check_grader
from calset.errors import CalsetError

START_SECONDS = 120.0  # importing sympy on a loaded machine; not counted against a grade's deadline
MEMORY_BYTES = 8 * 2**30


class GradingPool:
    """Worker processes that grade, each answer within a deadline; a context manager.

    Args:
        processes: workers at most; each starts when there is work for it.
        deadline_seconds: a worker that takes longer for one response is killed; the verdict is ``timeout``.
    """

    def __init__(self, processes: int = 2, deadline_seconds: float = 15.0) -> None:
        self._deadline = deadline_seconds
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="calset-grading")
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, grader: str, answer: str, response: str, metadata: Mapping[str, Any]) -> Future[Outcome]:
        """Grade in a worker. The future raises CalsetError only if no worker can be started at all.

        Raises:
            InputError: no such grader.
        """
        job = {
            "grader": check_grader(grader),
            "answer": answer,
            "response": response[-MAX_RESPONSE_CHARS:],
            "metadata": dict(metadata),
        }
        return self._threads.submit(self._grade, job)

    def close(self) -> None:
        """Kill the workers and drop what waits; may be called twice."""
        with self._lock:
            self._closed = True
            workers = list(self._all)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _grade(self, job: dict[str, Any]) -> Outcome:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = self._start()
        try:
            worker.load(job["grader"])
            reply = worker.ask(job, self._deadline)
        except (_WorkerFailed, TimeoutError) as failure:
            worker.kill()
            self._all.discard(worker)
            if isinstance(failure, TimeoutError):
                return Outcome("timeout", detail=f"no verdict within {self._deadline:g} s")
            return Outcome("error", detail=f"the grader crashed ({failure})")
        self._idle.put(worker)
        if "error" in reply:
            return Outcome("error", detail=reply["error"])
        return Outcome(reply["verdict"], reply["extracted"], reply["detail"])

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise CalsetError("the grading pool is closed")
            worker = _Worker()
            self._all.add(worker)
            return worker


class _WorkerFailed(Exception):
    """The worker's process ended or answered nonsense."""


class _Worker:
    """One process; used by one thread at a time."""

    def __init__(self) -> None:
        root = Path(__file__).parents[3]
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from calset.builder.grading.pool import work; work()"
        # Not multiprocessing: its children import the caller's main module again. A group of its own, since Ctrl-C goes
        # to the terminal's whole group and would end a worker that has not come to ignore it yet.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
            process_group=0,
        )
        self._buffer = b""
        self._loaded: set[str] = set()

    def load(self, grader: str) -> None:
        """Import a grader before the clock runs.

        Raises:
            CalsetError: it cannot be imported: every grade would fail.
        """
        if grader in self._loaded:
            return
        try:
            reply = self.ask({"load": grader}, START_SECONDS)
        except (_WorkerFailed, TimeoutError) as failure:
            self.kill()
            raise CalsetError(f"the {grader} grader's worker does not start: {failure or 'no answer'}") from failure
        if "error" in reply:
            raise CalsetError(f"the {grader} grader cannot be imported: {reply['error']}")
        self._loaded.add(grader)

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send one line, receive one.

        Raises:
            TimeoutError: no answer in time.
            _WorkerFailed: the process ended.
        """
        deadline = time.monotonic() + seconds
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:  # never, with PIPE
            raise _WorkerFailed("no pipes")
        try:
            stdin.write(json.dumps(message | {"seconds": seconds}).encode() + b"\n")
            stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(stdout, selectors.EVENT_READ)
                while b"\n" not in self._buffer:
                    left = deadline - time.monotonic()
                    if left <= 0 or not selector.select(left):
                        raise TimeoutError
                    chunk = os.read(stdout.fileno(), 1 << 16)
                    if not chunk:
                        raise _WorkerFailed(f"exit code {self._process.wait(10)}")
                    self._buffer += chunk
            line, _, self._buffer = self._buffer.partition(b"\n")
            return json.loads(line)
        except TimeoutError:
            raise
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise _WorkerFailed(str(error) or type(error).__name__) from error

    def kill(self) -> None:
        """End the process and reap it; may be called twice and from another thread."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()


def work() -> None:
    """A worker's main loop: JSON lines from stdin until it closes. Runs in the worker's main thread."""
    # Replies have a pipe of their own: whatever a grader prints goes nowhere.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # stopping is the parent's, which closes the pipes
    _limit_memory()
    for line in sys.stdin.buffer:
        job = json.loads(line)
        # If the parent is killed while this hangs in C, nobody is left to kill it: CPU time will, by SIGVTALRM.
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * job["seconds"] + 5)
        reply = _answer(job)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    from calset.builder.grading import grade_response, grader_version

    try:
        if "load" in job:
            grader_version(job["load"])
            _warm_up(job["load"])
            return {}
        outcome = grade_response(job["grader"], job["answer"], job["response"], job["metadata"])
        return outcome._asdict()
    except BaseException as error:
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _warm_up(grader: str) -> None:
    """One grade, so that imports and the parser's tables are there before a deadline runs."""
    from calset.builder.grading import grade_response

    samples = {"math": ("1/2", r"\boxed{\frac{2}{4}}", {}), "gym": ("3", "3", {"task": "chain_sum"})}
    if grader in samples:
        grade_response(grader, *samples[grader])


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))

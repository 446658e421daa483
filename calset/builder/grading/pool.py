"""Grading in worker processes that can be killed, beside a generation that they must not slow.

Why it exists: sympy can loop for ever inside one C call (a power tower), where neither an alarm nor a
ProcessPoolExecutor can reach it. Each worker is a bare interpreter that imports nothing but the grader it is asked
for, talks JSON lines over pipes, and is killed and replaced when it passes the deadline or dies.

Beside a generation, workers run at a low priority, so a deadline counts the time that a worker ran or slept, not the
time it stood in line for a CPU: a busy machine must not turn into ``timeout`` verdicts. A second worker costs up to a
second of imports and a hundred megabytes, so it starts only when the first falls behind.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from calset.builder.background import do_not_interrupt
from calset.builder.grading import MAX_RESPONSE_CHARS, Outcome, check_grader
from calset.errors import CalsetError

START_SECONDS = 120.0  # importing sympy; not counted against a grade's deadline
MEMORY_BYTES = 8 * 2**30
BACKLOG = 32  # jobs waiting for each worker that make it worth starting another
PATIENCE_SECONDS = 1.0  # or one job waiting that long
MAX_WAITING = 4096  # then submit() waits: jobs hold their responses
POLL_SECONDS = 0.25
# Not 19: a trace is saved with its verdict, and at 19 a generation that keeps all CPUs busy would leave a worker 1 % of
# one, half a minute for its imports alone. At 10 it is 10 %.
NICE = 10


class _Job(NamedTuple):
    message: dict[str, Any]
    future: Future[Outcome]
    since: float


class GradingPool:
    """Worker processes that grade, each answer within a deadline; a context manager.

    Args:
        processes: workers at most; the first starts with the first job, another when jobs wait.
        deadline_seconds: a worker that takes longer for one response, apart from waiting for a CPU, is killed; the
            verdict is ``timeout``.
        background: workers give way to other processes; False where nothing generates meanwhile.
        max_waiting: jobs that wait at most; then ``submit`` does.
        unsafe_scorers: see ``grade_response``.
    """

    def __init__(
        self,
        processes: int = 2,
        deadline_seconds: float = 15.0,
        *,
        background: bool = True,
        max_waiting: int = MAX_WAITING,
        unsafe_scorers: bool = False,
    ) -> None:
        self._unsafe_scorers = unsafe_scorers
        self._background = background
        self._processes, self._deadline, self._max_waiting = processes, deadline_seconds, max_waiting
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._loading, self._loaded_at = 0, 0.0  # workers that import, and when the last one had
        self._all: set[_Worker] = set()
        self._closed = False

    def submit(self, grader: str, answer: str, response: str, metadata: Mapping[str, Any]) -> Future[Outcome]:
        """Grade in a worker. The future raises CalsetError only if no worker can be started at all.

        Raises:
            InputError: no such grader.
            CalsetError: the pool is closed.
        """
        message = {
            "grader": check_grader(grader),
            "answer": answer,
            "response": response[-MAX_RESPONSE_CHARS:],
            "metadata": dict(metadata),
            "unsafe_scorers": self._unsafe_scorers,
        }
        future: Future[Outcome] = Future()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._max_waiting)
            if self._closed:
                raise CalsetError("the grading pool is closed")
            self._waiting.append(_Job(message, future, time.monotonic()))
            self._changed.notify_all()
        self._grow()
        return future

    def warm(self, grader: str) -> None:
        """Have the first worker import a grader now, while nothing else wants the processor."""
        with self._changed:
            if not self._threads and not self._closed:
                self._start_thread(check_grader(grader))

    @property
    def n_waiting(self) -> int:
        """Jobs that no worker has begun."""
        return len(self._waiting)

    def close(self) -> None:
        """Kill the workers and drop what waits; may be called twice."""
        with self._changed:
            self._closed = True
            dropped, workers = list(self._waiting), list(self._all)
            self._waiting.clear()
            self._changed.notify_all()
        for job in dropped:
            job.future.cancel()
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _grow(self) -> None:
        """Start the first worker, or another one when those there are fall behind."""
        with self._changed:
            n = len(self._threads)
            if self._closed or n >= self._processes or not self._waiting:
                return
            # What has waited for an import says nothing of how fast those there are.
            waited = time.monotonic() - max(self._waiting[0].since, self._loaded_at)
            behind = len(self._waiting) > BACKLOG * n or waited > PATIENCE_SECONDS
            if n == 0 or (behind and not self._loading and waited > PATIENCE_SECONDS / 4):
                self._start_thread()

    def _start_thread(self, grader: str | None = None) -> None:
        # Daemons: an interpreter that ends without close() does not wait for a grade.
        name = f"calset-grading-{len(self._threads)}"
        thread = threading.Thread(target=self._run, args=(grader,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, grader: str | None) -> None:
        """One worker's thread: its process lives in here, and is replaced in here."""
        worker: _Worker | None = None
        if grader is not None:
            try:
                worker = self._start()
                self._load(worker, grader)
            except Exception:  # whatever is wrong is found again, and said, with the first answer
                if worker is not None:
                    self._end(worker)
                worker = None
        while (job := self._take()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                worker, outcome = self._grade(worker, job.message)
            except BaseException as error:
                worker = None
                job.future.set_exception(error)
            else:
                job.future.set_result(outcome)
            self._grow()

    def _take(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            job = self._waiting.popleft()
            self._changed.notify_all()
            return job

    def _grade(self, worker: _Worker | None, message: dict[str, Any]) -> tuple[_Worker | None, Outcome]:
        """The verdict, and the worker that is still good for another. One that dies is not the answer's fault at once:
        it may have been killed from outside. The answer is graded again in a new one, and that is all."""
        grader, failure, began = message["grader"], None, False
        for _ in range(2):
            worker = worker or self._start()
            try:
                self._load(worker, grader)
                began = True
                reply = worker.ask(message, self._deadline, self._grow)
            except TimeoutError:
                self._end(worker)
                return None, Outcome("timeout", detail=f"no verdict within {self._deadline:g} s")
            except _WorkerFailed as error:
                failure, worker = error, self._end(worker)
            except BaseException:
                self._end(worker)
                raise
            else:
                if "error" in reply:
                    return worker, Outcome("error", detail=reply["error"])
                return worker, Outcome(reply["verdict"], reply["extracted"], reply["detail"])
        if not began:
            raise CalsetError(f"the {grader} grader's worker does not start: {failure}")
        return None, Outcome("error", detail=f"the grader crashed twice ({failure})")

    def _load(self, worker: _Worker, grader: str) -> None:
        if worker.has(grader):
            return
        with self._changed:
            self._loading += 1
        try:
            worker.load(grader)
        finally:
            with self._changed:
                self._loading -= 1
                self._loaded_at = time.monotonic()

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        with self._changed:
            self._all.discard(worker)

    def _start(self) -> _Worker:
        with self._changed:
            if self._closed:
                raise CalsetError("the grading pool is closed")
            worker = _Worker(NICE if self._background else 0)
            self._all.add(worker)
            return worker


class _WorkerFailed(Exception):
    """The worker's process ended or answered nonsense."""


class _Worker:
    """One process; used by one thread at a time."""

    def __init__(self, nice: int) -> None:
        # The parent's own path: a third-party grader is where the parent found it.
        path = [str(Path(__file__).parents[3]), *map(str, sys.path)]
        code = f"import sys; sys.path[:] = {path!r}; from calset.builder.grading.pool import work; work({nice})"
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

    def has(self, grader: str) -> bool:
        """Whether it has imported a grader."""
        return grader in self._loaded

    def load(self, grader: str) -> None:
        """Import a grader before the clock runs.

        Raises:
            CalsetError: it cannot be imported, or does not start: every grade would fail.
            _WorkerFailed: the process ended.
        """
        try:
            reply = self.ask({"load": grader}, START_SECONDS)
        except TimeoutError as failure:
            raise CalsetError(f"the {grader} grader's worker does not start: no answer") from failure
        if "error" in reply:
            raise CalsetError(f"the {grader} grader cannot be imported: {reply['error']}")
        self._loaded.add(grader)

    def ask(
        self, message: dict[str, Any], seconds: float, meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Send one line, receive one; calls ``meanwhile`` a few times a second.

        Args:
            seconds: that the worker may run or sleep. What it spends waiting for a CPU is not counted.

        Raises:
            TimeoutError: no answer in time.
            _WorkerFailed: the process ended.
        """
        began, in_line = time.monotonic(), self._seconds_in_line()
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:  # never, with PIPE
            raise _WorkerFailed("no pipes")
        try:
            stdin.write(json.dumps(message | {"seconds": seconds}).encode() + b"\n")
            stdin.flush()
            with selectors.PollSelector() as selector:  # of one pipe; it has no file of its own to make and close
                selector.register(stdout, selectors.EVENT_READ)
                while b"\n" not in self._buffer:
                    if not selector.select(min(POLL_SECONDS, seconds)):
                        # kill() from another thread closes the pipe, of which a selector then says nothing.
                        if self._process.poll() is not None:
                            raise _WorkerFailed("it was ended")
                        meanwhile()
                        used = time.monotonic() - began - (self._seconds_in_line() - in_line)
                        if used >= seconds:
                            raise TimeoutError
                        continue
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

    def _seconds_in_line(self) -> float:
        """How long the worker was ready to run and had no CPU; 0 where the kernel does not tell (not Linux)."""
        try:
            with open(f"/proc/{self._process.pid}/schedstat", "rb", buffering=0) as file:
                return int(file.read(64).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def kill(self) -> None:
        """End the process and reap it; may be called twice and from another thread."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()


def work(nice: int) -> None:
    """A worker's main loop: JSON lines from stdin until it closes. Runs in the worker's main thread."""
    with suppress(AttributeError, OSError):
        os.nice(nice)
    if nice:
        do_not_interrupt()
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
        outcome = grade_response(
            job["grader"], job["answer"], job["response"], job["metadata"], unsafe_scorers=job["unsafe_scorers"]
        )
        return outcome._asdict()
    except BaseException as error:
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _warm_up(grader: str) -> None:
    """One grade, so that imports and the parser's tables are there before a deadline runs."""
    from calset.builder.grading import grade_response

    samples = {"math": ("x^2", r"\boxed{\frac{x^3}{x}}", {}), "gym": ("3", "3", {"task": "chain_sum"})}
    if grader in samples:
        grade_response(grader, *samples[grader])


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))

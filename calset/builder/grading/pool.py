"""Grading in worker processes that can be killed, beside a generation that they must not slow.

Why it exists: sympy can loop for ever inside one C call (a power tower), where neither an alarm nor a
ProcessPoolExecutor can reach it. Each worker is a bare interpreter that imports nothing but the grader it is asked
for, talks JSON lines over pipes, and is killed and replaced when it passes the deadline or dies. It works within walls
(sandbox.py): what a model wrote is all that it has to lose.

Beside a generation, workers run at a low priority, so a deadline counts the time that a worker ran or slept, not the
time it stood in line for a CPU: a busy machine must not turn into ``timeout`` verdicts. A second worker costs up to a
second of imports and a hundred megabytes, so it starts only when the first falls behind.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from calset.builder.grading import MAX_RESPONSE_CHARS, Outcome, check_grader, sandbox
from calset.catalog.records import VERDICTS
from calset.errors import CalsetError
from calset.io import child

START_SECONDS = 120.0  # importing sympy; not counted against a grade's deadline
MAX_REPLY_BYTES = 2**22  # of a verdict, its extracted answer and its detail
LONGEST_WAIT = 60  # deadlines of a clock's time after which waiting for a CPU is no excuse
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

    Attributes:
        gaps: what this machine's kernel lets graders do that they should not be able to, as verb phrases; empty before
            a worker has imported its grader.
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
        self._graders: dict[str, None] = {}  # that could be imported: a new worker imports them all
        self._all: set[_Worker] = set()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.gaps: list[str] = []
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
        if self._scratch is not None:
            self._scratch.cleanup()

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
        if worker is not None and not worker.has(grader):
            worker = self._end(worker)  # behind its walls an import that caches something fails
        for _ in range(2):
            worker = worker or self._start()
            try:
                self._load(worker, grader)
                began = True
                outcome, full = worker.grade(message, self._deadline, self._grow)
            except TimeoutError:
                self._end(worker)
                return None, Outcome("timeout", detail=f"no verdict within {self._deadline:g} s")
            except _WorkerFailed as error:
                failure, worker = error, self._end(worker)
            except BaseException:
                self._end(worker)
                raise
            else:
                # Where memory ran out, the rest of it may not do for the next answer.
                return self._end(worker) if full else worker, outcome
        if not began:
            raise CalsetError(f"the {grader} grader's worker does not start: {failure}")
        return None, Outcome("error", detail=f"the grader crashed twice ({failure})")

    def _load(self, worker: _Worker, grader: str) -> None:
        if worker.has(grader):
            return
        with self._changed:
            self._loading += 1
            others = [name for name in self._graders if name != grader]
        try:
            self.gaps = worker.load(grader, others)
            with self._changed:
                self._graders[grader] = None
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
            worker = _Worker(NICE if self._background else 0, self._folder())
            self._all.add(worker)
            return worker

    def _folder(self) -> str:
        """The folder that the workers have for themselves; made anew where a weeks-old one was tidied away."""
        if self._scratch is not None and not os.path.isdir(self._scratch.name):
            self._scratch.cleanup()
            self._scratch = None
        if self._scratch is None:
            try:
                self._scratch = tempfile.TemporaryDirectory(prefix="calset-grading-", ignore_cleanup_errors=True)
            except OSError as error:
                raise CalsetError(
                    f"graders have no folder to work in ({error}); set TMPDIR to a folder that can be written"
                ) from error
        return self._scratch.name


class _WorkerFailed(Exception):
    """The worker's process ended or answered nonsense."""


class _Worker:
    """One process; used by one thread at a time."""

    def __init__(self, nice: int, folder: str) -> None:
        # The command has the parent's own path: a third-party grader is where the parent found it. A group of its own,
        # since Ctrl-C goes to the terminal's whole group and would end a worker that has not come to ignore it yet.
        self._process = subprocess.Popen(
            child.command("calset.builder.grading.pool", f"work({nice})"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child.environment(HOME=folder, TMPDIR=folder, LC_ALL="C.UTF-8"),
            cwd=folder,
            process_group=0,
        )
        if self._process.stdin is not None:
            os.set_blocking(self._process.stdin.fileno(), False)
        self._buffer = b""
        self._killed = False
        self._loaded: set[str] = set()

    def has(self, grader: str) -> bool:
        """Whether it has imported a grader."""
        return grader in self._loaded

    def load(self, grader: str, others: Sequence[str]) -> list[str]:
        """Import a grader, and others that may be asked for, before the clock runs and before the walls are raised.

        Returns:
            What the worker can do in spite of its walls.

        Raises:
            CalsetError: the grader cannot be imported, or does not start: every grade would fail.
            _WorkerFailed: the process ended.
        """
        try:
            reply = self._ask({"load": [grader, *others]}, START_SECONDS)
        except TimeoutError as failure:
            raise CalsetError(f"the {grader} grader's worker does not start: no answer") from failure
        if grader in reply["errors"]:
            raise CalsetError(f"the {grader} grader cannot be imported: {reply['errors'][grader]}")
        self._loaded.update(name for name in (grader, *others) if name not in reply["errors"])
        return reply["gaps"]

    def grade(self, message: dict[str, Any], seconds: float, meanwhile: Callable[[], None]) -> tuple[Outcome, bool]:
        """Grade an answer: see ``_ask``. The reply is checked, since the worker has read what a model wrote.

        Returns:
            The outcome, and True if the grader ran out of memory.
        """
        reply = self._ask(message, seconds, meanwhile)
        verdict, *texts = (reply.get(field) for field in Outcome._fields)
        if (
            verdict not in VERDICTS
            or verdict == "ungraded"
            or not all(text is None or isinstance(text, str) for text in texts)
        ):
            raise _WorkerFailed("it answered nonsense")
        return Outcome(verdict, *texts), bool(reply.get("full"))

    def _ask(
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
        # A line that the text of an earlier answer brought the worker to write is no reply to this one.
        token = secrets.token_hex(8)
        unsent = memoryview(json.dumps(message | {"seconds": seconds, "token": token}).encode() + b"\n")
        try:
            with selectors.PollSelector() as selector:  # of two pipes; it has no file of its own to make and close
                selector.register(stdout, selectors.EVENT_READ)
                selector.register(stdin, selectors.EVENT_WRITE)
                while b"\n" not in self._buffer:
                    elapsed = time.monotonic() - began
                    waited = self._seconds_in_line() - in_line if seconds <= elapsed < LONGEST_WAIT * seconds else 0
                    if elapsed - waited >= seconds:
                        raise TimeoutError
                    ready = selector.select(min(POLL_SECONDS, seconds))
                    if not ready:
                        # kill() from another thread closes the pipes, of which a selector then says nothing.
                        if self._process.poll() is not None:
                            raise _WorkerFailed("it was ended")
                        meanwhile()
                    for key, _ in ready:
                        if key.fileobj is stdout:
                            self._receive(stdout.fileno())
                        else:
                            unsent = unsent[os.write(stdin.fileno(), unsent) :]
                            if not unsent:
                                selector.unregister(stdin)
            line, _, self._buffer = self._buffer.partition(b"\n")
            reply = json.loads(line)
        except TimeoutError:
            raise
        except (OSError, ValueError, RecursionError, subprocess.TimeoutExpired) as error:
            raise _WorkerFailed(str(error) or type(error).__name__) from error
        if not isinstance(reply, dict) or reply.get("token") != token:
            raise _WorkerFailed("it answered nonsense")
        return reply

    def _receive(self, pipe: int) -> None:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            raise _WorkerFailed(f"exit code {self._process.wait(10)}")
        self._buffer += chunk
        if len(self._buffer) > MAX_REPLY_BYTES:
            raise _WorkerFailed("its reply is too long")

    def _seconds_in_line(self) -> float:
        """How long the worker was ready to run and had no CPU; 0 where the kernel does not tell (not Linux)."""
        try:
            with open(f"/proc/{self._process.pid}/schedstat", "rb", buffering=0) as file:
                return int(file.read(64).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def kill(self) -> None:
        """End the process and reap it, with those that its grader's import may have started; may be called twice and
        from another thread."""
        if not self._killed:  # a process that has just crashed may have left some
            self._killed = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # it may have left its group
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()


def work(nice: int) -> None:
    """A worker's main loop: JSON lines from stdin until it closes. Runs in the worker's main thread."""
    with suppress(AttributeError, OSError):
        os.nice(nice)
    # Replies have a pipe of their own: whatever a grader prints goes nowhere.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # stopping is the parent's, which closes the pipes
    gaps = sandbox.before_imports()
    for line in sys.stdin.buffer:
        job = json.loads(line)
        # If the parent is killed while this hangs in C, nobody is left to kill it: CPU time will, by SIGVTALRM.
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * job["seconds"] + 5)
        if "load" in job:  # the first job, and no other
            reply = {"errors": _import(job["load"]), "gaps": [*gaps, *sandbox.before_answers()]}
        else:
            reply = _verdict(job)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        replies.write(json.dumps(reply | {"token": job["token"]}).encode() + b"\n")


def _import(graders: Sequence[str]) -> dict[str, str]:
    """Import graders; returns why those failed that did."""
    from calset.builder.grading import grader_version

    errors = {}
    for grader in graders:
        try:
            grader_version(grader)
            _warm_up(grader)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            errors[grader] = _words(error)
    return errors


def _verdict(job: dict[str, Any]) -> dict[str, Any]:
    from calset.builder.grading import grade_response

    try:
        outcome = grade_response(
            job["grader"], job["answer"], job["response"], job["metadata"], unsafe_scorers=job["unsafe_scorers"]
        )
        return outcome._asdict()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        return Outcome("error", detail=_words(error))._asdict() | {"full": isinstance(error, MemoryError)}


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _warm_up(grader: str) -> None:
    """One grade, so that imports and the parser's tables are there before a deadline runs. The sum is a wrong one: a
    right one needs no library."""
    from calset.builder.grading import grade_response

    samples = {"math": ("x^2", r"\boxed{\frac{x^3}{x}}", {}), "gym": ("3", "4", {"task": "chain_sum"})}
    if grader in samples:
        # The answer is calset's own, and the import must come now, also of a reasoning-gym that nobody has read.
        grade_response(grader, *samples[grader], unsafe_scorers=True)

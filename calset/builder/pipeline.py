"""From a schedule to the catalog: feed the engine, grade beside it, commit traces and verdicts together.

One thread feeds and pumps the engine, worker processes grade, and the calling thread alone writes: a trace and its
verdict are committed together, some seconds after the trace ends, and only then counted as saved. Everything that is
held is bounded: what the engine runs, what waits for a verdict, what waits for a commit.
"""

from __future__ import annotations

import copy
import queue
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from calset import ids
from calset.builder.engines import Completion, Engine, Request, cpu_sharing
from calset.builder.engines.base import RESUME_HINT
from calset.builder.environment import hardware, versions
from calset.builder.grading import Outcome
from calset.builder.grading.grades import grade_row, submit
from calset.builder.grading.pool import GradingPool
from calset.builder.model.reasoning import split
from calset.builder.plan import LOCK_PATIENCE_SECONDS, Plan, patiently
from calset.builder.progress import Meter, Saved
from calset.builder.schedule.fixed import Schedule, Unit
from calset.catalog.catalog import Catalog
from calset.catalog.records import BROKEN, Contamination, Decision, Problem, Run, Trace, utc_now
from calset.errors import CalsetError, CatalogError, CatalogLocked, EngineError, first_line
from calset.io.progress import OnProgress

COMMIT_SECONDS = 1.5
# A commit takes processor time from the engine where there are few cores: at most one part in so many.
COMMIT_SHARE = 100
LOCK_SECONDS = 2.0
MAX_PAUSE_SECONDS = 10.0
MAX_HELD = 1024  # finished traces that are not saved yet, before the engine gets no more work


@dataclass(frozen=True, slots=True)
class _Entry:
    """A trace on its way: ``future`` is its verdict, None in a build that does not grade."""

    unit: Unit
    trace: Trace
    future: Future[Outcome] | None


@dataclass(frozen=True, slots=True)
class _End:
    """The engine's stream is over; ``error`` is why, if it broke."""

    error: BaseException | None = None


class Excluded:
    """Problems that were left out, with the evidence, on their way to the catalog; filled by the feeding thread."""

    def __init__(self) -> None:
        self._found: queue.SimpleQueue[tuple[Problem, list[Contamination]]] = queue.SimpleQueue()

    def add(self, problem: Problem, evidence: list[Contamination]) -> None:
        self._found.put((problem, evidence))

    def drain(self) -> list[tuple[Problem, list[Contamination]]]:
        return [self._found.get() for _ in range(self._found.qsize())]  # nobody else takes from it


class Pipeline:
    """One build at work: what is in flight, what is being graded, what is saved."""

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        store: Catalog,
        *,
        excluded: Excluded,
        progress: OnProgress | None = None,
    ) -> None:
        self.plan, self.settings, self.schedule = plan, plan.settings, schedule
        self.store = copy.copy(store)
        # A commit that finds the file locked comes back soon, and is tried again: a Ctrl-C is seen in between.
        self.store.lock_timeout = min(store.lock_timeout, LOCK_SECONDS)
        pause = self.settings.commit_every_seconds
        self._every = COMMIT_SECONDS if pause is None else pause
        self._share = COMMIT_SHARE if pause is None else 0
        self._size, self._excluded = self.settings.commit_size, excluded
        self.n_existing = plan.existing.n - plan.existing.again
        self.run_id: str | None = None
        self.stopped = False
        self.seconds = 0.0
        self._meter = Meter(None if self.settings.aim else plan.n_requested, progress)
        self._stop = threading.Event()
        self._taking = threading.Lock()
        self._feed_error: Exception | None = None
        self._locked_since: float | None = None
        self._flying: dict[str, Unit] = {}
        self._inbox: queue.SimpleQueue[Completion | _Entry | _End] = queue.SimpleQueue()
        self._waiting = 0  # for a verdict
        self._ready: list[_Entry] = []
        self._problems: dict[str, Problem] = {}  # of traces that are ready, until they are saved
        self._decisions: list[Decision] = []
        self._left_out: list[tuple[Problem, list[Contamination]]] = []
        self._first: Unit | None = None

    def has_work(self) -> bool:
        """Whether there is anything to generate; looks at what the catalog holds, starts nothing.

        Where there is nothing, what was left out on the way is kept at once.
        """
        self._first = self._first or self.schedule.take()
        if self._first is None and self._unsaved():
            self._commit()
        return self._first is not None

    def generate(self, engine: Engine, pool: GradingPool) -> None:
        """Stream completions into the catalog until the schedule is finished or somebody interrupts.

        Args:
            pool: what grades; the caller's, so that its workers can start while the engine does.

        Raises:
            EngineError: the engine died; what finished is saved.
            CatalogError: the catalog cannot be written.
        """
        self.run_id = f"{utc_now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        run = self._run(engine)
        patiently(lambda: self.store.add_run(run))
        self._meter.begin(self.schedule.facts().get("met", 0))
        self.emit("generating")
        with _interruptible(self._stop), cpu_sharing.beside(engine).giving_way():
            try:
                while self._round(engine, pool):
                    pass
            finally:
                self.seconds = self._meter.seconds
        self.emit("stopped" if self.stopped else "done")

    def _round(self, engine: Engine, pool: GradingPool) -> bool:
        """One stream of the engine; whether another one is needed.

        It is when a schedule was satisfied, what was in flight was dropped, and what came back meanwhile has moved the
        recipe's length band, so that the schedule is not satisfied after all.
        """
        over = threading.Event()
        pump = threading.Thread(target=self._pump, args=(engine, over), name="calset-pump", daemon=True)
        pump.start()
        try:
            self._collect(engine, pool)
        except (CatalogError, KeyboardInterrupt):
            raise
        except BaseException:
            with suppress(CalsetError):  # what is settled is not thrown away with what failed
                self._commit()
            raise
        finally:
            over.set()
            engine.cancel()
            pump.join(timeout=60)
        with self._taking:  # whoever fed the engine has taken its last unit
            dropped, self._flying = list(self._flying.values()), {}
        if self._feed_error is not None and not self.stopped:
            raise self._feed_error
        if dropped and not (self.stopped or self.schedule.satisfied):
            raise EngineError(f"the engine ended without {len(dropped)} of its requests; {RESUME_HINT}")
        while self._unsaved():
            self._commit()
        return not self.stopped and self.schedule.reopen(dropped)

    # -- the engine's side: its own threads -------------------------------------------------------------------------

    def _pump(self, engine: Engine, over: threading.Event) -> None:
        """Hand on what comes out of the engine, then the end or the error."""
        try:
            for completion in engine.stream(self._requests(over), self.plan.sampling):
                self.plan.info.check_ids(completion.token_ids, engine.name)
                self._inbox.put(completion)
            self._inbox.put(_End())
        except BaseException as error:
            self._inbox.put(_End(error))

    def _requests(self, over: threading.Event) -> Iterator[Request]:
        """What the engine is given. Its own errors end it: the engine then finishes what it has."""
        while not (over.is_set() or self._stop.is_set()):
            if self._inbox.qsize() + self._waiting + len(self._ready) >= MAX_HELD:
                time.sleep(0.05)
                continue
            try:
                unit = self._take(over)
                if unit is None and self.schedule.finished:
                    return
            except Exception as error:
                self._feed_error = error
                return
            if unit is not None:
                seed = ids.request_seed(self.settings.seed, unit.problem.problem_id, unit.sample_index)
                yield Request(unit.trace_id, unit.prompt_ids, seed, self.plan.max_tokens)

    def _take(self, over: threading.Event) -> Unit | None:
        with self._taking:
            if over.is_set():
                return None
            unit, self._first = self._first, None
            unit = unit or self.schedule.take(timeout=0.2)
            if unit is not None:
                self._flying[unit.trace_id] = unit
            return unit

    # -- the catalog's side: the calling thread ---------------------------------------------------------------------

    def _collect(self, engine: Engine, pool: GradingPool) -> None:
        end: _End | None = None
        committed, pause = time.monotonic(), self._every
        sharing = cpu_sharing.beside(engine)
        while end is None or self._waiting or self._unsaved():
            for item in sharing.drain(self._inbox, timeout=0.1):
                if isinstance(item, Completion):
                    # An engine that was interrupted with us aborts what it runs; that is no trace.
                    if not (self._stop.is_set() and item.finish_reason in BROKEN):
                        self._enter(item, pool)
                elif isinstance(item, _Entry):
                    self._waiting -= 1
                    self._settle(item)
                else:
                    end = item
                if len(self._ready) >= self._size:
                    break
            now = time.monotonic()
            last = end is not None and not self._waiting
            if last or len(self._ready) >= self._size or (self._ready and now - committed >= pause):
                spent = time.thread_time()  # not what it waited for others who hold the catalog
                saved = self._commit()
                committed = time.monotonic()
                cost = self._share * (time.thread_time() - spent)
                pause = min(max(self._every, cost), MAX_PAUSE_SECONDS) if saved else self._every
            self.stopped = self.stopped or self._stop.is_set()
            if end is None and (self.stopped or self.schedule.satisfied):
                engine.cancel()  # again each time: a cancel before the stream has begun is lost
        if end.error is not None and not self.stopped:
            raise _engine_error(end.error) from end.error

    def _enter(self, completion: Completion, pool: GradingPool) -> None:
        unit = self._flying.pop(completion.key)
        trace = self._trace(unit, completion)
        future = submit(pool, trace, unit.problem, unit.problem.grader) if self.settings.graded else None
        entry = _Entry(unit, trace, future)
        if future is None or future.done():
            self._settle(entry)
        else:
            self._waiting += 1
            future.add_done_callback(lambda _: self._inbox.put(entry))

    def _settle(self, entry: _Entry) -> None:
        verdict = None if entry.future is None else entry.future.result().verdict
        self._ready.append(entry)
        self._problems[entry.unit.problem.problem_id] = entry.unit.problem
        self.schedule.settle(entry.unit, entry.trace, verdict)

    def _trace(self, unit: Unit, completion: Completion) -> Trace:
        info, plan = self.plan.info, self.plan
        token_ids = completion.token_ids
        parts = split(token_ids, info.reasoning, info.decode)
        return Trace(
            trace_id=unit.trace_id,
            problem_id=unit.problem.problem_id,
            run_id=self.run_id or "",
            generation_key=plan.key,
            sample_index=unit.sample_index,
            request_seed=ids.request_seed(self.settings.seed, unit.problem.problem_id, unit.sample_index),
            prompt_ids=unit.prompt_ids,
            completion_ids=token_ids,
            text=info.text_of(token_ids),
            response=parts.response,
            finish_reason=completion.finish_reason,
            max_tokens=plan.max_tokens,
            reasoning_start=parts.reasoning_start,
            reasoning_end=parts.reasoning_end,
            answer_start=parts.answer_start,
            attempt=unit.attempt,
            seconds=completion.seconds,
        )

    def _unsaved(self) -> bool:
        """Gather what goes with the traces; whether there is anything to commit."""
        self._decisions += [replace(decision, run_id=self.run_id or "") for decision in self.schedule.decisions()]
        self._left_out += self._excluded.drain()
        return bool(self._ready or self._decisions or self._left_out)

    def _commit(self) -> bool:
        """Traces, verdicts and what goes with them in one transaction; False when others hold the catalog: all of it
        is kept for the next try."""
        self._unsaved()
        traces = [entry.trace for entry in self._ready]
        grades = [
            grade_row(entry.trace, entry.unit.problem.grader, entry.future.result())
            for entry in self._ready
            if entry.future is not None
        ]
        try:
            done = self.store.record(
                traces,
                grades,
                problems=[*self._problems.values(), *(problem for problem, _ in self._left_out)],
                decisions=self._decisions,
                contaminations=[one for _, evidence in self._left_out for one in evidence],
            )
        except CatalogLocked:
            self._locked_since = self._locked_since or time.monotonic()
            if time.monotonic() - self._locked_since > LOCK_PATIENCE_SECONDS:
                raise
            return False
        self._locked_since = None
        self._ready, self._problems, self._decisions, self._left_out = [], {}, [], []
        # What another build of the same traces had saved meanwhile is there, but not ours.
        self.n_existing += len(traces) - len(done.fresh)
        mine = [trace for trace in traces if (trace.trace_id, trace.attempt) in done.fresh]
        verdicts = [grade for grade in grades if (grade.trace_id, grade.attempt) in done.fresh]
        self._meter.add(mine, verdicts if self.settings.graded else None)
        self.emit("generating")
        return True

    # -- what is said -----------------------------------------------------------------------------------------------

    @property
    def saved(self) -> Saved:
        """Counts of what this build has saved."""
        return self._meter.saved

    def emit(self, phase: str) -> None:
        """Send a progress event."""
        self._meter.emit(phase, self.n_existing, self.schedule.facts())

    def _run(self, engine: Engine) -> Run:
        info, plan = self.plan.info, self.plan
        return Run(
            run_id=self.run_id or "",
            kind=self.settings.kind,
            generation_key=plan.key,
            model=info.model,
            model_revision=info.revision,
            tokenizer_hash=info.tokenizer_hash,
            chat_template_hash=info.chat_template_hash,
            system_prompt=self.settings.system_prompt,
            sampling=plan.sampling.as_dict(),
            max_tokens=plan.max_tokens,
            seed=self.settings.seed,
            engine=engine.name,
            engine_version=engine.version,
            reasoning_format=info.reasoning.name,
            versions=versions(),
            hardware=hardware(),
            command=shlex.join(sys.argv),
            model_path=str(info.folder.resolve()) if info.is_local else None,
            sampling_from={
                name: "asked for" if value != getattr(info.sampling, name) else info.sampling_from.get(name, "default")
                for name, value in plan.sampling.as_dict().items()
            },
            template_options=dict(info.template_options),
            engine_options=dict(self.settings.engine_options or {}),
        )


def _engine_error(error: BaseException) -> EngineError:
    return error if isinstance(error, EngineError) else EngineError(f"the engine failed: {first_line(error)}")


@contextmanager
def _interruptible(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for an orderly stop; a second Ctrl-C ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = 0.0

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        # Whoever ends a process group may reach this process twice for one stop.
        if stop.is_set() and time.monotonic() - asked > 1:
            raise KeyboardInterrupt
        if not stop.is_set():
            asked = time.monotonic()
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

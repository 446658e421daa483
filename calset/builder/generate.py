"""build(): problems x samples -> traces with verdicts in the catalog, resumable at any moment.

The work list is (problem, sample index) minus what the catalog holds, so resume, de-duplication and idempotence are
one thing. One thread pumps the engine, worker processes grade beside it, and the calling thread alone writes: a trace
and its verdict are committed together, a second or two after the trace ends, and only then counted as saved.
"""

from __future__ import annotations

import queue
import secrets
import shlex
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from calset import ids
from calset.builder.engines import Completion, Engine, Request, Sampling, check_options, open_engine, resolve_engine
from calset.builder.grading import Outcome
from calset.builder.grading.pool import GradingPool
from calset.builder.grading.rows import grade_row, submit
from calset.builder.model_info import ModelInfo, inspect
from calset.builder.problems import load_problems
from calset.builder.provenance import hardware, versions
from calset.builder.reasoning import split
from calset.catalog.catalog import Catalog
from calset.catalog.records import JUDGED, Grade, Problem, Run, RunKind, Source, Trace, utc_now
from calset.errors import CatalogLocked, EngineError, InputError

RETRIES = ("truncated", "error")
MAX_TOKENS = 32_768  # when the user gives none and the context holds more
MIN_TOKENS = 8
RECENT_SECONDS = 15.0
LOCK_PATIENCE_SECONDS = 600.0
_END = object()


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Where a build stands. Sent before the engine starts, and after each commit: ``saved`` traces are on disk."""

    total: int
    saved: int  # by this build
    existing: int  # by earlier ones
    tokens: int  # completion tokens of the saved traces
    tokens_per_second: float  # over the last seconds
    lifetime_tokens_per_second: float
    truncated: int
    correct: int
    judged: int
    eta_seconds: float | None
    phase: str  # "starting engine", "generating", and last "done" or "stopped"


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did. ``n_tokens``, ``seconds`` (engine start apart), ``verdicts``: of the new traces."""

    run_id: str | None  # None when there was nothing left to do
    generation_key: str
    model: str
    model_revision: str
    kind: str
    engine: str | None
    n_problems: int
    n_requested: int
    n_existing: int
    n_new: int
    n_tokens: int
    seconds: float
    start_seconds: float
    verdicts: Mapping[str, int]
    truncated: float | None  # share of the new traces
    max_tokens: int
    catalog: str
    stopped: bool
    problem_ids: tuple[str, ...] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; without the problem ids."""
        record = asdict(self)
        del record["problem_ids"]
        return record


Report = Callable[[BuildProgress], None]


def build(
    model: str | Path,
    problems: str | Sequence[str],
    *,
    samples: int = 4,
    catalog: Catalog | str | Path | None = None,
    engine: str | Engine = "auto",
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    system_prompt: str | None = None,
    limit: int | None = None,
    kind: RunKind = "build",
    graded: bool = True,
    question: str | None = None,
    answer: str | None = None,
    grader: str | None = None,
    device: str | None = None,
    concurrency: int | None = None,
    graders: int = 2,
    commit_every_seconds: float = 1.5,
    commit_size: int = 256,
    retry: Collection[str] = (),
    engine_options: Mapping[str, Any] | None = None,
    progress: Report | None = None,
) -> BuildReport:
    """Sample a model's own traces of problems, grade them, and keep them in a catalog.

    Killed or interrupted (Ctrl-C, SIGTERM) at any moment and called again with the same arguments, it finishes exactly
    ``samples`` traces a problem: none lost that a progress event had counted as saved, none twice.

    Args:
        model: a Hugging Face checkpoint folder or Hub id.
        problems: sources as ``load_problems`` takes them.
        samples: traces a problem, each its own request with its own seed.
        engine: ``auto``, ``vllm``, ``transformers``, or a running engine, which stays open; when it holds other weights
            than ``model``'s, they are swapped in.
        temperature, top_p, top_k, min_p: override the model's generation_config.
        max_tokens: completion tokens at most; when None, what the context leaves, at most 32768.
        limit: only the first that many problems of each source.
        kind: ``evaluate`` keeps the traces apart from calibration.
        question, answer, grader: see ``load_problems``.
        concurrency: sequences decoded at once.
        graders: grading processes.
        commit_every_seconds, commit_size: a batch is committed when it is this old or this large.
        retry: run again, as a new attempt that supersedes: ``truncated``, traces that a smaller limit than
            ``max_tokens`` cut; ``error``, traces that the engine aborted or failed on.
        engine_options: the engine's own options.
        progress: called in this thread with a ``BuildProgress`` before the engine starts and after each commit.

    Raises:
        InputError: a bad model, source or option; found before the engine starts.
        EngineError: the engine did not start, or died; what finished is saved, the same call continues.
        CatalogError: the catalog cannot be written.
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, not {samples}")
    if unknown := sorted(set(retry) - set(RETRIES)):
        raise InputError(f"retry takes {' and '.join(RETRIES)}, not {unknown[0]!r}")
    if isinstance(engine, str):
        check_options(resolve_engine(engine), engine_options or {})
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    specs = [problems] if isinstance(problems, str) else list(problems)
    sources, rows = _load(specs, question=question, answer=answer, grader=grader, limit=limit)
    info = inspect(model)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    sampling = replace(info.sampling, **{name: value for name, value in given.items() if value is not None})
    plan = _plan(info, rows, samples, sampling, system_prompt, max_tokens, kind, seed, engine)
    for source in sources:
        store.add_source(source)
    store.add_problems(rows)
    work = _Build(plan, store, graded, commit_every_seconds, commit_size, frozenset(retry), progress)
    if not work.todo:
        return work.report(None)
    work.emit("starting engine")
    began = time.monotonic()
    running = _running(engine, plan, device=device, concurrency=concurrency, options=engine_options)
    try:
        work.start_seconds = time.monotonic() - began
        if isinstance(engine, str) and engine == "auto" and running.name != resolve_engine(engine):
            work.warn(f"vLLM is installed but cannot be imported, {running.name} ran instead; --engine vllm says why")
        work.generate(running, graders)
    finally:
        if isinstance(engine, str):
            running.close()
    return work.report(running.name)


# --- planning: everything that can be wrong is found here, before an engine starts ---------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    info: ModelInfo
    problems: list[Problem]
    prompts: list[tuple[int, ...]]  # of each problem
    samples: int
    sampling: Sampling
    system_prompt: str | None
    max_tokens: int
    longest: int  # tokens of prompt and completion
    kind: RunKind
    seed: int
    key: str
    warnings: tuple[str, ...]


def _load(specs: Sequence[str], **options: Any) -> tuple[list[Source], list[Problem]]:
    if not specs:
        raise InputError("no problems given")
    sources, rows = [], {}
    for spec in specs:
        source, found = load_problems(spec, **options)
        sources.append(source)
        for problem in found:
            rows.setdefault(problem.problem_id, problem)
    if not rows:
        raise InputError(f"{', '.join(specs)} holds no problems")
    return sources, list(rows.values())


def _plan(
    info: ModelInfo,
    problems: list[Problem],
    samples: int,
    sampling: Sampling,
    system_prompt: str | None,
    max_tokens: int | None,
    kind: RunKind,
    seed: int,
    engine: str | Engine,
) -> _Plan:
    prompts = [info.prompt_ids(problem.question, system_prompt) for problem in problems]
    limit = info.max_model_len if isinstance(engine, str) else min(info.max_model_len, engine.max_model_len)
    longest = max(map(len, prompts))
    budget = _token_budget(max_tokens, limit, longest, problems[[len(p) for p in prompts].index(longest)])
    warnings = []
    if info.reasoning.name == "none":
        warnings.append(f"{info.model} marks no reasoning (<think>): its whole responses are graded")
    if sampling.temperature == 0 and samples > 1:
        warnings.append("temperature 0 gives the same trace for each sample of a problem")
    key = ids.generation_key(
        model=info.model,
        revision=info.revision,
        tokenizer_hash=info.tokenizer_hash,
        chat_template_hash=info.chat_template_hash,
        system_prompt=system_prompt,
        sampling=sampling.as_dict(),
        # An evaluation reports its seed and limit as its own, so other ones are other traces; a build's stay out of it.
        kind=kind if kind == "build" else f"{kind}-{seed}-{budget}",
    )
    return _Plan(
        info,
        problems,
        prompts,
        samples,
        sampling,
        system_prompt,
        budget,
        longest + budget,
        kind,
        seed,
        key,
        tuple(warnings),
    )


def _token_budget(max_tokens: int | None, limit: int, longest: int, problem: Problem) -> int:
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
    left = limit - longest
    if left < (max_tokens or MIN_TOKENS):
        need = f"{max_tokens} for the completion" if max_tokens else "room for a completion"
        what = f"the prompt of problem {problem.problem_id} ({problem.source} row {problem.source_row})"
        raise InputError(f"{what} has {longest} tokens; with {need} it does not fit the model's context of {limit}")
    return max_tokens or min(left, MAX_TOKENS)


def _running(
    engine: str | Engine, plan: _Plan, *, device: str | None, concurrency: int | None, options: Mapping[str, Any] | None
) -> Engine:
    info = plan.info
    if isinstance(engine, str):
        return open_engine(
            engine, info, max_model_len=plan.longest, device=device, concurrency=concurrency, **(options or {})
        )
    # Without this, traces could be recorded as one checkpoint's while another answers.
    if engine.loaded != info.revision:
        engine.load_weights(info.folder, info.revision)
    return engine


# --- generating ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unit:
    problem: Problem
    prompt_ids: tuple[int, ...]
    sample_index: int
    trace_id: str
    attempt: int = 0


class _Rate:
    """Tokens a second over the last commits.

    The time runs from the commit before the oldest one kept: its tokens were made since then, however rare commits are.
    """

    def __init__(self, began: float) -> None:
        self._since = began
        self._kept: deque[tuple[float, int]] = deque()

    def add(self, now: float, tokens: int) -> None:
        self._kept.append((now, tokens))
        while len(self._kept) > 1 and self._kept[0][0] < now - RECENT_SECONDS:
            self._since = self._kept.popleft()[0]

    def per_second(self, now: float) -> float:
        return sum(tokens for _, tokens in self._kept) / max(now - self._since, 1e-9)


class _Build:
    """One build's state: what is to do, what is being graded, what is saved."""

    def __init__(
        self,
        plan: _Plan,
        store: Catalog,
        graded: bool,
        commit_every_seconds: float,
        commit_size: int,
        retry: frozenset[str],
        progress: Report | None,
    ) -> None:
        self.plan, self.store, self.graded = plan, store, graded
        self._every, self._size, self._progress = commit_every_seconds, commit_size, progress
        self._warnings = [*plan.warnings, *_cut(store, plan, retry)]
        done = store.existing_trace_ids(plan.key)
        again = _retries(store, plan, retry)
        units = (replace(unit, attempt=again.get(unit.trace_id, 0)) for unit in self._units())
        self.todo = {unit.trace_id: unit for unit in units if unit.attempt or unit.trace_id not in done}
        self.n_requested = len(plan.problems) * plan.samples
        self.n_existing = self.n_requested - len(self.todo)
        self.run_id: str | None = None
        self.stopped = False
        self.start_seconds = self.seconds = 0.0
        self._saved = self._tokens = self._truncated = self._correct = self._judged = 0
        self._verdicts: Counter[str] = Counter()
        self._began = time.monotonic()
        self._rate = _Rate(self._began)
        self._locked_since: float | None = None

    def _units(self) -> Iterator[_Unit]:
        """Samples of a problem stand together: an engine with a prefix cache prefills their prompt once."""
        for problem, prompt in zip(self.plan.problems, self.plan.prompts, strict=True):
            for index in range(self.plan.samples):
                yield _Unit(problem, prompt, index, ids.trace_id(problem.problem_id, self.plan.key, index))

    def generate(self, engine: Engine, graders: int) -> None:
        """Stream completions into the catalog until the work list is empty or somebody interrupts."""
        self.run_id = f"{utc_now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        self.store.add_run(self._run(engine))
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._began = time.monotonic()
        self._rate = _Rate(self._began)
        self.emit("generating")
        with _interruptible() as stop, GradingPool(graders) as pool:
            pump = threading.Thread(target=self._pump, args=(engine, stop, finished), name="calset-pump", daemon=True)
            pump.start()
            try:
                self._collect(engine, stop, finished, pool)
            finally:
                engine.cancel()
                pump.join(timeout=60)
                self.seconds = time.monotonic() - self._began
        self.emit("stopped" if self.stopped else "done")

    def _pump(self, engine: Engine, stop: threading.Event, finished: queue.SimpleQueue[Any]) -> None:
        """Runs in its own thread: feed the engine, hand on what comes out, then the end or the error."""

        def requests() -> Iterator[Request]:
            for unit in list(self.todo.values()):
                if stop.is_set():
                    return
                seed = ids.request_seed(self.plan.seed, unit.problem.problem_id, unit.sample_index)
                yield Request(unit.trace_id, unit.prompt_ids, seed, self.plan.max_tokens)

        try:
            for completion in engine.stream(requests(), self.plan.sampling):
                finished.put(completion)
            finished.put(_END)
        except BaseException as error:
            finished.put(error)

    def _collect(
        self, engine: Engine, stop: threading.Event, finished: queue.SimpleQueue[Any], pool: GradingPool
    ) -> None:
        grading: deque[tuple[Trace, str, Future[Outcome] | None]] = deque()
        ready: list[tuple[Trace, str, Future[Outcome] | None]] = []
        failure: BaseException | None = None
        ended, committed = False, time.monotonic()
        while not ended or grading or ready:
            item = _next(finished, grading, ended)
            if isinstance(item, Completion):
                grading.append(self._grading(item, pool))
            elif item is not None:
                ended = True
                failure = item if isinstance(item, BaseException) else None
            for _ in range(len(grading)):
                entry = grading.popleft()
                (ready if entry[2] is None or entry[2].done() else grading).append(entry)
            now = time.monotonic()
            last = ended and not grading
            if ready and (last or len(ready) >= self._size or now - committed >= self._every):
                if self._commit(ready):
                    ready = []
                committed = time.monotonic()
            if stop.is_set() and not self.stopped:
                self.stopped = True
                engine.cancel()
        if failure is not None and not self.stopped:
            raise (
                failure if isinstance(failure, EngineError) else EngineError(f"the engine failed: {failure}")
            ) from failure

    def _grading(self, completion: Completion, pool: GradingPool) -> tuple[Trace, str, Future[Outcome] | None]:
        unit = self.todo[completion.key]
        trace = self._trace(unit, completion)
        future = submit(pool, trace, unit.problem, unit.problem.grader) if self.graded else None
        return trace, unit.problem.grader, future

    def _trace(self, unit: _Unit, completion: Completion) -> Trace:
        info, plan = self.plan.info, self.plan
        token_ids = completion.token_ids
        parts = split(token_ids, info.reasoning, info.decode)
        ended = bool(token_ids) and token_ids[-1] in info.eos_token_ids
        text = info.tokenizer.decode(list(token_ids[:-1] if ended else token_ids), skip_special_tokens=False)
        return Trace(
            trace_id=unit.trace_id,
            problem_id=unit.problem.problem_id,
            run_id=self.run_id or "",
            generation_key=plan.key,
            sample_index=unit.sample_index,
            request_seed=ids.request_seed(plan.seed, unit.problem.problem_id, unit.sample_index),
            prompt_ids=unit.prompt_ids,
            completion_ids=token_ids,
            text=text,
            response=parts.response,
            finish_reason=completion.finish_reason,
            max_tokens=plan.max_tokens,
            reasoning_start=parts.reasoning_start,
            reasoning_end=parts.reasoning_end,
            answer_start=parts.answer_start,
            attempt=unit.attempt,
            seconds=completion.seconds,
        )

    def _commit(self, ready: list[tuple[Trace, str, Future[Outcome] | None]]) -> bool:
        """Traces and verdicts in one transaction; False when the catalog is locked and is to be tried again."""
        traces = [trace for trace, _, _ in ready]
        grades = [grade_row(trace, grader, future.result()) for trace, grader, future in ready if future is not None]
        try:
            fresh = self.store.record(traces, grades).fresh
        except CatalogLocked:
            self._locked_since = self._locked_since or time.monotonic()
            if time.monotonic() - self._locked_since > LOCK_PATIENCE_SECONDS:
                raise
            return False
        self._locked_since = None
        # What another build of the same traces had saved meanwhile is there, but not ours.
        self.n_existing += len(traces) - len(fresh)
        self._count(
            [trace for trace in traces if (trace.trace_id, trace.attempt) in fresh],
            [grade for grade in grades if (grade.trace_id, grade.attempt) in fresh],
        )
        self.emit("generating")
        return True

    def _count(self, traces: list[Trace], grades: list[Grade]) -> None:
        tokens = sum(trace.n_tokens for trace in traces)
        self._saved += len(traces)
        self._tokens += tokens
        self._rate.add(time.monotonic(), tokens)
        found = Counter(grade.verdict for grade in grades) if self.graded else Counter({"ungraded": len(traces)})
        self._verdicts.update(found)
        self._truncated += sum(trace.finish_reason == "length" for trace in traces)
        self._correct += found["correct"]
        self._judged += sum(found[verdict] for verdict in JUDGED)

    def warn(self, text: str) -> None:
        self._warnings.append(text)

    def emit(self, phase: str) -> None:
        if self._progress is None:
            return
        seconds = max(time.monotonic() - self._began, 1e-9)
        left = self.n_requested - self.n_existing - self._saved
        self._progress(
            BuildProgress(
                total=self.n_requested,
                saved=self._saved,
                existing=self.n_existing,
                tokens=self._tokens,
                tokens_per_second=self._rate.per_second(time.monotonic()),
                lifetime_tokens_per_second=self._tokens / seconds,
                truncated=self._truncated,
                correct=self._correct,
                judged=self._judged,
                eta_seconds=left * seconds / self._saved if self._saved else None,
                phase=phase,
            )
        )

    def _run(self, engine: Engine) -> Run:
        info, plan = self.plan.info, self.plan
        return Run(
            run_id=self.run_id or "",
            kind=plan.kind,
            generation_key=plan.key,
            model=info.model,
            model_revision=info.revision,
            tokenizer_hash=info.tokenizer_hash,
            chat_template_hash=info.chat_template_hash,
            system_prompt=plan.system_prompt,
            sampling=plan.sampling.as_dict(),
            max_tokens=plan.max_tokens,
            seed=plan.seed,
            engine=engine.name,
            engine_version=engine.version,
            reasoning_format=info.reasoning.name,
            versions=versions(),
            hardware=hardware(),
            command=shlex.join(sys.argv),
            model_path=str(info.folder.resolve()) if info.is_local else None,
        )

    def report(self, engine: str | None) -> BuildReport:
        plan = self.plan
        return BuildReport(
            run_id=self.run_id,
            generation_key=plan.key,
            model=plan.info.model,
            model_revision=plan.info.revision,
            kind=plan.kind,
            engine=engine,
            n_problems=len(plan.problems),
            n_requested=self.n_requested,
            n_existing=self.n_existing,
            n_new=self._saved,
            n_tokens=self._tokens,
            seconds=self.seconds,
            start_seconds=self.start_seconds,
            verdicts=dict(self._verdicts),
            truncated=self._truncated / self._saved if self._saved else None,
            max_tokens=plan.max_tokens,
            catalog=str(self.store.path),
            stopped=self.stopped,
            problem_ids=tuple(problem.problem_id for problem in plan.problems),
            warnings=tuple(self._warnings),
        )


def _cut(store: Catalog, plan: _Plan, retry: frozenset[str]) -> list[str]:
    """Warnings about existing traces that their limit cut: a build's limit is not in their key."""
    rows = store.query(
        """
        SELECT max_tokens >= ?, count(*), max(max_tokens) FROM latest_traces
        WHERE generation_key = ? AND finish_reason = 'length' AND sample_index < ?
            AND problem_id IN (SELECT unnest(?::VARCHAR[]))
        GROUP BY ALL
        """,
        [plan.max_tokens, plan.key, plan.samples, [problem.problem_id for problem in plan.problems]],
    ).rows
    warnings = []
    for as_long, count, limit in rows:
        what = "existing trace was" if count == 1 else "existing traces were"
        if "truncated" not in retry and not as_long:
            warnings.append(
                f"{count} {what} cut at {limit} tokens and kept: --retry truncated runs them again with "
                f"{plan.max_tokens}"
            )
        elif "truncated" in retry and as_long:
            warnings.append(
                f"{count} {what} cut at {limit} tokens, no less than this build's {plan.max_tokens}: not run again; "
                "raise --max-tokens"
            )
    return warnings


def _retries(store: Catalog, plan: _Plan, retry: frozenset[str]) -> dict[str, int]:
    """Trace id -> attempt of what is to run again though it is there."""
    if not retry:
        return {}
    rows = store.query(
        """
        SELECT trace_id, attempt + 1 FROM latest_traces
        WHERE generation_key = ? AND (
            (? AND finish_reason = 'length' AND max_tokens < ?) OR (? AND finish_reason IN ('abort', 'error')))
        """,
        [plan.key, "truncated" in retry, plan.max_tokens, "error" in retry],
    ).rows
    return dict(rows)


def _next(finished: queue.SimpleQueue[Any], grading: Sequence[Any], ended: bool) -> Any:
    """The next thing out of the engine, or None after a moment without one."""
    if not ended:
        try:
            return finished.get(timeout=0.1)
        except queue.Empty:
            return None
    futures = [future for _, _, future in grading if future is not None]
    if futures:
        wait(futures, timeout=0.1)
    return None


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks for an orderly stop; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

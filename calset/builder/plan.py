"""What a build is going to do, found out before an engine starts: everything that can be wrong is found here.

Problems are streamed twice, never held: once here, to count, to measure every prompt and to find what is there already,
and once while generating. Must not know: engines at work, grading, progress bars.
"""

from __future__ import annotations

import shlex
import time
import warnings as python_warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calset import ids
from calset.builder.engines import Sampling
from calset.builder.grading.scorers import check_scorers
from calset.builder.model.info import ModelInfo, inspect
from calset.builder.problems import ProblemSource, gym_tasks, left_out, open_problems
from calset.builder.schedule.fixed import Opened
from calset.builder.settings import BuildSettings
from calset.catalog.catalog import Catalog
from calset.catalog.records import Contamination, Problem, Run
from calset.catalog.store.values import chunks
from calset.errors import BuildWarning, CatalogLocked, InputError
from calset.io.models import default_commit, hub_name
from calset.io.retry import Backoff, retried

if TYPE_CHECKING:
    from calset.catalog.contamination.overlap import Decontaminator

MAX_TOKENS = 32_768  # when the user gives none and the context holds more
MIN_TOKENS = 8
BLOCK = 256  # problems read at a time: one look into the catalog each, and one call of the chat template's process
IDS_A_LOOK = 10_000
LOCK_PATIENCE_SECONDS = 600.0
_LOCKED = Backoff(first=0.1, longest=1.0)  # beside the catalog's own wait for the lock

T = TypeVar("T")
LeaveOut = Callable[[Problem, list[Contamination]], None]


@dataclass(frozen=True, slots=True)
class Existing:
    """How many of the asked samples the catalog holds, and why some are run again."""

    n: int = 0
    again: int = 0  # of these, to be superseded
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of a build: its settings, and what follows from them, the model and the problems. Lengths are in tokens."""

    settings: BuildSettings
    info: ModelInfo
    sources: tuple[ProblemSource, ...]
    sampling: Sampling
    max_tokens: int
    longest: int  # of prompt and completion together
    key: str
    problem_ids: tuple[str, ...] = field(repr=False)
    prompt_tokens: int  # of one sample of every problem
    first_prompt_ids: tuple[int, ...]
    existing: Existing
    warnings: tuple[str, ...]
    other_graders: tuple[str, ...] = ()  # warnings, of problems that are stored with another grader
    excluded_ids: frozenset[str] = frozenset()  # problems that an evaluation source holds too
    decontaminator: Decontaminator | None = None

    @property
    def n_requested(self) -> int:
        return len(self.problem_ids) * self.settings.samples

    @property
    def n_todo(self) -> int:
        return self.n_requested - self.existing.n + self.existing.again

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """A problem's prompt as the model is served it."""
        return self.info.prompt_ids(problem.question, self.settings.system_prompt)

    def problems(self, leave_out: LeaveOut | None = None) -> Iterator[Problem]:
        """The problems of all sources in order, each once; an excluded one goes to ``leave_out`` with the evidence."""
        for problem in unique(self.sources):
            if problem.problem_id not in self.excluded_ids:
                yield problem
            elif leave_out is not None and self.decontaminator is not None:
                leave_out(problem, self.decontaminator.check(problem))

    def opened(self, store: Catalog, leave_out: LeaveOut | None = None) -> Iterator[Opened]:
        """The problems with their prompts and what the catalog holds of each, read a block at a time."""
        fresh = not self.existing.n
        problems = self.problems(leave_out)
        while block := list(islice(problems, BLOCK)):
            names = [problem.problem_id for problem in block]
            found = {} if fresh else patiently(lambda names=names: store.attempts(self.key, names))
            decided = {} if fresh else patiently(lambda names=names: store.last_decisions(self.key, names))
            prompts = self.info.prompts([problem.question for problem in block], self.settings.system_prompt)
            for problem, prompt in zip(block, prompts, strict=True):
                name = problem.problem_id
                yield Opened(problem, prompt, found.get(name, {}), decided.get(name))


def unique(sources: Sequence[ProblemSource]) -> Iterator[Problem]:
    """The sources' problems; one that several hold comes once."""
    if len(sources) == 1:
        yield from sources[0]
        return
    seen: set[str] = set()
    for source in sources:
        for problem in source:
            if problem.problem_id not in seen:
                seen.add(problem.problem_id)
                yield problem


def open_sources(settings: BuildSettings, store: Catalog) -> tuple[ProblemSource, ...]:
    """Open the settings' problem sources; one that the catalog knows stays at the revision recorded there.

    Raises:
        InputError: see ``open_problems``; or a source that only code unknown to calset can score.
    """
    pinned = store.source_revisions()
    sources = tuple(
        open_problems(
            spec,
            question=settings.question,
            answer=settings.answer,
            grader=settings.grader,
            limit=settings.limit,
            revision=pinned.get(spec),
            skip_bad=settings.skip_bad,
        )
        for spec in settings.specs
    )
    if settings.graded:
        check_scorers(gym_tasks(source.source for source in sources), unsafe_scorers=settings.unsafe_scorers)
    return sources


def open_model(model: str | Path, store: Catalog, *, template_options: Mapping[str, Any] | None = None) -> ModelInfo:
    """Open the model; one of the Hub that names no revision stays at the commit of the catalog's first run of it.

    Raises:
        InputError: see ``inspect``.

    Warns:
        BuildWarning: the Hub's default branch has moved on since then, or no run is at what the revision names now.
    """
    name, asked = hub_name(model)
    commits = store.model_commits(name)
    try:
        info = inspect(model, revision=commits[0] if commits else None, template_options=template_options)
    except InputError as error:
        if asked is not None or not commits or commits[0] not in str(error):
            raise
        raise InputError(
            f"{error}; {store.path} has {name} at that commit, {name}@main is what the Hub has now"
        ) from error
    if info.is_local or not commits:
        return info
    first, text = commits[0], None
    if asked is None and (newest := default_commit(name)) not in (None, first):
        text = f"{name} stays at {first}, where {store.path} has it; --model {name}@{newest} takes the Hub's newest"
    elif asked not in (None, info.revision) and info.revision not in commits:
        text = f"{model} is {info.revision}; --model {name}@{first} goes on where {store.path} has it"
    if text:
        python_warnings.warn(text, BuildWarning, stacklevel=2)
    return info


def make_plan(
    settings: BuildSettings,
    info: ModelInfo,
    sources: Sequence[ProblemSource],
    store: Catalog,
    *,
    decontaminator: Decontaminator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Read every problem once, render every prompt, and look what the catalog holds; writes nothing.

    Args:
        decontaminator: leaves out the problems that evaluation sources hold too.
        progress: called with the number of problems read, about once a second.

    Raises:
        InputError: no problems, or none that is left in; a prompt that the template refuses, or one that leaves no
            room for a completion.
    """
    system_prompt, kind = settings.system_prompt, settings.kind
    measured = _measure(info, sources, system_prompt, decontaminator, progress)
    names = ", ".join(source.source.spec for source in sources)
    if measured.longest is None:
        n = len(measured.excluded_ids)
        raise InputError(
            f"all {n} problems of {names} are in evaluation sources" if n else f"{names} holds no problems"
        )
    engine, sampling = settings.engine, settings.sampling(info.sampling)
    context = info.max_model_len if isinstance(engine, str) else min(info.max_model_len, engine.max_model_len)
    budget = _token_budget(settings.max_tokens, context, measured.n_longest, measured.longest)
    key = ids.generation_key(
        model=info.model,
        revision=info.revision,
        tokenizer_hash=info.tokenizer_hash,
        chat_template_hash=info.chat_template_hash,
        system_prompt=system_prompt,
        sampling=sampling.as_dict(),
        # An evaluation reports its seed and limit as its own, so other ones are other traces; a build's stay out of it.
        kind=kind if kind == "build" else f"{kind}-{settings.seed}-{budget}",
        template_options=info.template_options,
    )
    return Plan(
        settings=settings,
        info=info,
        sources=tuple(sources),
        sampling=sampling,
        max_tokens=budget,
        longest=measured.n_longest + budget,
        key=key,
        problem_ids=tuple(measured.problem_ids),
        prompt_tokens=measured.n_tokens,
        first_prompt_ids=measured.first,
        existing=_existing(store, key, measured.problem_ids, settings, budget),
        warnings=(*_warnings(info, sampling, settings), *filter(None, map(left_out, sources))),
        other_graders=tuple(_other_graders(store, sources, measured.problem_ids)) if settings.graded else (),
        excluded_ids=frozenset(measured.excluded_ids),
        decontaminator=decontaminator,
    )


@dataclass(slots=True)
class _Measured:
    """What one reading of all problems found; the longest prompt by its problem."""

    problem_ids: list[str] = field(default_factory=list)
    excluded_ids: list[str] = field(default_factory=list)
    n_tokens: int = 0
    n_longest: int = 0
    longest: Problem | None = None
    first: tuple[int, ...] = ()


def _measure(
    info: ModelInfo,
    sources: Sequence[ProblemSource],
    system_prompt: str | None,
    decontaminator: Decontaminator | None,
    progress: Callable[[int], None] | None,
) -> _Measured:
    found, said = _Measured(), time.monotonic()
    problems = unique(sources)
    while read := list(islice(problems, BLOCK)):
        block = []
        for problem in read:
            if decontaminator is not None and decontaminator.check(problem):
                found.excluded_ids.append(problem.problem_id)
            else:
                block.append(problem)
        prompts = info.prompts([problem.question for problem in block], system_prompt)
        for problem, prompt in zip(block, prompts, strict=True):
            found.problem_ids.append(problem.problem_id)
            found.n_tokens += len(prompt)
            found.first = found.first or prompt
            if len(prompt) > found.n_longest:
                found.n_longest, found.longest = len(prompt), problem
        if progress is not None and time.monotonic() - said > 1:
            said = time.monotonic()
            progress(len(found.problem_ids))
    return found


def _token_budget(max_tokens: int | None, limit: int, longest: int, problem: Problem) -> int:
    left = limit - longest
    if left < (max_tokens or MIN_TOKENS):
        need = f"{max_tokens} for the completion" if max_tokens else "room for a completion"
        what = f"the prompt of problem {problem.problem_id} ({problem.source} row {problem.source_row})"
        raise InputError(f"{what} has {longest} tokens; with {need} it does not fit the model's context of {limit}")
    return max_tokens or min(left, MAX_TOKENS)


def _warnings(info: ModelInfo, sampling: Sampling, settings: BuildSettings) -> Iterator[str]:
    if info.reasoning.name == "none":
        yield f"{info.model} marks no reasoning (<think>): its whole responses are graded"
    if sampling.temperature == 0 and settings.samples > 1:
        yield "temperature 0 gives the same trace for each sample of a problem"
    defaults = info.sampling.as_dict()
    yield from info.remarks(
        settings.system_prompt, [name for name, value in sampling.as_dict().items() if value != defaults[name]]
    )


def _existing(
    store: Catalog, key: str, problem_ids: Sequence[str], settings: BuildSettings, max_tokens: int
) -> Existing:
    """What is there; with warnings about traces that their limit cut: a build's limit is not in their key."""
    retry, there, cut, failed = settings.retry, 0, Counter[bool](), 0
    limits: dict[bool, int] = {}
    if not store.exists():
        return Existing()
    for part in chunks(problem_ids, IDS_A_LOOK):
        for row in store.count_attempts(key, part, samples=settings.samples, max_tokens=max_tokens):
            there += row.n
            failed += row.n if row.broken else 0
            if row.cut:
                cut[row.as_long] += row.n
                limits[row.as_long] = max(limits.get(row.as_long, 0), row.max_tokens)
    again = (cut[False] if "truncated" in retry else 0) + (failed if "error" in retry else 0)
    warnings = []
    for as_long, count in sorted(cut.items()):
        what = f"{count} existing {'trace was' if count == 1 else 'traces were'} cut at {limits[as_long]} tokens"
        if "truncated" not in retry and not as_long:
            warnings.append(f"{what} and kept: --retry truncated runs them again with {max_tokens}")
        elif "truncated" in retry and as_long:
            warnings.append(f"{what}, no less than this build's {max_tokens}: not run again; raise --max-tokens")
    return Existing(there, again, tuple(warnings))


def _other_graders(store: Catalog, sources: Sequence[ProblemSource], problem_ids: Sequence[str]) -> Iterator[str]:
    """Warnings where stored problems have another grader than their source has now; the stored ones stay."""
    if not store.exists():
        return
    found: Counter[tuple[str, str]] = Counter()
    for part in chunks(problem_ids, IDS_A_LOOK):
        found.update(store.count_graders(part))
    asked = {source.source.name: source.source.grader for source in sources}
    for (name, stored), n in sorted(found.items()):
        grader = asked.get(name, stored)
        if grader != stored:
            yield (
                f"{n} stored {'problem' if n == 1 else 'problems'} of {name} {'has' if n == 1 else 'have'} the grader "
                f"{stored}, which plain `calset grade` takes; this build grades by {grader}. So that no pass rate "
                f"mixes both: calset grade --grader {grader} --source {shlex.quote(name)}, or a fresh --catalog"
            )


def uncounted(plan: Plan, store: Catalog) -> str | None:
    """A warning, where ``select`` counts more traces of the plan's problems than an adaptive build of them does."""
    if not store.exists():
        return None
    found: Counter[str] = Counter()
    who = {"model": plan.info.model, "revision": plan.info.revision}
    for part in chunks(plan.problem_ids, IDS_A_LOOK):
        found.update(store.count_others(plan.key, part, samples=plan.settings.samples, **who))
    if not found:
        return None
    runs = {run.generation_key: run for run in store.runs("build")}
    listed = [f"{n} {_apart(plan, runs[key])}" for key, n in sorted(found.items())]
    return (
        f"select counts more traces of these problems and this model than this build does ({'; '.join(listed)}), so "
        "it may take other samples or fewer than the target has: build into a --catalog of its own"
    )


def _apart(plan: Plan, run: Run) -> str:
    """Why an adaptive build of the plan does not count a run's traces."""
    if run.generation_key == plan.key:
        return f"beyond --samples {plan.settings.samples}"
    ours = plan.sampling.as_dict()
    said = [f"{name} {value}" for name, value in run.sampling.items() if value != ours.get(name)]
    return f"with {', '.join(said)}" if said else "made otherwise"


def patiently(work: Callable[[], T]) -> T:
    """What ``work`` returns, tried again while another process holds the catalog.

    Raises:
        CatalogLocked: it held it for ``LOCK_PATIENCE_SECONDS``.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    return retried(work, _LOCKED, lambda error: isinstance(error, CatalogLocked), deadline=deadline)

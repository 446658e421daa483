"""build(): problems x samples -> traces with verdicts in the catalog, resumable at any moment.

The unit of work is (problem, sample index) and inserting is an anti-join, so resume, de-duplication and idempotence are
one thing. What is to be done is found out in plan.py, which unit comes next is decided in schedule/fixed.py or
schedule/adaptive.py, and pipeline.py does it.
"""

from __future__ import annotations

import shutil
import time
import warnings as python_warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from calset.builder.engines import Engine, check_length, open_engine, resolve_engine
from calset.builder.grading import grader_version
from calset.builder.grading.pool import GradingPool
from calset.builder.pipeline import Excluded, Pipeline
from calset.builder.plan import Plan, make_plan, open_model, open_sources, uncounted
from calset.builder.problems import BadRow, bad_rows_of
from calset.builder.schedule.adaptive import AdaptiveSchedule
from calset.builder.schedule.fixed import FixedSchedule, Retry, Schedule
from calset.builder.settings import BuildOptions, BuildSettings
from calset.catalog.catalog import Catalog
from calset.catalog.records import RunKind
from calset.catalog.subsets.recipes import Recipe
from calset.errors import BuildWarning, EngineWarning
from calset.io.keywords import shows
from calset.io.progress import OnProgress, Progress

if TYPE_CHECKING:
    from calset.builder.cost import PlanReport
    from calset.catalog.contamination.overlap import Decontaminator


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
    n_requested: int | None  # None when an adaptive build decided it as it went
    n_existing: int
    n_excluded: int  # problems that an evaluation source holds too
    n_new: int
    n_tokens: int
    seconds: float
    start_seconds: float
    verdicts: Mapping[str, int]
    finish_reasons: Mapping[str, int]
    truncated: float | None  # share of the new traces
    max_tokens: int
    catalog: str
    stopped: bool
    problem_ids: tuple[str, ...] = field(repr=False)
    target: Mapping[str, Any] | None = None  # of an adaptive build: recipe, need, met, problems by decision
    warnings: tuple[str, ...] = ()
    n_bad: int = 0  # rows of the sources that hold no problem and were left out
    bad: tuple[BadRow, ...] = ()  # the first ones

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; without the problem ids."""
        record = asdict(self)
        del record["problem_ids"]
        return record


def build(
    model: str | Path,
    problems: str | Sequence[str],
    *,
    samples: int = 4,
    target: str | Path | Recipe | None = None,
    need: int | None = None,
    need_tokens: int | None = None,
    confidence: float | None = None,
    catalog: Catalog | str | Path | None = None,
    engine: str | Engine = "auto",
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    system_prompt: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    decontaminate: str | Sequence[str] = (),
    kind: RunKind = "build",
    graded: bool = True,
    question: str | None = None,
    answer: str | None = None,
    grader: str | None = None,
    device: str | None = None,
    concurrency: int | None = None,
    graders: int = 2,
    commit_every_seconds: float | None = None,
    commit_size: int = 512,
    retry: Collection[str] = (),
    engine_options: Mapping[str, Any] | None = None,
    unsafe_scorers: bool = False,
    skip_bad: bool = False,
    progress: OnProgress | None = None,
) -> BuildReport:
    """Sample a model's own traces of problems, grade them, and keep them in a catalog.

    Killed or interrupted (Ctrl-C, SIGTERM) at any moment and called again with the same arguments, it finishes exactly
    ``samples`` traces a problem: none lost that a progress event had counted as saved, none twice.

    With a ``target`` it draws samples only where they decide something (docs/adaptive.md): a problem that is
    confidently outside the recipe's difficulty band is stopped early, every other one gets all its ``samples``, and no
    new problem is opened once the recipe has what it needs.

    Args:
        model: a Hugging Face checkpoint folder or Hub id, ``org/name`` or ``org/name@REVISION``; without a revision, a
            model that the catalog has runs of stays at the commit of the first.
        problems: sources as ``open_problems`` takes them.
        samples: traces a problem, each its own request with its own seed; with a target, at most.
        target: the recipe (name, TOML file or Recipe) whose samples are wanted; needs ``need`` or ``need_tokens``.
        need, need_tokens: how many samples, or tokens of samples, the recipe must be able to take.
        confidence: of stopping a problem; 0.95 when None.
        engine: ``auto``, ``vllm``, ``transformers``, URLs of OpenAI-compatible servers, or a running engine, which
            stays open; when it holds other weights than ``model``'s, they are swapped in.
        temperature, top_p, top_k, min_p, repetition_penalty: override the model's own (docs/models.md says where those
            come from).
        template_options: what the chat template is rendered with, e.g. ``{"enable_thinking": False}``.
        decontaminate: evaluation sources; a problem that they hold too is left out, and the evidence kept
            (docs/decontamination.md).
        max_tokens: completion tokens at most; when None, what the context leaves, at most 32768.
        limit: only the first that many problems of each source.
        kind: ``evaluate`` keeps the traces apart from calibration.
        question, answer, grader: see ``open_problems``.
        concurrency: sequences decoded at once.
        graders: grading processes.
        commit_every_seconds, commit_size: a batch is committed when it is this old or this large; when None after 1.5
            seconds, or later where commits are slow, so that they take at most a hundredth of the time.
        retry: run again, as a new attempt that supersedes: ``truncated``, traces that a smaller limit than
            ``max_tokens`` cut; ``error``, traces that the engine aborted or failed on. With a target, those of the
            problems that it looks at, before anything else.
        engine_options: the engine's own options.
        unsafe_scorers: let reasoning-gym score by code that calset does not know and that may run an answer
            (docs/problems.md).
        skip_bad: leave out rows of the sources that hold no problem, instead of refusing the source; the report counts
            them and names the first.
        progress: called with a ``Progress`` of traces while problems are checked, before the engine starts and after
            each commit: ``done`` traces are on disk. Phases: "checking problems", "starting engine", "generating".

    Raises:
        InputError: a bad model, source or option; found before the engine starts.
        EngineError: the engine did not start, or died; what finished is saved, the same call continues.
        CatalogError: the catalog cannot be written.

    Warns:
        BuildWarning: before the engine starts, of stored problems that keep another grader than the one asked for (the
            report says it again), of a Hub model whose branch is at another commit than the catalog's runs of it, and
            of other traces in the catalog, which a selection counts and the target does not.
        EngineWarning: before an error, what the engine had noted, such as servers that it dropped.
    """
    settings = BuildSettings(
        model, problems, samples=samples, target=target, need=need, need_tokens=need_tokens, confidence=confidence,
        engine=engine, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, max_tokens=max_tokens, seed=seed, system_prompt=system_prompt,
        template_options=template_options, limit=limit, decontaminate=decontaminate, kind=kind, graded=graded,
        question=question, answer=answer, grader=grader, device=device, concurrency=concurrency, graders=graders,
        commit_every_seconds=commit_every_seconds, commit_size=commit_size, retry=retry, engine_options=engine_options,
        unsafe_scorers=unsafe_scorers, skip_bad=skip_bad,
    )  # fmt: skip
    settings.require_engine()
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    plan = _planned(settings, store, progress)
    excluded = Excluded()
    schedule = _schedule(plan, store, excluded)
    if graded:
        for source in plan.sources:
            grader_version(source.source.grader)  # imports it: not only by name is it there
    evaluations = plan.decontaminator.sources if plan.decontaminator else []
    for source in [*(named.source for named in plan.sources), *evaluations]:
        store.add_source(source)
    work = Pipeline(plan, schedule, store, excluded=excluded, progress=progress)
    if not work.has_work():
        work.emit("done")
        return _report(work, None, 0.0, [])
    for text in plan.other_graders:
        python_warnings.warn(text, BuildWarning, stacklevel=2)
    return _generate(work)


def _schedule(plan: Plan, store: Catalog, excluded: Excluded) -> Schedule:
    settings, opened = plan.settings, plan.opened(store, excluded.add)
    retry = Retry(frozenset(settings.retry), plan.max_tokens)
    if settings.aim is None:
        return FixedSchedule(opened, plan.key, settings.samples, retry)
    return AdaptiveSchedule(
        opened, plan.key, settings.samples, settings.aim, render=plan.prompt_ids, retry=retry, seed=settings.seed
    )


def _generate(work: Pipeline) -> BuildReport:
    """Start the engine and the graders, and stream traces into the catalog."""
    plan, settings, warnings = work.plan, work.settings, []
    engine = settings.engine
    work.emit("starting engine")
    with GradingPool(settings.graders, unsafe_scorers=settings.unsafe_scorers) as pool:
        if settings.graded:
            pool.warm(plan.sources[0].source.grader)
        began = time.monotonic()
        running = _running(plan)
        try:
            start_seconds = time.monotonic() - began
            if engine == "auto" and running.name != resolve_engine("auto"):
                warnings.append(
                    f"vLLM is installed but cannot be imported, {running.name} ran instead; --engine vllm says why"
                )
            work.generate(running, pool)
            warnings += _said_by(running)
        except Exception:
            # No report will say them, and they may be why: which server was dropped, and for what.
            for text in _said_by(running):
                python_warnings.warn(text, EngineWarning, stacklevel=3)
            raise
        finally:
            if isinstance(engine, str):
                running.close()
    return _report(work, running.name, start_seconds, warnings)


@shows(BuildOptions)
def dry_run(
    model: str | Path,
    problems: str | Sequence[str],
    *,
    tokens_per_second: float | None = None,
    gpu: str | None = None,
    n_devices: int | None = None,
    catalog: Catalog | str | Path | None = None,
    progress: OnProgress | None = None,
    **options: Unpack[BuildOptions],
) -> PlanReport:
    """Estimate what ``build`` with these arguments would do and cost; starts no engine, writes nothing, needs no GPU.

    With a ``target`` that is the most that it may do. vLLM and its options are not looked for: it need not be here.

    Args:
        tokens_per_second: completion tokens a second of all devices together; the table of measured rates when None.
        gpu: plan for this GPU (H100, H200, A100) instead of what is here.
        n_devices: GPUs in all; those that are here when None.
        catalog, progress, options: ``build``'s.

    Raises:
        InputError: what ``build`` would refuse, or a rate that nothing tells.
    """
    from calset.builder.cost import estimate, length_history
    from calset.builder.environment import hardware

    settings = BuildSettings(model, problems, **options)
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    plan = _planned(settings, store, progress)
    report = estimate(
        plan.info,
        plan.first_prompt_ids,
        n_problems=len(plan.problem_ids),
        n_requested=plan.n_requested,
        n_existing=plan.existing.n - plan.existing.again,
        prompt_tokens=plan.prompt_tokens,
        max_tokens=plan.max_tokens,
        tokens_per_second=tokens_per_second,
        history=length_history(store, model=plan.info.model, generation_key=plan.key),
        hardware=hardware(),
        gpu=gpu,
        n_devices=n_devices,
        disk_free_bytes=shutil.disk_usage(store.path.resolve().parent).free,
    )
    left_out = len(plan.excluded_ids)
    said = [f"{left_out} problems are left out: evaluation sources hold them too"] if left_out else []
    said = [*plan.warnings, *plan.existing.warnings, *plan.other_graders, *said]
    return replace(report, warnings=(*said, *report.warnings))


def _planned(settings: BuildSettings, store: Catalog, progress: OnProgress | None) -> Plan:
    """Make the plan of a build, warning of what its report would say too late."""
    sources = open_sources(settings, store)
    info = open_model(settings.model, store, template_options=settings.template_options)
    decontaminator = _decontaminator(settings.decontaminate, store, skip_bad=settings.skip_bad)
    plan = make_plan(settings, info, sources, store, decontaminator=decontaminator, progress=_checking(progress))
    check_length((settings.engine_options or {}).get("max_model_len", plan.longest), plan.longest)
    # In a report it would come after the hours that it may save.
    if settings.aim is not None and settings.kind == "build" and (text := uncounted(plan, store)):
        python_warnings.warn(text, BuildWarning, stacklevel=3)
    return plan


def _decontaminator(sources: str | Sequence[str], store: Catalog, *, skip_bad: bool) -> Decontaminator | None:
    if not sources:
        return None
    from calset.builder.decontaminate import against_sources

    return against_sources(sources, pinned=store.source_revisions(), skip_bad=skip_bad)


def _running(plan: Plan) -> Engine:
    """Open the engine that the settings name, or give a running one the model's weights."""
    settings, info = plan.settings, plan.info
    engine = settings.engine
    if isinstance(engine, str):
        given = {"max_model_len": plan.longest, "device": settings.device, **settings.all_engine_options}
        return open_engine(engine, info, **given)
    # Without this, traces could be recorded as one checkpoint's while another answers.
    if engine.loaded != info.revision:
        engine.load_weights(info.folder, info.revision)
    return engine


def _said_by(engine: Engine) -> list[str]:
    """What an engine noted while it ran, of those that note anything."""
    return list(getattr(engine, "warnings", ()))


def _checking(progress: OnProgress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda n_problems: progress(Progress("checking problems", facts={"problems": n_problems}))


def _report(work: Pipeline, engine: str | None, start_seconds: float, warnings: Sequence[str]) -> BuildReport:
    plan, saved, aim = work.plan, work.saved, work.settings.aim
    facts = work.schedule.facts()
    n_bad, bad = bad_rows_of(plan.sources)
    return BuildReport(
        run_id=work.run_id,
        generation_key=plan.key,
        model=plan.info.model,
        model_revision=plan.info.revision,
        kind=work.settings.kind,
        engine=engine,
        n_problems=len(plan.problem_ids),
        n_requested=plan.n_requested if aim is None else None,
        n_existing=work.n_existing,
        n_excluded=len(plan.excluded_ids),
        n_new=saved.n_traces,
        n_tokens=saved.n_tokens,
        seconds=work.seconds,
        start_seconds=start_seconds,
        verdicts=dict(saved.verdicts),
        finish_reasons=dict(saved.finish_reasons),
        truncated=saved.truncated,
        max_tokens=plan.max_tokens,
        catalog=str(work.store.path),
        stopped=work.stopped,
        problem_ids=plan.problem_ids,
        target=None if aim is None else {**aim.as_dict(), **facts},
        warnings=(
            *plan.warnings,
            *plan.existing.warnings,
            *plan.other_graders,
            *warnings,
            *([] if work.stopped else work.schedule.warnings()),
        ),
        n_bad=n_bad,
        bad=bad,
    )

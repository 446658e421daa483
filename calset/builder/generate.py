"""build(): problems x samples -> traces with verdicts in the catalog, resumable at any moment.

The unit of work is (problem, sample index) and inserting is an anti-join, so resume, de-duplication and idempotence are
one thing. What is to be done is found out in plan.py, which unit comes next is decided in schedule.py or adaptive.py,
and pipeline.py does it.
"""

from __future__ import annotations

import shutil
import time
import warnings as python_warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.builder.adaptive import AdaptiveSchedule, Target
from calset.builder.engines import Engine, Sampling, check_length, check_options, open_engine, resolve_engine
from calset.builder.grading import grader_version
from calset.builder.grading.pool import GradingPool
from calset.builder.grading.scorers import check_scorers
from calset.builder.pipeline import BuildProgress, Excluded, Pipeline, Report
from calset.builder.plan import Plan, make_plan, open_model, open_sources, uncounted
from calset.builder.problems import gym_tasks
from calset.builder.schedule import FixedSchedule, Retry, Schedule
from calset.catalog.catalog import Catalog
from calset.catalog.recipes import Recipe
from calset.catalog.records import RunKind
from calset.errors import BuildWarning, EngineWarning, InputError

if TYPE_CHECKING:
    from calset.builder.planning import PlanReport
    from calset.overlap import Decontaminator

RETRIES = ("truncated", "error")
MAX_SAMPLES = 1_000_000  # beyond, it is a typing error


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
    progress: Report | None = None,
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
        progress: called in this thread with a ``BuildProgress`` before the engine starts and after each commit.

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
    asked = dict(locals())
    aim = _checked(asked, engine)
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    plan = _planned(asked, store)
    excluded = Excluded()
    opened = plan.opened(store, excluded.add)
    again = Retry(frozenset(retry), plan.max_tokens)
    schedule: Schedule
    if aim is not None:
        schedule = AdaptiveSchedule(opened, plan.key, samples, aim, render=plan.prompt_ids, retry=again, seed=seed)
    else:
        schedule = FixedSchedule(opened, plan.key, samples, again)
    if graded:
        for source in plan.sources:
            grader_version(source.source.grader)  # imports it: not only by name is it there
    evaluations = plan.decontaminator.sources if plan.decontaminator else []
    for source in [*(named.source for named in plan.sources), *evaluations]:
        store.add_source(source)
    work = Pipeline(
        plan,
        schedule,
        store,
        graded=graded,
        commit_every_seconds=commit_every_seconds,
        commit_size=commit_size,
        excluded=excluded,
        engine_options=engine_options,
        progress=progress,
    )
    warnings = [*plan.warnings, *plan.existing.warnings, *plan.other_graders]
    if not work.has_work():
        work.emit("done")
        return _report(work, None, 0.0, aim, warnings)
    for text in plan.other_graders:
        python_warnings.warn(text, BuildWarning, stacklevel=2)
    work.emit("starting engine")
    with GradingPool(graders, unsafe_scorers=unsafe_scorers) as pool:
        if graded:
            pool.warm(plan.sources[0].source.grader)
        began = time.monotonic()
        running = _running(engine, plan, device=device, concurrency=concurrency, options=engine_options or {})
        try:
            start_seconds = time.monotonic() - began
            if isinstance(engine, str) and engine == "auto" and running.name != resolve_engine(engine):
                warnings.append(
                    f"vLLM is installed but cannot be imported, {running.name} ran instead; --engine vllm says why"
                )
            work.generate(running, pool)
            warnings += _said_by(running)
        except Exception:
            # No report will say them, and they may be why: which server was dropped, and for what.
            for text in _said_by(running):
                python_warnings.warn(text, EngineWarning, stacklevel=2)
            raise
        finally:
            if isinstance(engine, str):
                running.close()
    return _report(work, running.name, start_seconds, aim, warnings)


def dry_run(
    model: str | Path,
    problems: str | Sequence[str],
    *,
    tokens_per_second: float | None = None,
    gpu: str | None = None,
    n_devices: int | None = None,
    **options: Any,
) -> PlanReport:
    """What ``build`` with these arguments would do and cost; starts no engine, writes nothing, needs no GPU.

    With a ``target`` that is the most that it may do. vLLM and its options are not looked for: it need not be here.

    Args:
        tokens_per_second: completion tokens a second of all devices together; the table of measured rates when None.
        gpu: plan for this GPU (H100, H200, A100) instead of what is here.
        n_devices: GPUs in all; those that are here when None.
        options: ``build``'s.

    Raises:
        InputError: what ``build`` would refuse, or a rate that nothing tells.
    """
    from calset.builder.planning import estimate, length_history
    from calset.builder.provenance import hardware

    bound = signature(build).bind(model, problems, **options)
    bound.apply_defaults()
    asked = bound.arguments
    _checked(asked, None if asked["engine"] in ("auto", "vllm") else asked["engine"])
    store = asked["catalog"] if isinstance(asked["catalog"], Catalog) else Catalog(asked["catalog"])
    plan = _planned(asked, store)
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


def _planned(asked: Mapping[str, Any], store: Catalog) -> Plan:
    """The checked plan of a build that was asked for with these arguments."""
    problems, engine = asked["problems"], asked["engine"]
    sources = open_sources(
        [problems] if isinstance(problems, str) else list(problems),
        store,
        **{name: asked[name] for name in ("question", "answer", "grader", "limit")},
    )
    if asked["graded"]:
        check_scorers(gym_tasks(s.source for s in sources), unsafe_scorers=asked["unsafe_scorers"])
    info = open_model(asked["model"], store, template_options=asked["template_options"])
    given = {f.name: asked[f.name] for f in fields(Sampling) if asked[f.name] is not None}
    plan = make_plan(
        info,
        sources,
        store,
        sampling=replace(info.sampling, **given),  # the model's own, where nothing else is asked
        limit=None if isinstance(engine, str) else min(info.max_model_len, engine.max_model_len),
        decontaminator=_decontaminator(asked["decontaminate"], store),
        progress=_checking(asked["progress"]),
        **{name: asked[name] for name in ("samples", "system_prompt", "max_tokens", "kind", "seed", "retry", "graded")},
    )
    check_length((asked["engine_options"] or {}).get("max_model_len", plan.longest), plan.longest)
    # In a report it would come after the hours that it may save.
    if asked["target"] is not None and plan.kind == "build" and (text := uncounted(plan, store)):
        python_warnings.warn(text, BuildWarning, stacklevel=3)
    return plan


def _checked(asked: Mapping[str, Any], engine: str | Engine | None) -> Target | None:
    """The target of a build that was asked for with these arguments, all checked that can be without its model.

    Args:
        engine: whose options are checked; None where it need not be here.

    Raises:
        InputError: naming the argument.
    """
    aim = _target(*(asked[name] for name in ("target", "need", "need_tokens", "confidence", "graded")))
    samples, seed, retry = (asked[name] for name in ("samples", "seed", "retry"))
    if not 1 <= samples <= MAX_SAMPLES:
        raise InputError(f"samples must be at least 1 and at most {MAX_SAMPLES:,}, not {samples}")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed must be a whole number of at most 63 bits, not {seed}")
    if unknown := sorted(set(retry) - set(RETRIES)):
        raise InputError(f"retry takes {' and '.join(RETRIES)}, not {unknown[0]!r}")
    if aim is not None:
        aim.rule(samples)
    if engine is None or isinstance(engine, str):
        options = {"concurrency": asked["concurrency"]} | dict(asked["engine_options"] or {})
        check_options(resolve_engine(engine) if engine else "vllm", options)
    return aim


def _target(
    target: str | Path | Recipe | None,
    need: int | None,
    need_tokens: int | None,
    confidence: float | None,
    graded: bool,
) -> Target | None:
    given = {"need": need, "need_tokens": need_tokens, "confidence": confidence}
    given = {name: value for name, value in given.items() if value is not None}
    if target is None:
        if given:
            raise InputError(f"{next(iter(given))} is for an adaptive build: pass a target recipe with it")
        return None
    if not graded:
        raise InputError("an adaptive build decides by verdicts: it cannot run ungraded")
    return Target.of(target, **given)


def _decontaminator(sources: str | Sequence[str], store: Catalog) -> Decontaminator | None:
    if not sources:
        return None
    from calset.builder.decontamination import against_sources

    return against_sources(sources, pinned=store.source_revisions())


def _running(
    engine: str | Engine, plan: Plan, *, device: str | None, concurrency: int | None, options: Mapping[str, Any]
) -> Engine:
    info = plan.info
    if isinstance(engine, str):
        asked = {"max_model_len": plan.longest, "device": device, "concurrency": concurrency}
        return open_engine(engine, info, **(asked | dict(options)))
    # Without this, traces could be recorded as one checkpoint's while another answers.
    if engine.loaded != info.revision:
        engine.load_weights(info.folder, info.revision)
    return engine


def _said_by(engine: Engine) -> list[str]:
    """What an engine noted while it ran, of those that note anything."""
    return list(getattr(engine, "warnings", ()))


def _checking(progress: Report | None) -> Callable[[int], None] | None:
    if progress is None:
        return None

    def say(n_problems: int) -> None:
        progress(BuildProgress(None, 0, 0, 0, 0.0, 0.0, 0, 0, 0, None, "checking problems", n_problems=n_problems))

    return say


def _report(
    work: Pipeline, engine: str | None, start_seconds: float, target: Target | None, warnings: Sequence[str]
) -> BuildReport:
    plan, tally = work.plan, work.tally
    facts = work.schedule.facts()
    return BuildReport(
        run_id=work.run_id,
        generation_key=plan.key,
        model=plan.info.model,
        model_revision=plan.info.revision,
        kind=plan.kind,
        engine=engine,
        n_problems=len(plan.problem_ids),
        n_requested=plan.n_requested if target is None else None,
        n_existing=work.n_existing,
        n_excluded=len(plan.excluded_ids),
        n_new=tally.saved,
        n_tokens=tally.tokens,
        seconds=work.seconds,
        start_seconds=start_seconds,
        verdicts=dict(tally.verdicts),
        finish_reasons=dict(tally.finish_reasons),
        truncated=tally.truncated / tally.saved if tally.saved else None,
        max_tokens=plan.max_tokens,
        catalog=str(work.store.path),
        stopped=work.stopped,
        problem_ids=plan.problem_ids,
        target=None if target is None else {**target.as_dict(), **facts},
        warnings=(*warnings, *([] if work.stopped else work.schedule.warnings())),
    )

"""The demo: the whole chain on the bundled tiny reasoning model, reported whichever way it comes out.

Traces -> ``ssgr``, ``rac``, ``prompts`` and ``text`` subsets of one token budget -> SparseGPT and Wanda at one sparsity
-> evaluation on held-out problems. It must not know how any part works.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calset.bundled import MODEL, PROSE
from calset.demo.report import Arm, DemoReport, DemoSettings, draw
from calset.errors import CalsetError, InputError, Stopped
from calset.io.progress import OnProgress, Progress, silent

if TYPE_CHECKING:
    from calset.builder.engines.base import Engine
    from calset.catalog.catalog import Catalog
    from calset.catalog.records import Subset
    from calset.evaluation.evaluate import EvaluationReport

CATALOG = "demo.duckdb"  # not the default name: a demo in a project folder must not write to its catalog
MODEL_LENGTH = 1024  # prompt and completion tokens that the engine must hold


def run_demo(
    out: str | Path = "calset-demo",
    *,
    engine: str = "auto",
    seed: int = 0,
    settings: DemoSettings | None = None,
    progress: OnProgress | None = None,
) -> DemoReport:
    """Run the demo into the folder ``out``: catalog, pruned models, ``report.json`` and ``demo.png``.

    Run again on the same folder it keeps what is there: traces by their ids, pruned models by their ``pruning.json``.

    Args:
        progress: called with a ``Progress`` whose phase is the stage: what a build, a pruning or an evaluation tells.

    Raises:
        InputError: ``out`` holds something else.
        CalsetError: a calibration problem turned up among the held-out ones.
    """
    from calset.builder.engines import open_engine
    from calset.builder.model.info import inspect
    from calset.catalog.catalog import Catalog

    began = time.monotonic()
    settings = settings or DemoSettings()
    say = progress or silent
    folder = _claim(Path(out))
    catalog = Catalog(folder / CATALOG)
    _check_disjoint()
    say(Progress("starting the engine"))
    running = open_engine(engine, inspect(MODEL), max_model_len=MODEL_LENGTH)
    try:
        build_traces(catalog, running, seed, settings, say)
        subsets = select_subsets(catalog, seed, settings)
        arms = [Arm("dense", "-", 0, 0, evaluate_model(MODEL, "dense", catalog, running, seed, settings, say))]
        for method in settings.methods:
            for recipe, subset in subsets.items():
                pruned = prune_model(folder / f"{method}-{recipe}", subset, method, catalog, settings, say)
                evaluation = evaluate_model(pruned, f"{method} {recipe}", catalog, running, seed, settings, say)
                arms.append(Arm(method, recipe, subset.n_samples, subset.n_tokens, evaluation))
        name = running.name
    finally:
        running.close()
    plot = folder / "demo.png"
    report = DemoReport(tuple(arms), settings, name, seed, plot, folder / CATALOG, time.monotonic() - began)

    draw(report, catalog, subsets[settings.shown], plot)
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2, default=str) + "\n", encoding="utf-8")
    return report


def _claim(folder: Path) -> Path:
    """The output folder, empty or of an earlier demo."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name another folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CATALOG).exists():
        raise InputError(f"{folder} holds something else than a demo: name another folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_disjoint() -> None:
    """No calibration question among the held-out ones, by question text."""
    from calset.builder.problems import load_problems

    calibration = {p.question for p in load_problems("demo")[1]}
    held_out = {p.question for p in load_problems("demo:evaluate")[1]}
    if shared := calibration & held_out:
        raise CalsetError(
            f"{len(shared)} calibration problems are among the held-out ones: problems.json must be mended"
        )


def build_traces(catalog: Catalog, engine: Engine, seed: int, settings: DemoSettings, say: OnProgress = silent) -> None:
    from calset.builder.build import build

    report = build(
        MODEL,
        "demo",
        samples=settings.samples,
        limit=settings.build_limit,
        catalog=catalog,
        engine=engine,
        seed=seed,
        max_tokens=settings.max_tokens,
        progress=_stage(say, "traces"),
    )
    if report.stopped:
        raise Stopped("the demo was stopped; run the same command again to continue it")


def _stage(say: OnProgress, label: str) -> OnProgress:
    """Pass events on under the name of the demo's stage."""

    def show(event: Progress) -> None:
        facts = {name: fact for name, fact in event.facts.items() if name == "tokens/s"}
        say(replace(event, phase=label, facts=facts, eta_seconds=None))

    return show


def select_subsets(catalog: Catalog, seed: int, settings: DemoSettings) -> dict[str, Subset]:
    from calset.catalog.select import select

    subsets = {}
    for recipe in settings.recipes:
        extra = {"text": PROSE, "window": settings.window} if recipe == "text" else {}
        subsets[recipe] = select(catalog, f"demo-{recipe}", recipe, tokens=settings.budget, seed=seed, **extra)
    return subsets


def prune_model(
    out: Path, subset: Subset, method: str, catalog: Catalog, settings: DemoSettings, say: OnProgress = silent
) -> Path:
    from calset.pruning.prune import prune

    if (out / "pruning.json").is_file():
        made = json.loads((out / "pruning.json").read_text(encoding="utf-8"))
        if made["calibration"]["content_hash"] == subset.content_hash and made["sparsity"] == settings.sparsity:
            catalog.add_pruning(made)  # a demo killed just before that had not kept it; twice is once
            return out
        raise InputError(f"{out} is from a demo with other settings: name another folder with -o")
    prune(
        MODEL,
        subset,
        out,
        method=method,
        sparsity=settings.sparsity,
        catalog=catalog,
        progress=_stage(say, f"prune {out.name}"),
    )
    return out


def evaluate_model(
    model: Path,
    label: str,
    catalog: Catalog,
    engine: Engine,
    seed: int,
    settings: DemoSettings,
    say: OnProgress = silent,
) -> EvaluationReport:
    from calset.evaluation.evaluate import evaluate

    return evaluate(
        model,
        "demo:evaluate",
        catalog=catalog,
        engine=engine,
        seed=seed,
        max_tokens=settings.max_tokens,
        limit=settings.evaluation_limit,
        progress=_stage(say, f"evaluate {label}"),
    )

"""Small real catalogs with synthetic problems, runs, traces and grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.records import Grade, Problem, Run, Source, Subset, Trace
from calset.catalog.references import export
from calset.catalog.subsets.facts import published_rows
from calset.catalog.subsets.folder import read_directory
from calset.catalog.subsets.versions import keep

START = datetime(2026, 1, 1)


def make_source(name: str = "demo") -> Source:
    return Source(ids.digest("source", name), name, f"{name}?size=4", "demo", "1", "math", "MIT")


def make_problem(n: int = 0, source: str = "demo", answer: str | None = None, **changes: Any) -> Problem:
    question, gold = f"What is {n} + {n}?", str(2 * n) if answer is None else answer
    values = {
        "problem_id": ids.problem_id(source, question, gold),
        "source_id": make_source(source).source_id,
        "source": source,
        "source_row": str(n),
        "question": question,
        "answer": gold,
        "grader": "math",
        "metadata": {"difficulty": {"terms": n}},
    }
    return Problem(**{**values, **changes})


def make_run(model: str = "tiny", *, kind: str = "build", revision: str = "r1", **changes: Any) -> Run:
    sampling = {"temperature": 1.0, "top_p": 1.0}
    key = ids.generation_key(
        model=model,
        revision=revision,
        tokenizer_hash="tok",
        chat_template_hash="chat",
        system_prompt=None,
        sampling=sampling,
        kind=kind,
    )
    values = {
        "run_id": ids.digest("run", model, revision, kind, str(changes)),
        "kind": kind,
        "generation_key": key,
        "model": model,
        "model_revision": revision,
        "tokenizer_hash": "tok",
        "chat_template_hash": "chat",
        "system_prompt": None,
        "sampling": sampling,
        "max_tokens": 64,
        "seed": 0,
        "engine": "none",
        "engine_version": "0",
        "reasoning_format": "think",
        "versions": {"calset": "0"},
        "hardware": {"cpu": "test"},
        "command": "calset build",
        "started_at": START,
    }
    return Run(**{**values, **changes})


def make_trace(problem: Problem, run: Run, sample_index: int = 0, n_tokens: int = 10, **changes: Any) -> Trace:
    trace = ids.trace_id(problem.problem_id, run.generation_key, sample_index)
    base = int(trace[:6], 16) % 1000
    values = {
        "trace_id": trace,
        "problem_id": problem.problem_id,
        "run_id": run.run_id,
        "generation_key": run.generation_key,
        "sample_index": sample_index,
        "request_seed": ids.request_seed(run.seed, problem.problem_id, sample_index),
        "prompt_ids": (1, 2, 3),
        "completion_ids": tuple(base + i for i in range(n_tokens)),
        "text": f"<think>hm</think> {problem.answer}",
        "response": problem.answer,
        "finish_reason": "stop",
        "max_tokens": run.max_tokens,
        "reasoning_start": 1,
        "reasoning_end": min(4, n_tokens),
        "answer_start": min(5, n_tokens),
        "seconds": 0.5,
        "created_at": START,
    }
    return Trace(**{**values, **changes})


def make_grade(trace: Trace, verdict: str = "correct", *, after: float = 0.0, **changes: Any) -> Grade:
    values = {
        "trace_id": trace.trace_id,
        "attempt": trace.attempt,
        "grader": "math",
        "grader_version": "0.9",
        "verdict": verdict,
        "extracted": trace.response,
        "graded_at": START + timedelta(seconds=after),
    }
    return Grade(**{**values, **changes})


def fill(
    path: Path,
    plan: Sequence[Sequence[tuple[str, int]]],
    *,
    model: str = "tiny",
    kind: str = "build",
    source: str = "demo",
) -> Catalog:
    """A catalog with one problem per entry of ``plan``, and per problem one trace per (verdict, n_tokens).

    Verdict "truncated" also makes the finish reason "length"; "ungraded" leaves the trace without a grade.
    """
    catalog = Catalog(path)
    problems = [make_problem(n, source) for n in range(len(plan))]
    run = make_run(model, kind=kind)
    traces, grades = [], []
    for problem, samples in zip(problems, plan, strict=True):
        for i, (verdict, n_tokens) in enumerate(samples):
            reason = "length" if verdict == "truncated" else "stop"
            trace = make_trace(problem, run, i, n_tokens, finish_reason=reason)
            traces.append(trace)
            if verdict != "ungraded":
                grades.append(make_grade(trace, verdict))
    catalog.add_source(make_source(source))
    catalog.add_problems(problems)
    catalog.add_run(run)
    catalog.record(traces, grades)
    return catalog


def keep_as_pulled(catalog: Catalog, subset: Subset, path: Path) -> Catalog:
    """Another catalog that keeps a subset as a pull does: with its published rows, and no trace."""
    folder = read_directory(export(catalog, subset, path.with_suffix(".folder")))
    hub = {"repo": "me/it", "commit": "0" * 40, "tag": "x-v1", "manifest": "manifests/x.json"}
    pulled = replace(folder, origin={**(folder.origin or {}), "hub": hub}, data_files=())
    keep(Catalog(path), pulled, published_rows(folder))
    return Catalog(path)


def rows_of(catalog: Catalog, subset: Subset) -> list[dict[str, Any]]:
    """The view's rows of a subset's samples, in their order."""
    by_id = {row["trace_id"]: row for row in catalog.query("FROM trace").as_dicts()}
    return [by_id[sample.trace_id] for sample in subset.samples]

"""Evaluate a (pruned) model: generate and grade held-out problems, and report more than accuracy.

Why more: a badly calibrated pruned model rambles. RAC (arXiv 2509.12464, tables 1 to 3) shows evaluation time
growing five-fold where accuracy halves, so completion length, non-termination, loops and wall time stand beside it.

Evaluation reuses the builder whole (engines, graders, resume); its traces go into the catalog under the run kind
``evaluate``, apart from what selection may take. It must not know how a model was pruned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calset.catalog.records import JUDGED
from calset.errors import CalsetError, Stopped
from calset.io.progress import OnProgress
from calset.pruning.model.checkpoint import RECORD
from calset.pruning.record import read_record

if TYPE_CHECKING:
    from calset.builder.build import BuildReport
    from calset.builder.engines.base import Engine
    from calset.catalog.catalog import Catalog

MAX_PERIOD = 256  # tokens; longer cycles are re-derivations rather than loops
MIN_REPEATS = 4
MIN_LOOP_TOKENS = 24


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What a model did on held-out problems.

    ``accuracy`` is the mean over problems of the share of correct samples among the judged ones (a broken reference or
    a grader's own failure says nothing about the model; ``warnings`` counts them); ``accuracy_se`` its standard error
    over problems (clustered by problem, so more samples a problem do not pretend to be more problems). Lengths are
    completion tokens. ``non_termination`` is the share of traces cut by the token limit; ``loop_rate`` the share that
    end in a repeated cycle. ``tokens_per_second`` is over generation wall time, or None when every trace was already in
    the catalog.
    """

    model: str
    model_revision: str
    problems: str
    n_problems: int
    n_samples: int
    n_traces: int
    accuracy: float
    accuracy_se: float
    mean_tokens: float
    median_tokens: float
    p90_tokens: float
    non_termination: float
    loop_rate: float
    no_answer: float
    n_tokens: int
    seconds: float
    tokens_per_second: float | None
    run_id: str | None  # None when every trace was already there
    generation_key: str
    max_tokens: int
    seed: int
    verdicts: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(measure, value), for a table."""
        verdicts = sorted(self.verdicts.items(), key=lambda item: -item[1])
        return [
            ("accuracy", f"{self.accuracy:.3f} ± {self.accuracy_se:.3f} ({self.n_problems} problems)"),
            (
                "completion tokens",
                f"mean {self.mean_tokens:.0f}, median {self.median_tokens:.0f}, p90 {self.p90_tokens:.0f}",
            ),
            ("non-termination", f"{self.non_termination:.3f} (limit {self.max_tokens} tokens)"),
            ("loop rate", f"{self.loop_rate:.3f}"),
            ("no answer", f"{self.no_answer:.3f}"),
            ("verdicts", ", ".join(f"{n} {verdict}" for verdict, n in verdicts)),
            (
                "tokens/s",
                f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else "- (all traces were there)",
            ),
        ]


def evaluate(
    model: str | Path,
    problems: str | Sequence[str],
    *,
    samples: int = 1,
    catalog: Catalog | str | Path | None = None,
    engine: str | Engine = "auto",
    max_tokens: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    system_prompt: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    question: str | None = None,
    answer: str | None = None,
    grader: str | None = None,
    concurrency: int | None = None,
    engine_options: Mapping[str, Any] | None = None,
    unsafe_scorers: bool = False,
    skip_bad: bool = False,
    progress: OnProgress | None = None,
) -> EvaluationReport:
    """Generate ``samples`` traces a problem with ``model``, grade them, and summarise; recorded in the catalog.

    Args:
        model: a checkpoint folder or Hub id, as ``build`` takes it.
        problems: problem sources, as ``build`` takes them; keep them apart from the calibration problems.
        engine: an engine's name, or a running engine that already holds ``model``'s weights.
        unsafe_scorers, skip_bad, progress: see ``build``.

    Raises:
        InputError: bad problems, model or options.
        EngineError: the engine could not start or died; running again continues.
        Stopped: by Ctrl-C, before every trace was there.
        CalsetError: no trace could be graded.
    """
    from calset.builder.build import build
    from calset.catalog.catalog import Catalog

    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    content_hash = _calibrated_on(model)
    report = build(
        model,
        problems,
        samples=samples,
        catalog=store,
        engine=engine,
        max_tokens=max_tokens,
        seed=seed,
        limit=limit,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        system_prompt=system_prompt,
        template_options=template_options,
        question=question,
        answer=answer,
        grader=grader,
        concurrency=concurrency,
        engine_options=engine_options,
        unsafe_scorers=unsafe_scorers,
        skip_bad=skip_bad,
        kind="evaluate",
        progress=progress,
    )
    if report.stopped:
        raise Stopped("the evaluation was stopped before it finished; run the same command again to continue it")
    spec = problems if isinstance(problems, str) else " ".join(problems)
    rows = _traces(store, report.generation_key, report.problem_ids, samples)
    result = _summary(
        rows, report, spec, samples, seed, [*report.warnings, *_overlap(store, content_hash, report.problem_ids)]
    )
    store.add_evaluation(result.as_dict())
    return result


def is_looping(token_ids: Sequence[int], *, max_period: int = MAX_PERIOD, min_repeats: int = MIN_REPEATS) -> bool:
    """True when the completion ends in at least ``min_repeats`` copies of one cycle of at most ``max_period`` tokens.

    A cycle must also fill ``MIN_LOOP_TOKENS`` tokens, so that "0, 0, 0, 0" at the end of a sum is not a loop.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    for period in range(1, min(max_period, len(ids) // min_repeats) + 1):
        window = max(period * min_repeats, MIN_LOOP_TOKENS)
        if window > len(ids):
            continue
        tail = ids[-window:]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Row:
    problem_id: str
    verdict: str
    n_tokens: int
    finish_reason: str
    looping: bool


def _traces(store: Catalog, generation_key: str, problem_ids: Sequence[str], samples: int) -> list[_Row]:
    """The evaluation's traces: those of the asked problems and sample indices, whichever run made them."""
    rows = store.rows(
        """
        SELECT t.problem_id, t.verdict, t.n_tokens, t.finish_reason, k.completion_ids
        FROM trace t JOIN trace_tokens k USING (trace_id, attempt)
        WHERE t.generation_key = ? AND t.sample_index < ? AND t.problem_id IN (SELECT unnest(?))
        ORDER BY t.trace_id
        """,
        [generation_key, samples, list(problem_ids)],
    )
    return [
        _Row(
            row["problem_id"],
            row["verdict"],
            row["n_tokens"],
            row["finish_reason"],
            row["finish_reason"] == "length" and is_looping(row["completion_ids"]),
        )
        for row in rows
    ]


def _summary(
    rows: Sequence[_Row], build_report: BuildReport, spec: str, samples: int, seed: int, warnings: Sequence[str]
) -> EvaluationReport:
    if not rows:
        raise CalsetError("the evaluation left no traces; see `calset stats`")
    by_problem: dict[str, list[bool]] = {}
    verdicts = Counter(row.verdict for row in rows)
    judged = [row for row in rows if row.verdict in JUDGED]
    for row in judged:
        by_problem.setdefault(row.problem_id, []).append(row.verdict == "correct")
    if not judged:
        raise CalsetError(f"no trace could be graded ({_counted(verdicts)}): see the column detail of the view trace")
    if len(judged) < len(rows):
        unjudged = Counter({v: n for v, n in verdicts.items() if v not in JUDGED})
        warnings = [*warnings, f"{len(rows) - len(judged)} of {len(rows)} traces were not judged: {_counted(unjudged)}"]
    means = np.array([np.mean(v) for v in by_problem.values()])
    lengths = np.array([r.n_tokens for r in rows])
    se = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else float("nan")
    fresh = build_report.n_new > 0 and build_report.seconds > 0
    return EvaluationReport(
        model=build_report.model,
        model_revision=build_report.model_revision,
        problems=spec,
        n_problems=len(by_problem),
        n_samples=samples,
        n_traces=len(rows),
        accuracy=float(means.mean()),
        accuracy_se=se,
        mean_tokens=float(lengths.mean()),
        median_tokens=float(np.median(lengths)),
        p90_tokens=float(np.percentile(lengths, 90)),
        non_termination=float(np.mean([r.finish_reason == "length" for r in rows])),
        loop_rate=float(np.mean([r.looping for r in rows])),
        no_answer=verdicts["no_answer"] / len(rows),
        n_tokens=int(lengths.sum()),
        seconds=build_report.seconds,
        tokens_per_second=build_report.n_tokens / build_report.seconds if fresh else None,
        run_id=build_report.run_id,
        generation_key=build_report.generation_key,
        max_tokens=build_report.max_tokens,
        seed=seed,
        verdicts=dict(verdicts),
        warnings=tuple(warnings),
    )


def _counted(verdicts: Counter[str]) -> str:
    return ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())


def _calibrated_on(model: str | Path) -> str | None:
    """The content hash of the subset that calibrated this model; None without one: not pruned, or by a method without.

    Raises:
        InputError: a ``pruning.json`` that cannot be read.
    """
    if not (Path(model) / RECORD).is_file():
        return None
    calibration = read_record(Path(model)).calibration
    return calibration.content_hash if calibration.used else None


def _overlap(store: Catalog, content_hash: str | None, problem_ids: Sequence[str]) -> list[str]:
    """A warning when questions of the evaluation were in the subset that calibrated the model.

    By question text, since the same question from two files is two problems.
    """
    if content_hash is None:
        return []
    if not store.rows("SELECT 1 AS there FROM subsets WHERE content_hash = ?", [content_hash]):
        return ["the subset this model was calibrated on is not in this catalog: its problems were not compared"]
    (found,) = store.rows(
        """
        WITH calibration AS (
            SELECT DISTINCT lower(trim(p.question)) AS question
            FROM subset_items i JOIN subsets s USING (name, version) JOIN problems p USING (problem_id)
            WHERE s.content_hash = ?
        )
        SELECT count(*) AS n FROM problems p SEMI JOIN calibration c ON lower(trim(p.question)) = c.question
        WHERE p.problem_id IN (SELECT unnest(?))
        """,
        [content_hash, list(problem_ids)],
    )
    if not found["n"]:
        return []
    return [f"{found['n']} of the evaluated problems were in the subset this model was calibrated on"]

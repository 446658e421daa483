"""Decontamination: evaluation sources to compare with, and which problems of a catalog they hold too.

The rule is ``calset.catalog.contamination.overlap``'s; here are the sources behind it and the evidence that the catalog
keeps. Must not know: models, engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calset.builder.problems import load_problems
from calset.catalog.catalog import Catalog
from calset.catalog.contamination.overlap import MIN_SHARE, NGRAMS, Decontaminator, OverlapRule, clean
from calset.catalog.records import Contamination, Problem, Source
from calset.catalog.store.values import chunks
from calset.io.progress import OnProgress, Progress, silent

PAGE = 512  # problems checked between two commits
N_EXAMPLES = 10


def against_sources(
    specs: str | Sequence[str],
    n: Sequence[int] = NGRAMS,
    *,
    min_share: float = MIN_SHARE,
    pinned: Mapping[str, str] | None = None,
    question: str | None = None,
    answer: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Decontaminator:
    """Open a ``Decontaminator`` of evaluation sources, named as ``load_problems`` takes them.

    Args:
        question, answer, limit, skip_bad: see ``load_problems``.
        pinned: spec -> the revision to take, as ``Catalog.source_revisions`` gives them.

    Raises:
        InputError: an unknown source, or a rule that makes no sense.
    """
    OverlapRule(tuple(n), min_share)  # before anything is read
    named = [specs] if isinstance(specs, str) else list(specs)
    revisions = pinned or {}
    opened = (
        load_problems(
            spec, revision=revisions.get(spec), question=question, answer=answer, limit=limit, skip_bad=skip_bad
        )
        for spec in named
    )
    return Decontaminator(opened, n, min_share=min_share)


# --- what a catalog holds already -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecontaminationReport:
    """What a check found; the evidence itself is in the catalog's view ``excluded``."""

    evaluations: tuple[str, ...]  # names of the evaluation sources
    n_evaluation: int  # their questions
    n_checked: int
    n_contaminated: int  # problems
    n_traces: int  # calibration traces that the catalog holds of contaminated problems
    by_source: Mapping[str, int]  # evaluation source -> contaminated problems
    examples: tuple[Mapping[str, Any], ...]  # the strongest evidence against each of a few problems
    catalog: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decontaminate(
    catalog: Catalog | str | Path | None,
    against: str | Sequence[str],
    *,
    problems: str | Sequence[str] | None = None,
    n: Sequence[int] = NGRAMS,
    min_share: float = MIN_SHARE,
    question: str | None = None,
    answer: str | None = None,
    skip_bad: bool = False,
    progress: OnProgress | None = None,
) -> DecontaminationReport:
    """Check problems against evaluation sources and keep the evidence, so that a selection can leave them out.

    Args:
        catalog: where the problems are and the evidence goes.
        against: evaluation sources, as ``load_problems`` takes them.
        problems: check these sources; those that are contaminated are kept with their evidence. By default the problems
            that the catalog holds, but for those that it only holds because they were evaluated.
        n, min_share: see ``Decontaminator``.
        question, answer: the columns of the evaluation sources.
        skip_bad: leave out rows of all these sources that hold no problem, with a warning.
        progress: called with a ``Progress`` of checked problems after each page (phase "checking").

    Raises:
        InputError: an unknown source, a rule that makes no sense, or no catalog to check.
        CatalogError: the catalog cannot be read or written.
    """
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    pinned = store.source_revisions()
    decontaminator = against_sources(
        against, n, min_share=min_share, pinned=pinned, question=question, answer=answer, skip_bad=skip_bad
    )
    if problems is None:
        pages, total = _kept_problems(store, decontaminator.sources)
    else:
        pages, total = _named_problems([problems] if isinstance(problems, str) else problems, skip_bad)
    emit = progress or silent
    strongest: dict[str, Contamination] = {}
    questions: dict[str, str] = {}
    by_source: Counter[str] = Counter()
    n_checked = 0
    for sources, page in pages:
        found = [(problem, evidence) for problem, evidence in clean(page, decontaminator) if evidence]
        if found:
            for source in sources:
                store.add_source(source)
            store.record((), (), problems=[p for p, _ in found], contaminations=[c for _, e in found for c in e])
        for problem, evidence in found:
            by_source.update({c.evaluation_source for c in evidence})
            strongest[problem.problem_id] = max(evidence, key=lambda c: (c.share, c.n))
            questions[problem.problem_id] = problem.question
        n_checked += len(page)
        emit(Progress("checking", n_checked, total))
    emit(Progress("done", n_checked, total, final=True))
    worst = sorted(strongest.values(), key=lambda c: (-c.share, -c.n_shared, c.problem_id))[:N_EXAMPLES]
    return DecontaminationReport(
        evaluations=tuple(sorted(source.name for source in decontaminator.sources)),
        n_evaluation=len(decontaminator),
        n_checked=n_checked,
        n_contaminated=len(strongest),
        n_traces=_traces_of(store, list(strongest)),
        by_source=dict(sorted(by_source.items())),
        examples=tuple({"question": questions[c.problem_id], **asdict(c)} for c in worst),
        catalog=str(store.path),
    )


_Pages = Iterator[tuple[Sequence[Source], Sequence[Problem]]]


def _kept_problems(store: Catalog, evaluations: Sequence[Source]) -> tuple[_Pages, int]:
    """The catalog's problems in pages. Evaluating keeps the evaluation's own problems too: they are no finding, unless
    they have calibration traces (two draws of a procedural task share problems)."""
    rows = store.rows(
        """
        SELECT problem_id FROM problems p
        WHERE source_id NOT IN (SELECT unnest(?::VARCHAR[])) OR EXISTS (
            SELECT 1 FROM traces t JOIN runs r ON r.run_id = t.run_id
            WHERE t.problem_id = p.problem_id AND r.kind = 'build')
        ORDER BY problem_id
        """,
        [[source.source_id for source in evaluations]],
    )
    kept = [row["problem_id"] for row in rows]
    return (((), list(store.problems(part).values())) for part in chunks(kept, PAGE)), len(kept)


def _named_problems(specs: Sequence[str], skip_bad: bool) -> tuple[_Pages, int]:
    loaded = [load_problems(spec, skip_bad=skip_bad) for spec in specs]
    pages = (([source], part) for source, problems in loaded for part in chunks(problems, PAGE))
    return pages, sum(len(problems) for _, problems in loaded)


def _traces_of(store: Catalog, problem_ids: list[str]) -> int:
    if not problem_ids or not store.exists():
        return 0
    sql = """
        SELECT count(*) AS n FROM latest_traces t JOIN runs r ON r.run_id = t.run_id
        WHERE r.kind = 'build' AND t.problem_id IN (SELECT unnest(?::VARCHAR[]))
    """
    return store.rows(sql, [problem_ids])[0]["n"]

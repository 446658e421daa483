"""grade(): stored traces judged again; the newest verdict counts, earlier ones stay."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calset.builder.grading import check_grader, grader_version
from calset.builder.grading import graders as known
from calset.builder.grading.grades import grade_row, submit
from calset.builder.grading.pool import GradingPool
from calset.builder.grading.scorers import check_scorers
from calset.catalog.catalog import Catalog
from calset.catalog.query import worklist
from calset.errors import InputError
from calset.io.progress import OnProgress, Progress, silent


@dataclass(frozen=True, slots=True)
class GradeReport:
    """What a re-grading did; earlier verdicts stay in the history. ``n_skipped`` had this verdict already."""

    n_graded: int
    n_changed: int
    n_skipped: int
    verdicts: dict[str, int]
    changes: dict[str, dict[str, int]]  # verdict before -> verdict now -> traces, where they differ
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def grade(
    catalog: Catalog | str | Path | None = None,
    *,
    grader: str | None = None,
    model: str | None = None,
    source: str | None = None,
    run: str | None = None,
    verdicts: Sequence[str] = (),
    ungraded: bool = False,
    force: bool = False,
    graders: int = 2,
    commit_size: int = 256,
    unsafe_scorers: bool = False,
    progress: OnProgress | None = None,
) -> GradeReport:
    """Grade stored traces again; the newest verdict counts, earlier ones stay.

    A trace whose newest grade is by the same grader at the same version is skipped: its verdict would be the same. So
    is one whose verdict is what its end says (truncated, broken, thinking never ended), whatever the grader.

    Args:
        grader: instead of each problem's own.
        model, source, run: only these traces.
        verdicts: only traces whose present verdict is one of these, e.g. ``["no_answer", "pred_unparsable"]``.
        ungraded: only traces without a verdict.
        force: grade again what would be skipped, too.
        unsafe_scorers: see ``build``.
        progress: called with a ``Progress`` of graded traces after each commit (phase "grading").

    Raises:
        InputError: an unknown grader or verdict, or a run that is not there.
        CatalogError: the catalog cannot be read or written.
    """
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    # A package's grader that is gone matters only if a trace wants it: then submit() says so.
    names = [check_grader(grader)] if grader is not None else [g for g in worklist.graders_of(store) if g in known()]
    if run is not None:
        store.run(run)
    if ungraded and verdicts:
        raise InputError("ungraded traces have no verdict: pass ungraded or verdicts, not both")
    for what, asked, known_names in (
        ("source", source, {s.name for s in store.sources()}),
        ("model", model, {r.model for r in store.runs()}),
    ):
        if asked is not None and asked not in known_names:
            raise InputError(
                f"no {what} {asked!r} in {store.path}: there are {', '.join(sorted(known_names)) or 'none'}"
            )
    every = worklist.Wanted(
        verdicts=("ungraded",) if ungraded else tuple(verdicts), run_id=run, model=model, source=source, grader=grader
    )
    wanted = every if force else replace(every, done={name: grader_version(name) for name in names})
    if "gym" in names:
        check_scorers(worklist.gym_tasks(store, wanted), unsafe_scorers=unsafe_scorers)
    total = worklist.count(store, wanted)
    skipped = worklist.count(store, every) - total
    emit = progress or silent
    began, now, changes = time.monotonic(), Counter[str](), Counter[tuple[str, str]]()
    with GradingPool(graders, background=False, unsafe_scorers=unsafe_scorers) as pool:
        for page in worklist.pages(store, wanted, commit_size):
            by = [grader or trace.problem.grader for trace in page]
            futures = [submit(pool, trace, trace.problem, name) for trace, name in zip(page, by, strict=True)]
            grades = [grade_row(t, name, f.result()) for t, name, f in zip(page, by, futures, strict=True)]
            store.add_grades(grades)
            now.update(g.verdict for g in grades)
            changes.update((t.verdict, g.verdict) for t, g in zip(page, grades, strict=True) if t.verdict != g.verdict)
            emit(Progress("grading", now.total(), max(total, now.total())))
    emit(Progress("done", now.total(), now.total(), final=True))
    nested: dict[str, dict[str, int]] = {}
    for (before, after), n in sorted(changes.items()):
        nested.setdefault(before, {})[after] = n
    return GradeReport(now.total(), changes.total(), skipped, dict(now), nested, time.monotonic() - began)

"""grade(): stored traces judged again; the newest verdict counts, earlier ones stay."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calset.builder.grading import check_grader
from calset.builder.grading.pool import GradingPool
from calset.builder.grading.rows import grade_row, submit
from calset.catalog.catalog import Catalog
from calset.catalog.records import Problem, Trace


@dataclass(frozen=True, slots=True)
class GradeReport:
    """What a re-grading did; earlier verdicts stay in the history."""

    n_graded: int
    n_changed: int
    verdicts: Mapping[str, int]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def grade(
    catalog: Catalog | str | Path | None = None,
    *,
    grader: str | None = None,
    model: str | None = None,
    source: str | None = None,
    ungraded: bool = False,
    graders: int = 2,
    commit_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> GradeReport:
    """Grade stored traces again; the newest verdict counts, earlier ones stay.

    Args:
        grader: instead of each problem's own.
        model, source: only these traces.
        ungraded: only traces without a verdict.
        progress: called with (graded and saved, all) after each commit.

    Raises:
        InputError: an unknown grader.
        CatalogError: the catalog cannot be read or written.
    """
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    if grader is not None:
        check_grader(grader)
    before = _verdicts(store, ungraded, model, source)
    began, changed, verdicts = time.monotonic(), 0, Counter[str]()
    with GradingPool(graders) as pool:
        for page in _pages(store, ungraded, model, source, commit_size):
            futures = [(t, p, submit(pool, t, p, grader or p.grader)) for t, p in page]
            grades = [grade_row(t, grader or p.grader, f.result()) for t, p, f in futures]
            store.record([], grades)
            verdicts.update(g.verdict for g in grades)
            changed += sum(before.get(g.trace_id) != g.verdict for g in grades)
            if progress is not None:
                progress(verdicts.total(), len(before))
    return GradeReport(verdicts.total(), changed, dict(verdicts), time.monotonic() - began)


def _verdicts(store: Catalog, ungraded: bool, model: str | None, source: str | None) -> dict[str, str]:
    """Trace id -> present verdict of what is to be graded: all that a re-grading holds of every trace at once."""
    rows = store.query(
        """
        SELECT trace_id, verdict FROM trace
        WHERE (? IS NULL OR model = ?) AND (? IS NULL OR source = ?) AND (NOT ? OR verdict = 'ungraded')
        """,
        [model, model, source, source, ungraded],
    ).rows
    return dict(rows)


def _pages(
    store: Catalog, ungraded: bool, model: str | None, source: str | None, size: int
) -> Iterator[list[tuple[Trace, Problem]]]:
    page: list[tuple[Trace, Problem]] = []
    for item in store.traces_to_grade(verdicts=("ungraded",) if ungraded else None, model=model, source=source):
        page.append(item)
        if len(page) == size:
            yield page
            page = []
    if page:
        yield page

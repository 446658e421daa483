"""Which stored traces are to be graded or judged, a page at a time.

Why here: a catalog of a million traces must be graded again without holding them, so this asks for ids in large steps
and for texts in small ones, and reads no token ids at all. The order is that of the trace ids, and each step begins
behind the last: what is graded meanwhile neither comes twice nor hides another. Must not know: graders, judges,
engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from calset.catalog.catalog import Catalog
from calset.catalog.records import BROKEN, UNFINISHED, VERDICTS, Problem
from calset.catalog.store.values import chunks
from calset.errors import InputError

IDS_AT_A_TIME = 20_000
# What the same grader may say otherwise next time: a deadline passed, a worker was lost.
PASSING = ("timeout", "error")
TRIES = 3  # of a grader at one version, after which such a verdict stays: the answer may be what it cannot do
# Whether a trace has the verdict that its end says by itself (``verdict_without_grading``): no grader changes that.
_ENDED = """
    coalesce(t.verdict = CASE
        WHEN t.finish_reason IN (SELECT unnest(?::VARCHAR[])) THEN 'truncated'
        WHEN t.finish_reason IN (SELECT unnest(?::VARCHAR[])) THEN 'error'
        WHEN t.answer_start < 0 THEN 'no_answer'
    END, false)
"""

_TRIED = """(
    SELECT trace_id, attempt, grader, grader_version FROM grades WHERE verdict IN (SELECT unnest(?::VARCHAR[]))
    GROUP BY ALL HAVING count(*) >= ?
)"""


class Gradable(NamedTuple):
    """What grading needs of a trace at its latest attempt, with its present verdict (``ungraded`` when none)."""

    trace_id: str
    attempt: int
    response: str
    finish_reason: str
    answer_start: int
    verdict: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which traces; every condition that is given must hold.

    Args:
        verdicts: present verdicts.
        run_id, model, source: only these.
        grader: the grader that will grade, each problem's own when None; matters for ``done``.
        done: grader -> version. A trace whose newest grade is by that grader at that version is left out, unless the
            verdict was ``timeout`` or ``error`` and that grader has not yet tried ``TRIES`` times; so is one whose
            verdict is what its end says, whoever graded it.
        judged: (judge, revision, prompt hash). A trace that has this judgement is left out, unless its verdict was
            ``error`` and the trace itself is not broken.

    Raises:
        InputError: an unknown verdict.
    """

    verdicts: Sequence[str] = ()
    run_id: str | None = None
    model: str | None = None
    source: str | None = None
    grader: str | None = None
    done: Mapping[str, str] = field(default_factory=dict)
    judged: tuple[str, str, str] | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.verdicts) - set(VERDICTS)):
            raise InputError(f"unknown verdict {unknown[0]!r}; there are {', '.join(VERDICTS)}")

    def condition(self) -> tuple[str, list[Any]]:
        """SQL over t (graded_traces), r (runs), p (problems), with ``done`` g (newest_grades), and its parameters."""
        clauses, params = [], []
        for column, value in (("t.run_id", self.run_id), ("r.model", self.model), ("p.source", self.source)):
            if value is not None:
                clauses.append(f"{column} = ?")
                params.append(value)
        if self.verdicts:
            clauses.append("coalesce(t.verdict, 'ungraded') IN (SELECT unnest(?::VARCHAR[]))")
            params.append(list(self.verdicts))
        if self.done:
            clauses.append(
                f"""(g.verdict IS NULL OR (g.verdict IN (SELECT unnest(?::VARCHAR[])) AND NOT EXISTS (FROM {_TRIED} o
                    WHERE o.trace_id = g.trace_id AND o.attempt = g.attempt AND o.grader = g.grader
                    AND o.grader_version = g.grader_version))
                OR g.grader <> coalesce(?, p.grader)
                OR concat(g.grader, ' ', g.grader_version) NOT IN (SELECT unnest(?::VARCHAR[]))) AND NOT {_ENDED}"""
            )
            params += [
                list(PASSING),
                list(PASSING),
                TRIES,
                self.grader,
                [f"{name} {version}" for name, version in self.done.items()],
            ]
            params += [list(UNFINISHED), list(BROKEN)]
        if self.judged is not None:
            clauses.append(
                """NOT EXISTS (FROM judgements j WHERE j.trace_id = t.trace_id AND j.attempt = t.attempt
                AND j.judge = ? AND j.judge_revision = ? AND j.prompt_hash = ?
                AND (j.verdict <> 'error' OR t.finish_reason IN (SELECT unnest(?::VARCHAR[]))))"""
            )
            params += [*self.judged, list(BROKEN)]
        return " AND ".join(clauses) or "true", params

    def tables(self) -> str:
        """The FROM clause of ``condition``. Grades are joined only for their version, which traces do not copy."""
        joined = "LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt"
        return f"{_FROM} {joined if self.done else ''}"


_FROM = """
    FROM graded_traces t
    JOIN runs r ON r.run_id = t.run_id
    JOIN problems p ON p.problem_id = t.problem_id
"""


def graders_of(catalog: Catalog) -> list[str]:
    """The graders that the catalog's problems name."""
    return [row["grader"] for row in catalog.rows("SELECT DISTINCT grader FROM problems ORDER BY grader")]


def gym_tasks(catalog: Catalog, wanted: Wanted) -> list[str]:
    """The reasoning-gym tasks of the traces that ``pages`` would give now and that the gym grader will grade."""
    where, params = wanted.condition()
    sql = f"""SELECT DISTINCT p.metadata->>'$.task' AS task {wanted.tables()}
        WHERE coalesce(?, p.grader) = 'gym' AND {where} ORDER BY task"""
    return [row["task"] for row in catalog.rows(sql, [wanted.grader, *params]) if row["task"] is not None]


def count(catalog: Catalog, wanted: Wanted) -> int:
    """How many traces ``pages`` would give now."""
    where, params = wanted.condition()
    return catalog.rows(f"SELECT count(*) AS n {wanted.tables()} WHERE {where}", params)[0]["n"]


def pages(catalog: Catalog, wanted: Wanted, size: int = 256) -> Iterator[list[Gradable]]:
    """The traces in lists of at most ``size``; grades and judgements may be added meanwhile."""
    where, params = wanted.condition()
    sql = f"SELECT t.trace_id {wanted.tables()} WHERE t.trace_id > ? AND {where} ORDER BY t.trace_id LIMIT ?"
    last = ""
    while found := [row["trace_id"] for row in catalog.rows(sql, [last, *params, IDS_AT_A_TIME])]:
        for part in chunks(found, size):
            yield _load(catalog, part)
        last = found[-1]


def _load(catalog: Catalog, trace_ids: Sequence[str]) -> list[Gradable]:
    names = ("problem_id", "source_id", "source", "source_row", "question", "answer", "grader", "metadata")
    sql = f"""
        SELECT t.trace_id, t.attempt, t.response, t.finish_reason, t.answer_start,
            coalesce(t.verdict, 'ungraded') AS verdict, {", ".join(f"p.{name} AS p_{name}" for name in names)}
        {_FROM} WHERE t.trace_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY t.trace_id
    """
    loaded = []
    for row in catalog.rows(sql, [list(trace_ids)]):
        values = {name: row.pop(f"p_{name}") for name in names}
        metadata = json.loads(values.pop("metadata") or "{}")
        loaded.append(Gradable(**row, problem=Problem(**values, metadata=metadata)))
    return loaded

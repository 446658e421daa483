"""Rows of calset's tables: append those that are not there yet.

Every insert is an anti-join on ids within the caller's transaction, so resume, de-duplication and idempotence are one
thing. Must not know: connections, questions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import duckdb

from calset import ids
from calset.catalog.records import Grade, Trace
from calset.catalog.store.schema import TABLES
from calset.catalog.store.sql import registered
from calset.catalog.store.values import arrow_batch, dump_json
from calset.errors import CatalogError, InputError


def row(table: str, record: Any) -> tuple[Any, ...]:
    """A record as a row of its table, in column order."""
    return tuple(
        dump_json(getattr(record, column)) if kind == "JSON" else getattr(record, column)
        for column, kind in TABLES[table].items()
    )


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: Sequence[tuple[Any, ...]], key: Sequence[str]) -> int:
    """Insert the rows whose key is not there yet, the first of several in the batch; returns how many.

    Why not ON CONFLICT: it needs keys, which DuckLake has not, and has holes.
    """
    at = [list(TABLES[table]).index(name) for name in key]
    by_key: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for row in rows:
        by_key.setdefault(tuple(row[i] for i in at), row)
    present = present_keys(con, table, key, by_key)
    return append(con, table, [row for k, row in by_key.items() if k not in present])


def present_keys(con: duckdb.DuckDBPyConnection, table: str, key: Sequence[str], keys: Iterable[Any]) -> set[Any]:
    """Which of the keys a table holds. The few keys are the build side: a large table is only streamed past them."""
    names = ", ".join(f'"{name}"' for name in key)
    return {row[: len(key)] for row in semi_join(con, table, key, keys, names)}


def semi_join(
    con: duckdb.DuckDBPyConnection, table: str, key: Sequence[str], keys: Iterable[Any], select: str
) -> list[tuple[Any, ...]]:
    """Return columns of the rows of a table that have one of the keys."""
    wanted = list(keys)
    if not wanted:
        return []
    names = ", ".join(f'"{name}"' for name in key)
    with registered(con, "calset_keys", arrow_batch({name: TABLES[table][name] for name in key}, wanted)):
        return con.execute(f"SELECT {select} FROM {table} SEMI JOIN calset_keys USING ({names})").fetchall()


def append(con: duckdb.DuckDBPyConnection, table: str, rows: Sequence[tuple[Any, ...]]) -> int:
    """Append rows, in column order; returns how many."""
    if rows:
        with registered(con, "calset_batch", arrow_batch(TABLES[table], rows)):
            con.execute(f"INSERT INTO {table} SELECT * FROM calset_batch").fetchall()
    return len(rows)


def insert_traces(
    con: duckdb.DuckDBPyConnection, traces: Sequence[Trace], grades: Sequence[Grade]
) -> set[tuple[str, int]]:
    """Insert the traces that are new, each with the first grade of it in ``grades``; returns their (id, attempt)."""
    by_key: dict[tuple[str, int], Trace] = {}
    for trace in traces:
        by_key.setdefault((trace.trace_id, trace.attempt), trace)
    pools = _pool_keys(con, by_key.values())
    present = _present_traces(con, by_key, pools)
    fresh = {key: trace for key, trace in by_key.items() if key not in present}
    # The views join on it, so an orphan would be kept and never seen.
    problems = {(trace.problem_id,) for trace in fresh.values()}
    if missing := problems - present_keys(con, "problems", ("problem_id",), problems):
        raise InputError(f"traces name a problem_id that the catalog does not hold: {min(missing)[0]}; add it first")
    first: dict[tuple[str, int], Grade] = {}
    for grade in _in_order(grades):
        first.setdefault((grade.trace_id, grade.attempt), grade)
    tokens = [(t.trace_id, t.attempt, t.prompt_ids, t.completion_ids) for t in fresh.values()]
    append(con, "trace_tokens", tokens)
    append(con, "traces", [_trace_row(t, pools[key], first.get(key)) for key, t in fresh.items()])
    return set(fresh)


def _pool_keys(con: duckdb.DuckDBPyConnection, traces: Iterable[Trace]) -> dict[tuple[str, int], int]:
    """The pool key of each trace by (trace id, attempt)."""
    runs = {(trace.run_id,) for trace in traces}
    kinds = {
        run: rest for run, *rest in semi_join(con, "runs", ("run_id",), runs, "run_id, model, model_revision, kind")
    }
    if missing := {run for (run,) in runs} - set(kinds):
        raise InputError(f"traces name a run_id that the catalog does not hold: {min(missing)}; add it first")
    return {(t.trace_id, t.attempt): ids.pool_key(t.problem_id, *kinds[t.run_id]) for t in traces}


def _present_traces(
    con: duckdb.DuckDBPyConnection, traces: Mapping[tuple[str, int], Trace], pools: Mapping[tuple[str, int], int]
) -> set[tuple[str, int]]:
    """Which of the traces are there, looked up among those of their pools: a million integers are scanned faster than
    a million ids, and the few that are found show as well whether two problems' keys are alike."""
    owners: dict[int, str] = {}
    found = semi_join(
        con, "traces", ("pool_key",), {(pool,) for pool in pools.values()}, "trace_id, attempt, pool_key, problem_id"
    )
    asked = [(*key, pools[key], trace.problem_id) for key, trace in traces.items()]
    for _, _, pool, problem in (*found, *asked):
        if owners.setdefault(pool, problem) != problem:
            raise CatalogError(
                f"the problems {owners[pool]} and {problem} have one 60-bit key by chance, and one catalog cannot tell "
                "them apart: keep one of them in a catalog of its own"
            )
    return {(trace, attempt) for trace, attempt, *_ in found} & traces.keys()


def _trace_row(trace: Trace, pool_key: int, first: Grade | None) -> tuple[Any, ...]:
    counted: dict[str, Any] = {"n_prompt_tokens": len(trace.prompt_ids), "pool_key": pool_key}

    def value(column: str) -> Any:
        if column.startswith("first_"):
            return getattr(first, column.removeprefix("first_"), None)
        return counted[column] if column in counted else getattr(trace, column)

    return tuple(value(column) for column in TABLES["traces"])


def _in_order(grades: Sequence[Grade]) -> list[Grade]:
    return sorted(grades, key=lambda grade: grade.graded_at)


def insert_grades(con: duckdb.DuckDBPyConnection, grades: Sequence[Grade], fresh: Collection[tuple[str, int]]) -> int:
    """Insert grades of traces that are there; ``fresh`` were inserted in this transaction and have no grade yet."""
    known: dict[tuple[str, int], set[tuple[Any, ...]]] = {(g.trace_id, g.attempt): set() for g in grades}
    older = [key for key in known if key not in fresh]
    if missing := set(older) - present_keys(con, "traces", ("trace_id", "attempt"), older):
        raise InputError(f"grades name a trace that the catalog does not hold: {min(missing)[0]}; add it first")
    # 0 belongs to the grade that came with the trace, so that one added later, though it be the first, begins at 1.
    next_seq = {key: int(key not in fresh) for key in known}
    mark = "grader, grader_version, verdict, graded_at"
    for trace_id, attempt, seq, *rest in semi_join(
        con, "grades", ("trace_id", "attempt"), older, f"trace_id, attempt, seq, {mark}"
    ):
        known[trace_id, attempt].add(tuple(rest))
        next_seq[trace_id, attempt] = max(next_seq[trace_id, attempt], seq + 1)
    rows = []
    for grade in _in_order(grades):
        key = (grade.trace_id, grade.attempt)
        this = (grade.grader, grade.grader_version, grade.verdict, grade.graded_at)
        if this not in known[key]:
            rows.append(tuple(next_seq[key] if c == "seq" else getattr(grade, c) for c in TABLES["grades"]))
            known[key].add(this)
            next_seq[key] += 1
    return append(con, "grades", rows)

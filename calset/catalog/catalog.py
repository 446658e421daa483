"""The catalog: one DuckDB file that keeps problems, runs, traces, grades and subsets.

Append-only: an insert is an anti-join on ids, so resume, de-duplication and idempotence are one thing. Every method
opens the file, does one transaction or one question, and closes it, so that other processes get their turn.
Must not know: engines, graders, recipes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import duckdb

from calset import ids
from calset.catalog.filters import Filter, FilterOptions
from calset.catalog.records import (
    BROKEN,
    Attempt,
    AttemptCount,
    Contamination,
    Decision,
    Grade,
    Judgement,
    Problem,
    Publication,
    Run,
    Source,
    Trace,
    utc_now,
)
from calset.catalog.store.connection import Mode, opened
from calset.catalog.store.inserts import append, insert, insert_grades, insert_traces, row
from calset.catalog.store.schema import TABLES
from calset.catalog.store.sql import Result, check_select, in_memory, transaction
from calset.catalog.store.tokens import read_tokens
from calset.catalog.store.values import clean, clean_params, dump_json
from calset.errors import InputError, did_you_mean, first_line
from calset.io.keywords import shows

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_PATH = "calset.duckdb"
_JSON_COLUMNS, _TIME_COLUMNS = (
    {name for columns in TABLES.values() for name, kind in columns.items() if kind == wanted}
    for wanted in ("JSON", "TIMESTAMP")
)
_MAY_BE_NULL = ("sampling_from", "template_options", "engine_options", "origin", "messages")
_LISTS = ("warnings", "messages")  # the JSON of all other columns is an object


@dataclass(frozen=True, slots=True)
class Recorded:
    """How many rows of a ``record`` were new; ``fresh`` are the new traces' (trace id, attempt)."""

    traces: int
    grades: int
    fresh: frozenset[tuple[str, int]] = frozenset()


class Catalog:
    """A catalog file. Cheap to make: nothing is opened before the first method, and nothing stays open after one.

    Args:
        path: the DuckDB file; by default ``CALSET_CATALOG``, else ``calset.duckdb`` here. A write creates it.
        lock_timeout: seconds to wait while another process holds the file.
    """

    def __init__(self, path: str | Path | None = None, *, lock_timeout: float = 30.0) -> None:
        self.path = Path(path or os.environ.get("CALSET_CATALOG") or DEFAULT_PATH)
        self.lock_timeout = lock_timeout

    def __repr__(self) -> str:
        return f"Catalog({str(self.path)!r})"

    def exists(self) -> bool:
        """Whether the file is there; reading a catalog that is not there is an InputError."""
        return os.path.isfile(self.path)

    # -- connections ------------------------------------------------------------------------------------------------

    def _open(self, mode: Mode) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        return opened(self.path, mode, self.lock_timeout)

    @contextmanager
    def transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A write transaction: committed at the end of the block, rolled back when it raises.

        Like every connection but ``connect()`` it reaches no other file, no network and no Python variable.

        Raises:
            CatalogLocked, CatalogError, InputError: see ``calset.catalog.store.connection.opened``.
        """
        with opened(self.path, "write", self.lock_timeout) as con, transaction(con):
            yield con

    @contextmanager
    def _writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """As ``transaction``, for statements of this module: after them the file need not be checked again."""
        with opened(self.path, "write", self.lock_timeout, own_sql=True) as con, transaction(con):
            yield con

    @contextmanager
    def merging(self, other: Path) -> Iterator[duckdb.DuckDBPyConnection]:
        """As ``transaction``, on a connection that may also attach the file ``other``, and no further one."""
        with opened(self.path, "write", self.lock_timeout, other=other) as con, transaction(con):
            yield con

    def reading(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A connection for SQL of calset's own; while it is open, all reads of this thread share it.

        It reaches no other file, and its views are calset's own, whoever made the catalog.
        """
        return self._open("own")

    def connect(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A read-only DuckDB connection of your own: ``with catalog.connect() as con: con.sql("FROM trace").pl()``.

        **There is no wall around it.** SQL that you run on it may read every file that you may read, your environment
        and your Python variables, reach the network, and write files (``COPY ... TO``, ``ATTACH``). The catalog is
        checked before it is opened: what would run by itself is refused, and ``trace``, ``problem`` and the other
        views of calset are calset's own. But a view or a macro that somebody added to the file runs with all of these
        rights as soon as your SQL names it. For a catalog that you did not make use ``query``, ``sql`` or ``stream``.

        Use it in the thread that opened it. While it is open no process can write to the catalog. Inside the block the
        catalog's own reads work (``stats``, ``runs``, ``trace``, ``load``, ``export``, ...). ``query`` and whatever
        writes (``select``, ``add_...``) raise CatalogError: this connection may read files, so SQL for ``query`` would
        lose its walls here; ask on the connection itself, or close it first.
        """
        return self._open("read")

    def rows(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a read-only query of calset's own as dicts, JSON columns parsed; for a user's SQL see ``query``."""
        with self._open("own") as con:
            cursor = con.execute(sql, clean_params(params))
            names = [column[0] for column in cursor.description or []]
            rows = cursor.fetchall()
        return [{n: self._parsed(n, v) for n, v in zip(names, row, strict=True)} for row in rows]

    def _parsed(self, column: str, value: Any) -> Any:
        """A column's value: JSON parsed, which calset writes as an object or a list; times as datetimes.

        Raises:
            InputError: the column holds what calset would not have written.
        """
        if column in _JSON_COLUMNS and value is not None:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):  # numbers of thousands of digits, lists in lists in lists
                value = ""
            strange = not isinstance(value, list if column in _LISTS else dict)
            strange = strange and not (value is None and column in _MAY_BE_NULL)
        else:  # of a moment beyond Python's years DuckDB gives the text
            strange = column in _TIME_COLUMNS and isinstance(value, str)
        if strange:
            raise InputError(f"{self.path} holds a {column} that calset did not write: use another copy of the file")
        return value

    # -- writing ----------------------------------------------------------------------------------------------------

    def add_source(self, source: Source) -> int:
        """Keep a source; returns 1, or 0 when it was there."""
        with self._writing() as con:
            return insert(con, "sources", [row("sources", source)], key=("source_id",))

    def add_problems(self, problems: Sequence[Problem]) -> int:
        """Keep problems; returns how many were new."""
        with self._writing() as con:
            return insert(con, "problems", [row("problems", p) for p in problems], key=("problem_id",))

    def add_run(self, run: Run) -> int:
        """Keep a run; returns 1, or 0 when it was there."""
        with self._writing() as con:
            return insert(con, "runs", [row("runs", run)], key=("run_id",))

    def add_traces(self, traces: Sequence[Trace]) -> int:
        """Keep traces with their token ids; returns how many (trace_id, attempt) were new."""
        return self.record(traces, ()).traces

    def add_grades(self, grades: Sequence[Grade]) -> int:
        """Keep grades; a trace may have many, the newest counts. An equal grade given twice is kept once."""
        return self.record((), grades).grades

    def record(
        self,
        traces: Sequence[Trace],
        grades: Sequence[Grade],
        *,
        problems: Sequence[Problem] = (),
        decisions: Sequence[Decision] = (),
        contaminations: Sequence[Contamination] = (),
    ) -> Recorded:
        """Keep traces, their grades and what goes with them in one transaction: all on disk after it, nothing before.

        Problems that are there stay as they are. A trace that was there already stays as it is, and a grade that comes
        with it in this call is dropped: it judged another completion (of a second build of the same traces).

        Raises:
            CatalogLocked, CatalogError, InputError: nothing was kept.
        """
        if not (traces or grades or problems or decisions or contaminations):
            return Recorded(0, 0)
        with self._writing() as con:
            insert(con, "problems", [row("problems", p) for p in problems], key=("problem_id",))
            append(con, "decisions", [row("decisions", d) for d in decisions])
            insert(
                con,
                "contaminations",
                [row("contaminations", c) for c in contaminations],
                key=("problem_id", "evaluation_source", "evaluation_revision", "evaluation_row", "n"),
            )
            fresh = insert_traces(con, traces, grades)
            strangers = {(t.trace_id, t.attempt) for t in traces} - fresh
            grades = [grade for grade in grades if (grade.trace_id, grade.attempt) not in strangers]
            return Recorded(len(fresh), insert_grades(con, grades, fresh), frozenset(fresh))

    def add_judgements(self, judgements: Sequence[Judgement]) -> int:
        """Keep what judges said of traces; returns how many were new."""
        rows = [row("judgements", judgement) for judgement in judgements]
        key = ("trace_id", "attempt", "judge", "judge_revision", "prompt_hash", "judged_at")
        with self._writing() as con:
            return insert(con, "judgements", rows, key=key)

    def add_evaluation(self, record: Mapping[str, Any]) -> str:
        """Keep what an evaluation found (any JSON-able mapping); returns its id."""
        return self._add_document("evaluations", "evaluation_id", record)

    def add_pruning(self, record: Mapping[str, Any]) -> str:
        """Keep what a pruning did (any JSON-able mapping, as in pruning.json); returns its id."""
        return self._add_document("prunings", "pruning_id", record)

    def add_publication(self, publication: Publication) -> int:
        """Keep that a subset stands on the Hub; returns 1, or 0 when that was kept."""
        key = ("name", "version", "content_hash", "repo", "revision", "tag")
        with self._writing() as con:
            return insert(con, "publications", [row("publications", publication)], key=key)

    def publications(self) -> list[Publication]:
        """Where subsets stand on the Hub, oldest first."""
        return [Publication(**row) for row in self.rows("SELECT * FROM publications ORDER BY published_at, name")]

    def _add_document(self, table: str, key: str, record: Mapping[str, Any]) -> str:
        text = dump_json(record)
        name = ids.digest(table, text)
        with self._writing() as con:
            insert(con, table, [(name, utc_now(), text)], key=(key,))
        return name

    # -- reading ----------------------------------------------------------------------------------------------------

    def attempts(self, generation_key: str, problem_ids: Sequence[str]) -> dict[str, dict[int, Attempt]]:
        """Problem id -> sample index -> the newest attempt kept for a generation key; nothing of a missing catalog."""
        found: dict[str, dict[int, Attempt]] = {}
        if not self.exists():
            return found
        sql = """
            SELECT t.problem_id, t.sample_index, t.trace_id, t.attempt, t.finish_reason, t.max_tokens,
                t.n_prompt_tokens, t.n_tokens, t.verdict
            FROM graded_traces t
            WHERE t.generation_key = ? AND t.problem_id IN (SELECT unnest(?::VARCHAR[]))
        """
        with self._open("own") as con:
            rows = con.execute(sql, [generation_key, list(problem_ids)]).fetchall()
        for problem_id, sample_index, *rest in rows:
            found.setdefault(problem_id, {})[sample_index] = Attempt(*rest)
        return found

    def last_decisions(self, generation_key: str, problem_ids: Sequence[str]) -> dict[str, Decision]:
        """Problem id -> the last decision that an adaptive build took of it."""
        columns = tuple(TABLES["decisions"])
        sql = f"""
            SELECT {", ".join(columns)} FROM decisions
            WHERE generation_key = ? AND problem_id IN (SELECT unnest(?::VARCHAR[]))
            QUALIFY row_number() OVER (PARTITION BY problem_id ORDER BY decided_at DESC, k DESC) = 1
        """
        with self._open("own") as con:
            rows = con.execute(sql, [generation_key, list(problem_ids)]).fetchall()
        found = (Decision(**dict(zip(columns, row, strict=True))) for row in rows)
        return {decision.problem_id: decision for decision in found}

    def count_attempts(
        self, generation_key: str, problem_ids: Sequence[str], *, samples: int, max_tokens: int
    ) -> list[AttemptCount]:
        """The newest attempts at the first ``samples`` of some problems, counted by what decides on a retry."""
        sql = """
            SELECT count(*) AS n, finish_reason = 'length' AS cut, max_tokens >= ? AS as_long,
                finish_reason IN (SELECT unnest(?::VARCHAR[])) AS broken, max(max_tokens) AS max_tokens
            FROM latest_traces
            WHERE generation_key = ? AND sample_index < ? AND problem_id IN (SELECT unnest(?::VARCHAR[]))
            GROUP BY ALL
        """
        params = [max_tokens, list(BROKEN), generation_key, samples, list(problem_ids)]
        return [AttemptCount(**row) for row in self.rows(sql, params)]

    def count_graders(self, problem_ids: Sequence[str]) -> dict[tuple[str, str], int]:
        """(Source's name, grader) -> how many of some problems are kept with it; unknown ids are left out."""
        sql = """
            SELECT source, grader, count(*) AS n FROM problems
            WHERE problem_id IN (SELECT unnest(?::VARCHAR[])) GROUP BY ALL
        """
        return {(row["source"], row["grader"]): row["n"] for row in self.rows(sql, [list(problem_ids)])}

    def count_others(
        self, generation_key: str, problem_ids: Sequence[str], *, samples: int, model: str, revision: str
    ) -> dict[str, int]:
        """Generation key -> traces that share a pass rate with the first ``samples`` of this key, and are not those."""
        sql = """
            SELECT t.generation_key, count(*) AS n FROM latest_traces t JOIN runs r ON r.run_id = t.run_id
            WHERE r.model = ? AND r.model_revision = ? AND r.kind = 'build'
                AND (t.generation_key <> ? OR t.sample_index >= ?)
                AND t.problem_id IN (SELECT unnest(?::VARCHAR[]))
            GROUP BY t.generation_key
        """
        params = [model, revision, generation_key, samples, list(problem_ids)]
        return {row["generation_key"]: row["n"] for row in self.rows(sql, params)}

    def runs(self, kind: str | None = None) -> list[Run]:
        """All runs, oldest first, or those of one kind ("build", "evaluate")."""
        where, params = ("WHERE kind = ?", [kind]) if kind else ("", [])
        return [Run(**row) for row in self.rows(f"SELECT * FROM runs {where} ORDER BY started_at, run_id", params)]

    def run(self, run_id: str) -> Run:
        """One run.

        Raises:
            InputError: no such run.
        """
        rows = self.rows("SELECT * FROM runs WHERE run_id = ?", [run_id])
        if not rows:
            raise InputError(
                f"no run {run_id!r} in {self.path}: calset query 'SELECT run_id, model FROM runs' lists them"
            )
        return Run(**rows[0])

    def sources(self) -> list[Source]:
        """All sources, by name."""
        return [Source(**row) for row in self.rows("SELECT * FROM sources ORDER BY name, source_id")]

    def source_revisions(self) -> dict[str, str]:
        """Spec -> the revision at which the catalog has the source; empty where there is no catalog yet."""
        return {source.spec: source.revision for source in self.sources()} if self.exists() else {}

    def model_commits(self, model: str) -> list[str]:
        """The commits at which the catalog has runs of a Hub model, that of the first run first."""
        if not self.exists():
            return []
        sql = """
            SELECT model_revision FROM runs
            WHERE model = ? AND model_path IS NULL AND regexp_full_match(model_revision, '[0-9a-f]{40}')
            GROUP BY model_revision ORDER BY min(started_at), model_revision
        """
        return [row["model_revision"] for row in self.rows(sql, [model])]

    def problem(self, problem_id: str) -> Problem:
        """One problem.

        Raises:
            InputError: no such problem.
        """
        found = self.problems([problem_id])
        if not found:
            raise InputError(
                f"no problem {problem_id!r} in {self.path}: calset query 'SELECT problem_id FROM problem' lists them"
            )
        return found[problem_id]

    def problems(self, problem_ids: Sequence[str]) -> dict[str, Problem]:
        """Problems by id; unknown ids are left out."""
        sql = "SELECT * FROM problems WHERE problem_id IN (SELECT unnest(?::VARCHAR[]))"
        return {row["problem_id"]: Problem(**row) for row in self.rows(sql, [list(problem_ids)])}

    def load_traces(self, trace_ids: Sequence[str]) -> dict[str, Trace]:
        """Traces with their token ids at their latest attempt, by id; unknown ids are left out."""
        columns = ", ".join(f"t.{name}" for name in _TRACE_COLUMNS)
        sql = f"""
            SELECT {columns}, k.prompt_ids, k.completion_ids FROM latest_traces t
            JOIN trace_tokens k ON k.trace_id = t.trace_id AND k.attempt = t.attempt
            WHERE t.trace_id IN (SELECT unnest(?::VARCHAR[]))
        """
        return {row["trace_id"]: Trace(**row) for row in self.rows(sql, [list(trace_ids)])}

    def tokens(self, attempts: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[list[int], list[int]]]:
        """Prompt and completion ids by (trace id, attempt).

        Raises:
            InputError: an attempt without token ids: a damaged catalog, or one that calset did not write.
        """
        return read_tokens(self.path, self.reading, attempts)

    def trace(self, trace_id: str) -> dict[str, Any]:
        """Everything about one trace, found by its id or a prefix that only it has.

        Returns:
            the columns of the view ``trace``, and ``request_seed``, ``reasoning_start``, ``reasoning_end``,
            ``answer_start`` (see ``Trace``), ``prompt_ids``, ``completion_ids``, ``grades`` and ``judgements`` (oldest
            first, all attempts), ``siblings`` (the other samples of the problem by the same model, as rows of the view
            without texts), ``problem`` and ``run`` (their tables' columns).

        Raises:
            InputError: no such trace, or several.
        """
        found, problem_id = self._find_trace(trace_id)
        # By problem, so that the view's pass rates are computed for one problem only.
        samples = self.rows("SELECT * FROM trace WHERE problem_id = ? ORDER BY sample_index, trace_id", [problem_id])
        row = next(sample for sample in samples if sample["trace_id"] == found)
        siblings = [s for s in samples if s is not row and all(s[c] == row[c] for c in _SAME_MODEL)]
        grades = self.rows("SELECT * FROM grades WHERE trace_id = ? ORDER BY attempt, graded_at, seq", [found])
        judged = "SELECT * FROM judgements WHERE trace_id = ? ORDER BY attempt, judged_at, judge"
        prompt_ids, completion_ids = self.tokens([(found, row["attempt"])])[found, row["attempt"]]
        (places,) = self.rows(
            "SELECT request_seed, reasoning_start, reasoning_end, answer_start FROM traces "
            "WHERE trace_id = ? AND attempt = ? LIMIT 1",
            [found, row["attempt"]],
        )
        return {
            **row,
            **places,
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "grades": grades,
            "judgements": self.rows(judged, [found]),
            "siblings": [{c: s[c] for c in s if c not in ("question", "text", "response")} for s in siblings],
            "problem": asdict(self.problem(problem_id)),
            "run": asdict(self.run(row["run_id"])),
        }

    def _find_trace(self, prefix: str) -> tuple[str, str]:
        """The (trace id, problem id) that a prefix names."""
        sql = (
            "SELECT DISTINCT trace_id, problem_id FROM traces WHERE starts_with(trace_id, ?) ORDER BY trace_id LIMIT 2"
        )
        found = [(row["trace_id"], row["problem_id"]) for row in self.rows(sql, [clean(prefix)])] if prefix else []
        if len(found) == 1 or (found and found[0][0] == prefix):
            return found[0]
        if found:
            raise InputError(f"several traces start with {prefix!r}: give more of the id")
        raise InputError(f"no trace {prefix!r} in {self.path}: calset query 'SELECT trace_id FROM trace' lists them")

    def evaluations(self) -> list[dict[str, Any]]:
        """What ``add_evaluation`` kept, oldest first, each with ``evaluation_id`` and ``created_at``."""
        return self._documents("evaluations", "evaluation_id")

    def prunings(self) -> list[dict[str, Any]]:
        """What ``add_pruning`` kept, oldest first, each with ``pruning_id`` and ``created_at``."""
        return self._documents("prunings", "pruning_id")

    def _documents(self, table: str, key: str) -> list[dict[str, Any]]:
        rows = self.rows(f"SELECT * FROM {table} ORDER BY created_at, {key}")
        return [{**row["record"], key: row[key], "created_at": row["created_at"]} for row in rows]

    # -- asking -----------------------------------------------------------------------------------------------------

    def query(self, sql: str, params: Sequence[Any] = (), *, limit: int | None = None) -> Result:
        """One read-only SQL question, closed off from files, network and settings.

        Args:
            sql: a single SELECT (also WITH, FROM, VALUES, SHOW, DESCRIBE, SUMMARIZE) or EXPLAIN.
            params: values for its ``?``.
            limit: fetch at most this many rows and say ``truncated``.

        Raises:
            InputError: not a single SELECT, or DuckDB's reason why it cannot be answered.
            CatalogError: this thread has a ``connect()`` open, which could not be closed off.
        """
        with self._asking(sql) as con:
            cursor = con.execute(sql, clean_params(params))
            columns = [(str(c[0]), str(c[1])) for c in cursor.description or []]
            rows = cursor.fetchall() if limit is None else cursor.fetchmany(limit + 1)
        names, types = [name for name, _ in columns], [kind for _, kind in columns]
        if limit is not None and len(rows) > limit:
            return Result(names, types, rows[:limit], truncated=True)
        return Result(names, types, rows)

    @contextmanager
    def _asking(self, sql: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for one SQL question of a user's; DuckDB's reasons leave as InputError."""
        with self._open("query") as con:
            try:
                check_select(con, sql)
                yield con
            except duckdb.InterruptException:  # Ctrl-C
                raise
            except duckdb.Error as error:
                raise InputError(first_line(error)) from error

    @contextmanager
    def stream(
        self, sql: str, params: Sequence[Any] = (), *, batch: int = 4096
    ) -> Iterator[tuple[list[str], Iterator[list[tuple[Any, ...]]]]]:
        """As ``query``, for answers that memory need not hold: column names, and batches of rows while the block lasts.

        The catalog is open for reading as long as the block, so take the rows without waiting for anybody.

        Raises:
            InputError, CatalogError: as ``query``.
        """
        with self._asking(sql) as con:
            cursor = con.execute(sql, clean_params(params))
            names = [str(column[0]) for column in cursor.description or []]
            yield names, iter(lambda: cursor.fetchmany(batch), [])

    @contextmanager
    def stream_arrow(
        self, sql: str, params: Sequence[Any] = (), *, batch: int = 4096
    ) -> Iterator[pa.RecordBatchReader]:
        """As ``stream``, in Arrow record batches.

        Raises:
            InputError, CatalogError: as ``query``.
        """
        with self._asking(sql) as con:
            yield con.sql(sql, params=clean_params(params)).to_arrow_reader(batch)

    def sql(self, sql: str, params: Sequence[Any] = ()) -> duckdb.DuckDBPyRelation:
        """One read-only SQL question, answered as a DuckDB relation: ``.pl()``, ``.df()``, ``.arrow()``, ``.filter()``.

        The rows are copied into a DuckDB in memory that lives as long as the relation. So a relation that is kept does
        not keep the catalog: its lock is gone when this returns, and no build waits for a notebook. The price is that
        the whole answer is held in memory: ask for the columns that you want, or stream with ``calset query -o``.
        Use it in the thread that asked.

        Args:
            sql, params: as ``query``.

        Raises:
            InputError, CatalogError: as ``query``.
        """
        with self._asking(sql) as con:
            found = con.sql(sql, params=clean_params(params))
            names, types, rows = found.columns, [str(kind) for kind in found.types], found.to_arrow_table()
            del found
        return in_memory(names, types, rows)

    @shows(FilterOptions)
    def traces(
        self, *, columns: Sequence[str] | None = None, limit: int | None = None, **filters: Unpack[FilterOptions]
    ) -> duckdb.DuckDBPyRelation:
        """The traces that meet filters, as a relation (see ``sql``), by problem and sample.

        ``catalog.traces(difficulty=(0.3, 0.8), correct=True, tokens=(2000, None), source="gsm8k").pl()``

        Args:
            columns: of the view ``trace``; all but its texts (``text``, ``response``) when None, ``["*"]`` for all.
            limit: only the first rows.
            filters: fields of ``calset.catalog.filters.Filter``, which explains them.

        Raises:
            InputError: a filter, value or column that there is not, or no catalog.
        """
        known = {f.name for f in fields(Filter)}
        for name in filters:
            if name not in known:
                near = did_you_mean(name, known)
                raise InputError(f"there is no filter {name!r}{near}; there are {', '.join(sorted(known))}")
        return self.sql(*Filter(**filters).select(columns, limit))


_SAME_MODEL = ("model", "model_revision", "kind")
_TRACE_COLUMNS = [f.name for f in fields(Trace) if f.name in TABLES["traces"]]

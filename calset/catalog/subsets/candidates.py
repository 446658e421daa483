"""The traces of a catalog as candidates of a selection: one pass over the columns that a recipe asks for.

Must not know: what a recipe does with them, token ids.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from calset.catalog.catalog import Catalog
from calset.catalog.contamination.overlap import Decontaminator
from calset.catalog.records import JUDGED, Subset
from calset.catalog.store.connection import opened
from calset.catalog.store.schema import VIEWS
from calset.catalog.store.sql import check_select
from calset.catalog.store.values import chunks, clean, text_array, to_arrow, to_numpy
from calset.catalog.subsets.recipes import Recipe
from calset.catalog.subsets.take import Candidates
from calset.catalog.subsets.versions import prompt_sample_id
from calset.catalog.subsets.where import require_stable
from calset.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    import pyarrow as pa

UNNAMED = "(none)"  # the stratum of problems without the metadata key


@dataclass(frozen=True, slots=True)
class Model:
    """Whose token ids these are. Subsets never mix two."""

    model: str
    revision: str
    tokenizer_hash: str


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Candidates of one model, and the traces that they are of.

    Args:
        trace_ids: of each candidate, the trace whose prompt it has.
        attempts: which attempt at that trace.
        problem_ids: by the numbers in ``candidates.problem``.
        stages: stage -> number of candidates that passed it.
        tails: of gold candidates, position -> the token ids that follow the prompt.
    """

    owner: Model
    candidates: Candidates
    trace_ids: pa.ChunkedArray
    attempts: np.ndarray
    problem_ids: pa.ChunkedArray
    stages: dict[str, int]
    tails: Mapping[int, list[int]] = field(default_factory=dict)


def read_pool(
    catalog: Catalog,
    recipe: Recipe,
    *,
    model: str | None = None,
    where: str | None = None,
    exclude: Decontaminator | None = None,
    held_out_from: Sequence[Subset] = (),
) -> Pool:
    """Read what a recipe may take of a catalog.

    Args:
        model, where, exclude, held_out_from: as ``calset.select`` takes them.

    Raises:
        InputError: no trace, traces of several models, a bad condition, a subset without problems, an unknown stratum.
    """
    rows = _read(catalog, recipe, model, where)
    stages = {"traces": len(rows)}
    if where is not None:
        rows = rows.only(rows["admitted"])
        stages["where"] = len(rows)
    if not len(rows):
        said = f" of {model}" if model else ""
        raise InputError(
            f"no trace{said} in {catalog.path} meets --where"
            if stages["traces"]
            else f"no build traces{said} in {catalog.path}: calset stats shows what is there"
        )
    owner = single_model({rows.models[run] for run in np.unique(rows["run"])})
    if exclude is not None:
        rows = rows.without(_overlapping(catalog, exclude, rows.problems()))
        stages["exclude_problems_of"] = len(rows)
    if held_out_from:
        rows = rows.without({problem for subset in held_out_from for problem in _problems_in(subset)})
        stages["held_out_from"] = len(rows)
    if recipe.kind != "trace":
        rows = rows.first_of_each_problem()
        stages["problems"] = len(rows)
    if recipe.kind == "gold" and (without := _without_reference(catalog)):
        rows = rows.without(without)
        stages["reference"] = len(rows)
    strata = _strata(catalog, recipe.stratify, rows.problems()) if recipe.stratify else None
    return Pool(owner, rows.candidates(recipe.kind, strata), rows.trace_ids, rows["attempt"], rows.problem_ids, stages)


def single_model(owners: set[Model]) -> Model:
    """Return the one model.

    Raises:
        InputError: there are several.
    """
    if len(owners) > 1:
        listed = sorted(f"{o.model}@{o.revision} (tokenizer {o.tokenizer_hash[:8]})" for o in owners)
        raise InputError(
            f"the candidates come from {len(listed)} models: {'; '.join(listed)}; pass --model MODEL or MODEL@REVISION"
        )
    return next(iter(owners))


def folder_of(model: str | None) -> str | None:
    """Return the full path of a model given as a folder, as runs keep it."""
    folder = os.path.expanduser(model or "")
    # os.path says False, where Path.is_dir raises, of a text that can be no path.
    return os.path.realpath(folder) if os.path.isdir(folder) else None


# -- traces as columns ----------------------------------------------------------------------------------------------

_RUNS = """
    CREATE TEMP TABLE run AS
    SELECT run_id, model, model_revision, tokenizer_hash, (row_number() OVER (ORDER BY run_id) - 1)::INTEGER AS number,
        $model::VARCHAR IS NULL OR model = $model OR model || '@' || model_revision = $model
            OR coalesce(model_path = $folder, false) AS asked
    FROM runs WHERE kind = 'build'
"""
# One row a (problem, model, revision), numbered in the order of the problem ids. The key is that of ``ids.pool_key``:
# computed for each problem, because the view ``pools`` finds the keys by grouping all traces.
_POOLS = """
    CREATE TEMP TABLE pool AS
    SELECT p.problem_id, (row_number() OVER (ORDER BY p.problem_id, m.model, m.model_revision) - 1)::INTEGER AS number,
        ('0x' || left(sha256(concat_ws(chr(10), p.problem_id, m.model, m.model_revision, 'build')), 15))::BIGINT
            AS pool_key
    FROM problems p, (SELECT DISTINCT model, model_revision FROM run WHERE asked) m
"""
_KEYS = """
    CREATE TEMP TABLE generation AS
    SELECT generation_key, (row_number() OVER (ORDER BY generation_key) - 1)::INTEGER AS number
    FROM (SELECT DISTINCT generation_key FROM traces)
"""
_JUDGED = ", ".join(f"'{verdict}'" for verdict in JUDGED)
_COLUMNS = {
    "pool": "p.number",
    "run": "r.number",
    "attempt": "t.attempt",
    "sample_index": "t.sample_index",
    "judged": f"t.verdict IN ({_JUDGED})",
    "correct": "t.verdict = 'correct'",
    "finished": "t.finish_reason = 'stop'",
    "n_tokens": "t.n_tokens",
    "size": "t.n_prompt_tokens + t.n_tokens",
}
_PASSED_ON = ("sample_index", "correct", "finished", "difficulty", "k", "n_tokens", "size")
_COUNTED = ("judged", "correct")
_FLAGS = (*_COUNTED, "finished", "admitted")


@dataclass(frozen=True, slots=True, eq=False)
class _Traces:
    """Traces as columns of one length.

    Args:
        columns: those of ``_COLUMNS``, and ``k`` and ``difficulty``, which is NaN where nothing was judged.
        models: by the numbers in the column ``run``.
        problem_ids: by the numbers in the column ``pool``.
        generation_keys: by the numbers in the column ``generation``, which recipes of prompts have.
    """

    columns: Mapping[str, np.ndarray]
    trace_ids: pa.ChunkedArray
    models: Sequence[Model]
    problem_ids: pa.ChunkedArray
    generation_keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.columns["pool"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def only(self, chosen: np.ndarray) -> _Traces:
        """Return the traces that a mask chooses."""
        if chosen.all():
            return self
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return replace(self, columns=columns, trace_ids=self.trace_ids.filter(to_arrow(chosen)))

    def problems(self) -> list[str]:
        """Return the ids of the problems that have traces, ascending."""
        return self.problem_ids.take(to_arrow(np.unique(self["pool"]))).to_pylist()

    def without(self, problem_ids: Collection[str]) -> _Traces:
        """Return the traces of other problems."""
        left_out = np.array([problem in problem_ids for problem in self.problem_ids.to_pylist()])
        return self.only(~left_out[self["pool"]])

    def candidates(self, kind: str, strata: Mapping[str, str] | None) -> Candidates:
        """Return the traces as candidates.

        Args:
            strata: problem id -> stratum.
        """
        sample_ids = self.trace_ids
        if kind != "trace":
            problems = self.problem_ids.take(to_arrow(self["pool"])).to_pylist()
            keys: list[Any] = [self.generation_keys[number] for number in self["generation"].tolist()]
            sample_ids = text_array([prompt_sample_id(kind, *of) for of in zip(problems, keys, strict=True)])
        return Candidates(
            sample_ids,
            problem=self["pool"],
            **{name: self[name] for name in _PASSED_ON},
            **self._strata(strata) if strata is not None else {},
        )

    def _strata(self, strata: Mapping[str, str]) -> dict[str, Any]:
        names = sorted(set(strata.values()))
        number = {name: i for i, name in enumerate(names)}
        of_pool = [number.get(strata.get(problem, ""), 0) for problem in self.problem_ids.to_pylist()]
        return {"stratum": np.array(of_pool, np.int32)[self["pool"]], "strata": names}

    def first_of_each_problem(self) -> _Traces:
        """Return the trace of the least (generation key, sample index) of each problem."""
        order = np.lexsort((self["sample_index"], self["generation"], self["pool"]))
        first = np.zeros(len(self), bool)
        first[order[np.flatnonzero(np.diff(self["pool"][order], prepend=-1))]] = True
        return self.only(first)


def _read(catalog: Catalog, recipe: Recipe, model: str | None, where: str | None) -> _Traces:
    """Read the traces of a model's runs (None: of all), with a column ``admitted`` where there is a condition."""
    columns, joins = dict(_COLUMNS), ""
    if recipe.kind != "trace":
        columns |= {"size": "t.n_prompt_tokens", "generation": "g.number"}
        joins = "JOIN generation g ON g.generation_key = t.generation_key"
    if where is not None:
        columns["admitted"] = "t.trace_id IN (SELECT trace_id FROM admitted)"
    # Neither NULLs nor bits: numpy has none.
    listed = [
        f"coalesce({sql}, false)::TINYINT AS {name}" if name in _FLAGS else f"coalesce({sql}, 0) AS {name}"
        for name, sql in columns.items()
    ]
    # The traces of other runs too, because a pass rate is of all traces of a (problem, model, revision).
    sql = f"""
        SELECT t.trace_id, {", ".join(listed)}
        FROM graded_traces t JOIN pool p ON p.pool_key = t.pool_key JOIN run r ON r.run_id = t.run_id {joins}
    """
    with opened(catalog.path, "query", catalog.lock_timeout) as con:
        con.execute(_RUNS, {"model": model and clean(model), "folder": folder_of(model)}).fetchall()
        for statement in (_POOLS, *([_KEYS] if joins else [])):
            con.execute(statement).fetchall()
        if where is not None:
            _admit(con, where)
        runs = con.execute("SELECT model, model_revision, tokenizer_hash, asked FROM run ORDER BY number").fetchall()
        problem_ids = con.sql("SELECT problem_id FROM pool ORDER BY number").to_arrow_table()["problem_id"]
        keys = con.execute("SELECT generation_key FROM generation ORDER BY number").fetchall() if joins else []
        table = con.sql(sql).to_arrow_table()
    found = {name: to_numpy(table[name]) for name in columns}
    found |= {name: found[name].view(bool) for name in _FLAGS if name in found}
    n_judged, n_correct = (np.bincount(found["pool"][found[flag]], minlength=len(problem_ids)) for flag in _COUNTED)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no pass rate
        difficulty = (n_judged - n_correct) / n_judged
    found |= {"k": n_judged.astype(np.int32)[found["pool"]], "difficulty": difficulty[found["pool"]]}
    asked = np.array([asked for *_, asked in runs], bool)[found["run"]]
    models = [Model(*model) for *model, _ in runs]
    return _Traces(found, table["trace_id"], models, problem_ids, [key for (key,) in keys]).only(asked)


def _admit(con: duckdb.DuckDBPyConnection, where: str) -> None:
    """Make a temporary table ``admitted`` of the ids of the traces that meet a user's condition.

    Raises:
        InputError: not one SQL expression, or one whose value changes from call to call.
    """
    where = clean(where)
    try:
        duckdb.SQLExpression(where)  # one expression: "true) UNION ..." does not parse
        sql = f"SELECT trace_id FROM trace WHERE (\n{where}\n)"
        check_select(con, sql)
        require_stable(con, sql, views=VIEWS)
        con.execute(f"CREATE TEMP TABLE admitted AS {sql}").fetchall()
    except duckdb.InterruptException:  # Ctrl-C
        raise
    except duckdb.Error as error:
        raise InputError(f"--where {where!r} is not a condition over the view trace: {first_line(error)}") from error


# -- problems -------------------------------------------------------------------------------------------------------


def _problems_in(subset: Subset) -> set[str]:
    """Return the problems that a subset has samples of.

    Raises:
        InputError: there are none.
    """
    if found := {s.problem_id for s in subset.samples if s.problem_id}:
        return found
    raise InputError(f"{subset.ref} holds no problems to hold others out from: its samples are of no problem")


_PAGE = 512  # problems compared at a time


def _overlapping(catalog: Catalog, exclude: Decontaminator, problem_ids: Sequence[str]) -> set[str]:
    """Return the problems that an evaluation source holds too."""
    return {
        problem.problem_id
        for part in chunks(problem_ids, _PAGE)
        for problem in catalog.problems(part).values()
        if exclude.check(problem)
    }


def _without_reference(catalog: Catalog) -> set[str]:
    """Return the problems that only a scorer can judge: there is neither an answer nor a solution."""
    rows = catalog.rows(
        "SELECT problem_id FROM problems "
        "WHERE answer = '' AND coalesce(json_extract_string(metadata, '$.solution'), '') = ''"
    )
    return {row["problem_id"] for row in rows}


def _strata(catalog: Catalog, by: str, problem_ids: Sequence[str]) -> dict[str, str]:
    """Return problem id -> its stratum: its source, or the text of a key of its metadata.

    Raises:
        InputError: no problem has the key.
    """
    wanted = list(problem_ids)
    if by == "source":
        rows = catalog.rows(
            "SELECT problem_id, source AS stratum FROM problems WHERE problem_id IN (SELECT unnest(?::VARCHAR[]))",
            [wanted],
        )
        return {row["problem_id"]: row["stratum"] for row in rows}
    pointer = "/" + by.replace("~", "~0").replace("/", "~1")  # a JSON pointer takes any key as it is
    rows = catalog.rows(
        "SELECT problem_id, json_extract_string(metadata, ?) AS stratum FROM problems "
        "WHERE problem_id IN (SELECT unnest(?::VARCHAR[]))",
        [pointer, wanted],
    )
    if wanted and all(row["stratum"] is None for row in rows):
        keys = catalog.rows(
            "SELECT DISTINCT unnest(json_keys(metadata)) AS name FROM problems "
            "WHERE problem_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY 1 LIMIT 20",
            [wanted],
        )
        there = ["source", *(row["name"] for row in keys)]
        near = did_you_mean(by, there)
        raise InputError(f"no problem has the metadata key {by!r} to stratify by{near}; there are {', '.join(there)}")
    return {row["problem_id"]: UNNAMED if row["stratum"] is None else row["stratum"] for row in rows}

"""What is known of a subset's samples beside their token ids: verdicts, difficulties, sources, texts.

Of a subset that was pulled or read from files, its rows as they were published; of any other, the catalog's own traces.
Must not know: the Hub, how a selection was made.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb

from calset.catalog.catalog import Catalog
from calset.catalog.records import Sample, Subset
from calset.catalog.store.schema import TABLES
from calset.catalog.store.sql import registered
from calset.catalog.store.values import arrow_array, text_array
from calset.catalog.subsets import samplefiles, versions
from calset.errors import CatalogError, InputError, TextsMissing

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024  # of an Arrow batch, which holds at most 2 GiB of text
_NUMBERS = ("position", "attempt", "served")  # columns of ``calset_wanted``
# The columns of a row that are not the sample's own.
TEXTS = tuple(name for name in TABLES["published_rows"] if name not in ("name", "version", "position"))


class Fact(NamedTuple):
    """What grading said of the trace that a sample is of."""

    verdict: str
    difficulty: float | None
    finish_reason: str | None
    source: str | None
    n_tokens: int  # of the trace's completion
    attempt: int = 0
    run_id: str | None = None  # None of a trace that another catalog has


def facts_of(catalog: Catalog, subset: Subset) -> list[Fact | None]:
    """Return a fact for each sample in their order; None where no trace is known.

    Of a trace that was run again since, it is what belongs to the sample's tokens: an earlier attempt's verdict.

    Raises:
        CatalogError: a pulled subset of which the catalog holds some rows only.

    Warns:
        TextsMissing: the files that the subset was read from hold no sound rows.
    """
    judged = Fact._fields[:4]
    if (rows := _published(catalog, subset, judged)) is not None:
        found = zip(subset.samples, *(rows[name].to_pylist() for name in judged), strict=True)
        return [
            None
            if verdict is None
            else Fact(verdict, difficulty, reason, source, len(sample.input_ids) - sample.n_prompt_tokens)
            for sample, verdict, difficulty, reason, source in found
        ]
    if not catalog.exists():
        return [None] * subset.n_samples
    with catalog.reading() as con:
        return _own_facts(con, catalog, subset)


def texts_of(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> pa.Table:
    """Return the columns ``TEXTS`` with a row for each sample in their order; unknown values are null.

    Args:
        facts: of ``facts_of``.

    Raises:
        CatalogError: a pulled subset of which the catalog holds some rows only.

    Warns:
        TextsMissing: the subset's published rows are not there.
    """
    import pyarrow as pa

    wanted = samplefiles.schema(TEXTS)
    if (rows := _published(catalog, subset, TEXTS)) is not None:
        return rows
    if (hub := (subset.origin or {}).get("hub")) and not subset.data_files:
        _warn_of_missing(subset, f"it was pulled without them; calset pull hub:{hub['repo']}/{subset.ref} brings them")
    found: dict[str, Any] = {field.name: pa.nulls(subset.n_samples, field.type) for field in wanted}
    if catalog.exists():
        with catalog.reading() as con:
            own = _own_texts(con, catalog, subset, facts)
        found |= {name: own[name] for name in own.column_names}
        found |= {
            name: text_array([fact and getattr(fact, name) for fact in facts]) for name in ("verdict", "finish_reason")
        }
        found["difficulty"] = arrow_array("DOUBLE", [fact and fact.difficulty for fact in facts])
    return pa.table([found[field.name].cast(field.type) for field in wanted], schema=wanted)


# --- rows as they were published ---------------------------------------------------------------------------------


def published_rows(subset: Subset, columns: Collection[str] = TEXTS) -> pa.Table | None:
    """Read columns of ``TEXTS`` from the files that a subset was read from; None where they are not sound.

    Warns:
        TextsMissing: they are not, and why.
    """
    try:
        return samplefiles.read_rows(subset, columns)
    except InputError as error:
        _warn_of_missing(subset, str(error))
        return None


def published_texts(catalog: Catalog, subset: Subset, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Return the columns ``TEXTS`` of some samples of a subset that was published; nothing of any other subset."""
    table = _published(catalog, subset, TEXTS)
    return table.take(list(positions)).to_pylist() if table is not None else []


def _warn_of_missing(subset: Subset, why: str) -> None:
    said = f"{subset.ref} comes without questions, texts and verdicts: {why}"
    warnings.warn(said, TextsMissing, stacklevel=4)


def _published(catalog: Catalog, subset: Subset, columns: Collection[str]) -> pa.Table | None:
    """Columns of the rows in the files of the subset, or of those that a pull kept; None where there are none."""
    if subset.data_files:
        return published_rows(subset, columns)
    if not subset.origin or not catalog.exists():
        return None
    with catalog.reading() as con:
        table = _kept(con, subset, columns)
    if not table.num_rows:
        return None
    if table["position"].to_pylist() != list(range(subset.n_samples)):
        raise CatalogError(
            f"{catalog.path} does not hold every published row of {subset.ref}: calset doctor says what is wrong; pull "
            "it into another catalog with --catalog"
        )
    return table.select(list(columns)).cast(samplefiles.schema(columns))


def _kept(con: duckdb.DuckDBPyConnection, subset: Subset, columns: Collection[str]) -> pa.Table:
    """Columns of the rows that a pull kept, with their ``position``; the catalog may be anybody's."""
    typed = {
        "messages": "messages::STRUCT(role VARCHAR, content VARCHAR)[] AS messages",
        "difficulty": "CASE WHEN difficulty BETWEEN 0 AND 1 THEN difficulty END AS difficulty",  # which NaN is not
    }
    sql = f"""
        SELECT position, {", ".join(typed.get(name, name) for name in columns)} FROM published_rows
        WHERE name = $name AND version = $version AND EXISTS (
            FROM subsets
            WHERE name = $name AND version = $version AND content_hash = $content AND starts_with(origin, '{{'))
        ORDER BY position
    """
    params = {"name": subset.name, "version": subset.version, "content": subset.content_hash}
    return con.sql(sql, params=params).to_arrow_reader(_BATCH_ROWS).read_all()


# --- the catalog's own traces ------------------------------------------------------------------------------------

# An attempt at a trace that is not the latest, with what the view ``trace`` says of the latest one.
_ATTEMPT = """
    SELECT t.trace_id, t.attempt, t.run_id, t.text, t.response, t.answer_start, t.n_tokens, t.n_reasoning_tokens,
        t.finish_reason, t.finish_reason = 'stop' AS finished, t.max_tokens, t.seconds, t.created_at,
        coalesce(g.verdict, 'ungraded') AS verdict, g.verdict = 'correct' AS correct, g.extracted, g.grader, g.detail
    FROM traces t LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
"""


def traces_of(catalog: Catalog, samples: Sequence[Sample], facts: Sequence[Fact | None]) -> dict[str, dict[str, Any]]:
    """Return the traces of some samples by trace id, each at the attempt that its sample holds.

    Returns:
        the columns of the view ``trace``, and ``answer_start`` (see ``Trace``).
    """
    held = {s.trace_id: fact.attempt for s, fact in zip(samples, facts, strict=True) if fact and s.trace_id}
    if not held:
        return {}
    ids = list(held)
    sql = """
        SELECT v.*, t.answer_start FROM trace v JOIN traces t ON t.trace_id = v.trace_id AND t.attempt = v.attempt
        WHERE v.trace_id IN (SELECT unnest(?::VARCHAR[]))
    """
    found = {row["trace_id"]: row for row in catalog.rows(sql, [ids])}
    if any(row["attempt"] != held[trace] for trace, row in found.items()):
        for row in catalog.rows(f"FROM ({_ATTEMPT}) WHERE trace_id IN (SELECT unnest(?::VARCHAR[]))", [ids]):
            if row["attempt"] == held[row["trace_id"]]:
                found[row["trace_id"]] |= row
    return found


def _own_facts(con: duckdb.DuckDBPyConnection, catalog: Catalog, subset: Subset) -> list[Fact | None]:
    attempts = attempts_of(con, catalog, subset)
    with _wanted(con, trace_id=list(attempts)):
        rows = con.execute("""
            SELECT trace_id, verdict, difficulty, finish_reason, source, n_tokens, attempt, run_id
            FROM trace SEMI JOIN calset_wanted USING (trace_id)
        """).fetchall()
    known = {trace: Fact(*rest) for trace, *rest in rows}
    if earlier := {trace: attempts[trace] for trace, fact in known.items() if fact.attempt != attempts[trace]}:
        with _wanted(con, trace_id=list(earlier), attempt=list(earlier.values())):
            rows = con.execute(f"""
                SELECT trace_id, verdict, finish_reason, n_tokens, attempt, run_id
                FROM ({_ATTEMPT}) SEMI JOIN calset_wanted USING (trace_id, attempt)
            """).fetchall()
        for trace, *changed in rows:
            names = ("verdict", "finish_reason", "n_tokens", "attempt", "run_id")
            known[trace] = known[trace]._replace(**dict(zip(names, changed, strict=True)))
    return [known.get(sample.trace_id or "") for sample in subset.samples]


def attempts_of(con: duckdb.DuckDBPyConnection, catalog: Catalog, subset: Subset) -> dict[str, int]:
    """Return the attempt at each trace that the samples hold: among several, the one with the sample's token ids."""
    samples = {s.trace_id: s for s in subset.samples if s.trace_id}
    there: dict[str, list[int]] = {}
    with _wanted(con, trace_id=list(samples)):
        sql = "SELECT trace_id, attempt FROM traces SEMI JOIN calset_wanted USING (trace_id) ORDER BY ALL"
        for trace, attempt in con.execute(sql).fetchall():
            there.setdefault(trace, []).append(attempt)
    found = {trace: attempts[-1] for trace, attempts in there.items()}
    several = [(trace, attempt) for trace, attempts in there.items() if len(attempts) > 1 for attempt in attempts]
    tokens = catalog.tokens(several) if several else {}
    for (trace, attempt), (prompt, completion) in sorted(tokens.items()):
        if _is_part(samples[trace], [*prompt, *completion]):
            found[trace] = attempt
    return found


def _is_part(sample: Sample, token_ids: Sequence[int]) -> bool:
    """Return True if a sample is this trace, or, as its id says, the window ``TRACE:START-STOP`` of it."""
    window = re.fullmatch(r".+:(\d+)-(\d+)", sample.sample_id)
    start, stop = (int(window[1]), int(window[2])) if window else (0, len(token_ids))
    return list(sample.input_ids) == list(token_ids[start:stop])


# The turns of a conversation whose system prompt and answer may be NULL.
_TURNS = """
    list_filter([
        {{'role': 'system', 'content': {system}}}, {{'role': 'user', 'content': p.question}},
        {{'role': 'assistant', 'content': {answer}}}
    ], lambda turn: turn.content IS NOT NULL)
"""


def _own_texts(
    con: duckdb.DuckDBPyConnection, catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]
) -> pa.Table:
    """The columns of ``TEXTS`` that are no judgement: of each sample's problem, and of the attempt that it holds."""
    prompts = _served_prompts(con, subset)
    sql = f"""
        SELECT p.question, p.answer, p.source,
            -- A window of a trace has no text of its own: its tokens are never decoded, and the trace's is another.
            CASE WHEN w.sample_id = w.trace_id THEN t.text END AS text,
            CASE WHEN p.problem_id IS NULL THEN NULL
                WHEN w.sample_id = w.trace_id AND r.run_id IS NOT NULL
                THEN {_TURNS.format(system="r.system_prompt", answer="t.text")}
                WHEN w.served = 1 THEN {_TURNS.format(system="w.system", answer="w.solution")} END AS messages
        FROM calset_wanted w
        LEFT JOIN problems p ON p.problem_id = w.problem_id
        LEFT JOIN traces t ON t.trace_id = w.trace_id AND t.attempt = w.attempt
        LEFT JOIN runs r ON r.run_id = t.run_id
        ORDER BY w.position
    """
    gold = [s.problem_id for s in subset.samples if s.kind == "gold" and s.problem_id]
    solutions = {name: problem.reference_solution for name, problem in catalog.problems(gold).items()} if gold else {}
    columns: dict[str, list[Any]] = {
        "position": list(range(subset.n_samples)),
        "sample_id": [s.sample_id for s in subset.samples],
        "trace_id": [s.trace_id for s in subset.samples],
        "attempt": [fact and fact.attempt for fact in facts],
        "problem_id": [s.problem_id for s in subset.samples],
        "served": [int(s.sample_id in prompts) for s in subset.samples],
        "system": [prompts.get(s.sample_id) for s in subset.samples],
        "solution": [solutions.get(s.problem_id or "") if s.kind == "gold" else None for s in subset.samples],
    }
    with _wanted(con, **columns):
        table = con.sql(sql).to_arrow_reader(_BATCH_ROWS).read_all()
    if table.num_rows != subset.n_samples:
        raise CatalogError(f"{catalog.path} holds rows twice: calset doctor says which; restore a backup")
    return table


def _served_prompts(con: duckdb.DuckDBPyConnection, subset: Subset) -> dict[str, str | None]:
    """The system prompt that was served, by the id of each sample that holds a prompt and no trace.

    The prompt is part of the generation key, so every attempt of a trace and every run of a key has the same.
    """
    samples = [s for s in subset.samples if s.kind in ("prompt", "gold") and s.problem_id]
    if not samples:
        return {}
    kinds = {s.kind for s in samples}
    with _wanted(con, problem_id=sorted({s.problem_id for s in samples if s.problem_id})):
        rows = con.execute("""
            SELECT DISTINCT t.problem_id, t.generation_key, r.system_prompt
            FROM (FROM traces SEMI JOIN calset_wanted USING (problem_id)) t JOIN runs r ON r.run_id = t.run_id
        """).fetchall()
    return {versions.prompt_sample_id(kind, problem, key): prompt for problem, key, prompt in rows for kind in kinds}


def _wanted(con: duckdb.DuckDBPyConnection, **columns: list[Any]) -> AbstractContextManager[None]:
    """Columns as the table ``calset_wanted``, which the connection knows while the block lasts."""
    import pyarrow as pa

    arrays = [arrow_array("INTEGER" if name in _NUMBERS else "VARCHAR", v) for name, v in columns.items()]
    return registered(con, "calset_wanted", pa.Table.from_arrays(arrays, names=list(columns)))

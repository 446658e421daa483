"""The catalog's tables and views, as data.

Why here: the DDL, the bulk writer and the readers share one list of columns, so they cannot disagree. Append-only and
free of enums, sequences, checks and keys, so that the same schema runs on DuckLake. Token ids live apart from the
traces' texts and numbers, so that a scan over verdicts and lengths never reads them.

Must not know: connections, files, migrations.
"""

from __future__ import annotations

from collections.abc import Mapping

from calset.catalog.records import JUDGED

# Table -> column -> DuckDB type. Columns follow calset.catalog.records.
TABLES: Mapping[str, Mapping[str, str]] = {
    "meta": {"key": "VARCHAR", "value": "VARCHAR"},
    "migrations": {
        "number": "INTEGER",
        "name": "VARCHAR",
        "applied_at": "TIMESTAMP",
        "calset_version": "VARCHAR",
        "duckdb_version": "VARCHAR",
    },
    "sources": {
        "source_id": "VARCHAR",
        "name": "VARCHAR",
        "spec": "VARCHAR",
        "kind": "VARCHAR",
        "revision": "VARCHAR",
        "grader": "VARCHAR",
        "licence": "VARCHAR",
    },
    "problems": {
        "problem_id": "VARCHAR",
        "source_id": "VARCHAR",
        "source": "VARCHAR",
        "source_row": "VARCHAR",
        "question": "VARCHAR",
        "answer": "VARCHAR",
        "grader": "VARCHAR",
        "metadata": "JSON",
    },
    "runs": {
        "run_id": "VARCHAR",
        "kind": "VARCHAR",
        "generation_key": "VARCHAR",
        "model": "VARCHAR",
        "model_revision": "VARCHAR",
        "tokenizer_hash": "VARCHAR",
        "chat_template_hash": "VARCHAR",
        "system_prompt": "VARCHAR",
        "sampling": "JSON",
        "max_tokens": "INTEGER",
        "seed": "BIGINT",
        "engine": "VARCHAR",
        "engine_version": "VARCHAR",
        "reasoning_format": "VARCHAR",
        "versions": "JSON",
        "hardware": "JSON",
        "command": "VARCHAR",
        "model_path": "VARCHAR",
        "started_at": "TIMESTAMP",
        "sampling_from": "JSON",
        "template_options": "JSON",
        "engine_options": "JSON",
    },
    "traces": {
        "trace_id": "VARCHAR",
        "attempt": "INTEGER",
        "problem_id": "VARCHAR",
        "run_id": "VARCHAR",
        "generation_key": "VARCHAR",
        "sample_index": "INTEGER",
        "request_seed": "BIGINT",
        "n_prompt_tokens": "INTEGER",
        "n_tokens": "INTEGER",
        "n_reasoning_tokens": "INTEGER",
        "reasoning_start": "INTEGER",
        "reasoning_end": "INTEGER",
        "answer_start": "INTEGER",
        "finish_reason": "VARCHAR",
        "max_tokens": "INTEGER",
        "seconds": "DOUBLE",
        "created_at": "TIMESTAMP",
        "text": "VARCHAR",
        "response": "VARCHAR",
        # 60 bits of hash(problem, model, revision, kind): what pass rates group and join on. Four columns of text in
        # its place made every filter over the view trace 1.5 times as slow (measured at a million traces).
        "pool_key": "BIGINT",
        # The grade that came with the trace (seq 0 in grades), again: joining a million grades to a million traces
        # took longer than all else that a filter does, and only the few traces graded later need the table.
        "first_verdict": "VARCHAR",
        "first_extracted": "VARCHAR",
        "first_grader": "VARCHAR",
        "first_detail": "VARCHAR",
        "first_graded_at": "TIMESTAMP",
    },
    "trace_tokens": {
        "trace_id": "VARCHAR",
        "attempt": "INTEGER",
        "prompt_ids": "INTEGER[]",
        "completion_ids": "INTEGER[]",
    },
    "grades": {
        "trace_id": "VARCHAR",
        "attempt": "INTEGER",
        # 0 for the grade that came with its trace, which is nearly every row, then 1, 2, ... in the order of adding:
        # the views read only what has more than 0.
        "seq": "INTEGER",
        "grader": "VARCHAR",
        "grader_version": "VARCHAR",
        "verdict": "VARCHAR",
        "extracted": "VARCHAR",
        "detail": "VARCHAR",
        "seconds": "DOUBLE",
        "graded_at": "TIMESTAMP",
    },
    "subsets": {
        "name": "VARCHAR",
        "version": "INTEGER",
        "content_hash": "VARCHAR",
        "recipe": "JSON",
        "seed": "BIGINT",
        "model": "VARCHAR",
        "model_revision": "VARCHAR",
        "tokenizer_hash": "VARCHAR",
        "n_samples": "INTEGER",
        "n_tokens": "BIGINT",
        "pool": "JSON",
        "warnings": "JSON",
        "created_at": "TIMESTAMP",
        "origin": "JSON",  # of a subset that was pulled
    },
    "subset_items": {
        "name": "VARCHAR",
        "version": "INTEGER",
        "position": "INTEGER",
        "sample_id": "VARCHAR",
        "kind": "VARCHAR",
        "trace_id": "VARCHAR",
        "problem_id": "VARCHAR",
        "n_prompt_tokens": "INTEGER",
        "input_ids": "INTEGER[]",
    },
    # The rows of a subset that was pulled, as they were published: its traces are in the catalog of whoever built them.
    "published_rows": {
        "name": "VARCHAR",
        "version": "INTEGER",
        "position": "INTEGER",
        "question": "VARCHAR",
        "answer": "VARCHAR",
        "text": "VARCHAR",
        "messages": "JSON",
        "verdict": "VARCHAR",
        "difficulty": "DOUBLE",
        "finish_reason": "VARCHAR",
        "source": "VARCHAR",
    },
    "publications": {
        "name": "VARCHAR",
        "version": "INTEGER",
        "content_hash": "VARCHAR",
        "repo": "VARCHAR",
        "revision": "VARCHAR",
        "tag": "VARCHAR",
        "published_at": "TIMESTAMP",
    },
    # What an adaptive build decided of a problem, and from what; append-only, the newest of a generation key counts.
    "decisions": {
        "run_id": "VARCHAR",
        "generation_key": "VARCHAR",
        "problem_id": "VARCHAR",
        "action": "VARCHAR",
        "reason": "VARCHAR",
        "k": "INTEGER",
        "n_correct": "INTEGER",
        "samples": "INTEGER",
        "probability": "DOUBLE",
        "confidence": "DOUBLE",
        "recipe": "VARCHAR",
        "decided_at": "TIMESTAMP",
    },
    # Why a problem was left out of a build: what it shares with an evaluation source.
    "contaminations": {
        "problem_id": "VARCHAR",
        "evaluation_source": "VARCHAR",
        "evaluation_revision": "VARCHAR",
        "evaluation_row": "VARCHAR",
        "n": "INTEGER",
        "n_shared": "INTEGER",
        "share": "DOUBLE",
        "evidence": "VARCHAR",
        "found_at": "TIMESTAMP",
    },
    # What a judge model said of a trace. Apart from grades: a judgement never overwrites a rule's verdict.
    "judgements": {
        "trace_id": "VARCHAR",
        "attempt": "INTEGER",
        "judge": "VARCHAR",
        "judge_revision": "VARCHAR",
        "prompt_hash": "VARCHAR",
        "engine": "VARCHAR",
        "engine_version": "VARCHAR",
        "verdict": "VARCHAR",
        "extracted": "VARCHAR",
        "raw": "VARCHAR",
        "detail": "VARCHAR",
        "seconds": "DOUBLE",
        "judged_at": "TIMESTAMP",
    },
    "prunings": {"pruning_id": "VARCHAR", "created_at": "TIMESTAMP", "record": "JSON"},
    "evaluations": {"evaluation_id": "VARCHAR", "created_at": "TIMESTAMP", "record": "JSON"},
}

_JUDGED = ", ".join(f"'{verdict}'" for verdict in JUDGED)

# Long texts: a fifth smaller and written twice as fast with zstd as with what DuckDB chooses by itself, read at a third
# of its speed, which nobody waits for (measured on 20,000 texts of 5,000 characters).
ZSTD = {("traces", "text"), ("published_rows", "text"), ("published_rows", "messages")}

# Of the view ``problem``: never right, yet at least three and half of the samples agree, which is more often a wrong
# reference than a hard problem.
SUSPECT = "pass_rate = 0 AND majority_n >= 3 AND majority_share >= 0.5"

# Views in the order of their dependence. The first three are the building blocks of the three that people query.
VIEWS: Mapping[str, str] = {
    # A retry supersedes. Retries are few, so the hash table built here is tiny, where a window over all traces sorts.
    "latest_traces": """
        SELECT t.* FROM traces t
        LEFT JOIN (SELECT trace_id, max(attempt) AS attempt FROM traces WHERE attempt > 0 GROUP BY trace_id) last
            ON last.trace_id = t.trace_id
        WHERE t.attempt = coalesce(last.attempt, t.attempt)
    """,
    # The newest grade counts; among equal times the one added last. Only traces graded more than once are sorted.
    "newest_grades": """
        WITH again AS (SELECT DISTINCT trace_id FROM grades WHERE seq > 0)
        SELECT g.* FROM grades g WHERE seq = 0 AND NOT EXISTS (FROM again a WHERE a.trace_id = g.trace_id)
        UNION ALL
        SELECT g.* FROM grades g WHERE EXISTS (FROM again a WHERE a.trace_id = g.trace_id)
        QUALIFY row_number() OVER (
            PARTITION BY g.trace_id, g.attempt
            ORDER BY g.graded_at DESC, g.seq DESC, g.grader, g.grader_version, g.verdict) = 1
    """,
    # The same newest grade beside its trace, from the copy in the trace's own row unless a later one outdates it.
    "graded_traces": """
        WITH later AS (
            SELECT trace_id, attempt, verdict, extracted, grader, detail, graded_at FROM grades WHERE seq > 0
            QUALIFY row_number() OVER (
                PARTITION BY trace_id, attempt
                ORDER BY graded_at DESC, seq DESC, grader, grader_version, verdict) = 1
        ), joined AS (
            SELECT t.*, g.verdict, g.extracted, g.grader, g.detail,
                g.graded_at IS NOT NULL AND (t.first_graded_at IS NULL OR g.graded_at >= t.first_graded_at) AS outdated
            FROM latest_traces t LEFT JOIN later g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        )
        SELECT * REPLACE (
            CASE WHEN outdated THEN verdict ELSE first_verdict END AS verdict,
            CASE WHEN outdated THEN extracted ELSE first_extracted END AS extracted,
            CASE WHEN outdated THEN grader ELSE first_grader END AS grader,
            CASE WHEN outdated THEN detail ELSE first_detail END AS detail)
        FROM joined
    """,
    # One row a (problem, model, revision, kind) that has traces. any_value: a pool has one of each (record checks it).
    "pools": f"""
        WITH counted AS (
            SELECT pool_key, any_value(problem_id) AS problem_id, any_value(run_id) AS run_id,
                count(*) AS n_traces,
                count(*) FILTER (WHERE verdict IN ({_JUDGED})) AS k,
                count(*) FILTER (WHERE verdict = 'correct') AS n_correct
            FROM graded_traces GROUP BY pool_key
        )
        SELECT c.pool_key, c.problem_id, r.model, r.model_revision, r.kind, c.n_traces, c.k, c.n_correct
        FROM counted c JOIN runs r ON r.run_id = c.run_id
    """,
    # difficulty is (k - n_correct) / k, not 1 - pass_rate: 1 - 4/5 is 0.19999999999999996 and misses a band from 0.2.
    # Dividing by zero gives NULL in DuckDB: nothing judged, no pass rate.
    # Problems and runs are joined to the pools, which are few, and then one integer to the traces, which are many.
    "trace": f"""
        WITH pool AS (
            SELECT s.pool_key, s.model, s.model_revision, s.kind, s.k, s.n_correct, p.source, p.question, p.answer
            FROM pools s JOIN problems p ON p.problem_id = s.problem_id
        )
        SELECT t.trace_id, t.problem_id, t.run_id, s.kind, s.model, s.model_revision, s.source,
            t.sample_index, t.attempt,
            (s.k - s.n_correct) / nullif(s.k, 0)::DOUBLE AS difficulty,
            s.n_correct / nullif(s.k, 0)::DOUBLE AS pass_rate,
            s.k,
            coalesce(t.verdict, 'ungraded') AS verdict,
            CASE WHEN t.verdict IN ({_JUDGED}) THEN t.verdict = 'correct' END AS correct,
            t.n_prompt_tokens, t.n_tokens, t.n_reasoning_tokens,
            t.finish_reason, t.finish_reason = 'stop' AS finished,
            s.question, s.answer, t.extracted, t.grader, t.detail,
            t.text, t.response, t.max_tokens, t.seconds, t.generation_key, t.created_at
        FROM graded_traces t JOIN pool s ON s.pool_key = t.pool_key
    """,
    # One row a (problem, model, revision, kind); a problem without traces has one row without a model.
    "problem": f"""
        WITH counts AS (
            SELECT pool_key,
                count(*) FILTER (WHERE finish_reason <> 'stop') AS n_unfinished,
                quantile_disc(n_tokens, [0.1, 0.5, 0.9]) AS lengths
            FROM latest_traces GROUP BY pool_key
        ), votes AS (
            SELECT pool_key, extracted, count(*) AS n
            FROM graded_traces WHERE verdict IN ({_JUDGED}) AND extracted IS NOT NULL GROUP BY ALL
        ), majority AS (
            SELECT pool_key, extracted, n FROM votes
            QUALIFY row_number() OVER (PARTITION BY pool_key ORDER BY n DESC, extracted) = 1
        )
        SELECT p.problem_id, p.source, s.model, s.model_revision, s.kind,
            coalesce(s.n_traces, 0) AS n_traces,
            coalesce(s.k, 0) AS k,
            coalesce(s.n_correct, 0) AS n_correct,
            s.n_correct / nullif(s.k, 0)::DOUBLE AS pass_rate,
            (s.k - s.n_correct) / nullif(s.k, 0)::DOUBLE AS difficulty,
            coalesce(c.n_unfinished, 0) AS n_unfinished,
            c.lengths[1] AS n_tokens_p10, c.lengths[2] AS n_tokens_p50, c.lengths[3] AS n_tokens_p90,
            m.extracted AS majority_answer,
            coalesce(m.n, 0) AS majority_n,
            m.n / nullif(s.k, 0)::DOUBLE AS majority_share,
            p.question, p.answer, p.grader, p.source_row, p.metadata
        FROM problems p
        LEFT JOIN pools s ON s.problem_id = p.problem_id
        LEFT JOIN counts c ON c.pool_key = s.pool_key
        LEFT JOIN majority m ON m.pool_key = s.pool_key
    """,
    "suspect_gold": f"SELECT * FROM problem WHERE {SUSPECT}",
    # Problems that a build left out because an evaluation source holds them too, with the evidence.
    "excluded": """
        SELECT c.problem_id, p.source, p.source_row, c.evaluation_source, c.evaluation_row, c.n, c.n_shared, c.share,
            c.evidence, p.question, p.answer, c.evaluation_revision, c.found_at
        FROM contaminations c JOIN problems p ON p.problem_id = c.problem_id
    """,
    # The newest judgement of each judge and prompt on each trace, beside the rule's verdict.
    "judgement": """
        SELECT t.trace_id, t.problem_id, t.model, t.source, j.judge, j.judge_revision, j.prompt_hash,
            j.verdict AS judge_verdict, t.verdict, t.grader, j.verdict = t.verdict AS agrees, j.extracted, j.detail,
            j.raw, t.question, t.answer, t.response, j.judged_at
        FROM judgements j JOIN trace t ON t.trace_id = j.trace_id AND t.attempt = j.attempt
        QUALIFY row_number() OVER (
            PARTITION BY j.trace_id, j.attempt, j.judge, j.judge_revision, j.prompt_hash
            ORDER BY j.judged_at DESC, j.verdict, j.raw) = 1
    """,
}


def create_table(name: str) -> str:
    """The CREATE TABLE statement of one table."""
    columns = ", ".join(
        f'"{column}" {kind}{" USING COMPRESSION zstd" if (name, column) in ZSTD else ""}'
        for column, kind in TABLES[name].items()
    )
    return f'CREATE TABLE "{name}" ({columns})'


def create_view(name: str) -> str:
    """The CREATE OR REPLACE VIEW statement of one view."""
    return f'CREATE OR REPLACE VIEW "{name}" AS {VIEWS[name].strip()}'

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
        # How many grades this trace had when this one was added: 0 for nearly every row, which is what lets
        # newest_grades skip a sort of the whole table.
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
    "pass_rates": f"""
        SELECT t.problem_id, r.model, r.model_revision, r.kind,
            count(*) AS n_traces,
            count(*) FILTER (WHERE g.verdict IN ({_JUDGED})) AS k,
            count(*) FILTER (WHERE g.verdict = 'correct') AS n_correct
        FROM latest_traces t
        JOIN runs r ON r.run_id = t.run_id
        LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        GROUP BY ALL
    """,
    # difficulty is (k - n_correct) / k, not 1 - pass_rate: 1 - 4/5 is 0.19999999999999996 and misses a band from 0.2.
    # Dividing by zero gives NULL in DuckDB: nothing judged, no pass rate.
    "trace": f"""
        SELECT t.trace_id, t.problem_id, t.run_id, r.kind, r.model, r.model_revision, p.source,
            t.sample_index, t.attempt,
            (s.k - s.n_correct) / nullif(s.k, 0)::DOUBLE AS difficulty,
            s.n_correct / nullif(s.k, 0)::DOUBLE AS pass_rate,
            s.k,
            coalesce(g.verdict, 'ungraded') AS verdict,
            CASE WHEN g.verdict IN ({_JUDGED}) THEN g.verdict = 'correct' END AS correct,
            t.n_prompt_tokens, t.n_tokens, t.n_reasoning_tokens,
            t.finish_reason, t.finish_reason = 'stop' AS finished,
            p.question, p.answer, g.extracted, g.grader, g.detail,
            t.text, t.response, t.max_tokens, t.seconds, t.generation_key, t.created_at
        FROM latest_traces t
        JOIN runs r ON r.run_id = t.run_id
        JOIN problems p ON p.problem_id = t.problem_id
        LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        JOIN pass_rates s ON s.problem_id = t.problem_id AND s.model = r.model
            AND s.model_revision = r.model_revision AND s.kind = r.kind
    """,
    # One row a (problem, model, revision, kind); a problem without traces has one row without a model.
    "problem": f"""
        WITH flat AS (
            SELECT t.problem_id, r.model, r.model_revision, r.kind, t.n_tokens, t.finish_reason, g.verdict, g.extracted
            FROM latest_traces t
            JOIN runs r ON r.run_id = t.run_id
            LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        ), counts AS (
            SELECT problem_id, model, model_revision, kind,
                count(*) AS n_traces,
                count(*) FILTER (WHERE verdict IN ({_JUDGED})) AS k,
                count(*) FILTER (WHERE verdict = 'correct') AS n_correct,
                count(*) FILTER (WHERE finish_reason <> 'stop') AS n_unfinished,
                quantile_disc(n_tokens, [0.1, 0.5, 0.9]) AS lengths
            FROM flat GROUP BY ALL
        ), votes AS (
            SELECT problem_id, model, model_revision, kind, extracted, count(*) AS n
            FROM flat WHERE verdict IN ({_JUDGED}) AND extracted IS NOT NULL GROUP BY ALL
        ), majority AS (
            SELECT problem_id, model, model_revision, kind, extracted, n FROM votes
            QUALIFY row_number() OVER (
                PARTITION BY problem_id, model, model_revision, kind ORDER BY n DESC, extracted) = 1
        )
        SELECT p.problem_id, p.source, c.model, c.model_revision, c.kind,
            coalesce(c.n_traces, 0) AS n_traces,
            coalesce(c.k, 0) AS k,
            coalesce(c.n_correct, 0) AS n_correct,
            c.n_correct / nullif(c.k, 0)::DOUBLE AS pass_rate,
            (c.k - c.n_correct) / nullif(c.k, 0)::DOUBLE AS difficulty,
            coalesce(c.n_unfinished, 0) AS n_unfinished,
            c.lengths[1] AS n_tokens_p10, c.lengths[2] AS n_tokens_p50, c.lengths[3] AS n_tokens_p90,
            m.extracted AS majority_answer,
            coalesce(m.n, 0) AS majority_n,
            m.n / nullif(c.k, 0)::DOUBLE AS majority_share,
            p.question, p.answer, p.grader, p.source_row, p.metadata
        FROM problems p
        LEFT JOIN counts c ON c.problem_id = p.problem_id
        LEFT JOIN majority m ON m.problem_id = c.problem_id AND m.model = c.model
            AND m.model_revision = c.model_revision AND m.kind = c.kind
    """,
    # Never right, yet at least three and half of the samples agree: more often a wrong reference than a hard problem.
    "suspect_gold": """
        SELECT * FROM problem WHERE pass_rate = 0 AND majority_n >= 3 AND majority_share >= 0.5
    """,
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
    columns = ", ".join(f'"{column}" {kind}' for column, kind in TABLES[name].items())
    return f'CREATE TABLE "{name}" ({columns})'


def create_view(name: str) -> str:
    """The CREATE OR REPLACE VIEW statement of one view."""
    return f'CREATE OR REPLACE VIEW "{name}" AS {VIEWS[name].strip()}'

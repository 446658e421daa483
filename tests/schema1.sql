-- The catalog's first schema, as calset wrote it then. Frozen: migrations are tested against it.
CREATE TABLE "meta" ("key" VARCHAR, "value" VARCHAR);
CREATE TABLE "migrations" ("number" INTEGER, "name" VARCHAR, "applied_at" TIMESTAMP, "calset_version" VARCHAR, "duckdb_version" VARCHAR);
CREATE TABLE "sources" ("source_id" VARCHAR, "name" VARCHAR, "spec" VARCHAR, "kind" VARCHAR, "revision" VARCHAR, "grader" VARCHAR, "licence" VARCHAR);
CREATE TABLE "problems" ("problem_id" VARCHAR, "source_id" VARCHAR, "source" VARCHAR, "source_row" VARCHAR, "question" VARCHAR, "answer" VARCHAR, "grader" VARCHAR, "metadata" JSON);
CREATE TABLE "runs" ("run_id" VARCHAR, "kind" VARCHAR, "generation_key" VARCHAR, "model" VARCHAR, "model_revision" VARCHAR, "tokenizer_hash" VARCHAR, "chat_template_hash" VARCHAR, "system_prompt" VARCHAR, "sampling" JSON, "max_tokens" INTEGER, "seed" BIGINT, "engine" VARCHAR, "engine_version" VARCHAR, "reasoning_format" VARCHAR, "versions" JSON, "hardware" JSON, "command" VARCHAR, "model_path" VARCHAR, "started_at" TIMESTAMP);
CREATE TABLE "traces" ("trace_id" VARCHAR, "attempt" INTEGER, "problem_id" VARCHAR, "run_id" VARCHAR, "generation_key" VARCHAR, "sample_index" INTEGER, "request_seed" BIGINT, "n_prompt_tokens" INTEGER, "n_tokens" INTEGER, "n_reasoning_tokens" INTEGER, "reasoning_start" INTEGER, "reasoning_end" INTEGER, "answer_start" INTEGER, "finish_reason" VARCHAR, "max_tokens" INTEGER, "seconds" DOUBLE, "created_at" TIMESTAMP, "text" VARCHAR, "response" VARCHAR);
CREATE TABLE "trace_tokens" ("trace_id" VARCHAR, "attempt" INTEGER, "prompt_ids" INTEGER[], "completion_ids" INTEGER[]);
CREATE TABLE "grades" ("trace_id" VARCHAR, "attempt" INTEGER, "seq" INTEGER, "grader" VARCHAR, "grader_version" VARCHAR, "verdict" VARCHAR, "extracted" VARCHAR, "detail" VARCHAR, "seconds" DOUBLE, "graded_at" TIMESTAMP);
CREATE TABLE "subsets" ("name" VARCHAR, "version" INTEGER, "content_hash" VARCHAR, "recipe" JSON, "seed" BIGINT, "model" VARCHAR, "model_revision" VARCHAR, "tokenizer_hash" VARCHAR, "n_samples" INTEGER, "n_tokens" BIGINT, "pool" JSON, "warnings" JSON, "created_at" TIMESTAMP);
CREATE TABLE "subset_items" ("name" VARCHAR, "version" INTEGER, "position" INTEGER, "sample_id" VARCHAR, "kind" VARCHAR, "trace_id" VARCHAR, "problem_id" VARCHAR, "n_prompt_tokens" INTEGER, "input_ids" INTEGER[]);
CREATE TABLE "publications" ("name" VARCHAR, "version" INTEGER, "content_hash" VARCHAR, "repo" VARCHAR, "revision" VARCHAR, "tag" VARCHAR, "published_at" TIMESTAMP);
CREATE TABLE "prunings" ("pruning_id" VARCHAR, "created_at" TIMESTAMP, "record" JSON);
CREATE TABLE "evaluations" ("evaluation_id" VARCHAR, "created_at" TIMESTAMP, "record" JSON);
CREATE OR REPLACE VIEW "latest_traces" AS SELECT t.* FROM traces t
        LEFT JOIN (SELECT trace_id, max(attempt) AS attempt FROM traces WHERE attempt > 0 GROUP BY trace_id) last
            ON last.trace_id = t.trace_id
        WHERE t.attempt = coalesce(last.attempt, t.attempt);
CREATE OR REPLACE VIEW "newest_grades" AS WITH again AS (SELECT DISTINCT trace_id FROM grades WHERE seq > 0)
        SELECT g.* FROM grades g WHERE seq = 0 AND NOT EXISTS (FROM again a WHERE a.trace_id = g.trace_id)
        UNION ALL
        SELECT g.* FROM grades g WHERE EXISTS (FROM again a WHERE a.trace_id = g.trace_id)
        QUALIFY row_number() OVER (
            PARTITION BY g.trace_id, g.attempt
            ORDER BY g.graded_at DESC, g.seq DESC, g.grader, g.grader_version, g.verdict) = 1;
CREATE OR REPLACE VIEW "pass_rates" AS SELECT t.problem_id, r.model, r.model_revision, r.kind,
            count(*) AS n_traces,
            count(*) FILTER (WHERE g.verdict IN ('correct', 'incorrect', 'no_answer', 'truncated', 'pred_unparsable')) AS k,
            count(*) FILTER (WHERE g.verdict = 'correct') AS n_correct
        FROM latest_traces t
        JOIN runs r ON r.run_id = t.run_id
        LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        GROUP BY ALL;
CREATE OR REPLACE VIEW "trace" AS SELECT t.trace_id, t.problem_id, t.run_id, r.kind, r.model, r.model_revision, p.source,
            t.sample_index, t.attempt,
            (s.k - s.n_correct) / nullif(s.k, 0)::DOUBLE AS difficulty,
            s.n_correct / nullif(s.k, 0)::DOUBLE AS pass_rate,
            s.k,
            coalesce(g.verdict, 'ungraded') AS verdict,
            CASE WHEN g.verdict IN ('correct', 'incorrect', 'no_answer', 'truncated', 'pred_unparsable') THEN g.verdict = 'correct' END AS correct,
            t.n_prompt_tokens, t.n_tokens, t.n_reasoning_tokens,
            t.finish_reason, t.finish_reason = 'stop' AS finished,
            p.question, p.answer, g.extracted, g.grader, g.detail,
            t.text, t.response, t.max_tokens, t.seconds, t.generation_key, t.created_at
        FROM latest_traces t
        JOIN runs r ON r.run_id = t.run_id
        JOIN problems p ON p.problem_id = t.problem_id
        LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        JOIN pass_rates s ON s.problem_id = t.problem_id AND s.model = r.model
            AND s.model_revision = r.model_revision AND s.kind = r.kind;
CREATE OR REPLACE VIEW "problem" AS WITH flat AS (
            SELECT t.problem_id, r.model, r.model_revision, r.kind, t.n_tokens, t.finish_reason, g.verdict, g.extracted
            FROM latest_traces t
            JOIN runs r ON r.run_id = t.run_id
            LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        ), counts AS (
            SELECT problem_id, model, model_revision, kind,
                count(*) AS n_traces,
                count(*) FILTER (WHERE verdict IN ('correct', 'incorrect', 'no_answer', 'truncated', 'pred_unparsable')) AS k,
                count(*) FILTER (WHERE verdict = 'correct') AS n_correct,
                count(*) FILTER (WHERE finish_reason <> 'stop') AS n_unfinished,
                quantile_disc(n_tokens, [0.1, 0.5, 0.9]) AS lengths
            FROM flat GROUP BY ALL
        ), votes AS (
            SELECT problem_id, model, model_revision, kind, extracted, count(*) AS n
            FROM flat WHERE verdict IN ('correct', 'incorrect', 'no_answer', 'truncated', 'pred_unparsable') AND extracted IS NOT NULL GROUP BY ALL
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
            AND m.model_revision = c.model_revision AND m.kind = c.kind;
CREATE OR REPLACE VIEW "suspect_gold" AS SELECT * FROM problem WHERE pass_rate = 0 AND majority_n >= 3 AND majority_share >= 0.5;

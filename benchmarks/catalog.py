"""How fast is a large catalog? Filters, stats, select, ingest, a commit, size, a subset; at 1 and 10 million traces.

The catalog is generated in SQL: 16 samples of each (problem, model), two models, words drawn by Zipf's law whose token
ids are those of the text, one trace in a hundred retried and one in a hundred graded again. Ten million come without
texts. Each figure is the median of several: wall seconds, the least of them, and CPU seconds of all
threads, which is what to look at on a machine with other work.

    python benchmarks/catalog.py --traces 1000000
    python benchmarks/catalog.py --traces 10000000 --no-texts --folder /scratch
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.compact import compact
from calset.catalog.query.stats import stats
from calset.catalog.records import Grade, Run, Trace
from calset.catalog.select import select
from calset.catalog.store import schema
from calset.catalog.store.connection import opened
from calset.catalog.store.values import arrow_batch
from calset.catalog.subsets.candidates import read_pool
from calset.catalog.subsets.recipes import RECIPES

SAMPLES = 16
MODELS = ("lrm-7b", "lrm-1.5b")
RETRIED, REGRADED = 97, 101  # one trace in so many
ROWS_A_STEP = 245_760  # two of DuckDB's row groups
WORDS = 30_000
COMMIT = 256
BUDGET = 1_000_000  # tokens of a subset
SUBSET_SECONDS = 2.0  # wanted of what is asked of it
FILTER = "difficulty BETWEEN 0.3 AND 0.8 AND correct AND n_tokens BETWEEN 40 AND 100"
WANTED = {False: {"filter": 2.0}, True: {"filter": 0.3, "stats": 1.0, "commit": 0.1}}  # seconds, by: with texts?


# -- a catalog ------------------------------------------------------------------------------------------------------


def make_run(model: str) -> Run:
    sampling = {"temperature": 0.6, "top_p": 0.95}
    identity: dict[str, Any] = {"model": model, "tokenizer_hash": "tok", "chat_template_hash": "chat"}
    identity |= {"system_prompt": None, "sampling": sampling}
    return Run(
        run_id=ids.digest("run", model), kind="build", model_revision="r1", max_tokens=4096, seed=0, engine="vllm",
        engine_version="0", reasoning_format="think", versions={}, hardware={}, command="calset build",
        generation_key=ids.generation_key(revision="r1", **identity), **identity,
    )  # fmt: skip


def chance(salt: int, of: str = "i") -> str:
    """SQL for a number in [0, 1) that depends on the row alone."""
    return f"((hash({of}, {salt}) % 1000003) / 1000003.0)"


def rows_sql(runs: Sequence[Run], start: int, stop: int, *, texts: bool) -> str:
    """One row a trace, with a column for whatever a table may want."""
    zipf = f"1 + ({WORDS} ** ((hash(i, j) % 1000003) / 1000003.0))::INTEGER % {WORDS}"
    words = f"list_transform(range(n), lambda j: {zipf})"
    text = "'<think> ' || array_to_string(list_transform(w, lambda x: list_extract(words, x)), ' ')"
    return f"""
        WITH numbered AS (
            SELECT i, i // {SAMPLES * len(MODELS)} AS p, (i // {SAMPLES}) % {len(MODELS)} AS m, i % {SAMPLES} AS s
            FROM range({start}, {stop}) t(i)
        ), shaped AS (
            SELECT *, left(sha256('p' || p), {ids.ID_DIGITS}) AS problem_id,
                left(sha256('t' || i), {ids.ID_DIGITS}) AS trace_id,
                (20 + 160 * {chance(1)} * {chance(2)})::INTEGER AS n,
                CASE WHEN {chance(3)} < 0.05 THEN 'truncated' WHEN {chance(4)} < {chance(7, "p, m")} THEN 'correct'
                    WHEN {chance(5)} < 0.1 THEN 'no_answer' ELSE 'incorrect' END AS verdict,
                TIMESTAMP '2026-01-01' + to_milliseconds(i * 30) AS created_at
            FROM numbered
        ), worded AS (SELECT *, {words} AS w FROM shaped)
        SELECT trace_id, 0 AS attempt, problem_id, {[r.run_id for r in runs]}[1 + m] AS run_id,
            {[r.generation_key for r in runs]}[1 + m] AS generation_key, s AS sample_index,
            hash(i) % 2147483647 AS request_seed, 12 + p % 16 AS n_prompt_tokens, n AS n_tokens,
            n - 10 AS n_reasoning_tokens, 1 AS reasoning_start, n - 9 AS reasoning_end, n - 8 AS answer_start,
            CASE WHEN verdict = 'truncated' THEN 'length' ELSE 'stop' END AS finish_reason, 4096 AS max_tokens,
            n * 0.02 AS seconds, created_at, {text if texts else "''"} AS text,
            {"'The answer is ' || s" if texts else "''"} AS response,
            ('0x' || left(sha256(concat_ws(chr(10), problem_id, {list(MODELS)}[1 + m], 'r1', 'build')), 15))::BIGINT
                AS pool_key,
            verdict AS first_verdict, s::VARCHAR AS first_extracted, 'math' AS first_grader,
            NULL::VARCHAR AS first_detail, created_at AS first_graded_at,
            list_transform(range(12 + p % 16), lambda j: ((hash(p, j) % 5000))::INTEGER) AS prompt_ids,
            list_transform(w, lambda x: (x * 7919) % 150000) AS completion_ids,
            0 AS seq, 'math' AS grader, '0.9' AS grader_version, verdict, s::VARCHAR AS extracted,
            NULL::VARCHAR AS detail, created_at AS graded_at, i
        FROM worded, vocabulary
    """


def fill(path: Path, n: int, *, texts: bool) -> None:
    """Write a catalog of ``n`` traces through SQL, a step at a time, in the order of the problems as a build would."""
    catalog, runs = Catalog(path), [make_run(model) for model in MODELS]
    for run in runs:
        catalog.add_run(run)
    with opened(path, "write", 60) as con:
        con.execute(
            "CREATE TEMP TABLE vocabulary AS SELECT list(left(md5(w::VARCHAR), 3 + w % 7) ORDER BY w) AS words "
            f"FROM range({WORDS + 1}) t(w)"
        )
        con.execute(f"""
            INSERT INTO problems
            SELECT left(sha256('p' || p), {ids.ID_DIGITS}), 'src', ['gsm8k', 'math500', 'demo'][1 + p % 3],
                p::VARCHAR, 'What is ' || p || ' plus ' || (p * 7 % 1000) || ', and why?', p::VARCHAR, 'math',
                '{{"domain": "d' || p % 4 || '"}}'
            FROM range({-(-n // (SAMPLES * len(MODELS)))}) t(p)
        """)
        for start in range(0, n, ROWS_A_STEP):
            step = rows_sql(runs, start, min(n, start + ROWS_A_STEP), texts=texts)
            con.execute(f"CREATE OR REPLACE TEMP TABLE step AS {step}")
            again = f"(SELECT * REPLACE (1 AS attempt) FROM step WHERE i % {RETRIED} = 0)"
            for table in ("traces", "grades", "trace_tokens"):
                insert(con, table, "step")
                insert(con, table, again)
            later = f"(SELECT * REPLACE (1 AS seq, 'correct' AS verdict) FROM step WHERE i % {REGRADED} = 0)"
            insert(con, "grades", later)


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: str) -> None:
    columns = ", ".join(schema.TABLES[table])
    con.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {rows}")


# -- timing ---------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object], times: int = 5, *, warm: bool = True) -> tuple[float, float, float]:
    """Median wall, least wall and median CPU seconds."""
    if warm:
        work()
    wall, cpu = [], []
    for _ in range(times):
        began, before = time.perf_counter(), os.times()
        work()
        after = os.times()
        wall.append(time.perf_counter() - began)
        cpu.append(after.user + after.system - before.user - before.system)
    return statistics.median(wall), min(wall), statistics.median(cpu)


def say(what: str, figures: tuple[float, float, float], wanted: float | None = None) -> None:
    median, least, cpu = figures
    target = "" if wanted is None else f"   wanted < {wanted:g} s: {'yes' if median < wanted else 'NO'}"
    print(f"{what:34} {median:8.3f} s  (least {least:.3f}, CPU {cpu:.3f}){target}", flush=True)


def ask(path: Path, *, texts: bool) -> None:
    """Filters and stats on a warm file."""
    wanted = WANTED[texts].get("filter")
    questions = {
        "count by a filter": f"SELECT count(*) FROM trace WHERE {FILTER}",
        "its first 1,000 ids": f"SELECT trace_id FROM trace WHERE {FILTER} ORDER BY trace_id LIMIT 1000",
    }
    with opened(path, "read", 60) as con:
        for what, sql in questions.items():
            say(what, timed(lambda sql=sql: con.execute(sql).fetchall()), wanted)
    say("a model's candidates", timed(lambda: read_pool(Catalog(path), RECIPES["rac"], model=MODELS[0])))
    say("stats", timed(lambda: stats(path), 3), WANTED[texts].get("stats"))


def batch(run: Run, n: int, *, first_problem: int, length: int, index: int) -> tuple[list[Trace], list[Grade]]:
    """New traces of existing problems, with their grades."""
    rng, now = random.Random(index), datetime(2026, 6, 1)
    words = [f"word{i}" for i in range(2000)]
    traces, grades = [], []
    for i in range(n):
        problem = hashlib.sha256(f"p{first_problem + i // SAMPLES}".encode()).hexdigest()[: ids.ID_DIGITS]
        picked = [int(2000 ** rng.random()) % 2000 for _ in range(length)]
        trace = Trace(
            ids.trace_id(problem, run.generation_key, index + i % SAMPLES), problem, run.run_id, run.generation_key,
            index + i % SAMPLES, 1, list(range(100, 120)), [w * 71 for w in picked],
            " ".join(words[w] for w in picked), "1", "stop", 4096, created_at=now,
        )  # fmt: skip
        traces.append(trace)
        grades.append(Grade(trace.trace_id, 0, "math", "0.9", "correct", "1", graded_at=now))
    return traces, grades


def commit(path: Path, n: int) -> None:
    """Open for a write, keep 256 traces with their grades, close; 40 times on a copy."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / "c.duckdb"
        shutil.copyfile(path, copy)
        catalog, run = Catalog(copy), make_run(MODELS[0])
        problems = n // (SAMPLES * len(MODELS))
        batches = iter(
            [
                batch(run, COMMIT, first_problem=(i * 977) % (problems - COMMIT), length=60, index=1000 + 100 * i)
                for i in range(41)
            ]
        )
        say("open, commit 256 traces, close", timed(lambda: catalog.record(*next(batches)), 40), WANTED[True]["commit"])


def ingest(folder: Path) -> None:
    """``Catalog.record`` against DuckDB alone inserting the same columns from the same Arrow tables."""
    run = make_run(MODELS[0])
    rows = 50
    traces, grades = batch(run, COMMIT * rows, first_problem=0, length=400, index=0)
    parts = [slice(i * COMMIT, (i + 1) * COMMIT) for i in range(rows)]

    def catalog(name: str) -> Catalog:
        target = Catalog(folder / name)
        fill(target.path, COMMIT * rows * 2, texts=False)
        return target

    def through_record(target: Catalog) -> None:
        for part in parts:
            target.record(traces[part], grades[part])

    def through_duckdb(target: Catalog) -> None:
        for part in parts:
            with opened(target.path, "write", 60) as con:
                con.execute("BEGIN")
                for table, values in raw_rows(traces[part], grades[part]).items():
                    con.register("batch", arrow_batch(schema.TABLES[table], values))
                    con.execute(f"INSERT INTO {table} FROM batch").fetchall()
                    con.unregister("batch")
                con.execute("COMMIT")

    ours, raw = [], []
    for i in range(3):
        for times, work in ((raw, through_duckdb), (ours, through_record)):
            target = catalog(f"{work.__name__}{i}.duckdb")
            times.append(timed(lambda work=work, target=target: work(target), 1, warm=False)[2])
    ratio = statistics.median(raw) / statistics.median(ours)
    print(
        f"{'ingest, share of DuckDB alone':34} {ratio:8.2f}    (CPU)   wanted >= 0.7: {'yes' if ratio >= 0.7 else 'NO'}"
    )


def raw_rows(traces: Sequence[Trace], grades: Sequence[Grade]) -> dict[str, list[tuple[Any, ...]]]:
    """Rows as they come, without a look at what is there."""
    known = {"n_prompt_tokens": 20, "pool_key": 1, "first_verdict": "correct", "first_extracted": "1"}
    known |= {"first_grader": "math", "first_detail": None, "first_graded_at": traces[0].created_at, "seq": 0}

    def row(table: str, record: object) -> tuple[Any, ...]:
        return tuple(known[c] if c in known else getattr(record, c) for c in schema.TABLES[table])

    return {
        "trace_tokens": [row("trace_tokens", t) for t in traces],
        "traces": [row("traces", t) for t in traces],
        "grades": [row("grades", g) for g in grades],
    }


def size(path: Path) -> None:
    """The compacted file against the same rows in zstd Parquet, a file a table."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / "c.duckdb"
        shutil.copyfile(path, copy)
        began = time.perf_counter()
        compact(copy)
        seconds, parquet = time.perf_counter() - began, 0
        with opened(copy, "read", 60) as con:
            for table in schema.TABLES:
                file = Path(folder) / "t.parquet"
                con.execute(f"COPY {table} TO '{file}' (FORMAT parquet, COMPRESSION zstd)")
                parquet += file.stat().st_size
        ratio = copy.stat().st_size / parquet
        print(
            f"{'file / the same rows in Parquet':34} {ratio:8.2f}    ({copy.stat().st_size / 1e6:.0f} MB, as written "
            f"{path.stat().st_size / 1e6:.0f} MB; compact took {seconds:.0f} s)   wanted <= 1.3: "
            f"{'yes' if ratio <= 1.3 else 'NO'}"
        )


def of_a_subset(path: Path) -> None:
    """report, diff and export of a subset of a million tokens, each in a process of its own, on a copy."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / "c.duckdb"
        shutil.copyfile(path, copy)
        a, b = (select(copy, f"of-{model}", "ssgr", model=model, tokens=BUDGET) for model in MODELS)
        commands = {
            "report": ["report", a.ref, "-o", f"{folder}/report.html"],
            "diff": ["diff", a.ref, b.ref, "--json"],
            "export": ["export", a.ref, "-o", f"{folder}/out"],
        }
        for what, arguments in commands.items():
            runs = [process([*arguments, "--catalog", str(copy)], Path(folder)) for _ in range(3)]
            seconds, peak = (statistics.median(run[i] for run in runs) for i in range(2))
            said = f"{what} of {a.n_samples:,} samples"
            print(
                f"{said:34} {seconds:8.3f} s  (peak memory {peak / 1e6:.0f} MB)   wanted <= {SUBSET_SECONDS:g} s: "
                f"{'yes' if seconds <= SUBSET_SECONDS else 'NO'}",
                flush=True,
            )


def process(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Run a command of calset in a fresh process; returns wall seconds and the most bytes of memory that it had."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    began = time.perf_counter()
    peak, _ = run(["-m", "calset.cli", *arguments])
    return time.perf_counter() - began, peak


def run(arguments: list[str]) -> tuple[float, str]:
    """Run Python in a fresh process; returns the most bytes of memory that it had, and what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, *arguments], stdout=output)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"python {' '.join(arguments)} ended with {child.returncode}")
        output.seek(0)
        return used.ru_maxrss * 1024, output.read()


# The time is that of the call, what it imports included; calset 9b80513 and newer have it.
SELECT = """
import os, sys, time, calset
path, name, recipe, model, tokens = sys.argv[1:]
began = time.perf_counter(), sum(os.times()[:2])
subset = calset.select(path, name, recipe, model=model, tokens=int(tokens))
print(time.perf_counter() - began[0], sum(os.times()[:2]) - began[1], subset.n_samples, subset.content_hash)
"""


def selecting(path: Path) -> None:
    """select of a million tokens of one model's traces, each in a process of its own, on a copy."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / "c.duckdb"
        shutil.copyfile(path, copy)
        for recipe in ("ssgr", "rac"):
            runs = []
            for i in range(5):
                peak, said = run(["-c", SELECT, str(copy), f"{recipe}{i}", recipe, MODELS[0], str(BUDGET)])
                seconds, cpu, samples, content_hash = said.split()
                runs.append((float(seconds), float(cpu), peak))
            seconds, cpu, peak = (statistics.median(run[i] for run in runs) for i in range(3))
            said = f"select {recipe}: {int(samples):,} samples"
            least = min(seconds for seconds, *_ in runs)
            print(
                f"{said:34} {seconds:8.3f} s  (least {least:.3f}, CPU {cpu:.3f}; peak memory {peak / 1e6:.0f} MB; "
                f"content {content_hash[:12]})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=1_000_000)
    parser.add_argument("--no-texts", action="store_true", help="no texts, and only the questions and select")
    parser.add_argument("--folder", type=Path, help="where to put the files; by default the system's own for such")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the catalog there; use it if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = args.keep or Path(folder) / "c.duckdb"
        if not path.exists():
            began = time.perf_counter()
            fill(path, args.traces, texts=not args.no_texts)
            print(f"{args.traces} traces generated in {time.perf_counter() - began:.0f} s")
        print(f"DuckDB {duckdb.__version__}, {os.cpu_count()} cores, {path.stat().st_size / 1e6:.0f} MB")
        ask(path, texts=not args.no_texts)
        selecting(path)
        if not args.no_texts:
            commit(path, args.traces)
            ingest(Path(folder))
            size(path)
            of_a_subset(path)


if __name__ == "__main__":
    main()

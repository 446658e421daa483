"""Several processes on one catalog at once: no wrong rows, no lost rows, and how long anybody waits."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from factories import fill, make_problem, make_run
from processes import python

from calset.catalog.subsets import list_subsets, load

ROOT = Path(__file__).parent.parent
# docs/catalog.md: while everybody follows calset's habit of opening for a moment, nobody waits longer than this.
LONGEST_WAIT = 10.0

COMMON = """
    import json, sys, time
    from pathlib import Path
    from factories import make_grade, make_problem, make_run, make_trace
    from calset.catalog.catalog import Catalog, _insert
    from calset.catalog.schema import TABLES
    from calset.catalog.records import utc_now
    from calset.catalog.selection import select

    catalog, stop = Catalog(sys.argv[1]), Path(sys.argv[1]).with_name("stop")
    waits = []

    def timed(work):
        began = time.monotonic()
        result = work()
        waits.append(time.monotonic() - began)
        return result
"""
ROLES = {
    "build": """
    problems, run = [make_problem(n) for n in range(5)], make_run()
    for i in range(10, 50):
        traces = [make_trace(p, run, i, 20) for p in problems for _ in range(1)]
        timed(lambda: catalog.record(traces, [make_grade(t, "correct" if i % 2 else "incorrect") for t in traces]))
        time.sleep(0.02)
    stop.touch()
    print(json.dumps(waits))
    """,
    "query": """
    last = 0
    while not stop.exists():
        sql = "SELECT count(*), count(DISTINCT trace_id), count(*) FILTER (verdict = 'ungraded'), min(k) FROM trace"
        n, distinct, ungraded, k = timed(lambda: catalog.query(sql)).rows[0]
        assert n == distinct and n >= last and n % 5 == 0 and ungraded == 0 and k == n // 5, (n, distinct, last, k)
        last = n
    print(json.dumps(waits))
    """,
    "select": """
    n = 0
    while not stop.exists():
        taken = timed(lambda: select(catalog, "live", "rac", seed=n))
        assert taken.n_samples % 5 == 0, taken.n_samples
        n += 1
        time.sleep(0.05)
    print(json.dumps(waits))
    """,
    "publish": """
    n = 0
    while not stop.exists():
        row = ("live", n, "h", "org/repo", "r", f"live-v{n}", utc_now())
        def publish():
            with catalog.transaction() as con:
                assert _insert(con, "publications", [row], key=("repo", "tag")) == 1
        timed(publish)
        n += 1
        time.sleep(0.05)
    print(json.dumps(waits))
    """,
}


@pytest.mark.slow
def test_a_build_two_queries_a_selection_and_a_publisher_share_one_catalog(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 5)]] * 5)
    run = catalog.runs()[0]
    assert run == make_run()
    roles = ("query", "query", "select", "publish", "build")
    processes = [python(textwrap.dedent(COMMON) + textwrap.dedent(ROLES[role]), catalog.path) for role in roles]
    waits = {}
    for role, process in zip(roles, processes, strict=True):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{role}: {errors}"
        waits.setdefault(role, []).extend(json.loads(out))
    for role, seconds in waits.items():
        middle = sorted(seconds)[len(seconds) // 2]
        print(f"{role}: {len(seconds)} times, median {middle:.3f} s, longest {max(seconds):.2f} s")
    assert all(len(seconds) >= 3 for seconds in waits.values())
    assert max(map(max, waits.values())) < LONGEST_WAIT
    assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM trace").rows == [(205, 205)]
    for table, n in {"traces": 205, "trace_tokens": 205, "grades": 205}.items():
        assert catalog.query(f"SELECT count(*) FROM {table}").rows == [(n,)]
    published = catalog.query("SELECT version FROM publications ORDER BY version").rows
    assert published == [(n,) for n in range(len(waits["publish"]))]
    kept = list_subsets(catalog)
    assert sorted(head["version"] for head in kept) == list(range(1, len(waits["select"]) + 1))
    assert load(catalog, kept[-1]["ref"]).n_samples % len([make_problem(n) for n in range(5)]) == 0

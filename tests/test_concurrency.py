"""Several processes on one catalog at once: no wrong rows, no lost rows, and everybody gets a turn."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from factories import fill, make_problem, make_run
from processes import python

from calset.catalog.subsets.versions import list_subsets, load

COMMON = """
    import sys, time
    from pathlib import Path
    from factories import make_grade, make_problem, make_run, make_trace
    from calset.catalog.catalog import Catalog
    from calset.catalog.records import Publication
    from calset.catalog.select import select

    catalog, stop = Catalog(sys.argv[1]), Path(sys.argv[1]).with_name("stop")
    n = 0
"""
ROLES = {
    "build": """
    problems, run = [make_problem(n) for n in range(5)], make_run()
    for i in range(10, 30):
        traces = [make_trace(p, run, i, 20) for p in problems for _ in range(1)]
        catalog.record(traces, [make_grade(t, "correct" if i % 2 else "incorrect") for t in traces])
        n += 1
        time.sleep(0.02)
    stop.touch()
    print(n)
    """,
    "query": """
    last = 0
    while not stop.exists():
        sql = "SELECT count(*), count(DISTINCT trace_id), count(*) FILTER (verdict = 'ungraded'), min(k) FROM trace"
        (rows, distinct, ungraded, k), = catalog.query(sql).rows
        assert rows == distinct >= last and (rows % 5, ungraded, k) == (0, 0, rows // 5), (rows, distinct, last, k)
        last = rows
        n += 1
        time.sleep(0.01)
    print(n)
    """,
    "select": """
    while not stop.exists():
        taken = select(catalog, "live", "rac", seed=n)
        assert taken.n_samples % 5 == 0, taken.n_samples
        n += 1
        time.sleep(0.05)
    print(n)
    """,
    "publish": """
    while not stop.exists():
        assert catalog.add_publication(Publication("live", n, "h", "org/repo", "r", f"live-v{n}")) == 1
        n += 1
        time.sleep(0.05)
    print(n)
    """,
}


@pytest.mark.slow
def test_a_build_two_queries_a_selection_and_a_publisher_share_one_catalog(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 5)]] * 5)
    run = catalog.runs()[0]
    assert run == make_run()
    roles = ("query", "query", "select", "publish", "build")
    processes = [python(textwrap.dedent(COMMON) + textwrap.dedent(ROLES[role]), catalog.path) for role in roles]
    times = {}
    for role, process in zip(roles, processes, strict=True):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{role}: {errors}"
        times[role] = int(out)
    assert min(times.values()) >= 3, times
    assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM trace").rows == [(105, 105)]
    for table, n in {"traces": 105, "trace_tokens": 105, "grades": 105}.items():
        assert catalog.query(f"SELECT count(*) FROM {table}").rows == [(n,)]
    published = catalog.query("SELECT version FROM publications ORDER BY version").rows
    assert published == [(n,) for n in range(times["publish"])]
    kept = list_subsets(catalog)
    assert sorted(head["version"] for head in kept) == list(range(1, times["select"] + 1))
    assert load(catalog, kept[-1]["ref"]).n_samples % len([make_problem(n) for n in range(5)]) == 0

"""grade(): what is graded again, what is skipped, and a history that keeps everything."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from factories import fill, make_grade, make_problem, make_run, make_source, make_trace

from calset.builder.grade import grade
from calset.catalog.catalog import Catalog
from calset.catalog.query import worklist
from calset.errors import InputError


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Responses are the reference answers, so each finished trace is correct for math and exact alike."""
    plan = [[("correct", 10), ("incorrect", 10), ("truncated", 9)], [("no_answer", 8), ("timeout", 7), ("ungraded", 6)]]
    return fill(tmp_path / "c.duckdb", plan)


def verdicts(catalog: Catalog) -> list[str]:
    return [v for (v,) in catalog.query("SELECT verdict FROM trace ORDER BY question, sample_index").rows]


def test_a_new_version_grades_all_and_keeps_the_history(catalog: Catalog):
    report = grade(catalog)
    assert (report.n_graded, report.n_changed, report.n_skipped) == (5, 4, 1)  # the truncated one stays
    assert verdicts(catalog) == ["correct", "correct", "truncated", "correct", "correct", "correct"]
    assert report.changes["incorrect"] == {"correct": 1}
    assert "correct" not in report.changes
    assert catalog.query("SELECT count(*) FROM grades").rows == [(5 + 5,)]
    assert catalog.query("SELECT count(*) FROM grades WHERE grader_version = '0.9'").rows == [(5,)]


def test_what_this_version_has_graded_is_skipped_unless_forced(catalog: Catalog):
    grade(catalog)
    again = grade(catalog)
    assert (again.n_graded, again.n_skipped) == (0, 6)
    assert grade(catalog, force=True).n_graded == 6
    other = grade(catalog, grader="exact")
    assert (other.n_graded, other.n_skipped) == (5, 1)
    # The newest counts, so math has something to say again.
    assert grade(catalog).n_graded == 5


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"finish_reason": "error", "response": ""}, "error"),
        ({"finish_reason": "abort"}, "error"),
        ({"finish_reason": "repetition"}, "truncated"),
        ({"answer_start": -1}, "no_answer"),
    ],
)
def test_what_a_trace_ended_with_is_said_once_unless_forced(tmp_path: Path, changes: dict, verdict: str):
    catalog = Catalog(tmp_path / "c.duckdb")
    run, problem = make_run(), make_problem(0)
    catalog.add_source(make_source())
    catalog.add_problems([problem])
    catalog.add_run(run)
    catalog.add_traces([make_trace(problem, run, 0, **changes), make_trace(problem, run, 1)])
    assert grade(catalog).verdicts == {verdict: 1, "correct": 1}
    again = grade(catalog, grader="exact")
    assert (again.n_graded, again.n_skipped) == (1, 1)
    assert grade(catalog, verdicts=[verdict]).n_graded == 0
    assert catalog.query("SELECT count(*) FROM grades").rows == [(3,)]
    assert grade(catalog, force=True).n_graded == 2


def test_an_unfinished_trace_with_a_graders_verdict_gets_that_of_its_end(catalog: Catalog):
    """As one has that was graded before its finish reason counted as one."""
    trace = make_trace(make_problem(0), make_run(), 9, finish_reason="repetition")
    catalog.record([trace], [make_grade(trace, "correct")])
    grade(catalog)
    assert catalog.trace(trace.trace_id)["verdict"] == "truncated"


def test_what_was_lost_to_a_deadline_is_tried_again(catalog: Catalog):
    grade(catalog)
    trace, version = catalog.query("SELECT trace_id, grader_version FROM grades ORDER BY graded_at DESC LIMIT 1").rows[
        0
    ]
    found = next(iter(catalog.load_traces([trace]).values()))
    later = 10**9
    catalog.add_grades([make_grade(found, "error", after=later, grader_version=version)])
    report = grade(catalog)
    assert (report.n_graded, report.n_skipped) == (1, 5)


def test_what_is_an_error_each_time_is_not_tried_for_ever(catalog: Catalog):
    grade(catalog)
    trace, version = catalog.query("SELECT trace_id, grader_version FROM grades ORDER BY graded_at DESC LIMIT 1").rows[
        0
    ]
    found = next(iter(catalog.load_traces([trace]).values()))
    for i, verdict in enumerate(("timeout", "error")):
        catalog.add_grades([make_grade(found, verdict, after=10**9 + i, grader_version=version)])
    wanted = worklist.Wanted(done={"math": version})
    assert worklist.count(catalog, wanted) == 1
    catalog.add_grades([make_grade(found, "error", after=10**9 + 2, grader_version=version)])
    assert worklist.count(catalog, wanted) == 0
    assert worklist.count(catalog, worklist.Wanted(done={"math": "another"})) == 5  # another version tries anew
    assert grade(catalog).n_graded == 0
    assert grade(catalog, force=True).n_graded == 6


def test_a_present_verdict_and_a_run_select(catalog: Catalog):
    other = make_run("other")
    trace = make_trace(make_problem(0), other, 0)
    catalog.add_run(other)
    catalog.record([trace], [make_grade(trace, "incorrect")])
    assert grade(catalog, verdicts=["no_answer", "timeout"]).n_graded == 2
    assert grade(catalog, verdicts=["incorrect"], run=other.run_id).n_graded == 1
    assert grade(catalog, verdicts=["incorrect"]).n_graded == 1
    assert grade(catalog, ungraded=True).n_graded == 1
    with pytest.raises(InputError, match="unknown verdict 'wrong'; there are correct"):
        grade(catalog, verdicts=["wrong"])
    with pytest.raises(InputError, match="no run 'nowhere'"):
        grade(catalog, run="nowhere")


def test_each_trace_comes_once_however_small_the_pages_are(catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worklist, "IDS_AT_A_TIME", 4)
    seen = []
    for page in worklist.pages(catalog, worklist.Wanted(verdicts=("correct", "incorrect", "ungraded")), 1):
        (item,) = page
        seen.append(item.trace_id)
        trace = catalog.load_traces([item.trace_id])[item.trace_id]
        catalog.add_grades([make_grade(trace, "correct", after=5)])
    assert len(seen) == len(set(seen)) == 3


def test_a_page_reads_no_token_ids_and_not_the_whole_catalog(tmp_path: Path):
    """7 MB of responses in 150 traces: a page of 8 holds half a megabyte."""
    catalog = Catalog(tmp_path / "c.duckdb")
    run, problem = make_run(), make_problem(0)
    catalog.add_source(make_source())
    catalog.add_problems([problem])
    catalog.add_run(run)
    for start in range(0, 150, 50):
        catalog.add_traces([make_trace(problem, run, i, response="x" * 50_000) for i in range(start, start + 50)])
    tracemalloc.start()
    n = sum(len(page) for page in worklist.pages(catalog, worklist.Wanted(), 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 150
    assert peak < 2e6


def test_a_suspect_reference_answer_is_found_and_an_honest_one_is_not(tmp_path: Path):
    """Three of four samples agree on what the reference does not say."""
    catalog = Catalog(tmp_path / "c.duckdb")
    run = make_run()
    wrong, fair = make_problem(2, answer="5"), make_problem(3)  # 2 + 2 and 3 + 3
    catalog.add_source(make_source())
    catalog.add_problems([wrong, fair])
    catalog.add_run(run)
    answers = ((wrong, ["4", "4", "4", "22"]), (fair, ["6", "6", "7", "7"]))
    catalog.add_traces(
        [make_trace(p, run, i, response=rf"\boxed{{{a}}}") for p, found in answers for i, a in enumerate(found)]
    )
    grade(catalog)
    rows = catalog.query("SELECT question, answer, majority_answer, majority_n, k FROM suspect_gold").rows
    assert rows == [("What is 2 + 2?", "5", "4", 3, 4)]

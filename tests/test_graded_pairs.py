"""Every grader against 374 answers labelled by hand, before any of them was graded (data/graded_pairs.jsonl).

The rules were then changed with an eye on the rows marked "tuning" alone. What they said of the rows marked "held out"
at that point is in docs/grading.md; two wrong verdicts and four missed answers that those rows showed are mended since.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from calset.builder.grading import Outcome, verdict_without_grading
from calset.builder.grading.pool import GradingPool
from calset.builder.model.reasoning import ReasoningFormat, split

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "graded_pairs.jsonl").read_text().splitlines()]
# (answer, response) -> what the grader says instead of the label, and why that stays.
KNOWN: dict[tuple[str, str], tuple[str, str]] = {
    ("7", r"The answer is \boxed{?}"): ("pred_unparsable", "states nothing that can be read; both count against it"),
}


@pytest.fixture(scope="module")
def graded() -> list[tuple[dict[str, Any], Outcome]]:
    with GradingPool(1, background=False) as pool:
        waiting = [(row, grade(row, pool)) for row in ROWS]
        return [(row, item if isinstance(item, Outcome) else item.result(timeout=120)) for row, item in waiting]


def grade(row: dict[str, Any], pool: GradingPool) -> Any:
    """As a build does: a whole completion is cut at its thinking, its end decides, else the grader."""
    response, ended = row.get("response", ""), True
    if "completion" in row:
        form = ReasoningFormat("think", "<think>", "</think>", None, None, row["opened_by_template"])
        parts = split([ord(c) for c in row["completion"]], form, lambda ids: "".join(map(chr, ids)))
        response, ended = parts.response, parts.answer_start >= 0
    known = verdict_without_grading(response, row.get("finish_reason", "stop"), ended)
    metadata = {"choices": row["choices"]} if "choices" in row else {}
    return known or pool.submit(row["grader"], row["answer"], response, metadata)


def test_each_verdict_is_the_label_or_a_known_disagreement(graded):
    wrong = []
    for row, outcome in graded:
        known = KNOWN.get((row["answer"], row.get("response", "")))
        if outcome.verdict != (known[0] if known else row["expected"]):
            wrong.append(
                (row["grader"], row["answer"], row.get("response", row.get("completion")), row["expected"], outcome)
            )
    assert wrong == []


def test_no_wrong_answer_is_called_correct(graded):
    assert [(r, o) for r, o in graded if o.verdict == "correct" and r["expected"] != "correct"] == []


def test_no_unfinished_trace_is_called_correct(graded):
    unfinished = [(r, o) for r, o in graded if r["expected"] in ("truncated", "error") or "completion" in r]
    assert len(unfinished) >= 20
    assert all(o.verdict == r["expected"] for r, o in unfinished)


def test_the_known_disagreements_are_all_there_and_no_more_than_one_in_a_hundred(graded):
    found = {(r["answer"], r.get("response", "")) for r, o in graded if o.verdict != r["expected"]}
    assert found == set(KNOWN)
    assert len(found) <= len(ROWS) / 100


def test_the_list_covers_what_it_says():
    assert len(ROWS) >= 200
    assert len({(r["grader"], r["answer"], json.dumps(r.get("choices")), r.get("response"), r.get("completion"),
                 r.get("finish_reason"), r.get("opened_by_template")) for r in ROWS}) == len(ROWS)  # fmt: skip
    assert {r["grader"] for r in ROWS} == {"math", "exact", "choice"}
    assert min(Counter(r["part"] for r in ROWS).values()) >= 150
    assert min(Counter(r["expected"] for r in ROWS)[v] for v in ("correct", "incorrect", "no_answer")) >= 25

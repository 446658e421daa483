"""Thousands of hostile answers through the real pool: no crash, no hang, and nothing unfinished is ever correct."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from adversarial import Case, cases
from brought import SLEEPER, bring

from calset.builder.grading import Outcome, verdict_without_grading
from calset.builder.grading.pool import GradingPool
from calset.builder.model.reasoning import ReasoningFormat, split
from calset.catalog.records import VERDICTS

DEADLINE_SECONDS = 5.0


def grade_all(found: list[Case], pool: GradingPool) -> list[Outcome]:
    """As a build does: cut the completion at its thinking, let its end decide, else the grader."""
    waiting = []
    for case in found:
        form = ReasoningFormat("think", "<think>", "</think>", None, None, case.opened_by_template)
        parts = split([ord(c) for c in case.completion], form, lambda ids: "".join(map(chr, ids)))
        known = verdict_without_grading(parts.response, case.finish_reason, parts.answer_start >= 0)
        waiting.append(known or pool.submit(case.grader, case.answer, parts.response, case.metadata))
    return [item if isinstance(item, Outcome) else item.result(timeout=600) for item in waiting]


def check(n: int, seed: int, hangs: int) -> Counter[str]:
    found = list(cases(n, seed, hangs=hangs))
    with GradingPool(2, deadline_seconds=DEADLINE_SECONDS, background=False) as pool:
        outcomes = grade_all(found, pool)
        assert pool.submit("math", "7", r"\boxed{7}", {}).result(timeout=60).verdict == "correct"
    pairs = list(zip(found, outcomes, strict=True))
    counts = Counter(outcome.verdict for outcome in outcomes)
    assert set(counts) <= set(VERDICTS) - {"ungraded"}
    assert [(c, o) for c, o in pairs if o.verdict == "correct" and not c.finished] == []
    assert [(c, o) for c, o in pairs if o.verdict == "correct" and c.right is False] == []
    assert [(c, o) for c, o in pairs if o.verdict != "correct" and c.right] == []
    assert [(c, o) for c, o in pairs if o.verdict == "error" and "crashed" in (o.detail or "")] == []
    slow = Counter(case.kind for case, outcome in pairs if outcome.verdict == "timeout")
    assert slow["hang"] == hangs
    assert slow.total() <= hangs + max(4, n // 500), slow
    return counts


@pytest.fixture(autouse=True)
def _sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path, "sleeper", SLEEPER)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_hostile_answers_neither_crash_nor_hang_nor_pass():
    counts = check(100, seed=1, hangs=1)
    assert counts["correct"] >= 3
    assert counts["truncated"] >= 1


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_ten_thousand_hostile_answers():
    check(10_000, seed=2026, hangs=25)

"""SIGKILLs into builds (grader, engine, writer, main): nothing saved is lost, nothing comes twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from crash import MAX_TOKENS, SAMPLES, TWENTY, VICTIMS, Crashes

import calset


@pytest.mark.vllm
@pytest.mark.slow
def test_killed_with_vllm_a_build_loses_nothing_saved_and_repeats_only_what_was_in_flight(
    tmp_path: Path, tiny_model: Path, vllm_engine
) -> None:
    """Another engine ends the build: it spares a start."""
    crashes = Crashes(tmp_path, tiny_model, engine="vllm", n_problems=40)
    for victim in VICTIMS:
        crashes.kill(victim)
    report = calset.build(
        tiny_model, crashes.problems, samples=SAMPLES, catalog=crashes.catalog, engine=vllm_engine,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    assert (report.n_existing, report.n_requested) == (len(crashes.saved), crashes.check_whole())


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_killed_twenty_times_a_build_loses_nothing_saved_and_repeats_only_what_was_in_flight(
    tmp_path: Path, tiny_model: Path
) -> None:
    """With vLLM: benchmarks/crash.py."""
    crashes = Crashes(tmp_path, tiny_model, engine="double", n_problems=150)
    for victim in TWENTY:
        crashes.kill(victim)
    crashes.finish()
    crashes.check_whole()

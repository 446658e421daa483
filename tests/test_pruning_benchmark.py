"""benchmarks/pruning.py: its pruners do the same work, and its evaluator sees what they did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "pruning.py"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("--sparsity", "0.5"), marks=pytest.mark.slow),
        pytest.param(("--pattern", "2:4"), marks=pytest.mark.nightly),
    ],
)
def test_calset_and_the_textbook_do_the_same_work(tmp_path, how):
    results = tmp_path / "results.jsonl"
    command = [sys.executable, SCRIPT, "--model", "tiny", "--dtype", "float32", "--pruners", "calset", "textbook", *how]
    done = subprocess.run([*command, "--json", results], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = map(json.loads, results.read_text().splitlines())
    assert ours["n_matrices"] == theirs["n_matrices"] == 14
    assert ours["sparsity"] == 0.5
    # The authors' threshold takes one weight too many of each block of columns: 14 of 73,728.
    assert 0.5 <= theirs["sparsity"] < 0.501
    assert ours["error"] == pytest.approx(theirs["error"], rel=0.01)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    assert "calset is" in done.stdout
    for result in (ours, theirs):
        assert sum(result["phases"].values()) == pytest.approx(result["seconds"])
        assert min(result["phases"].values()) > -0.01
        assert 0 <= result["peak_bytes"] < 2**26

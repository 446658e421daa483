"""What a large Gram takes of the host's memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from calset.errors import PruningError
from calset.pruning.blockwise.statistics import TILE, InputStatistics, Needs, mirror
from calset.pruning.model.memory import WORTHWHILE, enough_memory, forget_above, square_of_zeros

WIDTH = 17 * TILE - 3  # 290 MB, and the last tile is a smaller one


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux" or mmap.PAGESIZE > 4096, reason="elsewhere it takes what it takes")
def test_a_large_gram_takes_memory_for_the_half_that_is_used():
    inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(len(inputs), dtype=torch.bool)
    InputStatistics.zeros(WIDTH, Needs.GRAM).add(inputs, counted)  # libraries take some of their own
    before = anonymous_bytes()
    statistics = InputStatistics.zeros(WIDTH, Needs.GRAM)
    gram = statistics.gram
    assert gram is not None
    assert gram.nbytes >= WORTHWHILE
    assert anonymous_bytes() - before < 0.1 * gram.nbytes
    statistics.add(inputs, counted)
    assert statistics.is_finite()
    assert anonymous_bytes() - before < 0.75 * gram.nbytes
    mirror(gram)
    torch.testing.assert_close(gram, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    full, used = anonymous_bytes(), gram.clone()
    copied = anonymous_bytes() - full
    half = WIDTH // 2
    forget_above(gram, TILE, half)
    assert torch.equal(gram[:, half:], used[:, half:])
    forget_above(gram, TILE, WIDTH)
    assert full + copied - anonymous_bytes() > 0.25 * gram.nbytes
    for start in range(0, WIDTH, TILE):
        stop = start + TILE
        assert torch.equal(gram[start:stop, :stop], used[start:stop, :stop])


def test_a_small_one_is_left_whole():
    matrix = torch.randn(2 * TILE, 2 * TILE)
    used = matrix.clone()
    forget_above(matrix, TILE, 2 * TILE)
    assert torch.equal(matrix, used)
    assert square_of_zeros(3, "cpu").tolist() == [[0.0] * 3] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="torch says it in its own words")
def test_no_memory_for_a_gram_is_said_as_that():
    with pytest.raises(PruningError, match="out of memory: lower it"), enough_memory("lower it"):
        square_of_zeros(1 << 30, "cpu")

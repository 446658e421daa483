"""Masks: exact counts whatever the ties, shapes, dtypes and patterns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calset.errors import InputError, PruningError
from calset.pruning.methods.masks import Pattern, Selection, blocks, lowest_of_rows, nearest, prune_mask

SPARSITIES = st.floats(0.01, 0.99)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def make_scores(rows: int, width: int, seed: int, n_levels: int, dtype: torch.dtype) -> torch.Tensor:
    """Few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n_levels, (rows, width), generator=generator).to(dtype)


@given(st.integers(1, 9), st.integers(1, 300), SPARSITIES, st.integers(0, 99), st.sampled_from([1, 3, 1000]), DTYPES)
def test_row_masks_have_exactly_k_in_every_row(rows, width, sparsity, seed, n_levels, dtype):
    mask = prune_mask(make_scores(rows, width, seed, n_levels, dtype), Selection(sparsity=sparsity, group="row"))
    assert (mask.sum(1) == nearest(sparsity * width)).all()


@given(
    st.integers(1, 9),
    st.integers(1, 300),
    SPARSITIES,
    st.integers(0, 99),
    st.sampled_from([1, 3, 1000]),
    DTYPES,
    st.sampled_from(["matrix", "block"]),
    st.sampled_from([1, 7, 128]),
)
def test_matrix_and_block_masks_have_exactly_the_asked_count(
    rows, width, sparsity, seed, n_levels, dtype, group, block_size
):
    selection = Selection(sparsity=sparsity, group=group, block_size=block_size)
    mask = prune_mask(make_scores(rows, width, seed, n_levels, dtype), selection)
    assert int(mask.sum()) == nearest(sparsity * rows * width) == selection.n_pruned(rows, width)


@given(st.integers(1, 50), st.integers(1, 500), SPARSITIES, st.integers(1, 200))
def test_block_counts_fit_their_blocks_and_differ_by_less_than_one_from_the_share(rows, width, sparsity, size):
    found = blocks(rows, width, sparsity, size)
    assert [a for a, _, _ in found] == list(range(0, width, size))
    for start, stop, k in found:
        assert 0 <= k <= rows * (stop - start)
        assert abs(k - sparsity * rows * (stop - start)) <= 1 + 1e-6


@given(st.data())
def test_every_group_of_an_n_m_mask_keeps_exactly_n(data):
    m = data.draw(st.integers(2, 16))
    n = data.draw(st.integers(1, m - 1))
    rows, groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    scores = make_scores(
        rows, groups * m, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3, 1000])), data.draw(DTYPES)
    )
    selection = Selection(pattern=Pattern(n, m))
    mask = prune_mask(scores, selection)
    assert ((~mask).reshape(rows, groups, m).sum(-1) == n).all()
    assert int(mask.sum()) == selection.n_pruned(rows, groups * m)


@given(st.integers(1, 6), st.integers(2, 60), SPARSITIES, st.integers(0, 99))
def test_no_kept_weight_scores_below_a_pruned_one(rows, width, sparsity, seed):
    scores = make_scores(rows, width, seed, 50, torch.float32)
    mask = prune_mask(scores, Selection(sparsity=sparsity, group="matrix"))
    if mask.any() and not mask.all():
        assert scores[mask].max() <= scores[~mask].min()


def test_ties_go_by_index():
    ones = torch.ones(2, 4)
    assert prune_mask(ones, Selection(sparsity=0.5, group="row")).tolist() == [[True, True, False, False]] * 2
    assert prune_mask(ones, Selection(sparsity=0.5, group="matrix")).tolist() == [[True] * 4, [False] * 4]
    assert prune_mask(ones, Selection(pattern=Pattern(2, 4))).tolist() == [[True, True, False, False]] * 2


def test_counts_round_to_the_nearest_halves_up_and_ignore_floating_point_dust():
    assert [nearest(v) for v in (2.4, 2.5, 3.5, 0.35 * 100, 1 - 1e-12)] == [2, 3, 4, 35, 1]
    assert Selection(sparsity=0.15, group="matrix").n_pruned(10, 100) == 150


def test_infinities_are_ranked():
    scores = torch.tensor([[1.0, float("inf"), -float("inf"), 2.0]])
    assert prune_mask(scores, Selection(sparsity=0.5)).tolist() == [[True, False, True, False]]
    wide = scores.repeat(1, 50)
    assert torch.equal(prune_mask(wide, Selection(sparsity=0.5))[0], wide[0] <= 1)
    assert int((prune_mask(wide, Selection(sparsity=0.1))[0] & (wide[0] == -float("inf"))).sum()) == 20


@given(st.integers(1, 5), st.integers(33, 200), st.integers(0, 99), st.sampled_from([1, 2, 5, 1000]), DTYPES, st.data())
def test_long_rows_get_the_mask_of_a_stable_sort(rows, width, seed, n_levels, dtype, data):
    scores = make_scores(rows, width, seed, n_levels, dtype)
    k = data.draw(st.integers(0, width))
    order = torch.sort(scores, dim=-1, stable=True).indices[:, :k]
    want = torch.zeros(rows, width, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(lowest_of_rows(scores, k), want)


@pytest.mark.parametrize(
    "selection", [Selection(sparsity=0.5), Selection(sparsity=0.5, group="matrix"), Selection(pattern=Pattern(2, 4))]
)
def test_nan_scores_are_refused(selection):
    scores = torch.ones(2, 8)
    scores[1, 3] = float("nan")
    with pytest.raises(PruningError, match="not a number"):
        prune_mask(scores, selection)


@pytest.mark.parametrize("text", ["", "2", "2:", "4:2", "2:2", "0:4", "-1:4", "2:4:8", "a:b", "2.0:4"])
def test_bad_patterns_are_refused(text):
    with pytest.raises(InputError):
        Pattern.parse(text)


def test_n_of_a_pattern_counts_the_kept():
    assert Pattern.parse(" 1:4 ") == Pattern(1, 4)
    assert Pattern(1, 4).sparsity == 0.75
    assert str(Pattern(4, 8)) == "4:8"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.5, "pattern": Pattern(2, 4)},
        {"sparsity": 1.2},
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"sparsity": float("nan")},
        {"sparsity": 0.5, "group": "column"},
        {"sparsity": 0.5, "block_size": 0},
    ],
)
def test_bad_selections_are_refused(options):
    with pytest.raises(InputError):
        Selection(**options)


def test_a_width_that_m_does_not_divide_is_refused_by_name():
    with pytest.raises(InputError, match=r"layers\.0\.down has 190 inputs"):
        Selection(pattern=Pattern(2, 4)).check_width(190, "layers.0.down")

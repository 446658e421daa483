"""Methods against the textbook (tests/textbook.py), and the laws that every method keeps."""

from __future__ import annotations

import numpy as np
import pytest
import textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calset.errors import InputError, PruningError
from calset.pruning import updates
from calset.pruning.masks import Pattern, Selection, prune_mask
from calset.pruning.methods import METHODS, find, prune_shared
from calset.pruning.stats import InputStatistics


def make_inputs(n_tokens: int, width: int, kind: str = "correlated", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_tokens, width, generator=generator)
    if kind != "independent":
        inputs = inputs @ (torch.randn(width, width, generator=generator) / width**0.5) + 0.3 * inputs
    if kind == "dead":
        inputs[:, ::7] = 0
    if kind == "duplicated":
        inputs[:, 1] = inputs[:, 0]
        inputs[:, 2] = 1.0
    return inputs


def make_weight(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: torch.Tensor, needs: str = "gram") -> InputStatistics:
    statistics = InputStatistics.zeros(inputs.shape[1], needs)
    statistics.add(inputs, torch.ones(len(inputs), dtype=torch.bool))
    return statistics


def run(name: str, weight: torch.Tensor, inputs: torch.Tensor, **selection):
    method = METHODS[name]
    selection.setdefault("group", method.group)
    needed = None if method.needs == "nothing" else statistics_of(inputs, method.needs)
    return prune_shared(method, [weight], needed, Selection(**selection))[0]


# --- equal to the textbook --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["independent", "correlated", "dead", "duplicated"])
@pytest.mark.parametrize("width", [40, 128, 192])
@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"sparsity": 0.65}, {"pattern": (2, 4)}, {"pattern": (4, 8)}])
def test_sparsegpt_is_the_textbooks(kind, width, how):
    weight, inputs = make_weight(24, width), make_inputs(400, width, kind)
    want, want_mask = textbook.sparsegpt(weight.numpy(), inputs.numpy(), **how)
    ours = {"pattern": Pattern(*how["pattern"])} if "pattern" in how else how
    got = run("sparsegpt", weight, inputs, **ours)
    assert np.array_equal(got.mask.numpy(), want_mask)
    assert np.abs(got.weight.numpy() - want).max() < 1e-4


def test_sparsegpt_is_the_textbooks_with_fewer_tokens_than_inputs():
    weight, inputs = make_weight(24, 64), make_inputs(40, 64)
    want, want_mask = textbook.sparsegpt(weight.numpy(), inputs.numpy(), sparsity=0.5)
    got = run("sparsegpt", weight, inputs, sparsity=0.5)
    assert np.array_equal(got.mask.numpy(), want_mask)
    assert np.abs(got.weight.numpy() - want).max() < 1e-4


@pytest.mark.parametrize("block_size", [16, 48, 1000])
def test_sparsegpt_takes_other_block_sizes(block_size):
    weight, inputs = make_weight(16, 96), make_inputs(300, 96)
    want, want_mask = textbook.sparsegpt(weight.numpy(), inputs.numpy(), sparsity=0.5, block=block_size)
    got = run("sparsegpt", weight, inputs, sparsity=0.5, block_size=block_size)
    assert np.array_equal(got.mask.numpy(), want_mask)
    assert np.abs(got.weight.numpy() - want).max() < 1e-4


def test_sparsegpt_n_m_does_not_depend_on_blocks_that_m_does_not_divide():
    weight, inputs = make_weight(16, 96), make_inputs(300, 96)
    want = run("sparsegpt", weight, inputs, pattern=Pattern(2, 8), block_size=96)
    for block_size in (5, 12, 20):
        got = run("sparsegpt", weight, inputs, pattern=Pattern(2, 8), block_size=block_size)
        assert torch.equal(got.mask, want.mask)
        assert torch.allclose(got.weight, want.weight, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
@pytest.mark.parametrize("width", [40, 192])
def test_wanda_is_exactly_the_textbooks(width, sparsity):
    weight, inputs = make_weight(24, width), make_inputs(200, width)
    want = textbook.wanda(weight.double().numpy(), inputs.double().numpy(), sparsity)
    got = run("wanda", weight, inputs, sparsity=sparsity)
    assert np.array_equal(got.mask.numpy(), want)
    assert torch.equal(got.weight, weight.masked_fill(torch.from_numpy(want), 0))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
def test_magnitude_is_exactly_the_textbooks(sparsity):
    weight = make_weight(24, 192)
    want = textbook.magnitude(weight.double().numpy(), sparsity)
    got = run("magnitude", weight, make_inputs(10, 192), sparsity=sparsity)
    assert np.array_equal(got.mask.numpy(), want)
    assert torch.equal(got.weight, weight.masked_fill(torch.from_numpy(want), 0))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_wanda_and_magnitude_n_m_are_exactly_the_textbooks(pattern):
    weight, inputs = make_weight(12, 64), make_inputs(100, 64)
    scores = weight.double().abs().numpy()
    norms = np.linalg.norm(inputs.double().numpy(), axis=0)
    magnitude, wanda = (run(n, weight, inputs, pattern=Pattern(*pattern)) for n in ("magnitude", "wanda"))
    assert np.array_equal(magnitude.mask.numpy(), textbook.n_of_m(scores, *pattern))
    assert np.array_equal(wanda.mask.numpy(), textbook.n_of_m(scores * norms, *pattern))


# --- laws of every method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_method_prunes_exactly_what_was_asked(name, data):
    rows, groups = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20))
    width = groups * 4
    kind = data.draw(st.sampled_from(["independent", "correlated", "dead"] + ["duplicated"] * (width > 2)))
    inputs = make_inputs(data.draw(st.integers(2, 60)), width, kind, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        selection = Selection(pattern=Pattern(data.draw(st.integers(1, 3)), 4))
    else:
        group = data.draw(st.sampled_from(["row", "block", "matrix"]))
        selection = Selection(
            sparsity=data.draw(st.floats(0.05, 0.95)), group=group, block_size=data.draw(st.sampled_from([8, 128]))
        )
    weight = make_weight(rows, width)
    before = weight.clone()
    needs = METHODS[name].needs
    got = prune_shared(
        METHODS[name], [weight], statistics_of(inputs, needs) if needs != "nothing" else None, selection
    )[0]
    assert int(got.mask.sum()) == selection.n_pruned(rows, width)
    assert (got.weight[got.mask] == 0).all()
    assert got.weight.isfinite().all()
    assert torch.equal(weight, before)
    if selection.pattern is None and selection.group == "row":
        assert (got.mask.sum(1) == got.mask.sum(1)[0]).all()


@pytest.mark.parametrize("name", METHODS)
def test_matrices_pruned_together_are_as_one_by_one(name):
    inputs = make_inputs(300, 96)
    weights = [make_weight(rows, 96, seed) for seed, rows in enumerate((32, 16, 8))]
    method = METHODS[name]
    statistics = statistics_of(inputs, "gram")
    together = prune_shared(method, weights, statistics, Selection(sparsity=0.5, group=method.group))
    for weight, got in zip(weights, together, strict=True):
        alone = prune_shared(method, [weight], statistics, Selection(sparsity=0.5, group=method.group))[0]
        assert torch.equal(got.weight, alone.weight)


@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"pattern": Pattern(2, 4)}])
def test_sparsegpt_errs_less_than_wanda_and_magnitude_on_its_calibration_data(how):
    weight, inputs = make_weight(32, 128), make_inputs(600, 128)
    statistics = statistics_of(inputs)
    errors = {
        name: updates.relative_error(weight, run(name, weight, inputs, **how).weight, statistics) for name in METHODS
    }
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"])


def test_the_relative_error_is_that_of_the_outputs():
    weight, inputs = make_weight(32, 64), make_inputs(300, 64)
    got = run("sparsegpt", weight, inputs, sparsity=0.5)
    want = ((inputs @ (weight - got.weight).T).square().sum() / (inputs @ weight.T).square().sum()).item()
    assert got.error == pytest.approx(want, rel=1e-3)


# --- the Hessian ------------------------------------------------------------------------------------------------


def test_the_factor_is_the_upper_cholesky_of_the_inverse():
    statistics = statistics_of(make_inputs(300, 48))
    hessian = statistics.gram.double() / 300
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    want = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    got = updates.factorise(statistics).upper
    assert torch.allclose(got.double(), want, atol=1e-4)


def test_a_singular_gram_raises_the_damping_and_says_so():
    statistics = statistics_of(make_inputs(2, 300))
    assert updates.factorise(statistics, 1e-8).damping > 1e-8


def test_a_gram_that_no_damping_cures_is_an_error():
    statistics = statistics_of(make_inputs(20, 8))
    statistics.gram[0, 1] = statistics.gram[1, 0] = 1e12
    with pytest.raises(PruningError, match="damping"):
        updates.factorise(statistics)


def test_dead_inputs_do_not_change_the_damping_of_the_others():
    inputs = make_inputs(200, 24)
    padded = torch.zeros(200, 48)
    padded[:, ::2] = inputs
    alone, among = updates.factorise(statistics_of(inputs)), updates.factorise(statistics_of(padded))
    assert torch.allclose(among.upper[::2, ::2], alone.upper, atol=1e-5)
    assert among.dead.tolist() == [i % 2 == 1 for i in range(48)]


def test_all_inputs_dead_gives_an_all_zero_matrix():
    got = run("sparsegpt", make_weight(4, 8), torch.zeros(10, 8), sparsity=0.5)
    assert (got.weight == 0).all()
    assert int(got.mask.sum()) == 16


# --- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["diagonal", "gram"])
def test_statistics_are_the_same_in_batches_and_at_once(needs):
    inputs = make_inputs(100, 16)
    counted = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.6
    whole, parts = InputStatistics.zeros(16, needs), InputStatistics.zeros(16, needs)
    whole.add(inputs, counted)
    for a in range(0, 100, 9):
        parts.add(inputs[a : a + 9], counted[a : a + 9])
    assert whole.n_tokens == parts.n_tokens == int(counted.sum())
    assert torch.allclose(whole.diagonal, parts.diagonal, rtol=1e-5)
    assert torch.allclose(whole.diagonal, inputs[counted].square().sum(0), rtol=1e-5)
    if needs == "gram":
        assert torch.allclose(whole.gram, inputs[counted].T @ inputs[counted], rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_are_summed_in_float32():
    inputs = make_inputs(2000, 8).bfloat16()
    exact = inputs.double().T @ inputs.double()
    assert torch.allclose(statistics_of(inputs).gram.double(), exact, rtol=1e-5, atol=1e-2)


def test_scores_use_every_group_of_a_mask():
    weight = make_weight(6, 32)
    for group in ("row", "block", "matrix"):
        selection = Selection(sparsity=0.5, group=group, block_size=8)
        got = prune_shared(METHODS["magnitude"], [weight], None, selection)[0]
        assert torch.equal(got.mask, prune_mask(weight.abs(), selection))


def test_an_unknown_method_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="magnitude, wanda, sparsegpt"):
        find("sparsgpt")

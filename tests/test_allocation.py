"""Allocations: the asked total to the weight, and OWL as published."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import textbook
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import make_model, make_samples, make_subset, save_model

from calset.errors import InputError, VerificationError
from calset.pruning.methods import allocation
from calset.pruning.methods.allocation import Matrix
from calset.pruning.methods.masks import Selection, nearest
from calset.pruning.model.layout import Layout
from calset.pruning.prune import prune
from calset.pruning.verify import verify

SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=40)


# --- pure rules -------------------------------------------------------------------------------------------------


@given(st.data(), SIZES, st.floats(0.02, 0.98))
def test_owl_keeps_the_mean_by_parameters_and_its_bounds(data, sizes, sparsity):
    shares = data.draw(st.lists(st.floats(0, 0.2), min_size=len(sizes), max_size=len(sizes)))
    found = allocation.owl(shares, sizes, sparsity)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) == pytest.approx(sparsity * sum(sizes), rel=1e-9)
    low, high = allocation.bounds(sparsity)
    assert all(low <= s <= high for s in found)
    for (a, s), (b, t) in itertools.combinations(zip(shares, found, strict=True), 2):
        assert (a - b) * (s - t) <= 1e-12  # more outliers, fewer zeros


def test_owl_is_the_textbooks_within_its_bounds():
    shares, sizes = [0.01, 0.05, 0.02, 0.03], [100, 300, 200, 400]
    assert allocation.owl(shares, sizes, 0.5) == pytest.approx(textbook.owl(shares, sizes, 0.5))
    assert max(allocation.owl(shares, sizes, 0.5)) - min(allocation.owl(shares, sizes, 0.5)) == pytest.approx(0.16)


def test_owl_with_equal_outliers_is_uniform():
    assert allocation.owl([0.02] * 3, [5, 6, 7], 0.6) == pytest.approx([0.6] * 3)


def test_outliers_are_counted_over_a_whole_block():
    scores = [torch.ones(10, 9), torch.full((1, 10), 6.0)]
    mean = (90 + 60) / 100
    assert allocation.outlier_share(scores, times=6.1 / mean) == 0
    assert allocation.outlier_share(scores, times=5.9 / mean) == 0.1


@given(st.data(), st.integers(1, 12), st.floats(0.05, 0.95), st.sampled_from(["row", "block", "matrix"]))
def test_shares_become_whole_weights_of_the_asked_total(data, n, sparsity, group):
    matrices = [
        Matrix(f"b{i}.m", f"b{i}", data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))) for i in range(n)
    ]
    sizes = [m.size for m in matrices]
    wanted = allocation.settle([data.draw(st.floats(0, 1)) for _ in matrices], sizes, sparsity)
    per_block = {m.block: s for m, s in zip(matrices, wanted, strict=True)}
    found = allocation.share_out(matrices, per_block, sparsity, group)
    counts = []
    for m in matrices:
        share = found[m.name]
        count = m.rows * nearest(share * m.width) if group == "row" else nearest(share * m.size)
        assert count == pytest.approx(share * m.size)
        assert abs(share - per_block[m.block]) * m.size <= (m.rows if group == "row" else 1) + 1e-6
        counts.append(count)
        if 0 < share < 1:
            assert count == Selection(sparsity=share, group=group).n_pruned(m.rows, m.width)
    off = abs(sum(counts) - nearest(sparsity * sum(sizes)))
    assert off <= (max(m.rows for m in matrices) if group == "row" else 0)


# --- on a model -------------------------------------------------------------------------------------------------

SUBSET = make_subset(make_samples([20 + 13 * (i % 9) for i in range(12)]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(folder, num_hidden_layers=3, intermediate_size=64)
    model = make_model(num_hidden_layers=3, intermediate_size=64)
    with torch.no_grad():  # one block that hardly matters, one full of outliers
        for p in model.model.layers[1].parameters():
            p.mul_(0.05 if p.ndim == 2 else 1.0)
        model.model.layers[2].mlp.up_proj.weight[::9, ::5] *= 20
    model.save_pretrained(folder)
    return folder


def shares_by_block(report) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for m in report.matrices:
        found.setdefault(m.name.split(".")[2], set()).add(round(m.asked, 2))
    return found


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_owl_moves_zeros_between_blocks_and_keeps_the_total(tmp_path, llama, method):
    report = prune(llama, SUBSET, tmp_path / "out", method=method, sparsity=0.6, allocation="owl")
    size = sum(m.shape[0] * m.shape[1] for m in report.matrices)
    assert sum(m.n_pruned for m in report.matrices) == nearest(0.6 * size)
    blocks = shares_by_block(report)
    assert len({frozenset(s) for s in blocks.values()}) > 1
    assert min(blocks["2"]) < min(blocks["1"])
    assert verify(tmp_path / "out").realised_sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.calibration["used"]


def write(folder: Path, ratios) -> Path:
    path = folder / "ratios.json"
    path.write_text(ratios if isinstance(ratios, str) else json.dumps(ratios))
    return path


def test_a_file_of_ratios_names_blocks_and_matrices_and_the_longest_name_wins(tmp_path, llama):
    ratios = {"model.layers.0": 0.25, "model.layers.0.mlp": 0.5, "model.layers.0.mlp.down_proj": 0.75}
    report = prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.625, allocation=write(tmp_path, ratios))
    found = {m.name.removesuffix(".weight"): m.sparsity for m in report.matrices}
    assert found["model.layers.0.self_attn.q_proj"] == 0.25
    assert found["model.layers.0.mlp.up_proj"] == 0.5
    assert found["model.layers.0.mlp.down_proj"] == 0.75
    assert found["model.layers.2.mlp.up_proj"] == 0.625
    assert report.allocation == "file:ratios.json"
    assert verify(tmp_path / "out").n_matrices == 21


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ("{", "JSON file of ratios"),
        ([0.5], "no JSON object"),
        ({}, "no JSON object"),
        ({"model.layers.0": 1.5}, "between 0 and 1"),
        ({"model.layers.0": True}, "between 0 and 1"),
        ({"model.layers.9": 0.5}, "model.layers.9 is no block"),
        ({"model.layers.1.mlp.up": 0.5}, "is no block"),
        ({"model.layers.0": 0.01}, "rounds to none"),
    ],
)
def test_bad_ratios_are_refused_before_weights_load(tmp_path, llama, monkeypatch, ratios, message):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    path = write(tmp_path, ratios)
    with pytest.raises(InputError, match=message) as caught:
        prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5, allocation=path)
    assert "\n" not in str(caught.value)


def test_an_unknown_rule_and_an_allocation_of_a_pattern_are_refused(tmp_path, llama):
    with pytest.raises(InputError, match="uniform, owl or a JSON file"):
        prune(llama, SUBSET, tmp_path / "out", sparsity=0.5, allocation="howl")
    with pytest.raises(InputError, match="pattern"):
        prune(llama, SUBSET, tmp_path / "out", pattern="2:4", allocation="owl")


def test_verify_does_not_trust_the_shares_of_an_allocation(tmp_path, llama):
    out = tmp_path / "out"
    prune(llama, SUBSET, out, method="magnitude", sparsity=0.5, allocation="owl")
    record = json.loads((out / "pruning.json").read_text())

    def with_change(change) -> None:
        changed = json.loads(json.dumps(record))
        change(changed)
        (out / "pruning.json").write_text(json.dumps(changed))

    with_change(lambda r: r["matrices"][0].update(asked=0.9))
    with pytest.raises(VerificationError, match=r"weights pruned, but sparsity 0\.9"):
        verify(out)
    with_change(lambda r: r.update(sparsity=0.7))
    with pytest.raises(VerificationError, match=r"in all, but sparsity 0\.7"):
        verify(out)
    with_change(lambda r: r["matrices"][0].update(asked=None))
    with pytest.raises(InputError, match="corrupt"):
        verify(out)

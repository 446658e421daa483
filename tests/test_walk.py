"""The walk through a model: the right inputs, counted once, whatever the batching, padding and architecture."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from small_models import make_model, make_samples, make_subset
from torch import nn

from calset.catalog.records import Sample
from calset.errors import InputError, PruningError
from calset.pruning.blockwise.statistics import InputStatistics, Needs
from calset.pruning.blockwise.walk import Walk
from calset.pruning.calibration import Batch, read
from calset.pruning.methods.masks import Selection
from calset.pruning.methods.registry import METHODS, prune_shared
from calset.pruning.model.decoder import find_decoder

CPU = torch.device("cpu")


def batches_of(samples: Sequence[Sample], tokens: str = "all", batch_tokens: int = 100) -> list[Batch]:
    return read(make_subset(samples), tokens).batches(batch_tokens)


def inputs_of(model: nn.Module, names: Sequence[str], input_ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """What the named linears read for one sequence alone, without padding or mask."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0]}))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(input_ids)]))
    for handle in handles:
        handle.remove()
    return seen


def naive_statistics(
    model: nn.Module, names: Sequence[str], samples: Sequence[Sample], tokens: str = "all"
) -> dict[str, InputStatistics]:
    sums: dict[str, InputStatistics] = {}
    for sample in samples:
        n = len(sample.input_ids)
        start, stop = {"all": (0, n), "completion": (sample.n_prompt_tokens, n), "prompt": (0, sample.n_prompt_tokens)}[
            tokens
        ]
        counted = torch.zeros(n, dtype=torch.bool)
        counted[start:stop] = True
        for name, x in inputs_of(model, names, sample.input_ids).items():
            sums.setdefault(name, InputStatistics.zeros(x.shape[-1], Needs.GRAM)).add(x, counted)
    return sums


def first_block_statistics(model: nn.Module, batches: Sequence[Batch]) -> dict[str, InputStatistics]:
    with Walk(model, find_decoder(model), batches, CPU) as walk:
        return walk.statistics(0, Needs.GRAM, keep=False)


# --- calibration batches ----------------------------------------------------------------------------------------


def test_every_token_of_every_sample_is_in_a_batch_once_and_padding_is_not_counted():
    samples = make_samples()
    batches = batches_of(samples)
    found = sorted(tuple(r[m].tolist()) for b in batches for r, m in zip(b.input_ids, b.counted, strict=True))
    assert found == sorted(tuple(s.input_ids) for s in samples)
    for batch in batches:
        assert torch.equal(batch.counted, batch.attention_mask.bool())
        assert (batch.attention_mask.diff(dim=1) <= 0).all()  # padding on the right only


def test_batches_stay_within_their_positions_but_hold_a_longer_sample():
    batches = batches_of(make_samples((10, 10, 10, 90, 20)), batch_tokens=40)
    assert [tuple(b.input_ids.shape) for b in batches] == [(3, 10), (1, 20), (1, 90)]


@pytest.mark.parametrize(("tokens", "want"), [("all", 12 + 40 + 3), ("completion", 7 + 35), ("prompt", 5 + 5 + 3)])
def test_the_asked_tokens_count(tokens, want):
    samples = make_samples((12, 40, 3))
    calibration = read(make_subset(samples), tokens)
    assert calibration.n_counted_tokens == want
    assert sum(int(b.counted.sum()) for b in calibration.batches()) == want
    for batch in calibration.batches():
        for row, counted in zip(batch.input_ids, batch.counted, strict=True):
            sample = next(s for s in samples if list(s.input_ids[:5]) == row[: min(5, len(s.input_ids))].tolist())
            part = {"all": slice(None), "completion": slice(5, None), "prompt": slice(0, 5)}[tokens]
            assert row[counted].tolist() == list(sample.input_ids[part])


def test_samples_without_a_counted_token_are_left_out_with_a_warning():
    calibration = read(make_subset(make_samples((12, 3))), "completion")
    assert len(calibration.sequences) == 1
    assert "1 of 2 samples" in calibration.warnings[0]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "is empty"),
        (make_samples((4, 5)), {"tokens": "completion"}, "no token"),
        (make_samples((200,)), {"max_positions": 128}, "--max-length 128"),
        (make_samples((20,)), {"max_positions": 128, "max_length": 129}, "exceeds"),
        (make_samples((20,)), {"vocabulary_size": 50}, "outside the model's vocabulary"),
        (make_samples((20,)), {"tokens": "answer"}, "tokens must be one of"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(samples, options, message):
    with pytest.raises(InputError, match=message):
        read(make_subset(samples), **options)


def test_max_length_cuts_and_says_so():
    samples = make_samples((200, 20))
    calibration = read(make_subset(samples), max_positions=128, max_length=64)
    assert [len(s) for s in calibration.sequences] == [64, 20]
    assert calibration.sequences[0] == list(samples[0].input_ids[:64])
    assert "1 of 2 samples were cut" in calibration.warnings[0]


# --- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma3Text"])
@pytest.mark.parametrize("tokens", ["all", "completion", "prompt"])
def test_batched_and_padded_statistics_are_those_of_each_sample_alone(kind, tokens):
    model = make_model(kind)
    samples = make_samples()
    names = list(find_decoder(model).blocks[0].linears)
    want = naive_statistics(model, names, samples, tokens)
    got = first_block_statistics(model, batches_of(samples, tokens))
    assert set(got) == set(want)
    for linear in names:
        assert got[linear].n_tokens == want[linear].n_tokens
        scale = want[linear].gram.abs().max()
        assert (got[linear].gram - want[linear].gram).abs().max() < 1e-5 * scale


def test_linears_that_read_one_tensor_share_statistics_and_count_it_once():
    model = make_model()
    samples = make_samples()
    got = first_block_statistics(model, batches_of(samples))
    named = {name.rpartition(".")[2]: s for name, s in got.items()}
    assert named["q_proj"] is named["k_proj"] is named["v_proj"]
    assert named["gate_proj"] is named["up_proj"]
    assert len({id(s) for s in got.values()}) == 4
    assert {s.n_tokens for s in got.values()} == {sum(len(s.input_ids) for s in samples)}


def overwritten(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (lambda x: x, True),
        (lambda x: x.view(1, *x.shape), True),
        (lambda x: x.clone(), False),
        (lambda x: x.transpose(0, 1), False),
        (lambda x: x.flip(0), False),
        (overwritten, False),
    ],
    ids=["itself", "view", "copy", "transposed", "turned round", "overwritten"],
)
def test_two_linears_share_statistics_only_where_they_read_the_same_values_in_the_same_place(other, same):
    model = make_model()
    mlp = model.model.layers[0].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x)
        return mlp.down_proj(gate + mlp.up_proj(other(x)).reshape(gate.shape))

    mlp.forward = forward
    got = first_block_statistics(model, batches_of(make_samples((20, 20, 20))))
    named = {name.rpartition(".")[2]: s for name, s in got.items()}
    assert (named["gate_proj"] is named["up_proj"]) == same


def test_where_only_inputs_count_a_block_runs_no_further_than_to_the_last_of_them():
    model = make_model()
    batches = batches_of(make_samples())
    down, runs = model.model.layers[0].mlp.down_proj, []
    down.register_forward_hook(lambda *_: runs.append(1))
    found = {}
    for keep in (True, False):
        runs.clear()
        with Walk(model, find_decoder(model), batches, CPU) as walk:
            found[keep] = walk.statistics(0, Needs.GRAM, keep=keep)
        assert len(runs) == (len(batches) if keep else 1)
    assert len(batches) > 1
    assert all(torch.equal(found[True][name].gram, found[False][name].gram) for name in found[True])


def test_statistics_leave_no_trace_on_the_model():
    model = make_model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        first_block_statistics(model, batches_of(make_samples()))
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer():
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(PruningError, match=r"layers\.0"):
        first_block_statistics(model, batches_of(make_samples()))


# --- propagation ------------------------------------------------------------------------------------------------


def walk_and_prune(model: nn.Module, batches: Sequence[Batch], propagate: str, method: str) -> None:
    chosen = METHODS[method]
    with Walk(model, find_decoder(model), batches, CPU) as walk:
        for i, block in enumerate(walk.decoder.blocks):
            found = walk.statistics(i, Needs.GRAM, keep=propagate == "dense")
            prune_linears(block.linears, found, chosen)
            if propagate == "pruned":
                walk.advance(i)
            walk.finish(i)


def prune_linears(linears, statistics, method) -> None:
    for name, linear in linears.items():
        selection = Selection(sparsity=0.5, group=method.group)
        result = prune_shared(method, [linear.weight.detach()], statistics[name], selection)[0]
        linear.weight.data.copy_(result.weight)


def naive_prune(model: nn.Module, samples: Sequence[Sample], propagate: str, method: str) -> None:
    """The whole model anew for every block, sample by sample."""
    dense = copy.deepcopy(model)
    for block in find_decoder(model).blocks:
        source = dense if propagate == "dense" else model
        prune_linears(block.linears, naive_statistics(source, list(block.linears), samples), METHODS[method])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_each_propagation_equals_a_naive_rerun(propagate, method):
    samples = make_samples()
    ours, naive = make_model(num_hidden_layers=3), make_model(num_hidden_layers=3)
    walk_and_prune(ours, batches_of(samples), propagate, method)
    naive_prune(naive, samples, propagate, method)
    for (name, a), b in zip(ours.named_parameters(), naive.parameters(), strict=True):
        assert torch.equal(a == 0, b == 0), name
        assert torch.allclose(a, b, atol=1e-4), name


def test_pruned_and_dense_propagation_differ_after_the_first_block():
    models = {how: make_model() for how in ("pruned", "dense")}
    for how, model in models.items():
        walk_and_prune(model, batches_of(make_samples()), how, "wanda")
    first, second = (
        [torch.equal(a, b) for a, b in zip(*(m.model.layers[i].parameters() for m in models.values()), strict=True)]
        for i in (0, 1)
    )
    assert all(first)
    assert not all(second)


# --- structure --------------------------------------------------------------------------------------------------


def test_the_bundled_models_blocks_and_matrices_are_found(tiny_model):
    from calset.pruning.model.checkpoint import open_source

    decoder = find_decoder(open_source(tiny_model).skeleton())
    assert [b.name for b in decoder.blocks] == [f"model.layers.{i}" for i in range(6)]
    assert all(len(b.linears) == 7 for b in decoder.blocks)
    assert not any("lm_head" in name for name in decoder.linears())


def test_tied_decoder_matrices_are_refused_by_name():
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj"):
        find_decoder(model)

"""Biases that take over the mean of what is pruned: only where a checkpoint carries them, and loaded again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import make_model, make_samples, make_subset, save_model

from calset.errors import InputError, VerificationError
from calset.pruning import biases
from calset.pruning.layout import Layout
from calset.pruning.prune import prune
from calset.pruning.tensorfiles import INDEX
from calset.pruning.verify import verify

SUBSET = make_subset(make_samples([20 + 13 * (i % 9) for i in range(20)]))
ATTENTION = {f"self_attn.{x}_proj" for x in "qkvo"}


def carried_by(kind: str, **changes) -> tuple[set[str], dict[str, bool]]:
    found = biases.find_carriers(make_model(kind, **changes).config)
    return {name.removeprefix("model.layers.0.") for name in found.linears if ".0." in name}, dict(found.switches)


@pytest.mark.parametrize(
    ("kind", "linears", "switches"),
    [
        ("Llama", ATTENTION | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}, ["attention_bias", "mlp_bias"]),
        ("Qwen3", ATTENTION, ["attention_bias"]),
        ("Qwen2", ATTENTION - {"self_attn.o_proj"}, []),
        ("Mistral", set(), []),
    ],
)
def test_carriers_are_what_transformers_builds_with_a_bias(kind, linears, switches):
    assert carried_by(kind) == (linears, dict.fromkeys(switches, True))


def outputs(folder: Path, name: str, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """What a linear of the reloaded model gives, position by position of one sequence after the other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_the_reloaded_model_has_the_mean_outputs_of_the_dense_one(tmp_path, kind):
    folder = save_model(tmp_path / "dense", kind)
    report = prune(folder, SUBSET, tmp_path / "stade", method="stade", sparsity=0.5)
    prune(folder, SUBSET, tmp_path / "wanda", method="wanda", sparsity=0.5)
    name = "model.layers.0.self_attn.v_proj"
    ids = [s.input_ids for s in SUBSET.samples]
    dense, stade, wanda = (outputs(f, name, ids).mean(0) for f in (folder, tmp_path / "stade", tmp_path / "wanda"))
    assert (dense - stade).abs().max() < 1e-5
    assert (dense - wanda).abs().max() > 1e-2
    assert verify(tmp_path / "stade", base=folder).n_untouched is not None
    assert {m.bias for m in report.matrices if "v_proj" in m.name} == {True}


def test_added_biases_are_announced_and_turned_on_in_the_config_alone(tmp_path):
    folder = save_model(tmp_path / "dense", "Qwen3", dtype=torch.bfloat16)
    report = prune(folder, SUBSET, tmp_path / "out", method="stade", sparsity=0.5)
    dense, sparse = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert sparse == {**dense, "attention_bias": True}
    weights, before = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    added = weights.keys() - before.keys()
    assert added == set(report.biases)
    assert {weights[name].dtype for name in added} == {torch.bfloat16}
    assert any("8 linears get a bias" in w and "attention_bias" in w for w in report.warnings)
    assert any("6 of 14 linears" in w and "wanda" in w for w in report.warnings)
    assert "biases take over" in (tmp_path / "out/README.md").read_text()


def test_a_bias_that_was_there_changes_and_the_config_stays(tmp_path):
    folder = save_model(tmp_path / "dense", "Qwen2")
    report = prune(folder, SUBSET, tmp_path / "out", method="stade", sparsity=0.5)
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if name.endswith(".bias") and not torch.equal(before[name], after[name])}
    assert changed == set(report.biases) == {n for n in before if n.endswith(".bias")}


def test_biases_go_beside_their_matrix_into_shards_and_index(tmp_path):
    folder = save_model(tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({n: weights[n] for n in members}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: s for s, members in shards.items() for n in members}}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    report = prune(folder, SUBSET, tmp_path / "out", method="stade", sparsity=0.5)
    placed = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for name in report.biases:
        assert placed[name] == placed[name.replace(".bias", ".weight")]
    assert verify(tmp_path / "out").n_untouched == len(weights) - 14
    assert outputs(tmp_path / "out", "lm_head", [[1, 2, 3]]).isfinite().all()


def test_a_model_without_any_bias_is_refused_before_weights_load(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "dense", "Mistral")
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match="use wanda"):
        prune(folder, SUBSET, tmp_path / "out", method="stade", sparsity=0.5)


def test_verify_misses_no_broken_bias(tmp_path):
    folder = save_model(tmp_path / "dense")
    out = tmp_path / "out"
    report = prune(folder, SUBSET, out, method="stade", sparsity=0.5)
    weights = load_file(out / "model.safetensors")
    weights[report.biases[0]][0] = float("nan")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"\.bias holds values that are not finite"):
        verify(out)
    del weights[report.biases[0]]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"\.bias is listed as changed but not in"):
        verify(out)

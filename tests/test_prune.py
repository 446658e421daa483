"""prune and verify, end to end, on the bundled model and on tiny random ones."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from factories import fill
from safetensors.torch import load_file, save_file
from small_models import make_model, make_samples, make_subset, save_model

from calset.catalog.subsets import versions
from calset.errors import CalsetError, InputError, PruningError, VerificationError
from calset.io.models import folder_revision
from calset.io.progress import Progress
from calset.pruning import record
from calset.pruning.blockwise import workfolder
from calset.pruning.blockwise.phases import Phase
from calset.pruning.methods.registry import METHODS, REFINED
from calset.pruning.model import checkpoint
from calset.pruning.model.layout import Layout
from calset.pruning.model.tensorfiles import INDEX
from calset.pruning.prune import prune
from calset.pruning.verify import verify

SUBSET = make_subset(make_samples([20 + 13 * (i % 9) for i in range(20)]))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def left_beside(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith((".", out.name)))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, llama) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "llama"
    prune(llama, make_subset(), out, sparsity=0.5)
    return out


@pytest.fixture
def copy_of_pruned(tmp_path, pruned) -> Path:
    return shutil.copytree(pruned, tmp_path / "copy")


@pytest.mark.parametrize("method", ["wanda", "depth"])
def test_a_pruning_is_recorded_in_the_catalog_that_names_its_subset(tmp_path, llama, monkeypatch, method):
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 5)]])
    versions.keep(catalog, make_subset())
    report = prune(llama, make_subset().name, tmp_path / "named", method=method, sparsity=0.5, catalog=catalog)
    monkeypatch.setenv("CALSET_CATALOG", str(catalog.path))
    prune(llama, make_subset(), tmp_path / "default", method=method, sparsity=0.5)
    kept = catalog.prunings()
    assert [record["out"] for record in kept] == [str(tmp_path / "named"), str(tmp_path / "default")]
    assert kept[0]["calibration"]["content_hash"] == make_subset().content_hash
    written = json.loads((tmp_path / "named" / "pruning.json").read_text())
    assert {key: kept[0][key] for key in written} == written
    assert report.calibration["subset"] == make_subset().ref


def test_a_catalog_that_is_not_there_is_not_made_by_a_pruning(tmp_path, llama):
    path = tmp_path / "none.duckdb"
    prune(llama, make_subset(), tmp_path / "out", method="magnitude", sparsity=0.5, catalog=path)
    with pytest.raises(InputError, match="there is no catalog"):
        prune(llama, "name", tmp_path / "other", method="magnitude", sparsity=0.5, catalog=path)
    assert not path.exists()


# --- what comes out ---------------------------------------------------------------------------------------------


# What takes seconds on the bundled model is slow.
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in ("admm", "alps") else []) for name in METHODS]


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("how", [{"sparsity": 0.65}, {"pattern": "2:4"}])
def test_the_bundled_model_gets_exactly_the_asked_sparsity_and_nothing_else_changes(tmp_path, tiny_model, method, how):
    out = tmp_path / "pruned"
    report = prune(tiny_model, SUBSET, out, method=method, **how)
    dense, sparse = weights_of(tiny_model), weights_of(out)
    assert dense.keys() == sparse.keys()
    listed = {m.name: m for m in report.matrices}
    assert len(listed) == 42
    for name, tensor in sparse.items():
        assert tensor.dtype == dense[name].dtype == torch.bfloat16
        if name not in listed:
            assert torch.equal(tensor, dense[name]), name
            continue
        size = tensor.numel()
        if "pattern" in how:
            assert ((tensor != 0).reshape(-1, 4).sum(-1) == 2).all(), name
        else:
            per_row = round(0.65 * tensor.shape[1]) * tensor.shape[0]
            assert int((tensor == 0).sum()) == (per_row if METHODS[method].group == "row" else round(0.65 * size)), name
    assert verify(out).n_untouched == len(dense) - 42
    assert not any("lm_head" in n or "embed" in n or "norm" in n for n in listed)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Gemma3Text"])
def test_other_architectures_prune_verify_and_reload(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "dense", kind)
    report = prune(folder, make_subset(), tmp_path / "pruned", sparsity=0.5)
    assert report.realised_sparsity == pytest.approx(0.5, abs=1e-3)
    assert verify(tmp_path / "pruned", base=folder).n_untouched > 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_biases_stay(tmp_path):
    folder = save_model(tmp_path / "dense", "Qwen2")
    prune(folder, make_subset(), tmp_path / "pruned", sparsity=0.5)
    dense, sparse = weights_of(folder), weights_of(tmp_path / "pruned")
    biases = [n for n in dense if n.endswith(".bias")]
    assert biases
    assert all(torch.equal(dense[n], sparse[n]) for n in biases)


def test_tied_embeddings_stay(tmp_path):
    folder = save_model(tmp_path / "dense", tie_word_embeddings=True)
    prune(folder, make_subset(), tmp_path / "pruned", sparsity=0.5)
    assert verify(tmp_path / "pruned").n_untouched == len(weights_of(folder)) - 14


def test_batching_does_not_change_masks(tmp_path, llama):
    for name, batch_tokens in (("one", 1), ("many", 8192)):
        prune(llama, make_subset(), tmp_path / name, sparsity=0.5, batch_tokens=batch_tokens)
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, many[name] == 0), name
        assert torch.allclose(tensor, many[name], atol=1e-4), name


def test_pruning_twice_gives_the_same_bytes(tmp_path, llama, pruned):
    prune(llama, make_subset(), tmp_path / "again", sparsity=0.5)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_small_files_are_the_dense_models_and_the_card_says_what_happened(tmp_path, tiny_model):
    out = tmp_path / "pruned"
    report = prune(tiny_model, SUBSET, out, method="wanda", sparsity=0.5)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()
    card = (out / "README.md").read_text()
    assert SUBSET.content_hash in card
    assert "wanda, sparsity 0.5" in card
    record = json.loads((out / "pruning.json").read_text())
    assert record == json.loads(json.dumps(report.as_dict()))
    assert record["schema_version"] == 2
    assert record["calibration"]["content_hash"] == SUBSET.content_hash
    assert record["base"]["revision"] == folder_revision(tiny_model)
    assert record["n_counted_tokens"] == SUBSET.n_tokens
    assert {m["n_tokens"] for m in record["matrices"]} == {SUBSET.n_tokens}
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (out / "README.md").stat().st_mode & 0o777


def test_a_dense_models_card_keeps_its_front_matter_first(tmp_path, llama):
    folder = shutil.copytree(llama, tmp_path / "dense")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Dense\n\nScores 0.9.\n")
    prune(folder, make_subset(), tmp_path / "pruned", method="magnitude", sparsity=0.5)
    card = (tmp_path / "pruned/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# dense, pruned with calset")
    assert card.index("pruned with calset") < card.index("# Card of the dense model") < card.index("Scores 0.9.")


def test_progress_counts_blocks(tmp_path, llama):
    events = []
    prune(llama, make_subset(), tmp_path / "out", method="wanda", sparsity=0.5, progress=events.append)
    assert [(e.phase, e.done) for e in events] == [
        ("loading", 0),
        ("pruning", 0),
        ("pruning", 1),
        ("saving", 2),
        ("done", 2),
    ]


def test_tokens_and_propagation_reach_the_statistics(tmp_path, llama):
    report = prune(llama, make_subset(), tmp_path / "a", method="wanda", sparsity=0.5, tokens="completion")
    assert {m.n_tokens for m in report.matrices} == {sum(len(s.input_ids) - 5 for s in make_subset().samples)}
    prune(llama, make_subset(), tmp_path / "b", method="wanda", sparsity=0.5)
    prune(llama, make_subset(), tmp_path / "c", method="wanda", sparsity=0.5, propagate="dense")
    a, b, c = (weights_of(tmp_path / x)["model.layers.1.mlp.up_proj.weight"] for x in "abc")
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)


def test_a_dead_input_is_zeroed_and_recorded_as_it_is(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:20] = 0  # 20 of 32 inputs never fire
    folder = save_model(tmp_path / "dense")
    model.save_pretrained(folder)
    report = prune(folder, make_subset(), tmp_path / "out", sparsity=0.5)
    q = report.matrices[0]
    assert (q.n_pruned, q.n_zeros) == (512, 640)
    assert verify(tmp_path / "out").realised_sparsity == report.realised_sparsity


# --- warnings ---------------------------------------------------------------------------------------------------


def test_a_subset_of_another_model_is_warned_about_and_of_the_same_is_not(tmp_path, llama):
    own = make_subset(model="renamed", model_revision=folder_revision(llama))
    other = make_subset(model="bigger-sibling", model_revision="f" * 64)
    options = {"method": "wanda", "sparsity": 0.5}
    assert prune(llama, own, tmp_path / "own", **options).warnings == ()
    (warning,) = prune(llama, other, tmp_path / "other", **options).warnings
    assert "bigger-sibling" in warning


def test_fewer_tokens_than_inputs_is_warned_about(tmp_path, llama):
    subset = make_subset(make_samples((20, 20)))
    report = prune(llama, subset, tmp_path / "out", sparsity=0.5)
    assert any("rank-deficient" in w and "2 matrices" in w for w in report.warnings)
    assert verify(tmp_path / "out").realised_sparsity == pytest.approx(0.5, abs=1e-3)


def test_another_tokenizer_can_be_forced_and_is_recorded(tmp_path, llama):
    report = prune(llama, make_subset(tokenizer_hash="0" * 64), tmp_path / "out", sparsity=0.5, force=True)
    assert any("forced" in w for w in report.warnings)


def test_a_share_that_rows_cannot_hold_is_warned_about(tmp_path, llama):
    report = prune(llama, make_subset(), tmp_path / "out", method="wanda", sparsity=0.55)
    (warning,) = report.warnings
    assert "14 matrices" in warning  # 17.6 of 32 inputs go as 18; 26.4 of 48 as 26
    assert "0.5625" in warning
    assert verify(tmp_path / "out").realised_sparsity == report.realised_sparsity


def test_options_without_effect_are_warned_about(tmp_path, llama):
    options = {"pattern": "2:4", "group": "row", "damping": 0.1}
    group, damping = prune(llama, make_subset(), tmp_path / "out", method="wanda", **options).warnings
    assert "--group row has no effect" in group
    assert "--damping 0.1 has no effect" in damping


def test_magnitude_does_not_claim_data(tmp_path, llama):
    subset = make_subset(model="bigger-sibling", model_revision="f" * 64)
    report = prune(llama, subset, tmp_path / "out", method="magnitude", sparsity=0.5)
    assert (report.warnings, report.tokens, report.propagate, report.n_counted_tokens) == ((), None, None, 0)
    assert report.calibration["used"] is False
    card = (tmp_path / "out/README.md").read_text()
    assert "magnitude uses no data" in card
    assert subset.content_hash not in card


# --- bad input: before any weight is loaded ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.2}, "between 0 and 1"),
        ({"sparsity": 0}, "between 0 and 1"),
        ({}, "either a sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "not both"),
        ({"pattern": "4:2"}, "less than M"),
        ({"pattern": "half"}, "N:M"),
        ({"pattern": "2:5"}, "model.layers.0.self_attn.q_proj has 32 inputs"),
        ({"sparsity": 0.5, "method": "obs"}, "magnitude, wanda, sparsegpt"),
        ({"sparsity": 0.5, "group": "column"}, "row, block, matrix"),
        ({"sparsity": 0.5, "propagate": "both"}, "pruned, dense"),
        ({"sparsity": 0.5, "tokens": "answer"}, "all, completion, prompt"),
        ({"sparsity": 0.5, "damping": -1.0}, "damping"),
        ({"sparsity": 0.01, "group": "row"}, r"32 weights of a row of model\.layers\.0\.self_attn\.q_proj .* none"),
        ({"sparsity": 0.9995}, r"weights of a block of model\.layers\.0\.self_attn\.k_proj rounds to all"),
        ({"sparsity": 0.5, "batch_tokens": 0}, "batch_tokens"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size"),
        ({"sparsity": 0.5, "max_length": 1000}, "exceeds the 128 positions"),
        ({"sparsity": 0.5, "device": "toaster"}, "device 'toaster'"),
        ({"sparsity": 0.5, "calibration": make_subset([])}, "is empty"),
        ({"sparsity": 0.5, "calibration": make_subset(make_samples((300,)))}, "--max-length 128"),
        ({"sparsity": 0.5, "calibration": make_subset(tokenizer_hash="0" * 64)}, "another tokenizer"),
        ({"sparsity": 0.5, "calibration": make_subset(make_samples((4,))), "tokens": "completion"}, "no token"),
    ],
)
def test_bad_input_is_refused_before_weights_load(tmp_path, llama, monkeypatch, options, message):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message) as caught:
        prune(llama, out=tmp_path / "out", **{"calibration": make_subset(), **options})
    assert "\n" not in str(caught.value)
    assert left_beside(tmp_path / "out") == []


def test_bad_model_folders_are_refused(tmp_path, llama):
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            prune(folder, make_subset(), tmp_path / "out", sparsity=0.5)

    refused(tmp_path / "nothing", "no model folder")
    quantised = shutil.copytree(llama, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    refused(quantised, "quantised")
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    refused(broken, "config.json")
    untokenised = shutil.copytree(llama, tmp_path / "untokenised", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(untokenised, "tokenizer")
    truncated = shutil.copytree(llama, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:5000])
    refused(truncated, "cannot load the weights")
    partial = shutil.copytree(llama, tmp_path / "partial")
    kept = {k: v for k, v in weights_of(llama).items() if "layers.1.mlp.up" not in k}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    refused(partial, r"lacks 1 tensors, such as model\.layers\.1\.mlp\.up_proj")


def test_an_output_that_holds_something_is_left_alone(tmp_path, llama):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something"):
        prune(llama, make_subset(), tmp_path / "out", sparsity=0.5)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="holds something"):
        prune(llama, make_subset(), tmp_path / "out/thesis.txt", sparsity=0.5)


def test_an_empty_output_folder_is_used(tmp_path, llama):
    (tmp_path / "out").mkdir()
    prune(llama, make_subset(), tmp_path / "out", method="magnitude", sparsity=0.5)
    assert verify(tmp_path / "out").n_matrices == 14


# --- faults -----------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_weights_load(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    monkeypatch.setattr(workfolder.shutil, "disk_usage", lambda p: SimpleNamespace(free=10**6))
    with pytest.raises(CalsetError, match="make room"):
        prune(llama, make_subset(), tmp_path / "out", sparsity=0.5)


def test_a_disk_that_fills_up_leaves_nothing_and_says_so_in_a_line(tmp_path, tiny_model):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(PruningError, match="could not write") as caught:
            prune(tiny_model, make_subset(), tmp_path / "out", method="magnitude", sparsity=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert left_beside(tmp_path / "out") == []


def test_a_killed_run_leaves_no_output_and_the_next_one_sweeps_its_scraps(tmp_path, llama, monkeypatch):
    out = tmp_path / "out"
    options = {"method": "magnitude", "sparsity": 0.5, "device": "cpu"}
    child = os.fork()
    if child == 0:
        # Killed with everything written but the rename.
        monkeypatch.setattr(checkpoint, "write_companions", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        try:
            prune(llama, make_subset(), out, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    assert len(left_beside(out)) == 1
    prune(llama, make_subset(), out, **options)
    assert left_beside(out) == ["out"]


def test_weights_that_are_not_finite_are_an_error_that_names_the_matrix(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    folder = save_model(tmp_path / "dense")
    model.save_pretrained(folder)
    with pytest.raises(PruningError, match=r"layers\.1"):
        prune(folder, make_subset(), tmp_path / "out", method="magnitude", sparsity=0.5)
    assert left_beside(tmp_path / "out") == []


@pytest.mark.parametrize("where", ["load", "blocks"])
def test_too_little_memory_says_what_to_lower(tmp_path, llama, monkeypatch, where):
    def exhaust(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")

    if where == "load":
        monkeypatch.setattr("calset.pruning.model.tensorfiles.TensorFiles.slice", exhaust)
    else:
        monkeypatch.setattr("calset.pruning.blockwise.walk.Walk.statistics", exhaust)
    with pytest.raises(PruningError, match=r"--batch-tokens \(it was 99\).*--max-length.*--device cpu") as caught:
        prune(llama, make_subset(), tmp_path / "out", sparsity=0.5, batch_tokens=99)
    assert "\n" not in str(caught.value)
    assert left_beside(tmp_path / "out") == []


# --- what the source's files hold -------------------------------------------------------------------------------


def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_only_matrices_changed(dense: dict[str, torch.Tensor], report, out: Path) -> None:
    sparse = weights_of(out)
    listed = {m.name: m for m in report.matrices}
    assert dense.keys() == sparse.keys()
    for name, tensor in dense.items():
        assert sparse[name].dtype == tensor.dtype, name
        if name in listed:
            assert int((sparse[name] == 0).sum()) == listed[name].n_zeros
        else:
            assert torch.equal(sparse[name], tensor), name
    assert verify(out).n_untouched == len(dense) - len(listed)


def test_a_generation_config_that_transformers_refuses_to_save_is_kept_as_it_is(tmp_path, llama):
    folder = shutil.copytree(llama, tmp_path / "dense")
    text = '{"do_sample": false, "temperature": 0.6, "top_p": 0.95}'
    (folder / "generation_config.json").write_text(text)
    prune(folder, make_subset(), tmp_path / "out", method="wanda", sparsity=0.5)
    assert (tmp_path / "out/generation_config.json").read_text() == text


@pytest.mark.parametrize("method", METHODS)
def test_a_config_that_names_another_dtype_does_not_retype_the_weights(tmp_path, method):
    narrow = save_model(tmp_path / "narrow", dtype=torch.bfloat16)
    set_config(narrow, dtype="float32")
    report = prune(narrow, make_subset(), tmp_path / "a", method=method, sparsity=0.5)
    assert_only_matrices_changed(weights_of(narrow), report, tmp_path / "a")
    wide = save_model(tmp_path / "wide", dtype=torch.float32)
    set_config(wide, dtype="bfloat16")
    report = prune(wide, make_subset(), tmp_path / "b", method=method, sparsity=0.5)
    assert_only_matrices_changed(weights_of(wide), report, tmp_path / "b")
    if not METHODS[method].update:  # what stays, stays exactly: it was never rounded to the config's bfloat16
        name = report.matrices[0].name
        dense, sparse = weights_of(wide)[name], weights_of(tmp_path / "b")[name]
        assert torch.equal(sparse[sparse != 0], dense[sparse != 0])


@pytest.mark.parametrize("method", [*METHODS, *REFINED])
def test_a_float64_checkpoint_is_pruned_and_stays_one(tmp_path, method):
    folder = save_model(tmp_path / "dense", dtype=torch.float64)
    report = prune(folder, make_subset(), tmp_path / "out", method=method, sparsity=0.5)
    assert report.sparsity == 0.5
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.float64}


def test_a_mixed_checkpoint_stays_mixed_and_its_spare_tensors_stay(tmp_path):
    folder = save_model(tmp_path / "dense", dtype=torch.bfloat16)
    weights = weights_of(folder)
    for name in weights:
        if "norm" in name or "layers.1.mlp" in name:
            weights[name] = weights[name].float() + 1e-5
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "by": "me"})
    report = prune(folder, make_subset(), tmp_path / "out", sparsity=0.5)
    assert_only_matrices_changed(weights, report, tmp_path / "out")


def test_shards_keep_their_names_and_index_and_other_layouts_stay_behind(tmp_path):
    folder = save_model(tmp_path / "dense")
    weights = weights_of(folder)
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({n: weights[n] for n in members}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: s for s, members in shards.items() for n in members}}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    out = tmp_path / "out"
    prune(folder, make_subset(), out, sparsity=0.5)
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(shards)
    assert (out / INDEX).read_bytes() == (folder / INDEX).read_bytes()
    assert all(load_file(out / s).keys() == set(members) for s, members in shards.items())
    assert verify(out).n_untouched == len(weights) - 14


def test_names_that_transformers_changes_and_mixed_dtypes_come_out_as_they_went_in(tmp_path):
    folder = save_model(tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=True)
    weights = {k.removeprefix("model."): v for k, v in weights_of(folder).items()}
    weights["norm.weight"] = weights["norm.weight"].float() + 1e-5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, dtype="float32")
    report = prune(folder, make_subset(), tmp_path / "out", sparsity=0.5)
    assert {m.name for m in report.matrices} < weights.keys()
    assert_only_matrices_changed(weights, report, tmp_path / "out")


# --- verify -----------------------------------------------------------------------------------------------------


def tamper(folder: Path, name: str, change) -> None:
    weights = weights_of(folder)
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_verify_reports_what_it_proved(pruned, llama):
    report = verify(pruned)
    assert (report.n_matrices, report.sparsity, report.base) == (14, 0.5, str(llama))
    assert report.as_dict()["n_untouched"] == report.n_other_tensors
    assert any("bit-equal" in line for line in report.lines())


def test_verify_tells_how_far_it_is(pruned):
    events = []
    report = verify(pruned, progress=events.append)
    n_tensors = report.n_matrices + report.n_other_tensors
    assert [(e.phase, e.done, e.total) for e in events] == [
        *(("matrices", i, 14) for i in range(15)),
        *(("logits", i, 2) for i in range(3)),
        *(("untouched tensors", i, n_tensors) for i in range(n_tensors + 1)),
        ("done", 1, 1),
    ]


@pytest.mark.parametrize("total", [1, 7, 99, 100, 101, 12_345])
def test_a_phase_is_told_from_its_start_to_its_end_at_most_a_hundred_times(total):
    told = []
    phase = Phase("tensors", told.append)
    for done in range(total + 1):
        phase.step(done, total)
    assert len(told) == min(total, 100) + 1
    assert told[0] == Progress("tensors", 0, total)
    assert told[-1] == Progress("tensors", total, total)


def test_verify_catches_a_weight_that_came_back(copy_of_pruned):
    name = "model.layers.1.mlp.down_proj.weight"

    def fill(w: torch.Tensor) -> None:
        w[tuple((w == 0).nonzero()[0])] = 0.5

    tamper(copy_of_pruned, name, fill)
    with pytest.raises(VerificationError, match=rf"{name} has 767 zeros of 1536, recorded as 768"):
        verify(copy_of_pruned)


def test_verify_catches_a_broken_pattern_with_the_right_count(tmp_path, llama):
    out = tmp_path / "out"
    prune(llama, make_subset(), out, method="wanda", pattern="2:4")

    def swap(w: torch.Tensor) -> None:
        w[0, (w[0] == 0).nonzero()[0]] = 1.0
        w[1, (w[1] != 0).nonzero()[0]] = 0.0

    tamper(out, "model.layers.0.self_attn.q_proj.weight", swap)
    with pytest.raises(VerificationError, match=r"q_proj\.weight does not keep to 2:4: 1 of 256 groups"):
        verify(out)


def test_verify_catches_a_changed_tensor_that_was_not_pruned(copy_of_pruned):
    tamper(copy_of_pruned, "model.norm.weight", lambda w: w.add_(1e-6))
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs"):
        verify(copy_of_pruned)


def test_verify_catches_weights_and_logits_that_are_not_finite(tmp_path, pruned):
    folder = shutil.copytree(pruned, tmp_path / "weights")
    tamper(folder, "model.layers.0.mlp.up_proj.weight", lambda w: w.masked_fill_(w != 0, float("inf")))
    with pytest.raises(VerificationError, match="not finite"):
        verify(folder)
    folder = shutil.copytree(pruned, tmp_path / "logits")
    tamper(folder, "lm_head.weight", lambda w: w.fill_(float("inf")))
    with pytest.raises(VerificationError, match="logits"):
        verify(folder)


def test_verify_catches_a_missing_tensor(copy_of_pruned):
    weights = weights_of(copy_of_pruned)
    del weights["model.layers.0.post_attention_layernorm.weight"]
    save_file(weights, copy_of_pruned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="lacks 1 tensors"):
        verify(copy_of_pruned)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copy_of_pruned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="listed as pruned but not in"):
        verify(copy_of_pruned)


def test_verify_says_when_the_dense_model_is_gone_or_changed(tmp_path, llama):
    dense = shutil.copytree(llama, tmp_path / "dense")
    out = tmp_path / "out"
    prune(dense, make_subset(), out, method="magnitude", sparsity=0.5)
    assert verify(out).n_untouched is not None
    tamper(dense, "model.norm.weight", lambda w: w.add_(1))
    assert "changed" in verify(out).notes[0]
    with pytest.raises(InputError, match="not the model that was pruned"):
        verify(out, base=dense)
    shutil.rmtree(dense)
    report = verify(out)
    assert report.n_untouched is None
    assert "--base" in report.lines()[-1]
    assert verify(out, base=llama).n_untouched is not None


def edit_record(folder: Path, change) -> None:
    record = json.loads((folder / "pruning.json").read_text())
    change(record)
    (folder / "pruning.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(sparsity=0.9), r"q_proj\.weight had 512 weights pruned, but sparsity 0\.9 .* is 922"),
        (lambda r: r["matrices"][0].update(n_pruned=600), "600 weights pruned"),
        (lambda r: r["matrices"].pop(3), r"layers\.0\.self_attn\.o_proj\.weight is a matrix of the decoder, but not"),
        (lambda r: r["matrices"].append(r["matrices"][0]), "listed twice"),
    ],
)
def test_verify_does_not_trust_the_record(copy_of_pruned, change, message):
    edit_record(copy_of_pruned, change)
    with pytest.raises(VerificationError, match=message):
        verify(copy_of_pruned)


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": None, "pattern": None},
        {"sparsity": None, "pattern": 24},
        {"sparsity": None, "pattern": "half"},
        {"sparsity": "0.5"},
        {"group": 3},
        {"block_size": None},
        {"base": None},
        {"calibration": None},
        {"schema_version": "1"},
        {"matrices": {"a": 1}},
        {"matrices": [3]},
        {"matrices": [{"name": "a", "shape": [4], "n_zeros": 1, "n_pruned": 1}]},
        {"matrices": [{"name": "a", "shape": [4, 4], "n_zeros": 1, "n_pruned": None}]},
    ],
)
def test_a_record_of_wrong_types_is_bad_input_in_a_line(copy_of_pruned, change):
    edit_record(copy_of_pruned, lambda record: record.update(change))
    with pytest.raises(InputError, match=r"pruning\.json is corrupt") as caught:
        verify(copy_of_pruned)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", b"\xff", '{"schema_version": 1, "calibration": null, "matrices": []}', '{"a": ' + "[" * 100_000,
        '{"schema_version": 2, "matrices": [{"name": "a", "shape": [1, 1], "n_zeros": 1, "n_pruned": 1e999}]}',
    ],
)  # fmt: skip
def test_read_record_refuses_what_it_cannot_read(tmp_path, text):
    (tmp_path / "pruning.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"pruning\.json is corrupt") as caught:
        record.read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_record_that_is_too_long_or_no_file_is_not_read(tmp_path):
    with (tmp_path / "pruning.json").open("wb") as file:
        file.truncate(record.MAX_BYTES + 1)
    with pytest.raises(InputError, match="too long for a pruning's record"):
        record.read_record(tmp_path)
    (tmp_path / "pruning.json").unlink()
    os.mkfifo(tmp_path / "pruning.json")
    with pytest.raises(InputError, match=r"has no pruning\.json"):
        record.read_record(tmp_path)


def test_a_record_says_no_more_and_no_less_than_before_it_was_typed(pruned):
    """The names of the fields on the disk are those of the reports."""
    text = json.loads((pruned / "pruning.json").read_text())
    known = record.read_record(pruned)
    read = json.loads(msgspec.json.encode(known))
    assert read.keys() <= text.keys()
    assert [{key: entry[key] for key in read["matrices"][0]} for entry in text["matrices"]] == read["matrices"]
    for key in ("base", "calibration"):
        assert read[key] == {name: text[key][name] for name in read[key]}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"schema_version": 1, "matrices": []}',
        '{"schema_version": 99, "matrices": [{"name": "a", "shape": [1, 1], "n_zeros": 0}]}',
    ],
)
def test_a_missing_or_corrupt_record_is_bad_input(copy_of_pruned, text):
    path = copy_of_pruned / "pruning.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=r"pruning\.json"):
        verify(copy_of_pruned)


def test_verify_of_no_folder_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        verify(tmp_path / "nothing")

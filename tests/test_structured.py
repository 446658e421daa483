"""Experts and blocks dropped: scored as a slow textbook does, and what is left computes what the dense model would."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from processes import die, killed, ranks
from safetensors.torch import load_file, save_file
from small_models import VOCABULARY, blocks_of, load, make_model, make_subset, save_model

from calset.errors import CalsetError, InputError, PruningError, VerificationError
from calset.pruning.blockwise import workfolder
from calset.pruning.blockwise.workfolder import WorkFolder, folder_of
from calset.pruning.model.layout import Layout
from calset.pruning.model.tensorfiles import INDEX, read_headers
from calset.pruning.prune import plan_pruning, prune
from calset.pruning.structured import depth, reap
from calset.pruning.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

SUBSET = make_subset()
IDS = torch.arange(3, 3 + 24).remainder(VOCABULARY).reshape(2, 12)
# More blocks or experts than the other tests have, so that there is something to drop and to renumber.
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
KINDS = {
    "Llama": {"num_hidden_layers": 4},
    "GPT2": {"n_layer": 4},
    "Gemma3Text": {"num_hidden_layers": 6, "layer_types": SLIDING},
    "Qwen3Next": {"num_hidden_layers": 4, "layer_types": LINEAR},
    "Qwen3Moe": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "num_experts": 8},
    "Mixtral": {"num_local_experts": 8},
    "DeepseekV3": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "DeepseekV2": {
        "num_hidden_layers": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "q_lora_rank": 16,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "DeepseekV2Lite": {"num_hidden_layers": 4},
    "Qwen2Moe": {"num_hidden_layers": 4, "num_experts": 8},
    "GraniteMoe": {"num_hidden_layers": 4, "num_local_experts": 8},
    "HunYuanMoEV1": {"num_hidden_layers": 4, "num_experts": 8, "moe_topk": [2, 1, 2, 1]},
    "Jamba": {"num_hidden_layers": 4, "num_experts": 8},
    "Lfm2Moe": {"num_hidden_layers": 4, "num_experts": 8, "layer_types": ["conv", "full_attention"] * 2},
    "NemotronH": {"n_routed_experts": 8},
    "GptOss": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
# What a block adds to the hidden states.
ADDS = re.compile(r"(layers|h)\.1\..*(o_proj|down_proj|c_proj|out_proj|post_(attention|feedforward)_layernorm)")
MORE = ("DeepseekV2Lite", "Qwen2Moe", "GraniteMoe", "HunYuanMoEV1", "Jamba", "Lfm2Moe")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in MORE]
DEPTH = ["Llama", "GPT2", "Gemma3Text", "Qwen3Next", "Qwen3Moe", "DeepseekV3", "DeepseekV2", "GptOss", *SLOW]
MOE = [
    "Qwen3Moe",
    "Mixtral",
    "DeepseekV3",
    "DeepseekV2",
    "GptOss",
    *SLOW,
    pytest.param("NemotronH", marks=pytest.mark.slow),
]


def change(folder: Path, how) -> None:
    """Rewrite a checkpoint's tensors: ``how`` gets name and tensor, and writes to the tensor."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        how(name, tensor)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _make_odd(name: str, tensor: torch.Tensor, *, gemma: bool) -> None:
    """Have the second block do next to nothing, so that it is not the last ones which go, and biases that decide."""
    if ADDS.search(name):
        tensor.mul_(0.01)
        if gemma and "norm" in name:
            tensor.sub_(0.99)  # its norms multiply by 1 + the weight
    if name.endswith(("e_score_correction_bias", "expert_bias")):
        tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoint folders by architecture, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = save_model(tmp_path_factory.mktemp("models") / kind, kind.removesuffix("Lite"), **KINDS[kind])
            change(folder, partial(_make_odd, gemma=kind.startswith("Gemma")))
            made[kind] = folder
        return made[kind]

    return get


@pytest.fixture(scope="module")
def dropped(models, tmp_path_factory):
    """(the smaller checkpoint, its report) by architecture and method, made once."""
    made: dict[tuple[str, str], tuple[Path, object]] = {}

    def get(kind: str, method: str):
        if (kind, method) not in made:
            out = tmp_path_factory.mktemp("dropped") / f"{kind}-{method}"
            made[kind, method] = out, prune(models(kind), SUBSET, out, method=method, sparsity=0.5)
        return made[kind, method]

    return get


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def experts_of(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


@contextmanager
def only(model, kept: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """A dense model whose routers cannot choose any but these experts."""
    own, closed = torch.nn.functional.linear, {}
    for name, numbers in kept.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        gone = torch.ones(parent.experts.num_experts, dtype=torch.bool)
        gone[list(numbers)] = False
        for path, tensor in [*parent.named_parameters(), *parent.named_buffers()]:
            words = path.split(".")
            if {"gate", "router"} & set(words) and tensor.shape[:1] == gone.shape and tensor.ndim == 2:
                closed[tensor.data_ptr()] = gone
            elif words[-1] in ("e_score_correction_bias", "expert_bias"):
                tensor.data.masked_fill_(gone, float("-inf"))

    def linear(inputs, weight, bias=None):
        outputs = own(inputs, weight, bias)
        gone = closed.get(weight.data_ptr())
        return outputs if gone is None else outputs.masked_fill(gone, float("-inf"))

    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = own


def skip(model, kept: tuple[int, ...]) -> None:
    """Have a dense model go around the other blocks."""
    for index, block in enumerate(blocks_of(model)):
        if index not in kept:
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states


# --- what is left computes what the dense model would -------------------------------------------------------------


@pytest.mark.parametrize("kind", DEPTH)
def test_without_blocks_the_logits_are_those_of_the_dense_model_going_around_them(models, dropped, kind):
    out, report = dropped(kind, "depth")
    (stack,) = report.stacks
    assert len(stack.kept) == len(stack.scores) // 2
    assert 1 not in stack.kept
    dense = load(models(kind))
    skip(dense, stack.kept)
    torch.testing.assert_close(logits(load(out)), logits(dense), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MOE)
def test_without_experts_the_logits_are_those_of_routers_that_cannot_choose_them(models, dropped, kind):
    out, report = dropped(kind, "reap")
    kept = {stack.name: stack.kept for stack in report.stacks}
    assert all(len(stack.kept) == len(stack.scores) // 2 for stack in report.stacks)
    dense = load(models(kind))
    with only(dense, kept):
        expected = logits(dense)
    torch.testing.assert_close(logits(load(out)), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, logits(load(models(kind))), atol=1e-3)


def with_method(kinds, method):
    """The same kinds, marks and all, each with a method."""
    for kind in kinds:
        marks = () if isinstance(kind, str) else kind.marks
        yield pytest.param(kind if isinstance(kind, str) else kind.values[0], method, marks=marks)


@pytest.mark.parametrize(("kind", "method"), [*with_method(DEPTH, "depth"), *with_method(MOE, "reap")])
def test_the_smaller_model_loads_whole_generates_and_verifies(models, dropped, kind, method):
    out, report = dropped(kind, method)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # With a cache, whose layers follow the new numbers; the full forward must say the same.
    ids = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        again = model(input_ids=ids[:, :-1], use_cache=False).logits[0, IDS.shape[1] - 1 :].argmax(-1)
    assert ids[0, IDS.shape[1] :].tolist() == again.tolist()
    proved = verify(out)
    assert proved.n_equal == proved.n_tensors == len(read_headers(out))
    assert (out / "model.safetensors").stat().st_size < (models(kind) / "model.safetensors").stat().st_size
    assert report.n_parameters == sum(t.numel() for t in load_file(out / "model.safetensors").values())
    assert any("bit-equal" in line for line in proved.lines())


@pytest.mark.parametrize(("kind", "n_groups"), [("DeepseekV3", 2), ("DeepseekV2", 4)])
def test_a_group_limited_router_keeps_groups_of_equal_size(dropped, kind, n_groups):
    _, report = dropped(kind, "reap")
    for stack in report.stacks:
        assert [sum(i // 4 == group for i in stack.kept) for group in range(n_groups)] == [2] * n_groups


def test_a_vision_tower_larger_than_what_is_left_is_no_stack_of_blocks(tmp_path):
    config = transformers.Gemma3Config(
        text_config={**make_model("Gemma3Text", **KINDS["Gemma3Text"]).config.to_dict(), "vocab_size": 600},
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    folder = save_model(tmp_path / "dense", "Gemma3Text", **KINDS["Gemma3Text"])
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    report = prune(folder, SUBSET, tmp_path / "out", method="depth", sparsity=0.5)
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["num_hidden_layers"] == 3
    assert len(report.stacks[0].kept) == 3
    proved = verify(tmp_path / "out")
    assert proved.n_equal == proved.n_tensors
    names = read_headers(tmp_path / "out")
    assert sum("vision_tower.encoder.layers.5." in n or "vision_model.encoder.layers.5." in n for n in names) > 0


# --- scores -------------------------------------------------------------------------------------------------------


def textbook_experts(folder: Path, counted, weights=None, sparsity: float | None = None) -> dict[str, list[float]]:
    """REAP sample by sample and token by token, experts run one at a time by transformers' own forward.

    With a sparsity each mixture is closed to what was dropped before the next one is scored.
    """
    model = load(folder)
    kept: dict[str, tuple[int, ...]] = {}
    found: dict[str, list[float]] = {}
    for name, experts in experts_of(model).items():
        totals, shares = [0.0] * experts.num_experts, [0.0] * experts.num_experts
        seen: list[tuple] = []
        with only(model, kept) if sparsity is not None else only(model, {}):
            handle = experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
            for sample in SUBSET.samples:
                with torch.no_grad():
                    model(input_ids=torch.tensor([list(sample.input_ids)]), use_cache=False)
            handle.remove()
            for sample, (hidden, index, gates) in zip(SUBSET.samples, seen, strict=True):
                for position in counted(sample):
                    weight = 1.0 if weights is None else weights[sample.sample_id][position]
                    for expert, gate in zip(index[position].tolist(), gates[position].tolist(), strict=True):
                        with torch.no_grad():
                            one = experts(hidden[position : position + 1], torch.tensor([[expert]]), torch.ones(1, 1))
                        totals[expert] += weight * gate * float(one.double().norm())
                        shares[expert] += weight
        found[name] = [t / s if s else 0.0 for t, s in zip(totals, shares, strict=True)]
        if sparsity is not None:
            n = round(len(totals) * (1 - sparsity))
            kept[name] = tuple(sorted(sorted(range(len(totals)), key=lambda i: -found[name][i])[:n]))
    return found


def textbook_blocks(folder: Path, counted, weights=None) -> list[float]:
    model = load(folder)
    total = torch.zeros(len(blocks_of(model)), dtype=torch.float64)
    share = 0.0
    for sample in SUBSET.samples:
        states: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(
                lambda module, args, output, states=states: states.extend(
                    (args[0][0], (output[0] if isinstance(output, tuple) else output)[0])
                )
            )
            for block in blocks_of(model)
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([list(sample.input_ids)]), use_cache=False)
        for handle in handles:
            handle.remove()
        for position in counted(sample):
            weight = 1.0 if weights is None else weights[sample.sample_id][position]
            share += weight
            for block in range(len(total)):
                a, b = states[2 * block][position].double(), states[2 * block + 1][position].double()
                total[block] += weight * (1 - float(a @ b / (a.norm() * b.norm())))
    return (total / share).tolist()


def all_of(sample) -> range:
    return range(len(sample.input_ids))


def completion_of(sample) -> range:
    return range(sample.n_prompt_tokens, len(sample.input_ids))


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text", "Qwen3Next"])
def test_block_scores_equal_a_textbooks_sample_by_sample(models, dropped, kind):
    (stack,) = dropped(kind, "depth")[1].stacks
    assert stack.scores == pytest.approx(textbook_blocks(models(kind), all_of), rel=1e-4)
    assert set(stack.n_tokens) == {SUBSET.n_tokens}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_expert_scores_equal_a_textbooks_with_what_was_dropped_before_closed(models, dropped, kind):
    _, report = dropped(kind, "reap")
    expected = textbook_experts(models(kind), all_of, sparsity=0.5)
    assert [stack.name for stack in report.stacks] == list(expected)
    for stack in report.stacks:
        assert stack.scores == pytest.approx(expected[stack.name], rel=1e-3)
        chosen = load(models(kind)).config.get_text_config().num_experts_per_tok
        if stack.name == report.stacks[0].name:
            assert sum(stack.n_tokens) == chosen * SUBSET.n_tokens


@pytest.mark.parametrize("method", ["depth", "reap"])
def test_counted_tokens_weights_and_dense_inputs_reach_the_scores(tmp_path, models, method):
    folder = models("Mixtral")
    weights = {s.sample_id: [0.5 + (i % 3) for i in range(len(s.input_ids))] for s in SUBSET.samples}
    report = prune(
        folder, SUBSET, tmp_path / "out", method=method, sparsity=0.5, tokens="completion", token_weights=weights,
        propagate="dense", batch_tokens=64, hidden="disk",
    )  # fmt: skip
    if method == "depth":
        assert report.stacks[0].scores == pytest.approx(textbook_blocks(folder, completion_of, weights), rel=1e-4)
    else:
        expected = textbook_experts(folder, completion_of, weights)
        for stack in report.stacks:
            assert stack.scores == pytest.approx(expected[stack.name], rel=1e-3)
    assert report.tokens == "completion"
    assert report.n_counted_tokens == sum(len(completion_of(s)) for s in SUBSET.samples)


@pytest.mark.parametrize(("kind", "method"), [("Qwen3Next", "depth"), ("Mixtral", "reap")])
def test_padding_never_counts(tmp_path, models, dropped, kind, method):
    alone = prune(models(kind), SUBSET, tmp_path / "out", method=method, sparsity=0.5, batch_tokens=1)
    for one, many in zip(alone.stacks, dropped(kind, method)[1].stacks, strict=True):
        assert one.scores == pytest.approx(many.scores, rel=1e-4)
        assert list(one.n_tokens) == list(many.n_tokens)


@given(
    scores=st.lists(st.integers(0, 5), min_size=2, max_size=24),
    share=st.floats(0.01, 0.99),
    n_kinds=st.integers(1, 3),
)
def test_the_least_influential_blocks_go_but_the_last_of_a_kind(scores, share, n_kinds):
    kinds = [f"kind {i % n_kinds}" for i in range(len(scores))]
    n_dropped = min(int(share * len(scores)), len(scores) - len(set(kinds)))
    kept = depth.choose(scores, n_dropped, kinds)
    gone = set(range(len(scores))) - set(kept)
    assert len(gone) == n_dropped
    assert {kinds[i] for i in kept} == set(kinds)
    for i in gone:  # one that stays is as influential, or the last of its kind
        for j in kept:
            assert scores[j] >= scores[i] or sum(kinds[k] == kinds[j] for k in kept) == 1


@given(st.integers(1, 4), st.integers(2, 8), st.data())
def test_each_group_keeps_its_highest_experts(n_groups, size, data):
    scores = data.draw(st.lists(st.integers(0, 9), min_size=n_groups * size, max_size=n_groups * size))
    each = data.draw(st.integers(1, size))
    kept = reap.choose(scores, each * n_groups, n_groups)
    for group in range(n_groups):
        members = range(group * size, (group + 1) * size)
        inside = [scores[i] for i in members if i in kept]
        assert sorted(inside) == sorted(scores[i] for i in members)[size - each :]


# --- what comes out -----------------------------------------------------------------------------------------------


def test_every_tensor_keeps_its_bytes_and_the_config_its_other_words(models, dropped):
    out, report = dropped("Llama", "depth")
    (stack,) = report.stacks
    dense, fewer = (load_file(f / "model.safetensors") for f in (models("Llama"), out))
    for name, tensor in fewer.items():
        source = name
        if name.startswith("model.layers."):
            number = int(name.split(".")[2])
            source = name.replace(f"layers.{number}.", f"layers.{stack.kept[number]}.", 1)
        assert torch.equal(tensor, dense[source]), name
    config, before = (json.loads((f / "config.json").read_text()) for f in (out, models("Llama")))
    assert {k: v for k, v in config.items() if before[k] != v} == {"num_hidden_layers": 2}
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (models("Llama") / name).read_bytes()


def test_lists_with_an_entry_a_block_follow_the_blocks(dropped):
    out, report = dropped("Gemma3Text", "depth")
    (stack,) = report.stacks
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == [SLIDING[i] for i in stack.kept]
    out, report = dropped("Qwen3Moe", "depth")  # every second block had experts; now a list says which have
    kept = report.stacks[0].kept
    assert report.config == {
        "num_hidden_layers": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [new for new, old in enumerate(kept) if old % 2 == 0],
    }  # fmt: skip
    out, report = dropped("DeepseekV3", "depth")
    assert report.config["first_k_dense_replace"] == sum(i < 2 for i in report.stacks[0].kept)


def test_the_record_and_the_card_say_what_happened(models, dropped):
    out, report = dropped("GptOss", "reap")
    record = json.loads((out / "pruning.json").read_text())
    assert record == json.loads(json.dumps(report.as_dict()))
    assert (record["method"], record["structure"], record["sparsity"], record["schema_version"]) == (
        "reap",
        "experts",
        0.5,
        3,
    )
    assert record["calibration"]["content_hash"] == SUBSET.content_hash
    assert record["config"] == {"num_local_experts": 2}
    assert all(len(s["scores"]) == len(s["n_tokens"]) == 4 and len(s["kept"]) == 2 for s in record["stacks"])
    card = (out / "README.md").read_text()
    assert SUBSET.content_hash in card
    assert "8 of 16 experts" in card
    assert json.loads((out / "pruning.json").read_text())["calibration"]["content_hash"] == SUBSET.content_hash


@pytest.mark.parametrize("method", ["depth", "reap"])
def test_shards_are_written_anew_and_the_index_names_them(tmp_path, models, method):
    folder = shutil.copytree(models("Mixtral"), tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    transformers.AutoModelForCausalLM.from_pretrained(models("Mixtral")).save_pretrained(folder, max_shard_size="60KB")
    n_before = len(list(folder.glob("*.safetensors")))
    out = tmp_path / "out"
    report = prune(folder, SUBSET, out, method=method, sparsity=0.5)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert 1 < len(files) <= n_before
    assert all(name.endswith(f"-of-{len(files):05d}.safetensors") for name in files)
    index = json.loads((out / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == report.n_bytes
    assert verify(out).n_equal == len(index["weight_map"])
    whole = prune(models("Mixtral"), SUBSET, tmp_path / "whole", method=method, sparsity=0.5)
    assert [s.kept for s in whole.stacks] == [s.kept for s in report.stacks]
    torch.testing.assert_close(logits(load(out)), logits(load(tmp_path / "whole")), atol=0, rtol=0)


@pytest.mark.parametrize("method", ["depth", "reap"])
def test_heads_that_the_model_does_not_use_are_left_out_and_named(tmp_path, models, method):
    folder = shutil.copytree(models("DeepseekV3"), tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    extra = "model.layers.4.mlp.experts.0.up_proj.weight"
    weights[extra] = torch.ones(24, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = prune(folder, SUBSET, tmp_path / "out", method=method, sparsity=0.5)
    assert list(report.left_out) == [extra]
    assert any(extra in warning for warning in report.warnings)
    assert report.config["num_nextn_predict_layers"] == 0
    assert verify(tmp_path / "out").n_equal is not None


def test_an_expert_that_no_token_reaches_scores_nothing_and_is_warned_about(tmp_path, models):
    folder = shutil.copytree(models("DeepseekV3"), tmp_path / "dense")
    change(
        folder, lambda name, tensor: tensor.index_fill_(0, torch.tensor([1, 6]), -9) if "correction" in name else None
    )
    report = prune(folder, SUBSET, tmp_path / "out", method="reap", sparsity=0.25)
    for stack in report.stacks:
        assert (stack.scores[1], stack.n_tokens[1], stack.scores[6]) == (0.0, 0, 0.0)
        assert stack.kept == (0, 2, 3, 4, 5, 7)
    assert any("4 experts" in warning and "no calibration token" in warning for warning in report.warnings)


def test_the_dry_run_counts_and_loads_nothing(tmp_path, models, monkeypatch):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    plan = plan_pruning(models("Mixtral"), SUBSET, tmp_path / "out", method="reap", sparsity=0.25)
    rows = dict(plan.rows())
    assert rows["experts"] == "4 of 16 go"
    assert plan.problems() == []
    assert 0 < plan.disk_bytes < sum(p.stat().st_size for p in models("Mixtral").glob("*.safetensors"))
    plan = plan_pruning(models("Llama"), SUBSET, tmp_path / "out", method="depth", sparsity=0.25)
    assert dict(plan.rows())["blocks"] == "1 of 4 go"


# --- killed, full, stopped ----------------------------------------------------------------------------------------

MOMENTS = {
    "before a line": lambda m: m.setattr(WorkFolder, "note", lambda w, r: die()),
    "after two lines": lambda m: m.setattr(WorkFolder, "note", _die_after(2)),
    "while copying": lambda m: m.setattr("calset.pruning.structured.copy.Part.ranges", die),
    "before the rename": lambda m: m.setattr("calset.pruning.blockwise.workfolder.flush", die),
}


def _die_after(n: int):
    own = WorkFolder.note

    def note(work, record) -> None:
        own(work, record)
        if len(work.blocks) == n:
            die()

    return note


@pytest.mark.parametrize(("kind", "method"), [("Llama", "depth"), ("GptOss", "reap")])
def test_killed_at_any_moment_and_continued_it_ends_the_same(tmp_path, models, dropped, monkeypatch, kind, method):
    out = tmp_path / "out"
    for moment in MOMENTS.values():
        with monkeypatch.context() as patch:
            moment(patch)
            killed(lambda: prune(models(kind), SUBSET, out, method=method, sparsity=0.5))
        assert not out.exists()
    report = prune(models(kind), SUBSET, out, method=method, sparsity=0.5)
    whole, first = dropped(kind, method)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [s.scores for s in report.stacks] == [s.scores for s in first.stacks]
    assert list(report.resumed_at)[-1] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_another_share_is_no_continuation(tmp_path, models, monkeypatch):
    with monkeypatch.context() as patch:
        MOMENTS["after two lines"](patch)
        killed(lambda: prune(models("Llama"), SUBSET, tmp_path / "out", method="depth", sparsity=0.5))
    with pytest.raises(InputError, match=r"had sparsity 0\.5, not 0\.25"):
        prune(models("Llama"), SUBSET, tmp_path / "out", method="depth", sparsity=0.25)


def test_a_disk_that_fills_up_keeps_what_was_measured_and_leaves_no_output(tmp_path, tiny_model):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(PruningError, match="could not write") as caught:
            prune(tiny_model, SUBSET, out, method="depth", sparsity=0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    report = prune(tiny_model, SUBSET, out, method="depth", sparsity=0.2)
    assert list(report.resumed_at) == [6]
    assert verify(out).n_kept == 5
    assert not folder_of(out).exists()


def test_too_little_disk_is_said_before_weights_load(tmp_path, models, monkeypatch):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    monkeypatch.setattr(workfolder.shutil, "disk_usage", lambda p: SimpleNamespace(free=10**6))
    with pytest.raises(CalsetError, match="make room"):
        prune(models("Llama"), SUBSET, tmp_path / "out", method="depth", sparsity=0.5)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Llama", {"method": "depth"}, "depth takes --sparsity, the share of the blocks"),
        ("Llama", {"method": "depth", "sparsity": 1.0}, "between 0 and 1"),
        ("Llama", {"method": "depth", "sparsity": 0.1}, r"drops none of 4 blocks: ask for 0\.25"),
        ("Llama", {"method": "depth", "pattern": "2:4"}, "--pattern is about zeros within matrices"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "group": "row"}, "--group is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "allocation": "owl"}, "--allocation is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "include": ["mlp"]}, "--include is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "exclude": ["mlp"]}, "--exclude is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "damping": 0.1}, "--damping is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "block_size": 64}, "--block-size is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "allow_partial": True}, "--allow-partial is about zeros"),
        ("Llama", {"method": "depth", "sparsity": 0.5, "tokens": "some"}, "tokens must be"),
        ("Llama", {"method": "depth+dsnot", "sparsity": 0.5}, r"depth drops blocks: it has no mask"),
        ("Llama", {"method": "reap", "sparsity": 0.5}, "no mixture of experts"),
        ("Llama", {"method": "deep", "sparsity": 0.5}, "or reap or depth"),
        ("Mixtral", {"method": "reap", "sparsity": 0.05}, "drops none of 8 experts"),
        ("DeepseekV3", {"method": "reap", "sparsity": 0.1}, "drops none of 8 experts in 2 groups"),
        ("Gemma3Text", {"method": "depth", "sparsity": 0.9}, "one block of each kind"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line_before_weights_load(
    tmp_path, models, monkeypatch, kind, options, message
):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message) as caught:
        prune(models(kind), SUBSET, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "changes", "method", "message"),
    [
        ("Llama4", {}, "reap", "no mixture of experts that calset knows"),
        ("Llama4", {}, "wanda", r"does not know how to prune these decoder weights.*feed_forward\.experts"),
        ("LongcatFlash", {}, "reap", "no mixture of experts that calset knows"),
        ("LongcatFlash", {}, "depth", "a config that says 1 blocks makes"),
        ("Ernie4_5_Moe", {}, "reap", r"e_score_correction_bias changes with the number of experts in a way"),
        ("MiniMax", {"num_hidden_layers": 4, "layer_types": LINEAR}, "depth", "num_hidden_layers would be 2, not 4"),
        ("NemotronH", {}, "depth", "one block of each kind"),
        ("GlmMoeDsa", {"indexer_types": ["full", "shared"]}, "depth", "share what their indexers choose"),
        ("Jamba", {}, "wanda", r"does not know how to prune these decoder weights.*mamba\.A_log"),
    ],
)
def test_an_architecture_that_is_not_understood_is_refused_in_a_line(
    tmp_path, monkeypatch, kind, changes, method, message
):
    folder = save_model(tmp_path / "dense", kind, **changes)
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message) as caught:
        prune(folder, SUBSET, tmp_path / "out", method=method, sparsity=0.5)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_router_keeps_as_many_experts_as_a_token_gets(tmp_path, models):
    report = prune(models("Mixtral"), SUBSET, tmp_path / "out", method="reap", sparsity=0.9)
    assert all(len(stack.kept) == 2 for stack in report.stacks)
    assert any("6 of 8 go" in warning for warning in report.warnings)
    assert verify(tmp_path / "out").n_kept == 4


def test_a_config_that_cannot_say_which_blocks_stay_is_refused_before_weights_load(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "dense", "GPT2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match="scaled by the block's number"):
        prune(folder, SUBSET, tmp_path / "out", method="depth", sparsity=0.5)


def test_blocks_that_a_new_number_would_change_are_found(models):
    """What no rule of a config keeps is seen in the blocks themselves."""
    dense, other = make_model("Gemma3Text", **KINDS["Gemma3Text"]), make_model("Gemma3Text", **KINDS["Gemma3Text"])
    same = [0, 1, 2]
    depth.check_same(dense.model.layers, other.model.layers, same)
    with pytest.raises(InputError, match="block 2 would become block 1 and another one"):
        depth.check_same(dense.model.layers, other.model.layers, [0, 2])


# --- verify -------------------------------------------------------------------------------------------------------


def tamper(folder: Path, name: str, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights) if name == "" else change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, file: str, change) -> None:
    record = json.loads((folder / file).read_text())
    change(record)
    (folder / file).write_text(json.dumps(record))


GATE = "model.layers.1.block_sparse_moe.gate.weight"


def record(how):
    return lambda folder: edit(folder, "pruning.json", how)


def _forget(stack: dict) -> None:
    stack["scores"][stack["kept"][0]] = 0.0


def config(**values):
    return lambda folder: edit(folder, "config.json", lambda c: c.update(values))


@pytest.mark.parametrize(
    ("method", "spoil", "message"),
    [
        ("reap", lambda f: tamper(f, GATE, lambda w: w.view(-1)[7].add_(1e-3)), "gate.weight differs from"),
        ("reap", lambda f: tamper(f, "", lambda weights: weights.update({"a": torch.ones(2)})), "a is in neither"),
        ("depth", lambda f: tamper(f, "model.norm.weight", lambda w: w.neg_()), "norm.weight differs from"),
        ("depth", record(lambda r: r["stacks"][0].update(kept=[1])), "the recorded scores say"),
        ("depth", record(lambda r: r.update(sparsity=0.1)), "drops none"),
        ("depth", config(rms_norm_eps=0.5), r"config\.json says rms_norm_eps 0\.5"),
        ("reap", record(lambda r: r.update(sparsity=0.25)), "means 6"),
        ("reap", record(lambda r: r["stacks"].pop()), "not both in"),
        ("reap", record(lambda r: _forget(r["stacks"][0])), "the recorded scores say"),
        ("reap", config(num_local_experts=6), "is recorded to keep 4 of 8 and has 6"),
    ],
)
def test_verify_finds_what_is_not_as_recorded(tmp_path, dropped, method, spoil, message):
    folder = shutil.copytree(dropped("Mixtral", method)[0], tmp_path / "copy")
    spoil(folder)
    with pytest.raises(VerificationError, match=message):
        verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"stacks": []},
        {"stacks": [{"name": "a"}]},
        {"structure": "heads"},
        {"sparsity": "0.5"},
        {"stacks": [{"name": "a", "scores": [1, 2], "n_tokens": [1, 1], "kept": [2]}]},
        {"stacks": [{"name": "a", "scores": [1, 2], "n_tokens": [1, 1], "kept": [1, 0]}]},
    ],
)
def test_a_record_of_wrong_types_is_bad_input_in_a_line(tmp_path, dropped, change):
    folder = shutil.copytree(dropped("Mixtral", "reap")[0], tmp_path / "copy")
    edit(folder, "pruning.json", lambda record: record.update(change))
    with pytest.raises(InputError, match=r"pruning\.json is corrupt"):
        verify(folder)


def test_verify_tells_how_far_it_is(dropped):
    events = []
    proved = verify(dropped("Mixtral", "reap")[0], progress=events.append)
    assert [(e.phase, e.done, e.total) for e in events] == [
        *(("logits", i, 2) for i in range(3)),
        *(("tensors", i, proved.n_tensors) for i in range(proved.n_tensors + 1)),
        ("done", 1, 1),
    ]


def test_verify_says_when_the_dense_model_is_gone(tmp_path, models):
    dense = shutil.copytree(models("Llama"), tmp_path / "dense")
    prune(dense, SUBSET, tmp_path / "out", method="depth", sparsity=0.5)
    shutil.rmtree(dense)
    proved = verify(tmp_path / "out")
    assert proved.n_equal is None
    assert "--base" in proved.lines()[-1]
    assert verify(tmp_path / "out", base=models("Llama")).n_equal is not None


# --- other runtimes and processes ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [("Llama", "depth"), ("GptOss", "reap")])
def test_two_processes_choose_as_one_does(tmp_path, models, dropped, kind, method):
    code = (
        "import torch; torch.set_num_threads(1)\nfrom small_models import make_subset\n"
        "from calset.pruning.prune import prune\n"
        f"prune({str(models(kind))!r}, make_subset(), {str(tmp_path / 'out')!r}, method={method!r}, sparsity=0.5, "
        "batch_tokens=64, device='cpu')\n"
    )
    assert ranks(code) == [0, 0]
    whole, report = dropped(kind, method)
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    for stack, one in zip(record["stacks"], report.stacks, strict=True):
        assert stack["scores"] == pytest.approx(one.scores, rel=1e-5)
        assert stack["kept"] == list(one.kept)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

"""Every method, allocation and token weight on models that are streamed, continued and of experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from pairs import pairwise
from processes import die, killed
from safetensors.torch import load_file
from small_models import make_subset, save_model

from calset.errors import InputError, PruningError, Stopped
from calset.pruning.blockwise.workfolder import WorkFolder, folder_of
from calset.pruning.methods import sensitivity
from calset.pruning.methods.masks import nearest
from calset.pruning.methods.registry import METHODS, REFINED
from calset.pruning.model.layout import Layout, cut
from calset.pruning.prune import plan_pruning, prune
from calset.pruning.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

SUBSET = make_subset()
HEAVY_ENDS = {s.sample_id: [0.1] * 5 + [1.5] * (len(s.input_ids) - 5) for s in SUBSET.samples}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            layers = {} if kind in ("GptOss", "Gemma3Text", "Qwen3Next") else {"num_hidden_layers": 3}
            made[kind] = save_model(tmp_path_factory.mktemp("models") / kind, kind, **layers)
        return made[kind]

    return get


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- killed and continued ---------------------------------------------------------------------------------------


def kill_in_the_survey() -> None:
    own, seen = sensitivity.outliers, [0]

    def measured(*args):
        seen[0] += 1
        return die() if seen[0] == 2 else own(*args)

    sensitivity.outliers = measured


def kill_before_block(block: int) -> None:
    own = WorkFolder.finish_block
    WorkFolder.finish_block = lambda w, t, r: die() if len(w.blocks) == block else own(w, t, r)


def moments(options: Mapping[str, object]) -> list[Callable[[], None]]:
    blocks = [lambda b=b: kill_before_block(b) for b in range(3)]
    return [kill_in_the_survey, *blocks] if "allocation" in options else blocks


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"method": "sparsegpt", "sparsity": 0.6, "allocation": "owl"}),
        ("Qwen2", {"method": "wanda", "sparsity": 0.5, "propagate": "dense"}),
        pytest.param("Qwen3Moe", {"method": "admm", "sparsity": 0.5, "allocation": "owl"}, marks=SLOW),
        pytest.param("Mixtral", {"method": "magnitude+dsnot", "sparsity": 0.5, "allocation": "owl"}, marks=SLOW),
        pytest.param("Qwen3Moe", {"method": "magnitude", "sparsity": 0.5, "allocation": "owl"}, marks=SLOW),
        pytest.param("Llama", {"method": "alps", "pattern": "2:4", "token_weights": HEAVY_ENDS}, marks=SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for v in value.values())[:30],
)
def test_killed_anywhere_and_continued_it_ends_with_the_same_bytes(tmp_path, models, kind, options):
    dense, out = models(kind), tmp_path / "out"
    whole = prune(dense, SUBSET, tmp_path / "whole", device="cpu", **options)
    for kill in moments(options):

        def run(kill: Callable[[], None] = kill) -> None:
            kill()
            prune(dense, SUBSET, out, device="cpu", **options)

        killed(run)
        assert not out.exists()
    report = prune(dense, SUBSET, out, device="cpu", **options)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list(report.matrices) == list(whole.matrices)
    assert report.allocation == whole.allocation
    assert verify(out, base=dense).n_untouched is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_what_was_surveyed_is_not_surveyed_again(tmp_path, models, monkeypatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    options = {"method": "wanda", "sparsity": 0.5, "allocation": "owl"}
    monkeypatch.setattr(WorkFolder, "finish_block", stop)
    with pytest.raises(Stopped, match="0 blocks done; the same command continues"):
        prune(models("Llama"), SUBSET, tmp_path / "out", **options)
    monkeypatch.undo()
    monkeypatch.setattr(sensitivity, "outliers", lambda *a: pytest.fail("surveyed again"))
    report = prune(models("Llama"), SUBSET, tmp_path / "out", **options)
    monkeypatch.undo()
    whole = prune(models("Llama"), SUBSET, tmp_path / "whole", **options)
    assert [m.asked for m in report.matrices] == [m.asked for m in whole.matrices]


def test_a_survey_that_fails_for_good_leaves_nothing(tmp_path, models, monkeypatch):
    def fail(*args: object) -> None:
        raise PruningError("no")

    monkeypatch.setattr(sensitivity, "outliers", fail)
    with pytest.raises(PruningError):
        prune(models("Llama"), SUBSET, tmp_path / "out", sparsity=0.5, allocation="owl")
    assert list(tmp_path.iterdir()) == []


def ratios(folder: Path, share: float) -> Path:
    path = folder / "ratios.json"
    path.write_text(json.dumps({"model.layers.0": share}))
    return path


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"allocation": 0.25}, {"allocation": 0.3}, "had allocation 'ratios "),
        ({"allocation": "owl"}, {}, "had allocation 'owl', not 'uniform'"),
        ({"token_weights": HEAVY_ENDS}, {}, "had token_weights"),
    ],
)
def test_another_allocation_or_weights_do_not_continue_an_interrupted_run(
    tmp_path, models, monkeypatch, before, after, message
):
    def options(changes: Mapping[str, object]) -> dict[str, object]:
        share = changes.get("allocation")
        return {**changes, **({"allocation": ratios(tmp_path, share)} if isinstance(share, float) else {})}

    own = WorkFolder.finish_block

    def finish(w, tensors, record) -> None:
        own(w, tensors, record)
        raise KeyboardInterrupt

    asked = {"method": "wanda", "sparsity": 0.5}
    monkeypatch.setattr(WorkFolder, "finish_block", finish)
    with pytest.raises(Stopped):
        prune(models("Llama"), SUBSET, tmp_path / "out", **asked, **options(before))
    monkeypatch.undo()
    with pytest.raises(InputError, match=message):
        prune(models("Llama"), SUBSET, tmp_path / "out", **asked, **options(after))
    assert prune(models("Llama"), SUBSET, tmp_path / "out", **asked, **options(before)).resumed_at == (1,)
    assert not folder_of(tmp_path / "out").exists()


# --- experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "allocation"),
    pairwise(
        ("GptOss", "Mixtral", "Qwen3Moe"),  # fused experts, experts stored apart, fused and stored apart
        (*METHODS, *REFINED),
        ("owl", "uniform"),
        fast=[("GptOss", "ria", "owl"), ("Qwen3Moe", "admm", "uniform")],
    ),
)
def test_each_expert_gets_its_share_by_every_method_and_allocation(tmp_path, models, kind, method, allocation):
    out = tmp_path / "out"
    report = prune(models(kind), SUBSET, out, method=method, sparsity=0.5, allocation=allocation)
    weights = weights_of(out)
    for m in report.matrices:
        matrix = cut(weights[m.name], m.expert, m.rows, m.transposed)
        assert m.n_zeros == int((matrix == 0).sum()) >= m.n_pruned
    size = sum(m.shape[0] * m.shape[1] for m in report.matrices)
    step = max(m.shape[0] for m in report.matrices) if report.group == "row" else 0
    assert abs(sum(m.n_pruned for m in report.matrices) - nearest(0.5 * size)) <= step
    assert len([m for m in report.matrices if "experts" in m.name]) >= 2 * 4 * 2
    assert verify(out, base=models(kind)).n_untouched is not None


def test_a_file_of_ratios_names_experts_as_the_checkpoint_or_the_model_calls_them(tmp_path, models):
    path = tmp_path / "ratios.json"

    def shares(kind: str, wanted: Mapping[str, float]) -> dict[str, float]:
        path.write_text(json.dumps(wanted))
        out = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        report = prune(models(kind), SUBSET, out, method="magnitude", sparsity=0.75, allocation=path)
        verify(out)
        return {f"{m.name}[{m.expert}]" if m.expert is not None else m.name: m.asked for m in report.matrices}

    fused = "model.layers.0.mlp.experts.down_proj"
    found = shares("GptOss", {fused: 0.25, f"{fused}[2]": 0.5, "model.layers.1.self_attn": 0.5})
    assert [found[f"{fused}[{e}]"] for e in range(4)] == [0.25, 0.25, 0.5, 0.25]
    assert found["model.layers.1.self_attn.q_proj.weight"] == 0.5
    assert found["model.layers.1.mlp.experts.down_proj[0]"] == 0.75
    apart = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    if apart not in weights_of(models("Mixtral")):
        apart = next(n for n in weights_of(models("Mixtral")) if n.endswith("layers.0.mlp.experts.1.w2.weight"))
    found = shares("Mixtral", {apart.removesuffix(".weight"): 0.25, f"{fused}[3]": 0.5})
    assert found[apart] == 0.25
    assert found[apart.replace("experts.1", "experts.3")] == 0.5
    assert found[apart.replace("experts.1", "experts.0")] == 0.75


def test_token_weights_reach_the_experts(tmp_path, models):
    completion = {s.sample_id: [0.0] * 5 + [1.0] * (len(s.input_ids) - 5) for s in SUBSET.samples}
    for kind in ("Mixtral", "GptOss"):
        prune(models(kind), SUBSET, tmp_path / f"{kind}-w", method="wanda", sparsity=0.5, token_weights=completion)
        prune(models(kind), SUBSET, tmp_path / f"{kind}-c", method="wanda", sparsity=0.5, tokens="completion")
        prune(models(kind), SUBSET, tmp_path / f"{kind}-all", method="wanda", sparsity=0.5)
        ours, theirs, plain = (weights_of(tmp_path / f"{kind}-{x}") for x in ("w", "c", "all"))
        experts = [n for n in ours if ".experts." in n]
        assert all(torch.equal(ours[n], theirs[n]) for n in experts)
        assert not all(torch.equal(ours[n], plain[n]) for n in experts)


def test_an_expert_whose_tokens_all_weigh_nothing_is_pruned_by_magnitude(tmp_path, models):
    # All but one token weigh 0: an expert that it does not pass through is as good as unreached.
    weights = {s.sample_id: [0.0] * len(s.input_ids) for s in SUBSET.samples}
    weights[SUBSET.samples[0].sample_id][3] = 1.0
    report = prune(models("Mixtral"), SUBSET, tmp_path / "out", sparsity=0.5, token_weights=weights, allocation="owl")
    experts = [m for m in report.matrices if ".experts." in m.name]
    alone = [m for m in experts if m.n_tokens == 0]
    assert len(alone) == len(experts) // 2  # two experts of four get the token
    assert {m.instead for m in alone} == {"magnitude"}
    assert all(m.n_zeros < m.shape[0] * m.shape[1] for m in experts)


# --- parts of a model -------------------------------------------------------------------------------------------


def test_an_allocation_shares_out_what_is_chosen_and_nothing_else(tmp_path, models):
    report = prune(
        models("Llama"), SUBSET, tmp_path / "out", sparsity=0.5, allocation="owl", include=["mlp"],
        exclude=["layers.2"],
    )  # fmt: skip
    assert {m.name.split(".")[2] for m in report.matrices} == {"0", "1"}
    size = sum(m.shape[0] * m.shape[1] for m in report.matrices)
    assert sum(m.n_pruned for m in report.matrices) == nearest(0.5 * size)
    assert verify(tmp_path / "out").n_matrices == 6


# --- the plan ---------------------------------------------------------------------------------------------------


def test_a_plan_counts_the_pass_of_a_survey_and_loads_nothing(tmp_path, models, monkeypatch):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))

    def plan(**options):
        return plan_pruning(models("Llama"), SUBSET, tmp_path / "out", **{"sparsity": 0.5, **options})

    uniform, owl = (plan(method="wanda", allocation=a) for a in ("uniform", "owl"))
    assert owl.forward_flops == 1.5 * uniform.forward_flops
    assert owl.statistics_flops == 2 * uniform.statistics_flops
    assert owl.device_bytes == uniform.device_bytes
    assert owl.solve_flops == uniform.solve_flops
    nothing, surveyed = plan(method="magnitude"), plan(method="magnitude", allocation="owl")
    assert nothing.n_positions == 0
    assert (surveyed.n_positions, surveyed.forward_flops) == (uniform.n_positions, uniform.forward_flops / 2)
    gpt, admm, alps = (plan(method=m).solve_flops for m in ("sparsegpt", "admm", "alps"))
    assert gpt < admm < alps
    assert plan(method="sparsegpt+dsnot").solve_flops > gpt
    assert list(tmp_path.iterdir()) == []

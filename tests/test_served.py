"""What vLLM serves of a pruned model: the tokens that transformers would choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from small_models import make_subset, save_model

import calset
from calset.builder.engines import Engine, Request, Sampling, open_engine
from calset.builder.model_info import inspect

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SUBSET = make_subset()


def assert_served_as_by_transformers(engine: Engine, folder: Path) -> None:
    """Greedy tokens are equal, where transformers' own logits do not nearly tie."""
    prompts = [list(sample.input_ids) for sample in SUBSET.samples]
    requests = [Request(str(i), tuple(prompt), 0, 8) for i, prompt in enumerate(prompts)]
    served = {c.key: list(c.token_ids) for c in engine.stream(requests, Sampling(temperature=0.0))}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    n_compared = 0
    for i, prompt in enumerate(prompts):
        ids = [*prompt, *served[str(i)]]
        with torch.no_grad():
            top = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].topk(2)
        for token, values, best in zip(served[str(i)], top.values, top.indices, strict=True):
            if values[0] - values[1] > 0.3:
                assert token == best[0]
                n_compared += 1
    assert n_compared >= 8


def test_vllm_serves_a_model_of_fewer_blocks(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("vllm")
    calset.prune(tiny_model, SUBSET, tmp_path / "out", method="depth", sparsity=0.5)
    engine = open_engine("vllm", inspect(tmp_path / "out"), max_model_len=256, concurrency=8)
    try:
        assert_served_as_by_transformers(engine, tmp_path / "out")
    finally:
        engine.close()


def test_vllm_serves_a_mixture_of_fewer_experts_and_one_with_zeros_in_its_experts(tmp_path: Path) -> None:
    """What is left of 8 experts has the shapes of the other one, whose weights take their place: it spares a start."""
    pytest.importorskip("vllm")
    # Shapes that vLLM's kernels on a CPU take.
    shape = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "max_position_embeddings": 512}
    dense = save_model(tmp_path / "dense", "Qwen3Moe", num_experts=8, **shape)
    calset.prune(dense, SUBSET, tmp_path / "fewer", method="reap", sparsity=0.5)
    dense = save_model(tmp_path / "other", "Qwen3Moe", num_experts=4, seed=1, **shape)
    calset.prune(dense, SUBSET, tmp_path / "zeros", method="wanda", pattern="2:4")
    engine = open_engine("vllm", inspect(tmp_path / "fewer"), max_model_len=512, concurrency=8)
    try:
        assert_served_as_by_transformers(engine, tmp_path / "fewer")
        report = calset.evaluate(
            tmp_path / "zeros", "demo", engine=engine, max_tokens=16, limit=2, temperature=0.0,
            catalog=tmp_path / "calset.duckdb",
        )  # fmt: skip
        assert (report.n_traces, engine.loaded) == (2, inspect(tmp_path / "zeros").revision)
        assert report.mean_tokens > 0
        assert_served_as_by_transformers(engine, tmp_path / "zeros")
    finally:
        engine.close()

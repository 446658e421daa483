"""What vLLM serves of a pruned model: the tokens that transformers would choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from small_models import make_subset, save_model

import calset
from calset.builder.engines import Engine, Request, Sampling, open_engine
from calset.builder.model.info import inspect
from calset.errors import EngineError

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


def test_vllm_serves_a_mixture_of_fewer_experts_with_zeros_and_takes_no_other_in_its_place(tmp_path: Path) -> None:
    """On a CPU, vLLM 0.32 answers with garbage after a swap of experts."""
    pytest.importorskip("vllm")
    # Shapes that vLLM's kernels on a CPU take.
    shape = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "max_position_embeddings": 512}
    dense = save_model(tmp_path / "dense", "Qwen3Moe", num_experts=8, **shape)
    calset.prune(dense, SUBSET, tmp_path / "fewer", method="reap", sparsity=0.5)
    calset.prune(tmp_path / "fewer", SUBSET, tmp_path / "out", method="wanda", pattern="2:4")
    engine = open_engine("vllm", inspect(tmp_path / "out"), max_model_len=512, concurrency=8)
    try:
        assert_served_as_by_transformers(engine, tmp_path / "out")
        report = calset.evaluate(
            tmp_path / "out", "demo", engine=engine, max_tokens=16, limit=2, temperature=0.0,
            catalog=tmp_path / "calset.duckdb",
        )  # fmt: skip
        assert report.n_traces == 2
        assert report.mean_tokens > 0
        if engine.shares_cores:
            with pytest.raises(EngineError, match="cannot swap the weights of a mixture of experts; start a new eng"):
                engine.load_weights(tmp_path / "fewer", inspect(tmp_path / "fewer").revision)
            assert engine.loaded == inspect(tmp_path / "out").revision
    finally:
        engine.close()

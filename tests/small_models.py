"""Tiny random models built in place, and subsets of random token ids, for the pruning tests."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from calset import bundled, ids
from calset.catalog.records import Sample, Subset
from calset.catalog.subsets.recipes import get_recipe

VOCABULARY = 512
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
CHANGES: dict[str, dict[str, Any]] = {
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"pad_token_id": 0},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2},
    "Olmo2": {"eos_token_id": 2},
    "Falcon": {"alibi": False, "bos_token_id": 1, "eos_token_id": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": MOE,
    "DeepseekV3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **MLA,
    },
    # As V2-Lite has it; V2 itself has q_lora_rank and groups.
    "DeepseekV2": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        **MLA,
        "q_lora_rank": None,
    },
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 24},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": [2, 2], "head_dim": 8},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "MiniMax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "Lfm2Moe": {**MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "NemotronH": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "head_dim": 8,
    },
    "LongcatFlash": {
        "num_layers": 2,
        "num_hidden_layers": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        **MLA,
    },
    "GlmMoeDsa": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 64,
        **MLA,
    },
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Qwen3Next": {
        **MOE,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
MODELS = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Llama4": "Llama4TextConfig"}


@cache
def tokenizer_hash() -> str:
    """Of the bundled model's tokenizer."""
    return ids.vocabulary_hash(transformers.AutoTokenizer.from_pretrained(bundled.MODEL).get_vocab())


def make_samples(
    lengths: Sequence[int] = (12, 40, 7, 25, 33, 40, 18, 29), *, n_prompt: int = 5, seed: int = 0
) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(f"s{i}", [rng.randrange(3, 100) for _ in range(n)], min(n_prompt, n)) for i, n in enumerate(lengths)]


def make_subset(samples: Sequence[Sample] | None = None, **changes: Any) -> Subset:
    """A subset of random token ids of the bundled model's tokenizer, without a catalog."""
    samples = make_samples() if samples is None else list(samples)
    values: dict[str, Any] = {
        "name": "random-ids",
        "version": 1,
        "content_hash": ids.content_hash((s.sample_id, s.input_ids, s.n_prompt_tokens) for s in samples),
        "recipe": get_recipe("rac").as_dict(),
        "seed": 0,
        "model": "tiny",
        "model_revision": "",
        "tokenizer_hash": tokenizer_hash(),
        "samples": samples,
    }
    return Subset(**{**values, **changes})


def make_model(kind: str = "Llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of a transformers architecture."""
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**{**SHAPE, **CHANGES.get(kind, {}), **changes})
    model = getattr(transformers, MODELS.get(kind, f"{kind}ForCausalLM"))(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from initialisation: biases and norms that matter, activations that differ by input.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_model(folder: Path, kind: str = "Llama", **options: Any) -> Path:
    """The same as a checkpoint folder, with the bundled model's tokenizer."""
    make_model(kind, **options).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled.MODEL / name, folder / name)
    return folder


def load(folder: Path) -> Any:
    """A model of a folder in float32, as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """The decoder blocks of a small model."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers

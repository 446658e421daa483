#!/usr/bin/env bash
# llm-compressor 0.14.0.1: sparsity_profile="owl" always raises.
#
# The profile measures outliers with a calibration pass of its own, which sends an event to a session that is not
# initialised yet: ValueError "Cannot invoke event before initializing", before a weight is pruned.
#
# Output seen (compressed-tensors 0.19.0, torch 2.13.0, transformers 5.17.0, November 2026):
#   without a profile: pruned; sparsity_profile="owl": Cannot invoke event before initializing
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 compressed-tensors==0.19.0 llmcompressor==0.14.0.1
cd "$work" # llm-compressor writes its logs where it runs
HF_HUB_OFFLINE=1 venv/bin/python - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log"; exit 1; }
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0")
LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=4, **shape)).save_pretrained("model")
rows = [{"input_ids": torch.randint(0, 128, (64,)).tolist(), "attention_mask": [1] * 64} for _ in range(8)]


def prune(**profile):
    model = LlamaForCausalLM.from_pretrained("model")
    recipe = WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"], **profile)
    oneshot(model=model, tokenizer=tokenizer, dataset=Dataset.from_list(rows), recipe=recipe, max_seq_length=64,
            num_calibration_samples=8)  # fmt: skip
    return (model.model.layers[0].mlp.up_proj.weight == 0).float().mean().item()


assert abs(prune() - 0.5) < 0.01, "changed: Wanda without a profile"
try:
    prune(sparsity_profile="owl", owl_m=5, owl_lmbda=0.05)
except ValueError as error:
    assert "before initializing" in str(error), f"changed: {error}"
    print(f'without a profile: pruned; sparsity_profile="owl": {error}')
else:
    raise SystemExit("changed: the profile works")
PY

#!/usr/bin/env bash
# llm-compressor 0.14.0.1: SparseGPT prunes the lm_head that ignore=["lm_head"] names.
#
# With targets=["Linear"], as in the field's recipes, ignore=["lm_head"] has no effect on the pruning modifiers; the same
# name as a regular expression, "re:.*lm_head", has one. A comparison of pruners then compares models of which one has lost
# half of its output layer.
#
# Output seen (compressed-tensors 0.19.0, torch 2.13.0, transformers 5.17.0, November 2026):
#   ignore=['lm_head']: half of lm_head's weights are zero
#   ignore=['re:.*lm_head']: none of lm_head's weights are zero
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
from llmcompressor.modifiers.pruning import SparseGPTModifier
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0")
LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=4, **shape)).save_pretrained("model")
rows = [{"input_ids": torch.randint(0, 128, (64,)).tolist(), "attention_mask": [1] * 64} for _ in range(8)]
for ignore, want in ((["lm_head"], 0.5), (["re:.*lm_head"], 0.0)):
    model = LlamaForCausalLM.from_pretrained("model")
    recipe = SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=ignore)
    oneshot(model=model, tokenizer=tokenizer, dataset=Dataset.from_list(rows), recipe=recipe, max_seq_length=64,
            num_calibration_samples=8)  # fmt: skip
    zeros = (model.lm_head.weight == 0).float().mean().item()
    assert abs(zeros - want) < 0.01, f"changed: with ignore={ignore} {zeros:.2f} of lm_head are zero"
    print(f"ignore={ignore}: {'half' if want else 'none'} of lm_head's weights are zero")
PY

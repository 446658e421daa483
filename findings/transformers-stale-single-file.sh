#!/usr/bin/env bash
# transformers 5.19.0: save_pretrained() of shards beside an older single file, and the older weights are what loads.
#
# A model that was saved as model.safetensors and is saved again into the same folder as several shards leaves the single
# file there, and from_pretrained() prefers it to the new index. No warning on either side. The folder then holds two
# models, and another reader may take the other one: a reader that goes by model.safetensors.index.json gets the new one.
#
# Output seen (torch 2.13.0, November 2026): "4 new shards beside the old file; loaded: the old weights".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$work/venv/bin/python" - "$work/model" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
folder = Path(sys.argv[1])
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=4, **shape))
model.save_pretrained(folder)
with torch.no_grad():
    for weight in model.parameters():
        weight.fill_(0.5)
model.save_pretrained(folder, max_shard_size="100KB")
shards = len(list(folder.glob("model-*.safetensors")))
assert shards > 1 and (folder / "model.safetensors").exists(), "changed: the old file is gone"
loaded = LlamaForCausalLM.from_pretrained(folder)
new = all(bool((weight == 0.5).all()) for weight in loaded.parameters())
assert not new, "changed: the new weights are loaded"
print(f"{shards} new shards beside the old file; loaded: the old weights")
PY

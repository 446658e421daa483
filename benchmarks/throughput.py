"""What a build costs over bare generation: tokens/s of build (streaming, grading, catalog) against vLLM's LLM.generate.

One process, the same prompts, seeds and sampling; several rounds in turn, so that a drifting machine hits both. The
figure to read is the ratio.

    python benchmarks/throughput.py --problems "gym:chain_sum?min_terms=2&max_terms=7&size=128" --samples 4 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import calset
from calset import ids
from calset.builder.engines import open_engine
from calset.builder.model_info import inspect
from calset.demo import MODEL

MAX_TOKENS = 512
SLOTS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--problems", default="gym:chain_sum?min_terms=2&max_terms=7&size=128&seed=5")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    info = inspect(args.model)
    rows = calset.load_problems(args.problems)[1]
    longest = max(len(info.prompt_ids(p.question)) for p in rows) + MAX_TOKENS
    engine = open_engine("vllm", info, max_model_len=longest, concurrency=SLOTS)
    llm = bare_engine(info, longest)
    ratios = []
    print("round bare_tokens_per_s build_tokens_per_s ratio")
    try:
        for n in range(args.rounds):
            bare = bare_generate(llm, info, rows, args.samples, seed=n)
            with tempfile.TemporaryDirectory() as folder:
                report = calset.build(
                    args.model, args.problems, samples=args.samples, seed=n, max_tokens=MAX_TOKENS, engine=engine,
                    catalog=Path(folder) / "bench.duckdb",
                )  # fmt: skip
            built = report.n_tokens / report.seconds
            ratios.append(built / bare)
            print(f"{n} {bare:.0f} {built:.0f} {built / bare:.3f}", flush=True)
    finally:
        engine.close()
    print(f"median ratio {statistics.median(ratios):.3f} ({len(rows) * args.samples} requests, {SLOTS} slots)")


def bare_engine(info, max_model_len):
    """vLLM's own LLM with the settings that calset's engine uses."""
    from vllm import LLM
    from vllm.platforms import current_platform

    extra = {"enforce_eager": True, "enable_chunked_prefill": False} if current_platform.is_cpu() else {}
    return LLM(
        model=info.location, max_model_len=max_model_len, max_num_seqs=SLOTS, generation_config="vllm",
        max_num_batched_tokens=max(max_model_len, 4096), enable_prefix_caching=True, **extra,
    )  # fmt: skip


def bare_generate(llm, info, rows, samples, seed) -> float:
    """Tokens/s of one LLM.generate call over all requests."""
    from vllm import SamplingParams, TokensPrompt

    s = info.sampling
    llm.reset_prefix_cache()
    prompts, params = [], []
    for problem in rows:
        for index in range(samples):
            prompts.append(TokensPrompt(prompt_token_ids=list(info.prompt_ids(problem.question))))
            params.append(
                SamplingParams(
                    temperature=s.temperature,
                    top_p=s.top_p,
                    top_k=s.top_k,
                    min_p=s.min_p,
                    max_tokens=MAX_TOKENS,
                    seed=ids.request_seed(seed, problem.problem_id, index),
                    detokenize=False,
                    stop_token_ids=list(info.eos_token_ids),
                )
            )
    began = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.monotonic() - began)


if __name__ == "__main__":
    main()

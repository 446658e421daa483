"""One pruner in a process of its own, for ``pruning.py``: calset, llm-compressor, or SparseGPT as its authors wrote it.

Each is measured from a checkpoint folder and token ids to the pruned checkpoint on disk, after a run on a tiny model
that leaves imports and libraries' own memory behind. It imports calset only to run calset: llm-compressor's
environment does not have it.

    python pruning_worker.py JOB.json
"""

from __future__ import annotations

import cProfile
import gc
import io
import json
import math
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

DAMPING, BLOCK_SIZE = 0.01, 128
Phases = dict[str, float]


class Job(dict):
    """``pruner method model ids out``, and ``sparsity`` or ``pattern``; ``ids``: a JSON file with ``calibration``."""

    def sequences(self) -> list[list[int]]:
        return json.loads(Path(self["ids"]).read_text())["calibration"]

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(pruned, of how many): what llm-compressor and the authors' scripts call N:M."""
        if not self.get("pattern"):
            return None
        kept, m = map(int, self["pattern"].split(":"))
        return m - kept, m


def prune_with_calset(job: Job) -> Phases:
    from calset.catalog.records import Sample, Subset
    from calset.pruning.prune import prune

    samples = [Sample(str(i), ids, 0) for i, ids in enumerate(job.sequences())]
    subset = Subset("benchmark", 1, "", {}, 0, "", "", "", samples)
    asked = {"pattern": job["pattern"]} if job.get("pattern") else {"sparsity": job["sparsity"]}
    # Forced: the ids come from no catalog, so nothing is known of the tokenizer that made them.
    report = prune(job["model"], subset, job["out"], method=job["method"], damping=DAMPING, force=True, **asked)
    return {
        "loading": sum(report.phases.get(p, 0.0) for p in ("checking", "copying", "loading")),
        "forward and statistics": report.phases["statistics"] + report.phases.get("propagation", 0.0),
        "solving": report.phases["pruning"],
        "saving": report.phases["writing"],
    }


def prune_with_llm_compressor(job: Job) -> Phases:
    """As its examples do it: one call of ``oneshot`` with a modifier, samples one by one, the sequential pipeline."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM

    logger.remove()
    phases: Phases = {}
    kind: Any = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job["method"]]
    options: dict[str, Any] = {"sparsity": job.get("sparsity") or 0.5, "ignore": ["re:.*lm_head"]}
    if job.n_of_m:
        options["mask_structure"] = "{}:{}".format(*job.n_of_m)
    if job["method"] == "sparsegpt":
        options |= {"block_size": BLOCK_SIZE, "dampening_frac": DAMPING}
    rows = job.sequences()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    data.set_format("torch")
    with timed(phases, "loading"):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    with timed(phases, "forward and statistics"), timing(kind, "compress_modules", phases, "solving"):
        oneshot(
            model=model, dataset=data, recipe=[kind(**options)], num_calibration_samples=len(rows),
            shuffle_calibration_samples=False, max_seq_length=max(map(len, rows)),
        )  # fmt: skip
    phases["forward and statistics"] -= phases["solving"]
    with timed(phases, "saving"), torch.no_grad():
        model.save_pretrained(job["out"])
    return phases


def prune_with_textbook(job: Job) -> Phases:
    """SparseGPT as in its authors' scripts: the whole model in memory, samples one by one, a Gram a linear."""
    import torch
    from transformers import AutoModelForCausalLM

    phases: Phases = {}
    with timed(phases, "loading"):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    with torch.no_grad():
        with timed(phases, "forward and statistics"):
            hidden, arguments = first_inputs(model, job.sequences())
        for layer in model.model.layers:
            linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            solvers = {name: TextbookSparseGPT(linear) for name, linear in linears.items()}
            handles = [linears[n].register_forward_hook(hook_of(solver)) for n, solver in solvers.items()]
            with timed(phases, "forward and statistics"):
                for sample in hidden:
                    layer(sample[None], **arguments)
            for handle in handles:
                handle.remove()
            with timed(phases, "solving"):
                for name in list(solvers):
                    solvers.pop(name).prune(job.get("sparsity"), job.n_of_m)
            with timed(phases, "forward and statistics"):
                for i in range(len(hidden)):
                    hidden[i] = hidden_of(layer(hidden[i][None], **arguments))[0]
    with timed(phases, "saving"):
        model.save_pretrained(job["out"])
    return phases


def hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def hook_of(solver: TextbookSparseGPT) -> Callable[..., None]:
    return lambda module, args, output: solver.add(args[0])


def first_inputs(model: Any, sequences: list[list[int]]) -> tuple[Any, dict[str, Any]]:
    """What the first block gets: hidden states (samples x positions x width), and its other arguments."""
    import torch

    class Caught(Exception):
        pass

    first = model.model.layers[0]
    forward, inputs, arguments = first.forward, [], {}

    def catch(hidden: Any, **kwargs: Any) -> None:
        inputs.append(hidden[0])
        arguments.update(kwargs)
        raise Caught

    first.forward = catch
    for ids in sequences:
        with suppress(Caught):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    first.forward = forward
    return torch.stack(inputs), arguments


class TextbookSparseGPT:
    """One linear's Gram and solve, after Frantar & Alistarh's ``sparsegpt.py``."""

    def __init__(self, linear: Any) -> None:
        import torch

        self.linear = linear
        width = linear.weight.shape[1]
        self.gram = torch.zeros(width, width)
        self.n_samples = 0

    def add(self, inputs: Any) -> None:
        n = inputs.shape[0]
        x = inputs.reshape(-1, inputs.shape[-1]).t()
        self.gram *= self.n_samples / (self.n_samples + n)
        self.n_samples += n
        x = math.sqrt(2 / self.n_samples) * x.float()
        self.gram += x.matmul(x.t())

    def prune(self, sparsity: float | None, n_of_m: tuple[int, int] | None) -> None:
        import torch

        weight = self.linear.weight.data.clone().float()
        h = self.gram
        del self.gram
        dead = torch.diag(h) == 0
        h[dead, dead] = 1
        weight[:, dead] = 0
        diagonal = torch.arange(len(h))
        h[diagonal, diagonal] += DAMPING * torch.mean(torch.diag(h))
        h = torch.linalg.cholesky(h)
        h = torch.cholesky_inverse(h)
        upper = torch.linalg.cholesky(h, upper=True)
        for start in range(0, len(h), BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, len(h))
            block, inner = weight[:, start:stop].clone(), upper[start:stop, start:stop]
            kept, errors = torch.zeros_like(block), torch.zeros_like(block)
            mask = torch.zeros_like(block, dtype=torch.bool)
            if n_of_m is None:
                scores = block**2 / torch.diag(inner).reshape(1, -1) ** 2
                mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
            for i in range(stop - start):
                if n_of_m is not None and i % n_of_m[1] == 0:
                    group = slice(i, i + n_of_m[1])
                    scores = block[:, group] ** 2 / torch.diag(inner)[group].reshape(1, -1) ** 2
                    mask.scatter_(1, i + torch.topk(scores, n_of_m[0], dim=1, largest=False)[1], True)
                column = block[:, i].clone()
                column[mask[:, i]] = 0
                kept[:, i] = column
                errors[:, i] = (block[:, i] - column) / inner[i, i]
                block[:, i:] -= errors[:, i].unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            weight[:, start:stop] = kept
            weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
        self.linear.weight.data = weight.to(self.linear.weight.dtype)


PRUNERS: dict[str, tuple[Callable[[Job], Phases], str]] = {  # and the package whose version counts
    "calset": (prune_with_calset, "calset"),
    "llm-compressor": (prune_with_llm_compressor, "llmcompressor"),
    "textbook": (prune_with_textbook, "torch"),
}


@contextmanager
def timed(phases: Phases, phase: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - began


@contextmanager
def timing(kind: Any, method: str, phases: Phases, phase: str) -> Iterator[None]:
    """Time every call of a class's method."""
    own = getattr(kind, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with timed(phases, phase):
            return own(*args, **kwargs)

    setattr(kind, method, wrapped)
    try:
        yield
    finally:
        setattr(kind, method, own)


def resident(which: str) -> int:
    """Bytes of this process's memory (Linux): ``VmRSS`` now, ``VmHWM`` at its fullest since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def slowest(profile: cProfile.Profile, n: int = 15) -> str:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(n)
    return text.getvalue()


def main() -> None:
    job = Job(json.loads(Path(sys.argv[1]).read_text()))
    run, package = PRUNERS[job["pruner"]]
    run(Job({**job, **job["warm_up"]}))
    gc.collect()
    forget_peak()
    base = resident("VmRSS")
    profile = cProfile.Profile() if job.get("profile") else None
    began = time.monotonic()
    phases = profile.runcall(run, job) if profile else run(job)
    seconds = time.monotonic() - began
    peak = resident("VmHWM")
    import torch

    result = {
        "seconds": seconds,
        "phases": {**phases, "rest": seconds - sum(phases.values())},
        "base_bytes": base,
        "peak_bytes": max(0, peak - base),  # the kernel counts to a few pages only
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in sorted({package, "torch", "transformers"})},
        "profile": slowest(profile) if profile else None,
    }
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

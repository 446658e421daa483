"""What a pruning will need, computed from shapes before a weight is loaded: the dry run, and the refusal in time.

Figures are upper bounds where shapes alone do not decide (which linears share an input is seen only as they run), and
they leave out what the process holds anyway (Python, torch). It must not know how pruning is done in detail.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import CalsetError
from calset.io.files import existing_parent, size
from calset.pruning.blockwise import distributed
from calset.pruning.blockwise.hidden_states import Where, nearest_place
from calset.pruning.blockwise.statistics import CHUNK, TILE, Needs
from calset.pruning.methods.sensitivity import NEEDS
from calset.pruning.model.decoder import n_chosen_experts, surroundings
from calset.pruning.model.memory import free_memory

if TYPE_CHECKING:
    import torch

    from calset.pruning.calibration import Calibration
    from calset.pruning.methods.registry import Method
    from calset.pruning.model.decoder import Block, Decoder, Weight
    from calset.pruning.model.layout import Matrix
    from calset.pruning.model.tensorfiles import TensorFiles

FLOAT = 4  # bytes; Grams and solves are in float32
DOUBLE = 8  # bytes; sums and sums of squares are in float64


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a pruning does and needs at most. Bytes, and floating-point operations (a multiply-add counts as two)."""

    n_blocks: int
    n_matrices: int
    n_weights: int  # in those matrices
    n_counted_tokens: int
    n_positions: int  # run, padding included
    n_batches: int
    forward_flops: float
    statistics_flops: float
    solve_flops: float
    device: str
    hidden: Where
    device_parts: Mapping[str, int]  # what the device holds at its fullest; the host, where that is the device
    device_bytes: int
    device_free: int
    host_bytes: int
    host_free: int
    disk_bytes: int
    disk_free: int
    warnings: Sequence[str] = ()  # of the plan
    disk_there: int = 0  # of disk_bytes, what an interrupted run already holds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": self.problems()}

    def problems(self) -> list[str]:
        """Why it cannot work, a line each; empty when it can."""
        found = []
        if self.device_bytes > self.device_free:
            found.append(
                f"{self.device} would need about {size(self.device_bytes)} and has {size(self.device_free)} free: "
                f"lower --batch-tokens, or use --hidden disk"
            )
        if self.host_bytes > self.host_free:
            found.append(
                f"the host would need about {size(self.host_bytes)} and has {size(self.host_free)} free: use "
                f"--hidden disk"
            )
        if self.disk_bytes - self.disk_there > self.disk_free:
            found.append(
                f"the disk would need about {size(self.disk_bytes)} and has {size(self.disk_free)} free: make room"
            )
        return found

    def check(self, force: bool = False) -> None:
        """
        Raises:
            CalsetError: the first of ``problems``, unless forced.
        """
        if (problems := self.problems()) and not force:
            raise CalsetError(f"{problems[0]} (--force tries anyway)")

    def rows(self) -> list[tuple[str, str]]:
        """For a table of (what, how much)."""
        parts = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in self.device_parts.items() if n_bytes)
        rows = [
            ("blocks", f"{self.n_blocks}"),
            ("matrices", f"{self.n_matrices:,} of {self.n_weights:,} weights"),
            (
                "calibration",
                f"{self.n_counted_tokens:,} counted tokens, {self.n_positions:,} positions in {self.n_batches} batches",
            ),
            (
                "operations",
                f"forward {self.forward_flops:.2e}, statistics {self.statistics_flops:.2e}, solves "
                f"{self.solve_flops:.2e}",
            ),
            (f"{self.device} memory", f"{size(self.device_bytes)} of {size(self.device_free)} free ({parts})"),
        ]
        if self.device != "cpu":
            rows.append(("host memory", f"{size(self.host_bytes)} of {size(self.host_free)} free"))
        rows.append(("disk", f"{size(self.disk_bytes)} of {size(self.disk_free)} free"))
        rows.append(("hidden states", f"on {self.hidden}" if self.n_batches else "none: no data is used"))
        return rows


def estimate(
    model: Any,
    decoder: Decoder,
    files: TensorFiles,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    method: Method,
    allocation: str,
    propagate: str,
    dtype: torch.dtype,
    device: torch.device,
    batch_tokens: int,
    hidden: Where | None,
    out: Path,
) -> Estimate:
    """The estimate for a model whose parameters may be on the meta device.

    Args:
        allocation: a rule of ``methods.allocation``; ``owl`` runs the dense model once more.
        hidden: where hidden states are to be; default: wherever they fit, the nearest first.
    """
    measured = NEEDS if allocation == "owl" else Needs.NOTHING
    needs = method.needs | measured
    uses_data = bool(needs)
    names = {m.weight.name for m in matrices}
    chosen = [[w for w in block.weights.values() if w.name in names] for block in decoder.blocks]
    shapes = calibration.batch_shapes(batch_tokens) if uses_data else []
    positions = sum(n * length for n, length in shapes)
    width = model.get_input_embeddings().weight.shape[1]
    hidden_bytes = positions * width * dtype.itemsize
    own_hidden = -(-hidden_bytes // distributed.n_processes())  # each process has its part of the batches
    parts = {
        "a block's weights": max(sum(p.numel() for p in b.module.parameters()) for b in decoder.blocks)
        * dtype.itemsize,
        "statistics": max(_statistics_bytes(w, needs) for w in chosen),
        "a solve": max(_solve_bytes(w, needs, method) for w in chosen),
    }
    if uses_data:
        around = surroundings(model, decoder.blocks)
        parts["embeddings"] = sum(p.numel() for n, p in model.named_parameters() if n in around) * dtype.itemsize
        parts["activations"] = max(
            _activation_bytes(b, shapes, width, dtype.itemsize, model.config) for b in decoder.blocks
        )
    device_free, host_free = free_memory(device), free_memory(None)
    host = max((s.stop - s.start for n, s in files.stored.items() if n in {m.name for m in matrices}), default=0)
    where = hidden or nearest_place(own_hidden, device, sum(parts.values()), device_free, host_free)
    if where == "device" or (where == "host" and device.type == "cpu"):
        parts["hidden states"] = own_hidden
    total = sum(parts.values())
    weights_bytes = sum(path.stat().st_size for path in {s.path for s in files.stored.values()})
    blocks = decoder.blocks
    return Estimate(
        n_blocks=len(blocks),
        n_matrices=len(matrices),
        n_weights=sum(m.shape[0] * m.shape[1] for m in matrices),
        n_counted_tokens=calibration.n_counted_tokens if uses_data else 0,
        n_positions=positions,
        n_batches=len(shapes),
        forward_flops=_n_forwards(method, measured, propagate)
        * sum(_forward(b, model.config) for b in blocks)
        * positions,
        statistics_flops=sum(_statistics(w, n, model.config) for w in chosen for n in (method.needs, measured))
        * calibration.n_counted_tokens,
        solve_flops=sum(_solve(w, method) for w in chosen),
        device=device.type,
        hidden=where,
        device_parts=parts,
        device_bytes=total,
        device_free=device_free,
        host_bytes=total if device.type == "cpu" else host + (own_hidden if where == "host" else 0),
        host_free=host_free,
        disk_bytes=weights_bytes + (hidden_bytes if where == "disk" else 0),
        disk_free=shutil.disk_usage(existing_parent(out)).free,
    )


def _n_forwards(method: Method, measured: Needs, propagate: str) -> int:
    """How often the blocks run: for the allocation, for the statistics, and again as pruned."""
    pruning = 0 if not method.needs else 2 if propagate == "pruned" else 1
    return pruning + bool(measured)


def _statistics_bytes(weights: Sequence[Weight], needs: Needs) -> int:
    """Each expert reads inputs of its own, and for lack of better each linear."""
    gram, moments = FLOAT * (Needs.GRAM in needs), 2 * DOUBLE * (Needs.MOMENTS in needs)
    widths = [(w.shape[1], w.n_experts or 1) for w in weights]
    return sum(n * (gram * width * width + moments * width) for width, n in widths)


def _solve_bytes(weights: Sequence[Weight], needs: Needs, method: Method) -> int:
    """The matrices of one input at a time: what they lose, updated, their scores and masks, at most four copies in
    float32; a few columns of the Gram, of which the factor takes the unused half.

    Splitting methods also hold the Gram damped and scaled, the scaled weights, their product with it, and two iterates
    with their sums.
    """
    together: dict[tuple[int, int], int] = {}
    for weight in weights:
        # What one module holds may share an input; an attention's projections do.
        key = (id(weight.module) if weight.n_experts else hash(weight.name.rsplit(".", 2)[0]), weight.shape[1])
        together[key] = together.get(key, 0) + weight.shape[0]
    splits = method.products > 1
    grams = 5 if splits or method.refined else 0
    copies = 10 if splits else 4

    def each(width: int, rows: int) -> int:
        of_gram = grams * width + 3 * TILE if Needs.GRAM in needs else 0
        return (copies * rows + of_gram) * width * FLOAT

    return max((each(width, rows) for (_, width), rows in together.items()), default=0)


def _activation_bytes(block: Block, shapes: Sequence[tuple[int, int]], hidden: int, itemsize: int, config: Any) -> int:
    positions = max(n * length for n, length in shapes)
    outputs = sum(w.shape[0] * _uses(w, config) for w in block.weights.values())
    widest = max((w.shape[1] for w in block.weights.values()), default=hidden)
    pairs = max(n * length * length for n, length in shapes)
    mask = pairs  # one byte a pair, where the model builds one
    if getattr(config, "_attn_implementation", None) == "eager":
        # Eager attention holds every head's scores, their softmax in float32 and that cast back.
        heads = getattr(config.get_text_config(), "num_attention_heads", None) or 1
        mask += pairs * heads * (2 * itemsize + FLOAT)
    return positions * itemsize * (6 * hidden + 2 * round(outputs)) + min(positions * widest, CHUNK) * FLOAT + mask


def _uses(weight: Weight, config: Any) -> float:
    """How many matrices of a weight a token passes through."""
    if weight.n_experts is None:
        return 1
    return n_chosen_experts(config.get_text_config()) or weight.n_experts


def _forward(block: Block, config: Any) -> float:
    """Operations a position: of the matrices, nearly all where sequences are shorter than the model is wide."""
    return sum(2.0 * w.shape[0] * w.shape[1] * _uses(w, config) for w in block.weights.values())


def _statistics(weights: Sequence[Weight], needs: Needs, config: Any) -> float:
    """Operations a counted token."""
    gram, moments = 2.0 * (Needs.GRAM in needs), 4.0 * (Needs.MOMENTS in needs)
    return sum((gram * w.shape[1] ** 2 + moments * w.shape[1]) * _uses(w, config) for w in weights)


def _solve(weights: Sequence[Weight], method: Method) -> float:
    if Needs.GRAM not in method.needs:
        return float(sum(w.parameter.numel() for w in weights))
    # One Cholesky an input; with SparseGPT each column moves all those after it.
    solves = [(w.shape[0], w.shape[1], w.n_experts or 1) for w in weights]
    cubes, products = 1 / 3 + method.inverses, 2 * method.products
    return sum(n * (cubes * width**3 + products * rows * width**2) for rows, width, n in solves)

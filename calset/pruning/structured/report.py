"""What a structured pruning did: its ``pruning.json``, and what the smaller model's card says.

Must not know: how it was done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calset.io.files import size
from calset.pruning.model.checkpoint import RECORD
from calset.pruning.record import STRUCTURED_SCHEMA_VERSION
from calset.pruning.report_parts import (
    about_base,
    about_calibration,
    card_table,
    device_name,
    named_calibration,
    versions,
)

if TYPE_CHECKING:
    from calset.pruning.blockwise.workfolder import WorkFolder
    from calset.pruning.structured.plan import DropPlan
    from calset.pruning.structured.reduced import Reduced

SCORES = {
    "reap": "the mean of router weight x norm of the output, over an expert's tokens (arXiv 2510.13999)",
    "depth": "1 - the mean cosine similarity of a block's input and output (Block Influence, arXiv 2403.03853)",
}


@dataclass(frozen=True, slots=True)
class Stack:
    """The experts of one block, or the blocks: ``kept`` are the old numbers of those that stay, in their new order.

    ``name``: of the module that holds them. ``n_tokens``: the counted tokens behind each score. ``kinds``: of blocks,
    where the config tells them apart (``layer_types``).
    """

    name: str
    scores: Sequence[float]
    n_tokens: Sequence[int]
    kept: Sequence[int]
    kinds: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class DropReport:
    """What a structured pruning did; ``as_dict`` is what ``pruning.json`` holds. ``phases`` are seconds by phase.

    ``sparsity`` is the asked share, ``realised_sparsity`` that of the experts or blocks which went. ``config``: what
    config.json says differently. ``left_out``: stored tensors that the dense model did not use either.
    """

    out: str
    method: str
    structure: str  # "experts" or "blocks"
    sparsity: float
    realised_sparsity: float
    stacks: Sequence[Stack]
    config: Mapping[str, Any]
    left_out: Sequence[str]
    n_parameters_dense: int
    n_parameters: int
    n_bytes_dense: int
    n_bytes: int
    tokens: str
    propagate: str
    max_length: int | None
    n_counted_tokens: int
    base: Mapping[str, Any]
    calibration: Mapping[str, Any]
    resumed_at: Sequence[int]  # blocks that were measured when an interrupted run was continued
    seconds: float
    phases: Mapping[str, float]
    device: str
    versions: Mapping[str, str]
    warnings: Sequence[str] = ()
    schema_version: int = STRUCTURED_SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def outcome(self) -> str:
        """What became of the model, for a line."""
        n_kept, n_units = counts(self.stacks)
        return (
            f"{n_kept} of {n_units} {self.structure} stay, {self.n_parameters:,} of {self.n_parameters_dense:,} "
            f"parameters ({size(self.n_bytes)} of {size(self.n_bytes_dense)})"
        )


def counts(stacks: Sequence[Stack]) -> tuple[int, int]:
    """How many experts or blocks stay, and of how many."""
    return sum(len(stack.kept) for stack in stacks), sum(len(stack.scores) for stack in stacks)


def make_report(
    plan: DropPlan,
    work: WorkFolder,
    stacks: Sequence[Stack],
    left: Reduced,
    phases: Mapping[str, float],
    seconds: float,
) -> DropReport:
    n_kept, n_units = counts(stacks)
    return DropReport(
        out=str(plan.settings.folder),
        method=plan.settings.method,
        structure=plan.structure,
        sparsity=plan.sparsity,
        realised_sparsity=1 - n_kept / n_units,
        stacks=tuple(stacks),
        config=left.switches,
        left_out=tuple(left.left_out),
        n_parameters_dense=plan.n_parameters_dense,
        n_parameters=left.n_parameters,
        n_bytes_dense=plan.n_bytes_dense,
        n_bytes=left.n_bytes,
        tokens=plan.settings.tokens,
        propagate=plan.propagate,
        max_length=plan.settings.max_length,
        n_counted_tokens=plan.calibration.n_counted_tokens,
        base=about_base(plan.source),
        calibration=about_calibration(plan.subset, plan.calibration, used=True),
        resumed_at=tuple(work.resumed_at),
        seconds=seconds,
        phases=dict(phases),
        device=device_name(plan.device),
        versions=versions(),
        warnings=(*plan.warnings, *_unseen(stacks)),
    )


def _unseen(stacks: Sequence[Stack]) -> list[str]:
    """A warning about experts that no calibration token reached: they score 0, whatever they are worth."""
    empty = [(stack.name, i) for stack in stacks for i, n in enumerate(stack.n_tokens) if not (n and stack.scores[i])]
    if not empty:
        return []
    name, number = empty[0]
    return [
        f"{len(empty)} experts, such as {name}[{number}], got no calibration token that counts and score 0; use more "
        f"tokens"
    ]


def card_section(report: DropReport) -> str:
    """What a smaller model's card says of its pruning, in Markdown."""
    n_kept, n_units = counts(report.stacks)
    rows = {
        "method": f"{report.method}, sparsity {report.sparsity:g}; score: {SCORES[report.method]}",
        "left": f"{n_kept} of {n_units} {report.structure}, {report.n_parameters:,} of {report.n_parameters_dense:,} "
        f"parameters, {size(report.n_bytes)} of {size(report.n_bytes_dense)}",
        "calibration": named_calibration(report.calibration),
        "calibration tokens": f"{report.n_counted_tokens:,} ({report.tokens}), inputs from {report.propagate} blocks",
    }
    return (
        f"{card_table(report, rows)}What stays is the dense model's, bit for bit; {report.structure} are numbered "
        f"anew, and config.json says how many there are. `{RECORD}` lists all scores and what stays; `calset verify` "
        f"proves it.\n"
    )

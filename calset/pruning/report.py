"""What a pruning did: ``pruning.json``, and what a pruned model's card says.

Must not know: how it was done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.pruning import record
from calset.pruning.blockwise.statistics import Needs
from calset.pruning.methods import allocation
from calset.pruning.model.layout import label
from calset.pruning.plan import Plan
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


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One pruned matrix. ``error``: ||X(W-W')^T||^2 / ||X W^T||^2 on the calibration inputs, where a Gram was kept.

    ``name`` is the stored tensor; see ``layout.Matrix`` for its place there. ``instead``: the method that pruned it
    where it was not the asked one: magnitude, because no calibration token reached the matrix or it erred less.
    """

    name: str
    shape: tuple[int, int]
    n_pruned: int  # chosen by the mask
    n_zeros: int  # in the saved matrix: the mask, dead inputs and weights that were zero before
    sparsity: float  # n_zeros / size
    n_tokens: int
    damping: float | None = None
    error: float | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    asked: float | None = None  # its own sparsity, where an allocation shares them out
    instead: str | None = None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a pruning did; ``as_dict`` is what ``pruning.json`` holds. ``phases`` are seconds by phase."""

    out: str
    method: str
    sparsity: float | None
    pattern: str | None
    realised_sparsity: float
    group: str | None  # None with a pattern: weights compete within M columns
    tokens: str | None  # None, as propagate, damping and max_length, for a method that uses no data
    propagate: str | None
    damping: float | None
    block_size: int
    max_length: int | None
    n_counted_tokens: int
    base: Mapping[str, Any]
    calibration: Mapping[str, Any]
    matrices: Sequence[MatrixReport]
    left_dense: Sequence[str]  # matrices and other decoder weights that were not asked for or not understood
    resumed_at: Sequence[int]  # blocks that were finished when an interrupted run was continued
    seconds: float
    phases: Mapping[str, float]
    device: str
    versions: Mapping[str, str]
    warnings: Sequence[str] = ()
    allocation: str = "uniform"  # or owl, file:NAME
    schema_version: int = record.SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def outcome(self) -> str:
        """What became of the model, for a line."""
        return f"sparsity {self.realised_sparsity:.4f} over {len(self.matrices)} matrices"


def make_report(
    plan: Plan,
    work: WorkFolder,
    matrices: Sequence[MatrixReport],
    phases: Mapping[str, float],
    seconds: float,
) -> PruneReport:
    settings, selection, subset, source = plan.settings, plan.selection, plan.subset, plan.source
    uses_data, rule = settings.uses_data, settings.rule
    raised = [m for m in matrices if m.damping is not None and m.damping > settings.damping]
    warnings = list(plan.warnings)
    if raised:
        warnings.append(
            f"damping was raised for {len(raised)} matrices, such as {raised[0].name} ({raised[0].damping:g})"
        )
    if instead := [m for m in matrices if m.instead and m.n_tokens]:
        warnings.append(
            f"{len(instead)} matrices, such as {instead[0].name}, were pruned by {instead[0].instead}, which erred "
            f"less there than {plan.method.name}"
        )
    warnings.extend(_about_experts(plan, matrices))
    size = sum(m.shape[0] * m.shape[1] for m in matrices)
    return PruneReport(
        out=str(settings.folder),
        method=plan.method.name,
        sparsity=selection.sparsity,
        pattern=str(selection.pattern) if selection.pattern else None,
        realised_sparsity=sum(m.n_zeros for m in matrices) / size,
        group=None if selection.pattern else selection.group,
        tokens=settings.tokens if uses_data else None,
        propagate=settings.propagate if uses_data else None,
        damping=settings.damping if Needs.GRAM in plan.method.needs else None,
        block_size=selection.block_size,
        max_length=settings.max_length if uses_data else None,
        n_counted_tokens=plan.calibration.n_counted_tokens if uses_data else 0,
        base=about_base(source),
        calibration=about_calibration(subset, plan.calibration, used=uses_data),
        matrices=tuple(matrices),
        left_dense=tuple(plan.left_dense),
        resumed_at=tuple(work.resumed_at),
        seconds=seconds,
        phases=dict(phases),
        device=device_name(plan.device),
        versions=versions(),
        warnings=tuple(warnings),
        # Where the file lay is nobody else's business.
        allocation=rule if rule in allocation.RULES else f"file:{Path(rule).name}",
    )


def _about_experts(plan: Plan, matrices: Sequence[MatrixReport]) -> list[str]:
    """Warnings about experts that the router sent few or no calibration tokens."""
    warnings = []
    if without := [m for m in matrices if m.instead and not m.n_tokens]:
        warnings.append(
            f"{len(without)} expert matrices got no calibration token and were pruned by {without[0].instead}, such as "
            f"{_label(without[0])}; use more tokens"
        )
    few = [m for m in matrices if 0 < m.n_tokens < m.shape[1] <= plan.calibration.n_counted_tokens]
    if few and Needs.GRAM in plan.method.needs:
        fewest = min(few, key=lambda m: m.n_tokens)
        warnings.append(
            f"{len(few)} expert matrices got fewer calibration tokens than they have inputs, {_label(fewest)} only "
            f"{fewest.n_tokens} for {fewest.shape[1]}: only damping makes their Gram matrices invertible; use more"
        )
    return warnings


def card_section(report: PruneReport) -> str:
    """What a pruned model's card says of its pruning, in Markdown."""
    asked = f"pattern {report.pattern} (N kept)" if report.pattern else f"sparsity {report.sparsity:g}"
    calibration = report.calibration
    counted = f"{report.n_counted_tokens:,} ({report.tokens})"
    data = {"calibration": f"none: {report.method} uses no data"}
    allocated = "" if report.allocation == "uniform" else f", shared out by {report.allocation}"
    if calibration["used"]:
        data = {
            "calibration": named_calibration(calibration),
            "calibration tokens": f"{counted}, inputs from {report.propagate} blocks",
        }
    rows = {
        "method": f"{report.method}, {asked}" + (f", mask group {report.group}" if report.group else ""),
        "zeros": f"{report.realised_sparsity:.4f} of {len(report.matrices)} matrices in the decoder blocks{allocated}",
        **data,
        "damping": "-" if report.damping is None else f"{report.damping:g} of the mean diagonal",
    }
    return (
        f"{card_table(report, rows)}Embeddings, norms and lm_head are the dense model's, bit for bit. Zeros are stored "
        f"as ordinary weights: the checkpoint is as large and as fast as the dense one where the runtime does not use "
        f"sparsity. "
        f"`{record.RECORD}` lists every matrix; `calset verify` proves it.\n"
    )


def _label(matrix: MatrixReport) -> str:
    return label(matrix.name, matrix.expert, matrix.rows)

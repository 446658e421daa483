"""Plan of a structured pruning: which experts or blocks could go, and what that takes, before weights load.

Must not know: how units are scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from calset.pruning.blockwise import workfolder
from calset.pruning.blockwise.statistics import Needs
from calset.pruning.calibration import Calibration, TokenWeights
from calset.pruning.estimate import Estimate, estimate
from calset.pruning.methods import registry
from calset.pruning.methods.registry import Structure
from calset.pruning.model import checkpoint
from calset.pruning.model.decoder import find_decoder
from calset.pruning.model.layout import Layout
from calset.pruning.model.tensorfiles import TensorFiles, exact_dtype
from calset.pruning.plan import (
    MAX_DEVIATION,
    batch_positions,
    check_subset,
    find_device,
    identity_of,
    read_samples,
)
from calset.pruning.settings import Propagate, PruneSettings
from calset.pruning.structured import depth, reap
from calset.pruning.structured.reduced import Reduced, make_reduced, stack_name

if TYPE_CHECKING:
    import torch

    from calset.catalog.records import Subset
    from calset.pruning.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class DropPlan:
    """Plan of a structured pruning: its settings, and what follows from them before weights load.

    Attributes:
        propagate: as set, but that blocks are all judged before any goes.
        counts: the units of each stack; ``n_kept``: those of it that stay.
        identity: see ``plan.Plan``.
    """

    settings: PruneSettings
    source: checkpoint.Source
    subset: Subset
    sparsity: float
    calibration: Calibration
    propagate: Propagate
    batch_tokens: int
    device: torch.device
    dtype: torch.dtype  # of the model while it runs
    counts: Mapping[str, int]
    n_kept: int
    mixture: reap.Mixture | None  # None: blocks go
    provisional: Reduced  # what would be left with another choice: experts as many as there will be
    n_parameters_dense: int  # stored, as those of the result
    n_bytes_dense: int
    estimate: Estimate
    identity: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def structure(self) -> Structure:
        return registry.STRUCTURED[self.settings.method]

    def choose(self, scores: Sequence[float]) -> tuple[int, ...]:
        """What stays of a stack."""
        if self.mixture is not None:
            return reap.choose(scores, self.n_kept, self.mixture.n_groups)
        return depth.choose(scores, len(scores) - self.n_kept, self.kinds)

    @property
    def kinds(self) -> Sequence[str] | None:
        """Of the blocks, where they go and differ."""
        return None if self.mixture is not None else depth.kinds(self.source.config.get_text_config())


@dataclass(frozen=True, slots=True)
class DropEstimate(Estimate):
    """What dropping experts or blocks does and needs at most."""

    structure: str = ""
    n_units: int = 0
    n_dropped: int = 0

    def rows(self) -> list[tuple[str, str]]:
        rows = dict(Estimate.rows(self))
        rows["operations"] = f"forward {self.forward_flops:.2e}"
        goes = [(self.structure, f"{self.n_dropped:,} of {self.n_units:,} go")]
        return [row for name, value in rows.items() for row in (goes if name == "matrices" else [(name, value)])]


def make_plan(settings: PruneSettings, subset: Subset, token_weights: TokenWeights | None) -> DropPlan:
    """Check everything that can be checked before weights load.

    Raises:
        InputError: anything that cannot be done.
        CalsetError: too little free disk.
    """
    sparsity = settings.sparsity
    assert sparsity is not None  # its settings say so
    source = checkpoint.open_source(settings.model)
    warnings = check_subset(subset, source, settings)
    calibration = read_samples(subset, source, settings, token_weights)
    warnings.extend(calibration.warnings)
    device = find_device(settings.device)
    with TensorFiles(source.folder) as files:
        look = _look(settings, source, files, calibration, device, sparsity)
    left_out = look.provisional.left_out
    warnings.extend(_rounded(sparsity, look.counts, look.n_kept))
    if left_out:
        warnings.append(
            f"{len(left_out)} tensors that the model does not use, such as {left_out[0]}, are left out: they belong to "
            f"the dense model's blocks"
        )
    identity = identity_of(settings, source, subset, calibration, device)
    workfolder.check_out(settings.folder, look.estimate.disk_bytes)
    workfolder.check_settings(settings.folder, identity)
    return DropPlan(
        settings=settings,
        source=source,
        subset=subset,
        sparsity=sparsity,
        calibration=calibration,
        propagate=_propagate(settings),
        batch_tokens=batch_positions(settings.batch_tokens, device),
        device=device,
        dtype=look.dtype,
        counts=look.counts,
        n_kept=look.n_kept,
        mixture=look.mixture,
        provisional=look.provisional,
        n_parameters_dense=look.n_parameters,
        n_bytes_dense=look.n_bytes,
        estimate=replace(look.estimate, disk_there=workfolder.held_bytes(settings.folder)),
        identity=identity,
        warnings=warnings,
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """What the files and the config say before a choice is made."""

    counts: Mapping[str, int]
    n_kept: int
    mixture: reap.Mixture | None
    dtype: torch.dtype  # holds every matrix exactly
    provisional: Reduced
    n_parameters: int
    n_bytes: int
    estimate: DropEstimate


def _look(
    settings: PruneSettings,
    source: checkpoint.Source,
    files: TensorFiles,
    calibration: Calibration,
    device: torch.device,
    sparsity: float,
) -> _Look:
    import torch

    structure = registry.STRUCTURED[settings.method]
    skeleton = source.skeleton()
    decoder = find_decoder(skeleton, allow_partial=True)
    layout = Layout.of(files, skeleton)
    layout.check(torch.float32)
    matrices = [m for block in decoder.blocks for m in layout.matrices(block.weights.values())]
    dtype = exact_dtype(files.stored[m.name].torch_dtype for m in matrices)
    config, n_blocks = source.config.get_text_config(), len(decoder.blocks)
    if structure == "experts":
        mixture = reap.find_mixture(decoder, config)
        counts = dict.fromkeys(mixture.modules.values(), mixture.n_experts)
        n_kept = mixture.n_kept(sparsity)
        kept = {name: reap.choose([0.0] * n, n_kept, mixture.n_groups) for name, n in counts.items()}
    else:
        mixture, counts = None, {stack_name(decoder): n_blocks}
        n_kept = depth.n_kept(n_blocks, sparsity)
        # Every second block goes, from the front: what upsets schedules by number most.
        scores = [float(i + n_blocks * (i % 2 == 0)) for i in range(n_blocks)]
        kept = {stack_name(decoder): depth.choose(scores, n_blocks - n_kept, depth.kinds(config))}
    left = make_reduced(source, files, structure, kept)
    # As a method with the cheapest statistics; what it would solve is taken off again.
    like = registry.Method(settings.method, "", Needs.MOMENTS, "row")
    needed = estimate(
        skeleton, decoder, files, matrices, calibration, like, "uniform", _propagate(settings), dtype, device,
        batch_positions(settings.batch_tokens, device), settings.hidden, settings.folder,
    )  # fmt: skip
    n_bytes = left.n_bytes if mixture is not None else _most_bytes(layout, decoder, n_kept)
    return _Look(
        counts=counts,
        n_kept=n_kept,
        mixture=mixture,
        dtype=dtype,
        provisional=left,
        n_parameters=sum(math.prod(stored.shape) for stored in files.stored.values()),
        n_bytes=sum(stored.stop - stored.start for stored in files.stored.values()),
        estimate=_of_drop(needed, files, n_bytes, settings, counts, n_kept),
    )


def _propagate(settings: PruneSettings) -> Propagate:
    # Blocks are all judged before any goes.
    return settings.propagate if registry.STRUCTURED[settings.method] == "experts" else "dense"


def _most_bytes(layout: Layout, decoder: Decoder, n_kept: int) -> int:
    """Bytes of what is left when the smallest blocks go."""
    sizes = {name: stored.stop - stored.start for name, stored in layout.files.stored.items()}
    blocks = sorted(sum(sizes[name] for name in layout.names(f"{block.name}.")) for block in decoder.blocks)
    return sum(sizes.values()) - sum(blocks[: len(blocks) - n_kept])


def _of_drop(
    needed: Estimate,
    files: TensorFiles,
    n_bytes: int,
    settings: PruneSettings,
    counts: Mapping[str, int],
    n_kept: int,
) -> DropEstimate:
    """An estimate without solves, for a checkpoint of ``n_bytes`` instead of a copy of the dense one."""
    parts = {name: n for name, n in needed.device_parts.items() if name not in ("a solve", "statistics")}
    structure = registry.STRUCTURED[settings.method]
    if structure == "experts" and settings.propagate == "pruned":
        parts["it with fewer experts"] = parts["a block's weights"]
    values = {each.name: getattr(needed, each.name) for each in fields(needed)}
    on_device = sum(parts.values())
    copied = sum(path.stat().st_size for path in {stored.path for stored in files.stored.values()})
    values |= {
        "device_parts": parts,
        "device_bytes": on_device,
        "host_bytes": on_device if needed.device == "cpu" else needed.host_bytes,
        "disk_bytes": needed.disk_bytes - copied + n_bytes,
        "statistics_flops": 0.0,
        "solve_flops": 0.0,
    }
    n_units = sum(counts.values())
    n_dropped = n_units - n_kept * len(counts)
    return DropEstimate(**values, structure=structure, n_units=n_units, n_dropped=n_dropped)


def _rounded(sparsity: float, counts: Mapping[str, int], n_kept: int) -> list[str]:
    n = next(iter(counts.values()))
    if abs(1 - n_kept / n - sparsity) < MAX_DEVIATION:
        return []
    return [f"{n - n_kept} of {n} go, {1 - n_kept / n:.4f}: the nearest to {sparsity:g} that can go"]

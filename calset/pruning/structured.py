"""Structured pruning: whole experts or blocks go, and the checkpoint becomes smaller.

The dense model is walked block by block, each block's units are scored, and at the end what stays is copied from the
dense model's files. ``reap`` and ``depth`` know what is scored and how, ``smaller`` what is left, ``drop`` the files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from calset.errors import PruningError
from calset.io.progress import OnProgress, Progress
from calset.pruning import checkpoint, depth, distributed, drop, methods, reap, workfolder
from calset.pruning.calibration import Calibration, TokenWeights
from calset.pruning.decoder import find_decoder
from calset.pruning.estimate import Estimate, estimate
from calset.pruning.hidden import HiddenStates
from calset.pruning.layout import Layout, place, unload
from calset.pruning.methods import Structure
from calset.pruning.phases import timed
from calset.pruning.plan import (
    MAX_DEVIATION,
    batch_positions,
    check_subset,
    find_device,
    identity_of,
    read_samples,
)
from calset.pruning.settings import Propagate, PruneSettings
from calset.pruning.smaller import Smaller, make_smaller, stack_name
from calset.pruning.stats import Needs, is_finite
from calset.pruning.structured_report import DropReport, Stack, card_section, make_report
from calset.pruning.tensorfiles import TensorFiles, exact_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calset.catalog.records import Subset
    from calset.pruning.decoder import Block, Decoder
    from calset.pruning.distributed import Team
    from calset.pruning.walk import Walk
    from calset.pruning.workfolder import WorkFolder


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
    provisional: Smaller  # what would be left with another choice: experts as many as there will be
    n_parameters_dense: int  # stored, as those of the result
    n_bytes_dense: int
    estimate: Estimate
    identity: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def structure(self) -> Structure:
        return methods.STRUCTURED[self.settings.method]

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
    provisional: Smaller
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

    structure = methods.STRUCTURED[settings.method]
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
    left = make_smaller(source, files, structure, kept)
    # As a method with the cheapest statistics; what it would solve is taken off again.
    like = methods.Method(settings.method, "", Needs.MOMENTS, "row")
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
    return settings.propagate if methods.STRUCTURED[settings.method] == "experts" else "dense"


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
    structure = methods.STRUCTURED[settings.method]
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


# --- the work ---------------------------------------------------------------------------------------------------


def drop_units(
    settings: PruneSettings, subset: Subset, token_weights: TokenWeights | None, progress: OnProgress
) -> DropReport:
    """Drop experts or blocks and save the smaller checkpoint; see ``prune``."""
    began = time.monotonic()
    plan = make_plan(settings, subset, token_weights)
    plan.estimate.check(settings.force)
    phases: dict[str, float] = {"checking": time.monotonic() - began}
    progress(Progress("loading"))
    with distributed.joined(plan.device) as team:
        team.part([None] * plan.estimate.n_batches)
        with team.work(settings.folder, partial(workfolder.opened, settings.folder, None, plan.identity)) as work:
            sums = _measure(plan, work, team, phases, progress)
            stacks = _stacks(plan, sums)
            with TensorFiles(plan.source.folder) as files, timed(phases, "saving"):
                left = make_smaller(plan.source, files, plan.structure, {s.name: s.kept for s in stacks})
                work.fill(lambda folder: drop.write(left.parts, folder))
            report = make_report(plan, work, stacks, left, phases, time.monotonic() - began)
            work.complete(plan.source.folder, report.as_dict(), card_section(report), left.switches)
    progress(Progress("done", plan.estimate.n_blocks, plan.estimate.n_blocks, final=True))
    return report


def _measure(
    plan: DropPlan,
    work: WorkFolder,
    team: Team,
    phases: dict[str, float],
    progress: OnProgress,
) -> list[Any]:
    """The sums of each block, in order; None where a block has nothing to score."""
    from calset.pruning.walk import Walk

    total = plan.estimate.n_blocks
    if len(work.blocks) < total:
        model = plan.source.skeleton(plan.dtype)
        decoder = find_decoder(model, allow_partial=True)
        fewer = None
        if plan.mixture is not None and plan.propagate == "pruned":
            fewer = find_decoder(plan.provisional.source.skeleton(plan.dtype), allow_partial=True)
        batches = team.part(plan.calibration.batches(plan.batch_tokens))
        hidden = HiddenStates(len(batches), plan.device, plan.estimate.hidden, work.scratch)
        with TensorFiles(plan.source.folder) as files:
            layout = Layout.of(files, model)
            layout.load_surroundings(decoder.blocks, plan.dtype, plan.device)

            def load(block: Block) -> None:
                with timed(phases, "loading"):
                    layout.load(layout.names(f"{block.name}."), plan.dtype, plan.device)

            with Walk(model, decoder, batches, plan.device, hidden=hidden, load=load) as walk:
                for index in range(total):
                    progress(Progress("measuring", index, total))
                    if index >= len(work.blocks) or index + 1 < total:
                        walk.ready(index)  # so that its loading does not count as measuring
                    with timed(phases, "measuring"):
                        _pass(index, walk, plan, work, team, fewer)
    progress(Progress("saving", total, total))
    return [record["sums"] for record in work.blocks]


def _pass(index: int, walk: Walk, plan: DropPlan, work: WorkFolder, team: Team, fewer: Decoder | None) -> None:
    """Score one block, and give its outputs to the next."""
    block = walk.decoder.blocks[index]
    is_last = index + 1 == len(walk.decoder.blocks)
    replaced = fewer is not None and bool(block.experts)
    watcher = _watcher(block, plan)
    is_new = index >= len(work.blocks)
    if is_new and watcher is not None:
        walk.watch(index, watcher, keep=not is_last and not replaced)
        work.note(_record(block, _added_up(watcher.sums, block, team), work))
    else:
        if not is_last and not replaced:
            walk.advance(index)
        if is_new:
            work.note(_record(block, None, work))
    if replaced and not is_last:
        assert fewer is not None
        _advance_with_fewer(index, walk, fewer.blocks[index], plan.choose(reap.scores(work.blocks[index]["sums"])))
    walk.finish(index)


def _advance_with_fewer(index: int, walk: Walk, smaller: Block, kept: Sequence[int]) -> None:
    """Give the next block what this one makes with the experts that stay."""
    reap.fill(smaller.module, walk.ready(index).module, kept)
    place(smaller.module, walk.device)
    walk.advance(index, through=smaller)
    unload(smaller.module)


def _watcher(block: Block, plan: DropPlan) -> depth.BlockInfluence | reap.ExpertScores | None:
    if plan.mixture is None:
        return depth.BlockInfluence(plan.device)
    return reap.ExpertScores(plan.mixture.n_experts, plan.device) if block.experts else None


def _record(block: Block, sums: Any, work: WorkFolder) -> dict[str, Any]:
    return {"block": block.name, "sums": sums, "resumed_at": work.resumed_at}


def _added_up(sums: Tensor, block: Block, team: Team) -> Any:
    """Over all processes, in the order of their ranks, as lists."""
    import torch

    parts = team.gather({team.rank: sums.tolist()})
    total = torch.tensor([parts[rank] for rank in sorted(parts)], dtype=torch.float64).sum(0)
    if not is_finite(total):
        raise PruningError(f"what {block.name} makes of the calibration data is not finite")
    return total.tolist()


def _stacks(plan: DropPlan, sums: Sequence[Any]) -> list[Stack]:
    """What was measured and what stays, in the order of the model."""
    if plan.mixture is None:
        scores = [depth.influence(each) for each in sums]
        n_tokens = [round(each[2]) for each in sums]
        return [Stack(next(iter(plan.counts)), scores, n_tokens, plan.choose(scores), plan.kinds)]
    found = []
    for name, each in zip(plan.counts, [s for s in sums if s is not None], strict=True):
        scores = reap.scores(each)
        found.append(Stack(name, scores, [round(n) for n in each[2]], plan.choose(scores)))
    return found

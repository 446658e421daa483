"""Structured pruning: whole experts or blocks go, and the checkpoint becomes smaller.

The dense model is walked block by block, each block's units are scored, and at the end what stays is copied from the
dense model's files. ``reap`` and ``depth`` know what is scored and how, ``reduced`` what is left, ``copy`` the files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from calset.errors import PruningError
from calset.io.progress import OnProgress, Progress
from calset.pruning.blockwise import workfolder
from calset.pruning.blockwise.hidden_states import HiddenStates
from calset.pruning.blockwise.phases import timed
from calset.pruning.blockwise.statistics import is_finite
from calset.pruning.model.decoder import find_decoder
from calset.pruning.model.layout import Layout, place, unload
from calset.pruning.model.tensorfiles import TensorFiles
from calset.pruning.structured import copy, depth, reap
from calset.pruning.structured.plan import DropPlan
from calset.pruning.structured.reduced import make_reduced
from calset.pruning.structured.report import DropReport, Stack, card_section, make_report

if TYPE_CHECKING:
    from torch import Tensor

    from calset.pruning.blockwise.distributed import Team
    from calset.pruning.blockwise.walk import Walk
    from calset.pruning.blockwise.workfolder import WorkFolder
    from calset.pruning.model.decoder import Block, Decoder


def drop_units(plan: DropPlan, team: Team, phases: dict[str, float], progress: OnProgress, began: float) -> DropReport:
    """Drop experts or blocks and save the smaller checkpoint; ``began`` is the moment on the monotonic clock."""
    folder = plan.settings.folder
    with team.work(folder, partial(workfolder.opened, folder, None, plan.identity)) as work:
        sums = _measure(plan, work, team, phases, progress)
        stacks = _stacks(plan, sums)
        with TensorFiles(plan.source.folder) as files, timed(phases, "saving"):
            left = make_reduced(plan.source, files, plan.structure, {s.name: s.kept for s in stacks})
            work.fill(lambda folder: copy.write(left.parts, folder))
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
    from calset.pruning.blockwise.walk import Walk

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

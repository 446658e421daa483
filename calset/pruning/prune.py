"""Prune a model against a calibration subset: block by block, its weights are read, statistics, prune, written, next.

What comes before is in ``plan``, what is said of it in ``report``; ``walk`` runs the model, ``layout`` and
``workfolder`` read and write its tensors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from calset.catalog.catalog import Catalog
from calset.errors import PruningError
from calset.io.keywords import shows
from calset.io.progress import OnProgress, Progress, silent
from calset.pruning.blockwise import distributed, workfolder
from calset.pruning.blockwise.hidden_states import HiddenStates, Where
from calset.pruning.blockwise.phases import Phase, timed
from calset.pruning.blockwise.statistics import is_finite
from calset.pruning.calibration import Tokens, TokenWeights, open_calibration
from calset.pruning.estimate import Estimate
from calset.pruning.methods import allocation, registry
from calset.pruning.methods.masks import BLOCK_SIZE, Group
from calset.pruning.methods.sensitivity import measure_blocks
from calset.pruning.model.decoder import find_decoder
from calset.pruning.model.layout import Layout, Matrix, place
from calset.pruning.model.memory import enough_memory
from calset.pruning.model.tensorfiles import TensorFiles
from calset.pruning.plan import Plan, as_allocated, check_shapes, make_plan, own_selection
from calset.pruning.report import MatrixReport, PruneReport, card_section, make_report
from calset.pruning.settings import DAMPING, Propagate, PruneOptions, PruneSettings
from calset.pruning.structured import drop
from calset.pruning.structured.plan import DropPlan
from calset.pruning.structured.plan import make_plan as make_drop_plan
from calset.pruning.structured.report import DropReport

if TYPE_CHECKING:
    import torch

    from calset.catalog.records import Subset
    from calset.pruning.blockwise.distributed import Team
    from calset.pruning.blockwise.statistics import InputStatistics
    from calset.pruning.blockwise.walk import Walk
    from calset.pruning.blockwise.workfolder import WorkFolder
    from calset.pruning.model.decoder import Block


def prune(
    model: str | Path,
    calibration: Subset | str | Path,
    out: str | Path,
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    tokens: Tokens = "all",
    propagate: Propagate = "pruned",
    group: Group | None = None,
    allocation: str | Path = "uniform",
    token_weights: TokenWeights | str | Path | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    device: str | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_partial: bool = False,
    hidden: Where | None = None,
    force: bool = False,
    catalog: Catalog | str | Path | None = None,
    progress: OnProgress | None = None,
) -> PruneReport | DropReport:
    """Prune every linear layer of every decoder block, and save an ordinary checkpoint with ``pruning.json``.

    With ``reap`` or ``depth`` whole experts or blocks go instead, and the checkpoint becomes smaller.

    Embeddings, norms, routers and lm_head stay bit-equal. Weights are read and written block by block, so that memory
    holds one block. A run that was killed is continued by the same call, and ends with the same bytes.

    Args:
        model: a checkpoint folder or a Hub id, ``org/name`` or ``org/name@REVISION``.
        calibration: a subset, or a reference to one: ``name``, ``name@2``, ``hub:org/repo/name@2`` or a folder.
        out: a new (or empty) folder.
        method: a name of ``methods.registry.METHODS`` or ``methods.registry.STRUCTURED``.
        sparsity: the share of zeros in every matrix, or of a mixture's experts or of the blocks that go, in (0, 1); or
        pattern: "N:M", N kept of every M.
        tokens: which tokens the statistics count.
        propagate: a block's inputs come from the blocks before it ``pruned`` or ``dense``.
        group: within what weights compete; default: the method's own.
        allocation: ``uniform`` (every matrix alike), ``owl``, or a JSON file of ratios; see ``methods.allocation``.
        token_weights: how much each token counts, by sample id (a number a token), or a Parquet file of that; what is
            not named weighs 1. When None, the column ``token_weights`` of the folder that ``calibration`` names.
        damping: SparseGPT, ADMM, ALPS: the share of the mean diagonal added to the Hessian.
        block_size: columns of a block, for group ``block`` and SparseGPT's updates.
        device: default: CUDA when there is one, else the CPU.
        batch_tokens: positions a micro-batch; default: 8192, on a CPU 2048.
        max_length: cut longer samples.
        include: regular expressions; only matrices whose stored name one of them is found in are pruned.
        exclude: the same, of matrices that stay dense.
        allow_partial: leave decoder weights that calset does not understand dense, instead of refusing the model.
        hidden: where hidden states are between blocks; default: on the device if they fit, else in host memory, else
            on disk beside ``out``. It changes no result.
        force: accept a subset of another tokenizer, and an estimate that does not fit.
        catalog: where the name of a subset is looked up, and where the pruning is recorded if the catalog exists.
        progress: called with a ``Progress`` of blocks; the phase is "loading", "measuring", "pruning" or
            "saving".

    Raises:
        InputError: anything asked that cannot be done, before weights load.
        PruningError: non-finite activations, a singular Gram, too little memory, a full disk; nothing is left at
            ``out``.
        CalsetError: too little free disk or memory to begin.
        Stopped: by Ctrl-C; the same call continues.
        CatalogError: the pruning could not be recorded; the checkpoint is whole.
    """
    settings = PruneSettings(
        model, out, method=method, sparsity=sparsity, pattern=pattern, tokens=tokens, propagate=propagate, group=group,
        allocation=allocation, damping=damping, block_size=block_size, device=device, batch_tokens=batch_tokens,
        max_length=max_length, include=include, exclude=exclude, allow_partial=allow_partial, hidden=hidden,
        force=force,
    )  # fmt: skip
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subset, weights = open_calibration(calibration, token_weights, store)
    was = f" (it was {batch_tokens})" if batch_tokens else ""
    with enough_memory(
        f"lower --batch-tokens{was}, cut the samples with --max-length, keep hidden states elsewhere with --hidden "
        f"disk, or on a GPU use --device cpu"
    ):
        report = _work(settings, subset, weights, progress or silent)
    if distributed.is_first() and store.exists():
        store.add_pruning(report.as_dict())
    return report


@shows(PruneOptions)
def plan_pruning(
    model: str | Path,
    calibration: Subset | str | Path,
    out: str | Path,
    *,
    token_weights: TokenWeights | str | Path | None = None,
    catalog: Catalog | str | Path | None = None,
    **options: Unpack[PruneOptions],
) -> Estimate:
    """Estimate what ``prune`` with the same arguments would do and need, without loading a weight.

    Its ``warnings`` are those that the report of such a pruning would begin with.

    Raises:
        InputError: what ``prune`` would refuse (but not for memory or disk: ``Estimate.problems`` says that).
    """
    settings = PruneSettings(model, out, **options)
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subset, weights = open_calibration(calibration, token_weights, store)
    plan = (make_drop_plan if settings.is_structured else make_plan)(settings, subset, weights)
    return replace(plan.estimate, warnings=tuple(plan.warnings))


def _work(
    settings: PruneSettings, subset: Subset, token_weights: TokenWeights | None, progress: OnProgress
) -> PruneReport | DropReport:
    """Plan, then put zeros into matrices or drop whole parts."""
    began = time.monotonic()
    plan = (make_drop_plan if settings.is_structured else make_plan)(settings, subset, token_weights)
    plan.estimate.check(settings.force)
    phases: dict[str, float] = {"checking": time.monotonic() - began}
    progress(Progress("loading"))
    with distributed.joined(plan.device) as team:
        team.part([None] * plan.estimate.n_batches)
        if isinstance(plan, DropPlan):
            return drop.drop_units(plan, team, phases, progress, began)
        return _prune_weights(plan, team, phases, progress, began)


def _prune_weights(plan: Plan, team: Team, phases: dict[str, float], progress: OnProgress, began: float) -> PruneReport:
    """Put zeros into matrices, block by block; ``began`` is the moment on the monotonic clock."""
    folder, opening = plan.settings.folder, time.monotonic()
    with team.work(folder, partial(workfolder.opened, folder, plan.source.folder, plan.identity)) as work:
        phases["copying"] = time.monotonic() - opening
        matrices = _prune_blocks(plan, work, team, phases, progress)
        report = make_report(plan, work, matrices, phases, time.monotonic() - began)
        work.complete(plan.source.folder, report.as_dict(), card_section(report))
    progress(Progress("done", len(work.blocks), len(work.blocks), final=True))
    return report


def _prune_blocks(
    plan: Plan, work: WorkFolder, team: Team, phases: dict[str, float], progress: OnProgress
) -> list[MatrixReport]:
    from calset.pruning.blockwise.walk import Walk

    settings = plan.settings
    model = plan.source.skeleton(plan.dtype)
    decoder = find_decoder(model, allow_partial=settings.allow_partial)
    total = len(decoder.blocks)
    batches = team.part(plan.calibration.batches(plan.batch_tokens)) if settings.uses_data else []
    matrices: list[MatrixReport] = []
    with TensorFiles(plan.source.folder) as dense, TensorFiles(work.model) as pruned:
        layout, finished = Layout.of(dense, model), Layout.of(pruned, model)
        if batches:
            layout.load_surroundings(decoder.blocks, plan.dtype, plan.device)

        def load(block: Block, source: Layout = layout) -> None:
            with timed(phases, "loading"):
                source.load(source.names(f"{block.name}."), plan.dtype, plan.device)

        def load_as_propagated(block: Block) -> None:
            # Blocks that an interrupted run finished are run as that run propagated them.
            was_done = decoder.blocks.index(block) < len(work.blocks) and settings.propagate == "pruned"
            load(block, finished if was_done else layout)

        if settings.is_measured and work.shares is None:
            hidden = HiddenStates(len(batches), plan.device, plan.estimate.hidden, work.scratch)
            with (
                timed(phases, "allocation"),
                Walk(model, decoder, batches, plan.device, hidden=hidden, load=load) as w,
            ):
                work.remember(_measured_shares(w, layout, plan, team, progress))
            place(model, plan.device)  # what surrounds the blocks; a walk leaves it on the CPU
        shares = plan.shares if work.shares is None else work.shares
        check_shapes([m for b in decoder.blocks for m in _chosen(layout, b, plan)], plan.selection, shares)
        if not plan.method.needs:
            batches = []  # such a method does not run the model
        hidden = HiddenStates(len(batches), plan.device, plan.estimate.hidden, work.scratch)
        run = _Run(plan, layout, finished, work, team, shares, phases)
        with Walk(model, decoder, batches, plan.device, hidden=hidden, load=load_as_propagated) as walk:
            for index in range(total):
                progress(Progress("pruning", index, total))
                is_last = index + 1 == total
                if index < len(work.blocks):
                    reports = _recorded(work.blocks[index], work.folder)
                    if not is_last:
                        with timed(phases, "replaying"):
                            walk.advance(index)
                else:
                    reports = _work_on(index, walk, run)
                    if settings.propagate == "pruned" and not is_last:
                        with timed(phases, "propagation"):
                            walk.advance(index)
                walk.finish(index)
                matrices.extend(reports)
    progress(Progress("saving", total, total))
    return matrices


@dataclass(frozen=True, slots=True)
class _Run:
    """What the work on every block needs. ``layout``: of the dense checkpoint; ``finished``: of the one in the making.

    ``shares``: each matrix's own sparsity by label; None where all have the asked one.
    """

    plan: Plan
    layout: Layout
    finished: Layout
    work: WorkFolder
    team: Team
    shares: Mapping[str, float] | None
    phases: dict[str, float]


def _chosen(layout: Layout, block: Block, plan: Plan) -> list[Matrix]:
    return [m for m in layout.matrices(block.weights.values()) if m.key in plan.chosen]


def _measured_shares(walk: Walk, layout: Layout, plan: Plan, team: Team, progress: OnProgress) -> dict[str, float]:
    """How much of each matrix goes, after measuring the dense model."""
    assert plan.selection.sparsity is not None
    matrices = [_chosen(layout, block, plan) for block in walk.decoder.blocks]
    listed = [m for chosen in matrices for m in chosen]
    measured = measure_blocks(walk, matrices, team, Phase("measuring", progress))
    allocated = as_allocated(walk.decoder, listed)
    return allocation.shares(measured, allocated, plan.selection.sparsity, plan.selection.group)


def _work_on(index: int, walk: Walk, run: _Run) -> list[MatrixReport]:
    """Prune one block and write it."""
    plan, work, team, phases = run.plan, run.work, run.team, run.phases
    block = walk.ready(index)
    chosen = _chosen(run.layout, block, plan)
    found: dict[str, InputStatistics] = {}
    if walk.batches and (chosen or plan.settings.propagate == "dense"):
        with timed(phases, "statistics"):
            needs, only = plan.method.needs, {m.reads for m in chosen}
            found = walk.statistics(index, needs, keep=plan.settings.propagate == "dense", only=only)
            found = team.add_up(found, {m.reads: m.shape[1] for m in chosen}, needs, plan.device)
    with timed(phases, "pruning"):
        reports = _prune_block(chosen, found, run)
    with timed(phases, "writing"):
        record = {"block": block.name, "matrices": [asdict(r) for r in reports], "resumed_at": work.resumed_at}
        work.finish_block(_changed(run, block, chosen), record)
    return reports


def _changed(run: _Run, block: Block, chosen: Sequence[Matrix]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors that hold the chosen matrices, as they now are."""
    names = {m.name for m in chosen}
    for name, tensor in run.layout.to_stored({w.name: w.parameter.data for w in block.weights.values()}):
        if name in names:
            yield name, tensor


def _recorded(record: Mapping[str, Any], folder: Path) -> list[MatrixReport]:
    """Return the reports of a block that an interrupted run finished.

    Raises:
        PruningError: another version of calset wrote them.
    """

    def pair(values: Sequence[int] | None) -> tuple[int, int] | None:
        return None if values is None else (values[0], values[1])

    try:
        return [MatrixReport(**{**m, "shape": pair(m["shape"]), "rows": pair(m["rows"])}) for m in record["matrices"]]
    except (TypeError, KeyError) as error:
        raise PruningError(
            f"another version of calset began the interrupted pruning: remove {folder} to begin anew"
        ) from error


def _prune_block(matrices: Sequence[Matrix], statistics: dict[str, InputStatistics], run: _Run) -> list[MatrixReport]:
    """Prune a block's matrices in place; an update takes those with one input together. Reports in the given order.

    Statistics are dropped as they are used: the widest first, since its Gram is most of a block's memory.
    """
    team = run.team
    together: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        inputs = statistics.get(matrix.reads)
        stacked = inputs is not None and run.plan.method.update is not None
        together.setdefault(id(inputs) if stacked else id(matrix), []).append(matrix)
    inputs = None
    groups = sorted(together.values(), key=lambda members: -members[0].shape[1])
    last = {m.reads: i for i, members in enumerate(groups) for m in members}  # an expert's gate and up have one name
    owners = team.owners([sum(m.shape[0] for m in g) * g[0].shape[1] ** 2.0 + g[0].shape[1] ** 3.0 for g in groups])
    reports: dict[Any, MatrixReport] = {}
    for members, owner in zip(groups, owners, strict=True):
        if owner == team.rank:
            reports.update(_prune_group(members, statistics.get(members[0].reads), run))
        for reads in {m.reads for m in members if groups[last[m.reads]] is members}:
            statistics.pop(reads, None)
    for members, owner in zip(groups, owners, strict=True):
        for matrix in members:
            team.broadcast(matrix.values(), owner)
    reports = team.gather(reports)
    return [reports[m.key] for m in matrices]


def _prune_group(
    members: Sequence[Matrix], inputs: InputStatistics | None, run: _Run
) -> dict[tuple[Any, ...], MatrixReport]:
    """Prune matrices that read one input, in place; reports by the matrices' keys."""
    weights = [m.values().detach() for m in members]
    if not all(map(is_finite, weights)):
        raise PruningError(f"{members[0].label} holds values that are not finite: the checkpoint is broken")
    plan, method = run.plan, run.plan.method
    if method.needs and (inputs is None or not inputs.weight):
        # An expert that no calibration token reached: nothing is known of its inputs, so weights are all there is.
        method, inputs = registry.find("magnitude"), None
    selections = [own_selection(plan.selection, m, run.shares) for m in members]
    try:
        results = registry.prune_shared(method, weights, inputs, selections, plan.settings.damping)
    except PruningError as error:
        raise PruningError(f"{members[0].label}: {error}") from error
    if method is not plan.method:
        results = [replace(r, instead=method.name) for r in results]
    return {m.key: _write(m, r, inputs, run) for m, r in zip(members, results, strict=True)}


def _write(
    matrix: Matrix,
    result: registry.Pruned,
    statistics: InputStatistics | None,
    run: _Run,
) -> MatrixReport:
    """Cast once, to the dtype in the source's file, and count what will be saved."""
    import torch

    weight = result.weight.to(run.plan.dtypes[matrix.name])
    if not is_finite(weight):
        raise PruningError(
            f"the pruned weights of {matrix.label} are not finite: use more calibration tokens or raise --damping"
        )
    place = matrix.values()
    with torch.no_grad():
        place.copy_(weight)  # as wide or wider: see make_plan
    rows, width = matrix.shape
    n_zeros = place.numel() - int(place.count_nonzero())
    return MatrixReport(
        name=matrix.name,
        shape=(rows, width),
        n_pruned=int(result.mask.count_nonzero()),
        n_zeros=n_zeros,
        sparsity=n_zeros / (rows * width),
        n_tokens=statistics.n_tokens if statistics is not None else 0,
        damping=result.damping,
        error=result.error,
        expert=matrix.expert,
        rows=matrix.rows,
        transposed=matrix.transposed,
        asked=None if run.shares is None else run.shares[matrix.label],
        instead=result.instead,
    )

"""Prune a model against a calibration subset: the order of checks and work, and the report.

Everything that can be known fails before a weight is loaded. Then block by block: its weights are read, statistics,
prune, written, next (``walk``, ``layout``, ``workfolder``).
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from calset.errors import InputError, PruningError
from calset.pruning import checkpoint, distributed, methods, workfolder
from calset.pruning.calibration import BATCH_TOKENS, Calibration, Tokens, read
from calset.pruning.decoder import find_decoder
from calset.pruning.estimate import Estimate, estimate
from calset.pruning.hidden import HiddenStates, Where
from calset.pruning.layout import Layout, Matrix
from calset.pruning.masks import BLOCK_SIZE, Group, Pattern, Selection
from calset.pruning.tensorfiles import TensorFiles

if TYPE_CHECKING:
    import torch

    from calset.catalog.records import Subset
    from calset.pruning.decoder import Block
    from calset.pruning.distributed import Team
    from calset.pruning.stats import InputStatistics
    from calset.pruning.walk import Walk
    from calset.pruning.workfolder import WorkFolder

Propagate = Literal["pruned", "dense"]
DAMPING = 0.01  # of the mean diagonal
MAX_DEVIATION = 0.005  # of a matrix's share of zeros from the asked one, before it is worth a warning
# Events: {"done": blocks, "total": blocks, "phase": "loading" | "pruning" | "saving"}
OnProgress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One pruned matrix. ``error``: ||X(W-W')^T||^2 / ||X W^T||^2 on the calibration inputs, where a Gram was kept.

    ``name`` is the stored tensor; see ``layout.Matrix`` for its place there. ``method``: where it is not the asked one,
    because no calibration token reached the matrix.
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
    method: str | None = None


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
    schema_version: int = checkpoint.SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything checked, before weights load."""

    source: checkpoint.Source
    subset: Subset
    out: Path
    method: methods.Method
    selection: Selection
    calibration: Calibration
    tokens: Tokens
    propagate: Propagate
    damping: float
    max_length: int | None
    batch_tokens: int
    device: torch.device
    dtype: torch.dtype  # of the model while it runs
    dtypes: Mapping[str, torch.dtype]  # of the matrices in the source's files, by tensor name
    chosen: frozenset[tuple[Any, ...]]  # the keys of the matrices to prune
    left_dense: Sequence[str]
    allow_partial: bool
    estimate: Estimate
    settings: Mapping[str, Any]  # all that decides the result, for a run that continues this one
    warnings: list[str] = field(default_factory=list)

    @property
    def uses_data(self) -> bool:
        return self.method.needs != "nothing"


def prune(
    model: str | Path,
    calibration: Subset,
    out: str | Path,
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    tokens: Tokens = "all",
    propagate: Propagate = "pruned",
    group: Group | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    device: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_partial: bool = False,
    hidden: Where | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> PruneReport:
    """Prune every linear layer of every decoder block, and save an ordinary checkpoint with ``pruning.json``.

    Embeddings, norms, routers and lm_head stay bit-equal. Weights are read and written block by block, so that memory
    holds one block. A run that was killed is continued by the same call, and ends with the same bytes.

    Args:
        model: a checkpoint folder or a Hub id.
        out: a new (or empty) folder.
        sparsity: the share of zeros in every matrix, in (0, 1); or
        pattern: "N:M", N kept of every M.
        tokens: which tokens the statistics count.
        propagate: a block's inputs come from the blocks before it ``pruned`` or ``dense``.
        group: within what weights compete; default: the method's own.
        damping: SparseGPT: the share of the mean diagonal added to the Hessian.
        block_size: columns of a block, for group ``block`` and SparseGPT's updates.
        device: default: CUDA when there is one, else the CPU.
        batch_tokens: positions a micro-batch.
        max_length: cut longer samples.
        include: regular expressions; only matrices whose stored name one of them is found in are pruned.
        exclude: the same, of matrices that stay dense.
        allow_partial: leave decoder weights that calset does not understand dense, instead of refusing the model.
        hidden: where hidden states are between blocks; default: on the device if they fit, else in host memory, else
            on disk beside ``out``. It changes no result.
        force: accept a subset of another tokenizer, and an estimate that does not fit.

    Raises:
        InputError: anything asked that cannot be done, before weights load.
        PruningError: non-finite activations, a singular Gram, too little memory, a full disk; nothing is left at
            ``out``.
        CalsetError: too little free disk or memory to begin.
        Stopped: by Ctrl-C; the same call continues.
    """
    asked = dict(locals())
    began = time.monotonic()
    with _enough_memory(batch_tokens):
        plan = _plan(**_planned(asked))
        plan.estimate.check(force)
        tell = progress or (lambda event: None)
        phases: dict[str, float] = {"checking": time.monotonic() - began}
        tell({"done": 0, "total": None, "phase": "loading"})
        with distributed.joined(plan.device) as team:
            team.part([None] * plan.estimate.n_batches)
            opening = time.monotonic()
            opened = partial(workfolder.opened, plan.out, plan.source.folder, plan.settings)
            with team.work(plan.out, opened) as work:
                phases["copying"] = time.monotonic() - opening
                matrices = _prune_blocks(plan, work, team, phases, tell)
                report = _report(plan, work, matrices, phases, time.monotonic() - began)
                work.complete(plan.source.folder, report.as_dict(), card_section(report))
    return report


def plan_pruning(model: str | Path, calibration: Subset, out: str | Path, **options: Any) -> Estimate:
    """What ``prune`` with the same arguments would do and need, without loading a weight.

    Raises:
        InputError: what ``prune`` would refuse (but not for memory or disk: ``Estimate.problems`` says that).
    """
    bound = inspect.signature(prune).bind(model, calibration, out, **options)
    bound.apply_defaults()
    return _plan(**_planned(bound.arguments)).estimate


def _planned(asked: Mapping[str, Any]) -> dict[str, Any]:
    """``prune``'s arguments as ``_plan`` takes them."""
    return {key: value for key, value in asked.items() if key != "progress"}


@contextmanager
def _enough_memory(batch_tokens: int) -> Iterator[None]:
    """Too little memory is the user's to solve: said with what to lower."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
        if not is_memory:
            raise
        raise PruningError(
            f"out of memory: lower --batch-tokens (it was {batch_tokens}), cut the samples with --max-length, keep "
            f"hidden states elsewhere with --hidden disk, or on a GPU use --device cpu"
        ) from error


def _without_effect(method: methods.Method, pattern: Pattern | None, group: str | None, damping: float) -> list[str]:
    warnings = []
    if pattern is not None and group is not None:
        warnings.append(f"--group {group} has no effect with a pattern: weights compete within {pattern.m} columns")
    if method.needs != "gram" and damping != DAMPING:
        warnings.append(f"--damping {damping:g} has no effect: {method.name} has no damping")
    return warnings


def _check_options(propagate: str, damping: float, batch_tokens: int, hidden: str | None) -> None:
    if propagate not in get_args(Propagate):
        raise InputError(f"propagate must be one of {', '.join(get_args(Propagate))}, not {propagate!r}")
    if not 0 < damping <= 1e4:
        raise InputError(f"damping is a positive share of the mean diagonal, such as 0.01, not {damping}")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
    if hidden is not None and hidden not in get_args(Where):
        raise InputError(f"hidden must be one of {', '.join(get_args(Where))}, not {hidden!r}")


def _plan(
    model: str | Path,
    calibration: Subset,
    out: str | Path,
    *,
    method: str,
    sparsity: float | None,
    pattern: str | None,
    tokens: Tokens,
    propagate: Propagate,
    group: Group | None,
    damping: float,
    block_size: int,
    device: str | None,
    batch_tokens: int,
    max_length: int | None,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_partial: bool,
    hidden: Where | None,
    force: bool,
) -> _Plan:
    import torch

    asked = {key: value for key, value in locals().items() if key != "torch"}
    parsed = Pattern.parse(pattern) if pattern is not None else None
    chosen = methods.find(method)
    selection = Selection(sparsity, parsed, group or chosen.group, block_size)
    _check_options(propagate, damping, batch_tokens, hidden)
    patterns = _Patterns.of(include, exclude)
    source = checkpoint.open_source(model)
    warnings = _check_subset(calibration, source, chosen, force)
    samples = read(
        calibration,
        tokens,
        max_positions=source.max_positions,
        max_length=max_length,
        vocabulary_size=getattr(source.config.get_text_config(), "vocab_size", None),
    )
    if chosen.needs != "nothing":
        warnings.extend(samples.warnings)
    on_device = _device(device)
    with TensorFiles(source.folder) as files:
        skeleton = source.skeleton()
        decoder = find_decoder(skeleton, allow_partial=allow_partial)
        layout = Layout.of(files, skeleton)
        layout.check(torch.float32)
        blocks = [layout.matrices(block.weights.values()) for block in decoder.blocks]
        every = [matrix for matrices in blocks for matrix in matrices]
        matrices = patterns.choose(every)
        for matrix in matrices:
            selection.check_shape(*matrix.shape, matrix.label.removesuffix(".weight"))
        dtypes = {m.name: files.stored[m.name].torch_dtype for m in matrices}
        # The narrowest that holds every matrix exactly: the config's may round them.
        dtype = reduce(torch.promote_types, set(dtypes.values()))
        needed = estimate(
            skeleton, decoder, files, matrices, samples, chosen.needs, propagate, dtype, on_device, batch_tokens,
            hidden, Path(out),
        )  # fmt: skip
    warnings.extend(_rounded(selection, matrices))
    warnings.extend(_too_few_tokens(chosen, matrices, samples.n_counted_tokens))
    warnings.extend(_without_effect(chosen, parsed, group, damping))
    if unknown := decoder.unknown():
        warnings.append(f"{len(unknown)} decoder weights are not understood and stay dense, such as {unknown[0]}")
    keys = frozenset(m.key for m in matrices)
    settings = _settings(asked, source, calibration, on_device)
    workfolder.check_out(Path(out), needed.disk_bytes)
    workfolder.check_settings(Path(out), settings)
    return _Plan(
        source=source,
        subset=calibration,
        out=Path(out),
        method=chosen,
        selection=selection,
        calibration=samples,
        tokens=tokens,
        propagate=propagate,
        damping=damping,
        max_length=max_length,
        batch_tokens=batch_tokens,
        device=on_device,
        dtype=dtype,
        dtypes=dtypes,
        chosen=keys,
        left_dense=[*(m.label for m in every if m.key not in keys), *unknown],
        allow_partial=allow_partial,
        estimate=needed,
        settings=settings,
        warnings=warnings,
    )


@dataclass(frozen=True, slots=True)
class _Patterns:
    """Which matrices are pruned, by their stored names and their modules'."""

    include: Sequence[re.Pattern[str]]
    exclude: Sequence[re.Pattern[str]]

    @classmethod
    def of(cls, include: Sequence[str], exclude: Sequence[str]) -> _Patterns:
        def parse(text: str) -> re.Pattern[str]:
            try:
                return re.compile(text)
            except re.error as error:
                raise InputError(f"{text!r} is no regular expression: {error}") from error

        return cls([parse(t) for t in include], [parse(t) for t in exclude])

    def choose(self, matrices: Sequence[Matrix]) -> list[Matrix]:
        """
        Raises:
            InputError: a pattern that matches nothing, or patterns that leave nothing.
        """
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(pattern, m) for m in matrices):
                raise InputError(
                    f"no matrix of the decoder has {pattern.pattern!r} in its name (they are called "
                    f"{matrices[0].label} to {matrices[-1].label})"
                )
        chosen = [
            m
            for m in matrices
            if (not self.include or any(_matches(p, m) for p in self.include))
            and not any(_matches(p, m) for p in self.exclude)
        ]
        if not chosen:
            raise InputError("--include and --exclude leave no matrix to prune")
        return chosen


def _matches(pattern: re.Pattern[str], matrix: Matrix) -> bool:
    return bool(pattern.search(matrix.label) or pattern.search(matrix.reads))


def _settings(
    asked: Mapping[str, Any], source: checkpoint.Source, subset: Subset, device: torch.device
) -> dict[str, Any]:
    """All that decides the result: only a run with the same may go on where one was interrupted."""
    without_effect = ("model", "calibration", "out", "hidden", "force", "device")
    return {
        **{key: value for key, value in asked.items() if key not in without_effect},
        "model revision": source.revision,
        "calibration": subset.content_hash,
        "device": device.type,
        "processes": distributed.n_processes(),  # sums come out in another order
        "versions": _versions(),
    }


def _check_subset(subset: Subset, source: checkpoint.Source, method: methods.Method, force: bool) -> list[str]:
    """Warnings about where the subset comes from.

    Raises:
        InputError: its tokenizer is not the model's, unless forced.
    """
    warnings = []
    if subset.tokenizer_hash != source.tokenizer_hash:
        problem = (
            f"{source.name} has no tokenizer to compare the subset's with"
            if source.tokenizer_hash is None
            else f"the subset {subset.ref} was made with another tokenizer than that of {source.name}"
        )
        if not force:
            raise InputError(
                f"{problem}: its token ids would mean other text; select from this model's own traces, or --force"
            )
        warnings.append(f"{problem} (forced)")
    if method.needs == "nothing":
        return warnings
    # A Hub model given as its snapshot folder goes by the commit in the folder's name.
    if subset.model_revision and subset.model_revision not in (source.revision, source.folder.name):
        warnings.append(
            f"the subset {subset.ref} was made by {subset.model} ({subset.model_revision[:12]}), not by {source.name} "
            f"({source.revision[:12]}): a model's own traces calibrate its pruning best"
        )
    return warnings


def _too_few_tokens(method: methods.Method, matrices: Sequence[Matrix], n_tokens: int) -> list[str]:
    wide = [m.shape[1] for m in matrices if m.shape[1] > n_tokens]
    if method.needs != "gram" or not wide:
        return []
    return [
        f"{len(wide)} matrices have more inputs (up to {max(wide)}) than there are calibration tokens ({n_tokens}): "
        f"their Gram matrices are rank-deficient and only damping makes them invertible; use more tokens"
    ]


def _rounded(selection: Selection, matrices: Sequence[Matrix]) -> list[str]:
    """A warning when whole weights cannot make up the asked share (narrow rows)."""
    asked = selection.sparsity
    if asked is None:
        return []
    shares = {m.label: selection.n_pruned(*m.shape) / (m.shape[0] * m.shape[1]) for m in matrices}
    off = {name: share for name, share in shares.items() if abs(share - asked) > MAX_DEVIATION}
    if not off:
        return []
    worst = max(off, key=lambda name: abs(off[name] - asked))
    finer = "" if selection.group == "matrix" else "; --group matrix rounds less"
    return [
        f"{len(off)} matrices get another share of zeros than {asked:g}, rounded to whole weights of a "
        f"{selection.group}: {worst} gets {off[worst]:.4f}{finer}"
    ]


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"the device {name!r} cannot be used: {reason}") from error
    return device


# --- the work ---------------------------------------------------------------------------------------------------


@contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of a ``with`` block to a phase."""
    began = time.monotonic()
    try:
        yield
    finally:
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - began


def _prune_blocks(
    plan: _Plan, work: WorkFolder, team: Team, phases: dict[str, float], tell: OnProgress
) -> list[MatrixReport]:
    from calset.pruning.walk import Walk

    model = plan.source.skeleton(plan.dtype)
    decoder = find_decoder(model, allow_partial=plan.allow_partial)
    total = len(decoder.blocks)
    # A method that needs no data does not run the model.
    batches = team.part(plan.calibration.batches(plan.batch_tokens)) if plan.uses_data else []
    hidden = HiddenStates(len(batches), plan.device, plan.estimate.hidden, work.scratch)
    matrices: list[MatrixReport] = []
    with TensorFiles(plan.source.folder) as dense, TensorFiles(work.model) as pruned:
        layout, finished = Layout.of(dense, model), Layout.of(pruned, model)
        if batches:
            _load_surroundings(layout, decoder.blocks, plan)

        def load(block: Block) -> None:
            # Blocks that an interrupted run finished are run as that run propagated them.
            was_done = decoder.blocks.index(block) < len(work.blocks) and plan.propagate == "pruned"
            source = finished if was_done else layout
            with _timed(phases, "loading"):
                source.load(source.names(f"{block.name}."), plan.dtype, plan.device)

        with Walk(model, decoder, batches, plan.device, hidden=hidden, load=load) as walk:
            for index in range(total):
                tell({"done": index, "total": total, "phase": "pruning"})
                is_last = index + 1 == total
                if index < len(work.blocks):
                    reports = _recorded(work.blocks[index])
                    if not is_last:
                        with _timed(phases, "replaying"):
                            walk.advance(index)
                else:
                    reports = _work_on(index, walk, layout, plan, work, team, phases)
                    if plan.propagate == "pruned" and not is_last:
                        with _timed(phases, "propagation"):
                            walk.advance(index)
                walk.finish(index)
                matrices.extend(reports)
    tell({"done": total, "total": total, "phase": "saving"})
    return matrices


def _work_on(
    index: int,
    walk: Walk,
    layout: Layout,
    plan: _Plan,
    work: WorkFolder,
    team: Team,
    phases: dict[str, float],
) -> list[MatrixReport]:
    """Prune one block and write it."""
    block = walk.ready(index)
    chosen = [m for m in layout.matrices(block.weights.values()) if m.key in plan.chosen]
    found: dict[str, InputStatistics] = {}
    if walk.batches and (chosen or plan.propagate == "dense"):
        with _timed(phases, "statistics"):
            needs, only = plan.method.needs, {m.reads for m in chosen}
            found = walk.statistics(index, needs, keep=plan.propagate == "dense", only=only)
            found = team.add_up(found, {m.reads: m.shape[1] for m in chosen}, needs, plan.device)
    with _timed(phases, "pruning"):
        reports = _prune_block(chosen, found, plan, team)
    with _timed(phases, "writing"):
        record = {"block": block.name, "matrices": [asdict(r) for r in reports], "resumed_at": work.resumed_at}
        work.finish_block(_changed(layout, block, chosen), record)
    return reports


def _load_surroundings(layout: Layout, blocks: Sequence[Block], plan: _Plan) -> None:
    """What runs before the first block: everything outside the blocks but an output layer of its own."""
    inside = tuple(f"{block.name}." for block in blocks)
    head = layout.model.get_output_embeddings()
    embedding = layout.model.get_input_embeddings()
    names = {id(p): n for n, p in layout.model.named_parameters()}
    unused = set()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        unused = {names[id(p)] for p in head.parameters()}
    wanted = [n for n, target in layout.target.items() if not target.startswith(inside) and target not in unused]
    layout.load(wanted, plan.dtype, plan.device)


def _changed(layout: Layout, block: Block, chosen: Sequence[Matrix]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors that hold the chosen matrices, as they now are."""
    names = {m.name for m in chosen}
    for name, tensor in layout.to_stored({w.name: w.parameter.data for w in block.weights.values()}):
        if name in names:
            yield name, tensor


def _recorded(record: Mapping[str, Any]) -> list[MatrixReport]:
    """The reports of a block that an interrupted run finished."""

    def pair(values: Sequence[int] | None) -> tuple[int, int] | None:
        return None if values is None else (values[0], values[1])

    return [MatrixReport(**{**m, "shape": pair(m["shape"]), "rows": pair(m["rows"])}) for m in record["matrices"]]


def _prune_block(
    matrices: Sequence[Matrix], statistics: Mapping[str, InputStatistics], plan: _Plan, team: Team
) -> list[MatrixReport]:
    """Prune a block's matrices in place, those with one input together; reports in the given order."""
    together: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        inputs = statistics.get(matrix.reads)
        together.setdefault(id(inputs) if inputs is not None else id(matrix), []).append(matrix)
    groups = list(together.values())
    owners = team.owners([sum(m.shape[0] for m in g) * g[0].shape[1] ** 2.0 + g[0].shape[1] ** 3.0 for g in groups])
    reports: dict[Any, MatrixReport] = {}
    for members, owner in zip(groups, owners, strict=True):
        if owner == team.rank:
            reports.update(_prune_group(members, statistics.get(members[0].reads), plan))
    for members, owner in zip(groups, owners, strict=True):
        for matrix in members:
            team.tell(matrix.values(), owner)
    reports = team.gather(reports)
    return [reports[m.key] for m in matrices]


def _prune_group(
    members: Sequence[Matrix], inputs: InputStatistics | None, plan: _Plan
) -> dict[tuple[Any, ...], MatrixReport]:
    """Prune matrices that read one input, in place; reports by the matrices' keys."""
    weights = [m.values().detach().float() for m in members]
    if not all(bool(w.isfinite().all()) for w in weights):
        raise PruningError(f"{members[0].label} holds values that are not finite: the checkpoint is broken")
    method = plan.method
    if plan.uses_data and (inputs is None or not inputs.n_tokens):
        # An expert that no calibration token reached: nothing is known of its inputs, so weights are all there is.
        method, inputs = methods.find("magnitude"), None
    try:
        results = methods.prune_shared(method, weights, inputs, plan.selection, plan.damping)
    except PruningError as error:
        raise PruningError(f"{members[0].label}: {error}") from error
    return {m.key: _write(m, r, inputs, plan, method) for m, r in zip(members, results, strict=True)}


def _write(
    matrix: Matrix,
    result: methods.Pruned,
    statistics: InputStatistics | None,
    plan: _Plan,
    method: methods.Method,
) -> MatrixReport:
    """Cast once, to the dtype in the source's file, mask again, and count what will be saved."""
    import torch

    weight = result.weight.to(plan.dtypes[matrix.name]).masked_fill_(result.mask, 0.0)
    if not bool(weight.isfinite().all()):
        raise PruningError(
            f"the pruned weights of {matrix.label} are not finite: use more calibration tokens or raise --damping"
        )
    place = matrix.values()
    with torch.no_grad():
        place.copy_(weight)  # as wide or wider: see _load_dtype
    rows, width = matrix.shape
    n_zeros = int((place == 0).sum())
    return MatrixReport(
        name=matrix.name,
        shape=(rows, width),
        n_pruned=int(result.mask.sum()),
        n_zeros=n_zeros,
        sparsity=n_zeros / (rows * width),
        n_tokens=statistics.n_tokens if statistics is not None else 0,
        damping=result.damping,
        error=result.error,
        expert=matrix.expert,
        rows=matrix.rows,
        transposed=matrix.transposed,
        method=method.name if method is not plan.method else None,
    )


# --- the report -------------------------------------------------------------------------------------------------


def _report(
    plan: _Plan,
    work: WorkFolder,
    matrices: Sequence[MatrixReport],
    phases: Mapping[str, float],
    seconds: float,
) -> PruneReport:
    selection, subset, source = plan.selection, plan.subset, plan.source
    uses_data = plan.uses_data
    raised = [m for m in matrices if m.damping is not None and m.damping > plan.damping]
    warnings = list(plan.warnings)
    if raised:
        warnings.append(
            f"damping was raised for {len(raised)} matrices, such as {raised[0].name} ({raised[0].damping:g})"
        )
    warnings.extend(_about_experts(plan, matrices))
    size = sum(m.shape[0] * m.shape[1] for m in matrices)
    return PruneReport(
        out=str(plan.out),
        method=plan.method.name,
        sparsity=selection.sparsity,
        pattern=str(selection.pattern) if selection.pattern else None,
        realised_sparsity=sum(m.n_zeros for m in matrices) / size,
        group=None if selection.pattern else selection.group,
        tokens=plan.tokens if uses_data else None,
        propagate=plan.propagate if uses_data else None,
        damping=plan.damping if plan.method.needs == "gram" else None,
        block_size=selection.block_size,
        max_length=plan.max_length if uses_data else None,
        n_counted_tokens=plan.calibration.n_counted_tokens if uses_data else 0,
        base={
            "model": source.name,
            "revision": source.revision,
            "path": str(source.folder.resolve()),
            "tokenizer_hash": source.tokenizer_hash,
        },
        calibration={
            "used": uses_data,
            "subset": subset.ref,
            "name": subset.name,
            "version": subset.version,
            "content_hash": subset.content_hash,
            "recipe": dict(subset.recipe),
            "seed": subset.seed,
            "model": subset.model,
            "model_revision": subset.model_revision,
            "tokenizer_hash": subset.tokenizer_hash,
            "n_samples": subset.n_samples,
            "n_tokens": subset.n_tokens,
            # The runs and sources behind it; of a subset from the Hub also repo, commit and tag.
            "origin": dict(subset.origin) if subset.origin else None,
        },
        matrices=tuple(matrices),
        left_dense=tuple(plan.left_dense),
        resumed_at=tuple(work.resumed_at),
        seconds=seconds,
        phases=dict(phases),
        device=_device_name(plan.device),
        versions=_versions(),
        warnings=tuple(warnings),
    )


def _about_experts(plan: _Plan, matrices: Sequence[MatrixReport]) -> list[str]:
    """Warnings about experts that the router sent few or no calibration tokens."""
    warnings = []
    if without := [m for m in matrices if m.method is not None]:
        warnings.append(
            f"{len(without)} expert matrices got no calibration token and were pruned by {without[0].method}, such as "
            f"{_place(without[0])}; use more tokens"
        )
    few = [m for m in matrices if m.method is None and 0 < m.n_tokens < m.shape[1] <= plan.calibration.n_counted_tokens]
    if few and plan.method.needs == "gram":
        fewest = min(few, key=lambda m: m.n_tokens)
        warnings.append(
            f"{len(few)} expert matrices got fewer calibration tokens than they have inputs, {_place(fewest)} only "
            f"{fewest.n_tokens} for {fewest.shape[1]}: only damping makes their Gram matrices invertible; use more"
        )
    return warnings


def _place(report: MatrixReport) -> str:
    return report.name + ("" if report.expert is None else f"[{report.expert}]")


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import calset

    return {"calset": calset.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def card_section(report: PruneReport) -> str:
    """What a pruned model's card says of its pruning, in Markdown."""
    asked = f"pattern {report.pattern} (N kept)" if report.pattern else f"sparsity {report.sparsity:g}"
    calibration = report.calibration
    counted = f"{report.n_counted_tokens:,} ({report.tokens})"
    data = {"calibration": f"none: {report.method} uses no data"}
    if calibration["used"]:
        hub = (calibration["origin"] or {}).get("hub")
        place = f" of the dataset {hub['repo']} (commit `{hub['commit']}`)" if hub else ""
        data = {
            "calibration": f"{calibration['subset']}{place}, content hash `{calibration['content_hash']}`",
            "calibration tokens": f"{counted}, inputs from {report.propagate} blocks",
        }
    rows = {
        "dense model": f"{report.base['model']} (revision `{report.base['revision']}`)",
        "method": f"{report.method}, {asked}" + (f", mask group {report.group}" if report.group else ""),
        "zeros": f"{report.realised_sparsity:.4f} of {len(report.matrices)} matrices in the decoder blocks",
        **data,
        "damping": "-" if report.damping is None else f"{report.damping:g} of the mean diagonal",
        "took": f"{report.seconds:.0f} s on {report.device}",
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"# {report.base['model']}, pruned with calset\n\n| | |\n|---|---|\n{table}\n\n"
        f"Embeddings, norms and lm_head are the dense model's, bit for bit. Zeros are stored as ordinary weights: the "
        f"checkpoint is as large and as fast as the dense one where the runtime does not use sparsity. "
        f"`{checkpoint.RECORD}` lists every matrix; `calset verify` proves it.\n"
    )

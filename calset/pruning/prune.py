"""Prune a model against a calibration subset: the order of checks and work, and the report.

Everything that can be known fails before a weight is loaded. Then block by block: its weights are read, statistics,
prune, written, next (``walk``, ``layout``, ``workfolder``).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from calset.errors import InputError, PruningError
from calset.pruning import allocate, biases, checkpoint, distributed, methods, workfolder
from calset.pruning import survey as surveys
from calset.pruning.calibration import BATCH_TOKENS, Calibration, Tokens, read
from calset.pruning.decoder import find_decoder
from calset.pruning.estimate import Estimate, estimate
from calset.pruning.hidden import HiddenStates, Where
from calset.pruning.layout import Layout, Matrix, place
from calset.pruning.masks import BLOCK_SIZE, Group, Pattern, Selection
from calset.pruning.tensorfiles import Added, TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calset.catalog.records import Subset
    from calset.pruning.decoder import Block, Decoder
    from calset.pruning.distributed import Team
    from calset.pruning.stats import InputStatistics
    from calset.pruning.walk import Walk
    from calset.pruning.workfolder import WorkFolder

Propagate = Literal["pruned", "dense"]
DAMPING = 0.01  # of the mean diagonal
MAX_DEVIATION = 0.005  # of a matrix's share of zeros from the asked one, before it is worth a warning
# Events: {"done": blocks, "total": blocks, "phase": "loading" | "surveying" | "pruning" | "saving"}
OnProgress = Callable[[Mapping[str, Any]], None]


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
    bias: bool = False  # its linear's bias was changed or added
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
    allocation: str = "uniform"  # or owl, search, file:NAME
    biases: Sequence[str] = ()  # stored tensors that were changed or added
    switches: Mapping[str, bool] = field(default_factory=dict)  # of config.json, for added biases
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
    allocation: str
    shares: Mapping[str, float] | None  # by label, of an allocation that is known before weights load
    carriers: biases.Carriers
    bias_names: Mapping[str, str]  # linear -> the stored tensor of its bias, of those that change or are new
    added: Mapping[str, Added]
    estimate: Estimate
    settings: Mapping[str, Any]  # all that decides the result, for a run that continues this one
    warnings: list[str] = field(default_factory=list)

    @property
    def uses_data(self) -> bool:
        return _uses_data(self.method, self.allocation)


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
    allocation: str | Path = "uniform",
    token_weights: Mapping[str, Sequence[float]] | None = None,
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
        allocation: ``uniform`` (every matrix alike), ``owl``, ``search``, or a JSON file of ratios; see ``allocate``.
        token_weights: how much each token counts, by sample id (a number a token); what is not named weighs 1.
        damping: SparseGPT, ADMM, ALPS: the share of the mean diagonal added to the Hessian.
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
            opened = partial(workfolder.opened, plan.out, plan.source.folder, plan.settings, plan.added)
            with team.work(plan.out, opened) as work:
                phases["copying"] = time.monotonic() - opening
                matrices = _prune_blocks(plan, work, team, phases, tell)
                report = _report(plan, work, matrices, phases, time.monotonic() - began)
                section, switches = card_section(report), plan.carriers.switches
                work.complete(plan.source.folder, report.as_dict(), section, switches)
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
        said = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # pinned memory and cuBLAS have their own words
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in said)
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
    allocation: str | Path,
    token_weights: Mapping[str, Sequence[float]] | None,
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
    allocation = str(allocation)
    uses_data = _uses_data(chosen, allocation)
    warnings = _check_subset(calibration, source, uses_data, force)
    samples = read(
        calibration,
        tokens,
        max_positions=source.max_positions,
        max_length=max_length,
        vocabulary_size=getattr(source.config.get_text_config(), "vocab_size", None),
        token_weights=token_weights,
    )
    if uses_data:
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
        shares = _known_shares(allocation, decoder, matrices, selection)
        _check_shapes(matrices, selection, shares)
        carriers, bias_names, added = _biases(chosen, source, layout, matrices)
        dtypes = {name: files.stored[name].torch_dtype for name in {m.name for m in matrices}}
        dtypes.update({n: files.stored[n].torch_dtype for n in bias_names.values() if n in files.stored})
        dtypes.update({name: files.stored[new.beside].torch_dtype for name, new in added.items()})
        # The narrowest that holds every matrix exactly: the config's may round them.
        dtype = reduce(torch.promote_types, set(dtypes.values()))
        needed = estimate(
            skeleton, decoder, files, matrices, samples, chosen, allocation, propagate, dtype, on_device, batch_tokens,
            hidden, Path(out),
        )  # fmt: skip
    warnings.extend(_bias_warnings(chosen, carriers, matrices, added))
    if allocation == "uniform":
        warnings.extend(_rounded(selection, matrices))
    warnings.extend(_too_few_tokens(chosen, matrices, samples.n_counted_tokens))
    warnings.extend(_without_effect(chosen, parsed, group, damping))
    if unknown := decoder.unknown():
        warnings.append(f"{len(unknown)} decoder weights are not understood and stay dense, such as {unknown[0]}")
    keys = frozenset(m.key for m in matrices)
    settings = _settings(
        {**asked, "allocation": _told_apart(allocation, shares), "token_weights": _hash_of(samples.weights)},
        source,
        calibration,
        on_device,
    )
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
        allocation=allocation,
        shares=shares,
        carriers=carriers,
        bias_names=bias_names,
        added=added,
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


def _uses_data(method: methods.Method, allocation: str) -> bool:
    return method.needs != "nothing" or allocation in allocate.MEASURED


def _allocated(decoder: Decoder, matrices: Sequence[Matrix]) -> list[allocate.Matrix]:
    blocks = {name: block.name for block in decoder.blocks for name in block.weights}
    return [allocate.Matrix(m.label, blocks[m.weight.name], *m.shape, m.reads) for m in matrices]


def _known_shares(
    allocation: str, decoder: Decoder, matrices: Sequence[Matrix], selection: Selection
) -> dict[str, float] | None:
    """The sparsities of a file; None for those that are uniform or measured later.

    Raises:
        InputError: no such file or rule, or an allocation of a pattern.
    """
    if allocation != "uniform" and selection.sparsity is None:
        raise InputError(
            f"a pattern is one share of zeros everywhere: --allocation {allocation} takes --sparsity instead"
        )
    if allocation in allocate.RULES:
        return None
    assert selection.sparsity is not None
    return allocate.read_ratios(Path(allocation), _allocated(decoder, matrices), selection.sparsity)


def _told_apart(allocation: str, shares: Mapping[str, float] | None) -> str:
    """What tells one allocation from another: of a file what it says, not where it lies."""
    if shares is None:
        return allocation
    return f"ratios {hashlib.sha256(json.dumps(shares).encode()).hexdigest()[:16]}"


def _hash_of(weights: Sequence[Sequence[float]] | None) -> str | None:
    """What tells one set of token weights from another: they are no part of the subset's content hash."""
    return None if weights is None else hashlib.sha256(json.dumps([list(w) for w in weights]).encode()).hexdigest()


def _own(selection: Selection, matrix: Matrix, shares: Mapping[str, float] | None) -> Selection:
    """How much of one matrix goes."""
    return selection if shares is None else replace(selection, sparsity=shares[matrix.label])


def _check_shapes(matrices: Sequence[Matrix], selection: Selection, shares: Mapping[str, float] | None) -> None:
    for matrix in matrices:
        _own(selection, matrix, shares).check_shape(*matrix.shape, matrix.label.removesuffix(".weight"))


def _biases(
    method: methods.Method, source: checkpoint.Source, layout: Layout, matrices: Sequence[Matrix]
) -> tuple[biases.Carriers, dict[str, str], dict[str, Added]]:
    """Which linears can have a bias, the stored names of those that change or are new, and the new ones.

    A new one goes beside its matrix, so that its matrix must be a tensor of the checkpoint's own.
    """
    if not method.biased:
        return biases.Carriers(frozenset(), {}), {}, {}
    pruned = {m.reads for m in matrices if m.in_expert is None}
    carriers = biases.find_carriers(source.config, pruned, lambda name: f"{name}.weight" in layout.plain)
    own = dict(layout.model.named_parameters())
    names, added = {}, {}
    for linear in sorted(carriers.linears):
        parameter = own.get(f"{linear}.bias")
        if parameter is None:
            beside = layout.plain[f"{linear}.weight"]
            names[linear] = f"{beside.removesuffix('.weight')}.bias"
            # As many as the linear has outputs; a Conv1D has a bias already.
            added[names[linear]] = Added(beside, (own[f"{linear}.weight"].shape[0],))
        elif linear in pruned and (stored := layout.plain.get(f"{linear}.bias")):
            names[linear] = stored
    return replace(carriers, linears=frozenset(names)), names, added


def _bias_warnings(
    method: methods.Method, carriers: biases.Carriers, matrices: Sequence[Matrix], added: Mapping[str, Added]
) -> list[str]:
    """What a method that corrects biases can do on this model.

    Raises:
        InputError: nothing.
    """
    if not method.biased:
        return []
    readers = list(dict.fromkeys(m.reads for m in matrices))
    without = [name for name in readers if name not in carriers.linears]
    if len(without) == len(readers):
        raise InputError(
            f"{method.name} corrects biases, and what is pruned of this model has none and cannot be given any that "
            f"would be loaded again: use wanda"
        )
    warnings = []
    if without:
        warnings.append(
            f"{len(without)} of {len(readers)} linears and experts, such as {without[0]}, can have no bias that would "
            f"be loaded again: they are pruned by {method.name}'s score without one, which is wanda's"
        )
    if added:
        warnings.append(
            f"{len(added)} linears get a bias that they did not have, through {', '.join(carriers.switches)} in "
            f"config.json: transformers loads it; other runtimes may drop it without a word, as vLLM's Qwen3 that of "
            f"o_proj"
        )
    return warnings


def _check_subset(subset: Subset, source: checkpoint.Source, uses_data: bool, force: bool) -> list[str]:
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
    if not uses_data:
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

    model = plan.source.skeleton(plan.dtype, plan.carriers.switches)
    decoder = find_decoder(model, allow_partial=plan.allow_partial)
    total = len(decoder.blocks)
    batches = team.part(plan.calibration.batches(plan.batch_tokens)) if plan.uses_data else []
    matrices: list[MatrixReport] = []
    with TensorFiles(plan.source.folder) as dense, TensorFiles(work.model) as pruned:
        layout, finished = Layout.of(dense, model), Layout.of(pruned, model)
        if batches:
            _load_surroundings(layout, decoder.blocks, plan)

        def load(block: Block, source: Layout = layout) -> None:
            with _timed(phases, "loading"):
                source.load(source.names(f"{block.name}."), plan.dtype, plan.device)
                _give_biases(block, plan)

        def load_as_propagated(block: Block) -> None:
            # Blocks that an interrupted run finished are run as that run propagated them.
            was_done = decoder.blocks.index(block) < len(work.blocks) and plan.propagate == "pruned"
            load(block, finished if was_done else layout)

        if plan.allocation in allocate.MEASURED and work.shares is None:
            hidden = HiddenStates(len(batches), plan.device, plan.estimate.hidden, work.scratch)
            with (
                _timed(phases, "allocation"),
                Walk(model, decoder, batches, plan.device, hidden=hidden, load=load) as w,
            ):
                work.remember(_measured_shares(w, layout, plan, team, tell))
            place(model, plan.device)  # what surrounds the blocks; a walk leaves it on the CPU
        shares = plan.shares if work.shares is None else work.shares
        _check_shapes([m for b in decoder.blocks for m in _chosen(layout, b, plan)], plan.selection, shares)
        if plan.method.needs == "nothing":
            batches = []  # such a method does not run the model
        hidden = HiddenStates(len(batches), plan.device, plan.estimate.hidden, work.scratch)
        run = _Run(plan, layout, finished, work, team, shares, phases)
        with Walk(model, decoder, batches, plan.device, hidden=hidden, load=load_as_propagated) as walk:
            for index in range(total):
                tell({"done": index, "total": total, "phase": "pruning"})
                is_last = index + 1 == total
                if index < len(work.blocks):
                    reports = _recorded(work.blocks[index])
                    if not is_last:
                        with _timed(phases, "replaying"):
                            walk.advance(index)
                else:
                    reports = _work_on(index, walk, run)
                    if plan.propagate == "pruned" and not is_last:
                        with _timed(phases, "propagation"):
                            walk.advance(index)
                walk.finish(index)
                matrices.extend(reports)
    tell({"done": total, "total": total, "phase": "saving"})
    return matrices


@dataclass(frozen=True, slots=True)
class _Run:
    """What the work on every block needs. ``layout``: of the dense checkpoint; ``finished``: of the one in the making.

    ``shares``: each matrix's own sparsity by label; None where all have the asked one.
    """

    plan: _Plan
    layout: Layout
    finished: Layout
    work: WorkFolder
    team: Team
    shares: Mapping[str, float] | None
    phases: dict[str, float]


def _chosen(layout: Layout, block: Block, plan: _Plan) -> list[Matrix]:
    return [m for m in layout.matrices(block.weights.values()) if m.key in plan.chosen]


def _measured_shares(walk: Walk, layout: Layout, plan: _Plan, team: Team, tell: OnProgress) -> dict[str, float]:
    """How much of each matrix goes, after a survey of the dense model."""
    assert plan.selection.sparsity is not None
    matrices = [_chosen(layout, block, plan) for block in walk.decoder.blocks]
    listed = [m for chosen in matrices for m in chosen]
    biased = {m.label for m in listed if m.reads in plan.carriers.linears}
    measure = surveys.measure_of(plan.allocation, plan.method, plan.selection, plan.damping, biased)
    total = len(matrices)
    measured = surveys.survey(
        walk, matrices, measure, team, lambda index: tell({"done": index, "total": total, "phase": "surveying"})
    )
    allocated = _allocated(walk.decoder, listed)
    return allocate.shares(plan.allocation, measured, allocated, plan.selection.sparsity, plan.selection.group)


def _give_biases(block: Block, plan: _Plan) -> None:
    """Zeros where the config's switches make transformers expect a bias that the dense model does not have."""
    import torch
    from torch import nn

    for name, linear in block.linears.items():
        bias: Any = linear.bias
        if plan.bias_names.get(name) in plan.added and bias.device.type == "meta":
            zeros = torch.zeros(bias.shape, dtype=plan.dtype, device=plan.device)
            linear.bias = nn.Parameter(zeros, requires_grad=False)


def _work_on(index: int, walk: Walk, run: _Run) -> list[MatrixReport]:
    """Prune one block and write it."""
    plan, work, team, phases = run.plan, run.work, run.team, run.phases
    block = walk.ready(index)
    chosen = _chosen(run.layout, block, plan)
    found: dict[str, InputStatistics] = {}
    if walk.batches and (chosen or plan.propagate == "dense"):
        with _timed(phases, "statistics"):
            needs, only = plan.method.needs, {m.reads for m in chosen}
            found = walk.statistics(index, needs, keep=plan.propagate == "dense", only=only)
            found = team.add_up(found, {m.reads: m.shape[1] for m in chosen}, needs, plan.device)
    with _timed(phases, "pruning"):
        reports = _prune_block(chosen, found, run)
    with _timed(phases, "writing"):
        record = {"block": block.name, "matrices": [asdict(r) for r in reports], "resumed_at": work.resumed_at}
        work.finish_block(_changed(run, block, chosen), record)
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


def _changed(run: _Run, block: Block, chosen: Sequence[Matrix]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors that hold the chosen matrices and their biases, as they now are."""
    names = {m.name for m in chosen}
    for name, tensor in run.layout.to_stored({w.name: w.parameter.data for w in block.weights.values()}):
        if name in names:
            yield name, tensor
    for reads in sorted({m.reads for m in chosen} & run.plan.carriers.linears):
        linear: Any = block.linears[reads]
        yield run.plan.bias_names[reads], linear.bias.data


def _recorded(record: Mapping[str, Any]) -> list[MatrixReport]:
    """The reports of a block that an interrupted run finished."""

    def pair(values: Sequence[int] | None) -> tuple[int, int] | None:
        return None if values is None else (values[0], values[1])

    return [MatrixReport(**{**m, "shape": pair(m["shape"]), "rows": pair(m["rows"])}) for m in record["matrices"]]


def _prune_block(
    matrices: Sequence[Matrix], statistics: Mapping[str, InputStatistics], run: _Run
) -> list[MatrixReport]:
    """Prune a block's matrices in place, those with one input together; reports in the given order."""
    team = run.team
    together: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        inputs = statistics.get(matrix.reads)
        together.setdefault(id(inputs) if inputs is not None else id(matrix), []).append(matrix)
    groups = list(together.values())
    owners = team.owners([sum(m.shape[0] for m in g) * g[0].shape[1] ** 2.0 + g[0].shape[1] ** 3.0 for g in groups])
    reports: dict[Any, MatrixReport] = {}
    for members, owner in zip(groups, owners, strict=True):
        if owner == team.rank:
            reports.update(_prune_group(members, statistics.get(members[0].reads), run))
    for members, owner in zip(groups, owners, strict=True):
        for matrix in members:
            team.tell(matrix.values(), owner)
            if matrix.reads in run.plan.carriers.linears:
                team.tell(_bias(matrix), owner)
    reports = team.gather(reports)
    return [reports[m.key] for m in matrices]


def _bias(matrix: Matrix) -> Tensor:
    """A view of what its linear's bias adds to the matrix's outputs."""
    module: Any = matrix.weight.module
    return module.bias.data[slice(*matrix.in_rows)]


def _prune_group(
    members: Sequence[Matrix], inputs: InputStatistics | None, run: _Run
) -> dict[tuple[Any, ...], MatrixReport]:
    """Prune matrices that read one input, in place; reports by the matrices' keys."""
    weights = [m.values().detach().float() for m in members]
    if not all(bool(w.isfinite().all()) for w in weights):
        raise PruningError(f"{members[0].label} holds values that are not finite: the checkpoint is broken")
    plan, method = run.plan, run.plan.method
    if method.needs != "nothing" and (inputs is None or not inputs.weight):
        # An expert that no calibration token reached: nothing is known of its inputs, so weights are all there is.
        method, inputs = methods.find("magnitude"), None
    selections = [_own(plan.selection, m, run.shares) for m in members]
    biased = [m.reads in plan.carriers.linears for m in members]
    try:
        results = methods.prune_shared(method, weights, inputs, selections, plan.damping, can_have_bias=biased)
    except PruningError as error:
        raise PruningError(f"{members[0].label}: {error}") from error
    if method is not plan.method:
        results = [replace(r, instead=method.name) for r in results]
    return {m.key: _write(m, r, inputs, run) for m, r in zip(members, results, strict=True)}


def _write(
    matrix: Matrix,
    result: methods.Pruned,
    statistics: InputStatistics | None,
    run: _Run,
) -> MatrixReport:
    """Cast once, to the dtype in the source's file, mask again, and count what will be saved."""
    import torch

    weight = result.weight.to(run.plan.dtypes[matrix.name]).masked_fill_(result.mask, 0.0)
    if not bool(weight.isfinite().all()):
        raise PruningError(
            f"the pruned weights of {matrix.label} are not finite: use more calibration tokens or raise --damping"
        )
    place = matrix.values()
    with torch.no_grad():
        place.copy_(weight)  # as wide or wider: see _plan
    if result.bias_shift is not None:
        _shift_bias(matrix, result.bias_shift, run.plan)
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
        asked=None if run.shares is None else run.shares[matrix.label],
        bias=result.bias_shift is not None,
        instead=result.instead,
    )


def _shift_bias(matrix: Matrix, shift: Tensor, plan: _Plan) -> None:
    """Add to the linear's bias, rounded to what the file will hold, so that later blocks see that."""
    import torch

    place = _bias(matrix)
    bias = (place.to(shift) + shift).to(plan.dtypes[plan.bias_names[matrix.reads]])
    if not bool(bias.isfinite().all()):
        raise PruningError(f"the corrected bias of {matrix.reads} is not finite: its inputs are too large; use wanda")
    with torch.no_grad():
        place.copy_(bias)


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
    if instead := [m for m in matrices if m.instead and m.n_tokens]:
        warnings.append(
            f"{len(instead)} matrices, such as {instead[0].name}, were pruned by {instead[0].instead}, which erred "
            f"less there than {plan.method.name}"
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
            "token_weights": _hash_of(plan.calibration.weights) if uses_data else None,
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
        # Where the file lay is nobody else's business.
        allocation=plan.allocation if plan.allocation in allocate.RULES else f"file:{Path(plan.allocation).name}",
        biases=tuple(sorted(plan.bias_names.values())),
        switches=plan.carriers.switches,
    )


def _about_experts(plan: _Plan, matrices: Sequence[MatrixReport]) -> list[str]:
    """Warnings about experts that the router sent few or no calibration tokens."""
    warnings = []
    if without := [m for m in matrices if m.instead and not m.n_tokens]:
        warnings.append(
            f"{len(without)} expert matrices got no calibration token and were pruned by {without[0].instead}, such as "
            f"{_place(without[0])}; use more tokens"
        )
    few = [m for m in matrices if 0 < m.n_tokens < m.shape[1] <= plan.calibration.n_counted_tokens]
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
    allocated = "" if report.allocation == "uniform" else f", shared out by {report.allocation}"
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
        "zeros": f"{report.realised_sparsity:.4f} of {len(report.matrices)} matrices in the decoder blocks{allocated}",
        **data,
        "damping": "-" if report.damping is None else f"{report.damping:g} of the mean diagonal",
        "took": f"{report.seconds:.0f} s on {report.device}",
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"# {report.base['model']}, pruned with calset\n\n| | |\n|---|---|\n{table}\n\n"
        f"{_biases_section(report)}Embeddings, norms and lm_head are the dense model's, bit for bit. "
        f"Zeros are stored as ordinary weights: the "
        f"checkpoint is as large and as fast as the dense one where the runtime does not use sparsity. "
        f"`{checkpoint.RECORD}` lists every matrix; `calset verify` proves it.\n"
    )


def _biases_section(report: PruneReport) -> str:
    """What a reader must know before loading a model with corrected biases."""
    if not report.biases:
        return ""
    turned_on = f", of which config.json turned some on ({', '.join(report.switches)})" if report.switches else ""
    return f"{len(report.biases)} biases take over the mean of the pruned weights{turned_on}. "

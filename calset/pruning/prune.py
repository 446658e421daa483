"""Prune a model against a calibration subset: the order of checks and work, and the report.

Everything that can be known fails before a weight is loaded. Then block by block (``walk``): statistics, prune, next.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from calset.errors import InputError, PruningError
from calset.pruning import allocate, biases, checkpoint, methods, survey
from calset.pruning.calibration import BATCH_TOKENS, Calibration, Tokens, read
from calset.pruning.masks import BLOCK_SIZE, Group, Pattern, Selection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from calset.catalog.records import Subset
    from calset.pruning.stats import InputStatistics
    from calset.pruning.walk import Decoder

Propagate = Literal["pruned", "dense"]
DAMPING = 0.01  # of the mean diagonal
MAX_DEVIATION = 0.005  # of a matrix's share of zeros from the asked one, before it is worth a warning
# Events: {"done": blocks, "total": blocks, "phase": "loading" | "pruning" | "saving"}
OnProgress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One pruned matrix. ``error``: ||X(W-W')^T||^2 / ||X W^T||^2 on the calibration inputs, where a Gram was kept."""

    name: str
    shape: tuple[int, int]
    n_pruned: int  # chosen by the mask
    n_zeros: int  # in the saved matrix: the mask, dead inputs and weights that were zero before
    sparsity: float  # n_zeros / size
    n_tokens: int
    damping: float | None = None
    error: float | None = None
    asked: float | None = None  # its own sparsity, where an allocation shares them out
    bias: bool = False  # its linear's bias was changed or added
    instead: str | None = None  # "magnitude": it erred less than the method, and was kept


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
    seconds: float
    phases: Mapping[str, float]
    device: str
    versions: Mapping[str, str]
    warnings: Sequence[str] = ()
    allocation: str = "uniform"  # or owl, search, file:NAME
    biases: Sequence[str] = ()  # tensors that were changed or added
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
    device: torch.device
    dtypes: Mapping[str, torch.dtype]  # of the matrices in the source's files, by tensor name
    allocation: str
    shares: Mapping[str, float] | None  # by linear, of an allocation that is known before weights load
    carriers: biases.Carriers
    warnings: list[str] = field(default_factory=list)


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
    force: bool = False,
    progress: OnProgress | None = None,
) -> PruneReport:
    """Prune every linear layer of every decoder block, and save an ordinary checkpoint with ``pruning.json``.

    Embeddings, norms and lm_head stay bit-equal.

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
        force: accept a subset of another tokenizer.

    Raises:
        InputError: anything asked that cannot be done, before weights load.
        PruningError: non-finite activations, a singular Gram, too little memory, a full disk; nothing is left at
            ``out``.
        CalsetError: too little free disk to begin.
    """
    began = time.monotonic()
    parsed = Pattern.parse(pattern) if pattern is not None else None
    chosen = methods.find(method)
    selection = Selection(sparsity, parsed, group or chosen.group, block_size)
    _check_options(propagate, damping, batch_tokens)
    with _enough_memory(batch_tokens):
        plan = _plan(
            model,
            calibration,
            Path(out),
            chosen,
            selection,
            tokens,
            propagate,
            damping,
            max_length,
            device,
            force,
            str(allocation),
            token_weights,
        )
        plan.warnings.extend(_without_effect(chosen, parsed, group, damping))
        tell = progress or (lambda event: None)
        phases: dict[str, float] = {"checking": time.monotonic() - began}
        with _timed(phases, "loading"):
            tell({"done": 0, "total": None, "phase": "loading"})
            loaded = plan.source.load(_load_dtype(plan.dtypes))
        matrices = _prune_blocks(loaded, plan, batch_tokens, phases, tell)
        report = _report(plan, matrices, phases, time.monotonic() - began)
        checkpoint.save(loaded, plan.source, plan.out, report.as_dict(), card_section(report))
    return report


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
            f"out of memory: lower --batch-tokens (it was {batch_tokens}), cut the samples with --max-length, or on a "
            f"GPU use --device cpu; nothing was written"
        ) from error


def _load_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds every matrix exactly: the config's may round them."""
    import torch

    return reduce(torch.promote_types, set(dtypes.values()))


def _without_effect(method: methods.Method, pattern: Pattern | None, group: str | None, damping: float) -> list[str]:
    warnings = []
    if pattern is not None and group is not None:
        warnings.append(f"--group {group} has no effect with a pattern: weights compete within {pattern.m} columns")
    if method.needs != "gram" and damping != DAMPING:
        warnings.append(f"--damping {damping:g} has no effect: {method.name} has no damping")
    return warnings


def _check_options(propagate: str, damping: float, batch_tokens: int) -> None:
    if propagate not in get_args(Propagate):
        raise InputError(f"propagate must be one of {', '.join(get_args(Propagate))}, not {propagate!r}")
    if not 0 < damping <= 1e4:
        raise InputError(f"damping is a positive share of the mean diagonal, such as 0.01, not {damping}")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")


def _plan(
    model: str | Path,
    subset: Subset,
    out: Path,
    method: methods.Method,
    selection: Selection,
    tokens: Tokens,
    propagate: Propagate,
    damping: float,
    max_length: int | None,
    device: str | None,
    force: bool,
    allocation: str,
    token_weights: Mapping[str, Sequence[float]] | None,
) -> _Plan:
    source = checkpoint.open_source(model)
    uses_data = _uses_data(method, allocation)
    warnings = _check_subset(subset, source, uses_data, force)
    calibration = read(
        subset,
        tokens,
        max_positions=source.max_positions,
        max_length=max_length,
        vocabulary_size=getattr(source.config.get_text_config(), "vocab_size", None),
        token_weights=token_weights,
    )
    if uses_data:
        warnings.extend(calibration.warnings)
    decoder = _decoder(source.skeleton())
    linears = decoder.linears()
    shares = _known_shares(allocation, decoder, selection)
    for name, linear in linears.items():
        at = selection if shares is None else replace(selection, sparsity=shares[name])
        at.check_shape(linear.out_features, linear.in_features, name)
    if allocation == "uniform":
        warnings.extend(_rounded(selection, linears))
    carriers = biases.find_carriers(source.config) if method.biased else biases.Carriers(frozenset(), {})
    warnings.extend(_bias_warnings(method, carriers, linears))
    warnings.extend(_too_few_tokens(method, linears, calibration.n_counted_tokens))
    checkpoint.check_out(out, source)
    return _Plan(
        source=source,
        subset=subset,
        out=out,
        method=method,
        selection=selection,
        calibration=calibration,
        tokens=tokens,
        propagate=propagate,
        damping=damping,
        max_length=max_length,
        device=_device(device),
        dtypes=source.matrix_dtypes({f"{name}.weight" for name in linears}),
        allocation=allocation,
        shares=shares,
        carriers=carriers,
        warnings=warnings,
    )


def _decoder(model: nn.Module) -> Decoder:
    from calset.pruning.walk import find_decoder

    return find_decoder(model)


def _matrices(decoder: Decoder) -> list[allocate.Matrix]:
    return [
        allocate.Matrix(name, block.name, linear.out_features, linear.in_features)
        for block in decoder.blocks
        for name, linear in block.linears.items()
    ]


def _known_shares(allocation: str, decoder: Decoder, selection: Selection) -> dict[str, float] | None:
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
    return allocate.read_ratios(Path(allocation), _matrices(decoder), selection.sparsity)


def _uses_data(method: methods.Method, allocation: str) -> bool:
    return method.needs != "nothing" or allocation in allocate.MEASURED


def _bias_warnings(method: methods.Method, carriers: biases.Carriers, linears: Mapping[str, nn.Linear]) -> list[str]:
    """What a method that corrects biases can do on this model.

    Raises:
        InputError: nothing.
    """
    if not method.biased:
        return []
    without = [name for name in linears if name not in carriers.linears]
    if len(without) == len(linears):
        raise InputError(
            f"{method.name} corrects biases, and this model has none and cannot be given any that would be loaded "
            f"again: use wanda"
        )
    warnings = []
    if without:
        warnings.append(
            f"{len(without)} of {len(linears)} linears, such as {without[0]}, can have no bias that would be loaded "
            f"again: they are pruned by {method.name}'s score without one, which is wanda's"
        )
    added = [name for name in carriers.linears if linears[name].bias is None]
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


def _too_few_tokens(method: methods.Method, linears: Mapping[str, nn.Linear], n_tokens: int) -> list[str]:
    wide = [linear.in_features for linear in linears.values() if linear.in_features > n_tokens]
    if method.needs != "gram" or not wide:
        return []
    return [
        f"{len(wide)} matrices have more inputs (up to {max(wide)}) than there are calibration tokens ({n_tokens}): "
        f"their Gram matrices are rank-deficient and only damping makes them invertible; use more tokens"
    ]


def _rounded(selection: Selection, linears: Mapping[str, nn.Linear]) -> list[str]:
    """A warning when whole weights cannot make up the asked share (narrow rows)."""
    asked = selection.sparsity
    if asked is None:
        return []
    shares = {
        name: selection.n_pruned(linear.out_features, linear.in_features) / linear.weight.numel()
        for name, linear in linears.items()
    }
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
    model: nn.Module, plan: _Plan, batch_tokens: int, phases: dict[str, float], tell: OnProgress
) -> list[MatrixReport]:
    from calset.pruning.walk import Walk

    decoder = _decoder(model)
    _give_biases(decoder, plan)
    # A method that needs no data does not run the model.
    needs = plan.method.needs
    batches = [] if needs == "nothing" else plan.calibration.batches(batch_tokens)
    with _timed(phases, "allocation"):
        selections = _selections(model, decoder, plan, batch_tokens)
    matrices: list[MatrixReport] = []
    total = len(decoder.blocks)
    with Walk(model, decoder, batches, plan.device) as walk:
        for index, block in enumerate(decoder.blocks):
            tell({"done": index, "total": total, "phase": "pruning"})
            shared: dict[str, InputStatistics | None] = dict.fromkeys(block.linears)
            if batches:
                with _timed(phases, "statistics"):
                    shared.update(walk.statistics(index, needs, keep=plan.propagate == "dense"))
            with _timed(phases, "pruning"):
                matrices.extend(_prune_block(block.linears, shared, plan, selections))
            if batches and plan.propagate == "pruned" and index + 1 < total:
                with _timed(phases, "propagation"):
                    walk.advance(index)
            walk.finish(index)
    tell({"done": total, "total": total, "phase": "saving"})
    return matrices


def _selections(model: nn.Module, decoder: Decoder, plan: _Plan, batch_tokens: int) -> dict[str, Selection]:
    """How much of each linear goes, after a survey of the dense model where the allocation asks for one."""
    selection, matrices = plan.selection, _matrices(decoder)
    shares = plan.shares
    if plan.allocation in allocate.MEASURED:
        assert selection.sparsity is not None
        shares = _measured_shares(model, decoder, matrices, plan, batch_tokens)
    if shares is None:
        return {matrix.name: selection for matrix in matrices}
    found = {name: replace(selection, sparsity=share) for name, share in shares.items()}
    for matrix in matrices:
        found[matrix.name].check_shape(matrix.rows, matrix.width, matrix.name)
    return found


def _measured_shares(
    model: nn.Module, decoder: Decoder, matrices: Sequence[allocate.Matrix], plan: _Plan, batch_tokens: int
) -> dict[str, float]:
    selection, batches = plan.selection, plan.calibration.batches(batch_tokens)
    assert selection.sparsity is not None
    measure, needs = survey.measure_of(plan.allocation, plan.method, selection, plan.damping, plan.carriers.linears)
    found = survey.survey(model, decoder, batches, plan.device, needs, measure)
    measured = {block.name: values for block, values in zip(decoder.blocks, found, strict=True)}
    return allocate.shares(plan.allocation, measured, matrices, selection.sparsity, selection.group)


def _prune_block(
    linears: Mapping[str, nn.Linear],
    shared: Mapping[str, InputStatistics | None],
    plan: _Plan,
    selections: Mapping[str, Selection],
) -> list[MatrixReport]:
    """Prune a block's matrices in place, those with one input together; reports in the model's order."""
    reports: dict[str, MatrixReport] = {}
    for names in survey.grouped(shared):
        statistics = shared[names[0]]
        weights = [linears[name].weight.detach().to(plan.device).float() for name in names]
        try:
            results = methods.prune_shared(
                plan.method,
                weights,
                statistics,
                [selections[name] for name in names],
                plan.damping,
                can_have_bias=[name in plan.carriers.linears for name in names],
            )
        except PruningError as error:
            raise PruningError(f"{names[0]}: {error}") from error
        for name, result in zip(names, results, strict=True):
            asked = selections[name].sparsity if plan.allocation != "uniform" else None
            reports[name] = _write(name, linears[name], result, statistics, plan.dtypes[f"{name}.weight"], asked)
    return [reports[name] for name in linears]


def _write(
    name: str,
    linear: nn.Linear,
    result: methods.Pruned,
    statistics: InputStatistics | None,
    dtype: torch.dtype,
    asked: float | None,
) -> MatrixReport:
    """Cast once, to the dtype in the source's file, mask again, and count what will be saved."""
    import torch

    weight = result.weight.to(dtype).masked_fill_(result.mask, 0.0)
    if not bool(weight.isfinite().all()):
        raise PruningError(
            f"the pruned weights of {name} are not finite: use more calibration tokens or raise --damping"
        )
    with torch.no_grad():
        linear.weight.copy_(weight)  # as wide or wider: see _load_dtype
    if result.bias_shift is not None:
        _shift_bias(name, linear, result.bias_shift, dtype)
    rows, width = linear.weight.shape
    n_zeros = int((linear.weight == 0).sum())
    n_tokens = statistics.n_tokens if statistics is not None else 0
    return MatrixReport(
        name=f"{name}.weight",
        shape=(rows, width),
        n_pruned=int(result.mask.sum()),
        n_zeros=n_zeros,
        sparsity=n_zeros / (rows * width),
        n_tokens=n_tokens,
        damping=result.damping,
        error=result.error,
        asked=asked,
        bias=result.bias_shift is not None,
        instead=result.instead,
    )


def _shift_bias(name: str, linear: nn.Linear, shift: Tensor, dtype: torch.dtype) -> None:
    """Add to the linear's bias, rounded to what the file will hold, so that later blocks see that."""
    import torch

    bias = (linear.bias.detach().to(shift) + shift).to(dtype)
    if not bool(bias.isfinite().all()):
        raise PruningError(f"the corrected bias of {name} is not finite: its inputs are too large; use wanda")
    with torch.no_grad():
        linear.bias.copy_(bias)


def _give_biases(decoder: Decoder, plan: _Plan) -> None:
    """Zeros where the config's switches make transformers expect a bias that the dense model does not have."""
    import torch
    from torch import nn

    for name, linear in decoder.linears().items():
        if name in plan.carriers.linears and linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]), requires_grad=False)


# --- the report -------------------------------------------------------------------------------------------------


def _report(plan: _Plan, matrices: Sequence[MatrixReport], phases: Mapping[str, float], seconds: float) -> PruneReport:
    selection, subset, source = plan.selection, plan.subset, plan.source
    uses_data = _uses_data(plan.method, plan.allocation)
    raised = [m for m in matrices if m.damping is not None and m.damping > plan.damping]
    warnings = list(plan.warnings)
    if raised:
        warnings.append(
            f"damping was raised for {len(raised)} matrices, such as {raised[0].name} ({raised[0].damping:g})"
        )
    if instead := [m for m in matrices if m.instead]:
        warnings.append(
            f"{len(instead)} matrices, such as {instead[0].name}, were pruned by {instead[0].instead}, which erred "
            f"less there than {plan.method.name}"
        )
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
        },
        matrices=tuple(matrices),
        seconds=seconds,
        phases=dict(phases),
        device=_device_name(plan.device),
        versions=_versions(),
        warnings=tuple(warnings),
        # Where the file lay is nobody else's business.
        allocation=plan.allocation if plan.allocation in allocate.RULES else f"file:{Path(plan.allocation).name}",
        biases=tuple(sorted(f"{name}.bias" for name in plan.carriers.linears)),
        switches=plan.carriers.switches,
    )


def _hash_of(weights: Sequence[Sequence[float]] | None) -> str | None:
    """What tells one set of token weights from another: they are no part of the subset's content hash."""
    return None if weights is None else hashlib.sha256(json.dumps([list(w) for w in weights]).encode()).hexdigest()


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
        data = {
            "calibration": f"{calibration['subset']}, content hash `{calibration['content_hash']}`",
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

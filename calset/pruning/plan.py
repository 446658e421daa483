"""Everything that can be known of a pruning before a weight is loaded: checked, refused, or put into a plan.

Must not know: how a block is pruned.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import InputError
from calset.pruning.blockwise import distributed, workfolder
from calset.pruning.blockwise.statistics import Needs
from calset.pruning.calibration import BATCH_TOKENS, CPU_BATCH_TOKENS, Calibration, TokenWeights, read
from calset.pruning.estimate import Estimate, estimate
from calset.pruning.methods import allocation, registry
from calset.pruning.methods.masks import Pattern, Selection
from calset.pruning.methods.sparsegpt import has_triton
from calset.pruning.model import checkpoint
from calset.pruning.model.decoder import find_decoder
from calset.pruning.model.layout import Layout, Matrix
from calset.pruning.model.tensorfiles import TensorFiles, exact_dtype
from calset.pruning.report_parts import device_name, hash_of, versions
from calset.pruning.settings import DAMPING, PruneSettings, compiled

if TYPE_CHECKING:
    import torch

    from calset.catalog.records import Subset
    from calset.pruning.model.decoder import Decoder

MAX_DEVIATION = 0.005  # of a matrix's share of zeros from the asked one, before it is worth a warning


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of a pruning: its settings, and what follows from them, the model and the samples before weights load.

    Attributes:
        batch_tokens: positions a micro-batch, as set or as suits the device.
        identity: all that decides the result; an interrupted run is continued by one with the same.
    """

    settings: PruneSettings
    source: checkpoint.Source
    subset: Subset
    method: registry.Method
    selection: Selection
    calibration: Calibration
    batch_tokens: int
    device: torch.device
    dtype: torch.dtype  # of the model while it runs
    dtypes: Mapping[str, torch.dtype]  # of the matrices in the source's files, by tensor name
    chosen: frozenset[tuple[Any, ...]]  # the keys of the matrices to prune
    left_dense: Sequence[str]
    shares: Mapping[str, float] | None  # by label, of an allocation that is known before weights load
    estimate: Estimate
    identity: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)


def _without_effect(settings: PruneSettings, method: registry.Method, pattern: Pattern | None) -> list[str]:
    group, damping, warnings = settings.group, settings.damping, []
    if pattern is not None and group is not None:
        warnings.append(f"--group {group} has no effect with a pattern: weights compete within {pattern.m} columns")
    if Needs.GRAM not in method.needs and damping != DAMPING:
        warnings.append(f"--damping {damping:g} has no effect: {method.name} has no damping")
    return warnings


def make_plan(settings: PruneSettings, subset: Subset, token_weights: TokenWeights | None) -> Plan:
    """Check everything that can be checked before weights load.

    Args:
        token_weights: see ``calibration.read``.

    Raises:
        InputError: anything that cannot be done.
        CalsetError: too little free disk.
    """
    import torch

    method, selection = registry.find(settings.method), settings.selection
    source = checkpoint.open_source(settings.model)
    warnings = check_subset(subset, source, settings)
    samples = read_samples(subset, source, settings, token_weights)
    if settings.uses_data:
        warnings.extend(samples.warnings)
    device = find_device(settings.device)
    batch_tokens = batch_positions(settings.batch_tokens, device)
    with TensorFiles(source.folder) as files:
        skeleton = source.skeleton()
        decoder = find_decoder(skeleton, allow_partial=settings.allow_partial)
        layout = Layout.of(files, skeleton)
        layout.check(torch.float32)
        blocks = [layout.matrices(block.weights.values()) for block in decoder.blocks]
        every = [matrix for matrices in blocks for matrix in matrices]
        matrices = choose_matrices(every, settings)
        shares = _known_shares(settings, decoder, matrices, selection)
        check_shapes(matrices, selection, shares)
        dtypes = {name: files.stored[name].torch_dtype for name in {m.name for m in matrices}}
        dtype = exact_dtype(dtypes.values())  # the config's may round them
        needed = estimate(
            skeleton, decoder, files, matrices, samples, method, settings.rule, settings.propagate, dtype, device,
            batch_tokens, settings.hidden, settings.folder,
        )  # fmt: skip
    if settings.rule == "uniform":
        warnings.extend(_rounded(selection, matrices))
    warnings.extend(_too_few_tokens(method, matrices, samples.n_counted_tokens))
    warnings.extend(_without_effect(settings, method, selection.pattern))
    if unknown := decoder.unknown():
        warnings.append(f"{len(unknown)} decoder weights are not understood and stay dense, such as {unknown[0]}")
    warnings.extend(_not_loaded(layout))
    keys = frozenset(m.key for m in matrices)
    identity = identity_of(settings, source, subset, samples, device)
    identity["allocation"] = _told_apart(settings.rule, shares)
    workfolder.check_out(settings.folder, needed.disk_bytes)
    workfolder.check_settings(settings.folder, identity)
    return Plan(
        settings=settings,
        source=source,
        subset=subset,
        method=method,
        selection=selection,
        calibration=samples,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        dtypes=dtypes,
        chosen=keys,
        left_dense=[*(m.label for m in every if m.key not in keys), *unknown],
        shares=shares,
        estimate=replace(needed, disk_there=workfolder.held_bytes(settings.folder)),
        identity=identity,
        warnings=warnings,
    )


def read_samples(
    subset: Subset, source: checkpoint.Source, settings: PruneSettings, token_weights: TokenWeights | None
) -> Calibration:
    """Read the calibration samples as the model takes them; see ``calibration.read``."""
    return read(
        subset,
        settings.tokens,
        max_positions=source.max_positions,
        max_length=settings.max_length,
        vocabulary_size=getattr(source.config.get_text_config(), "vocab_size", None),
        token_weights=token_weights,
    )


def choose_matrices(matrices: Sequence[Matrix], settings: PruneSettings) -> list[Matrix]:
    """Return the matrices to prune, by their stored names and their modules'.

    Raises:
        InputError: a pattern that matches nothing, or patterns that leave nothing.
    """
    include, exclude = compiled(settings.include), compiled(settings.exclude)
    for pattern in (*include, *exclude):
        if not any(_matches(pattern, m) for m in matrices):
            raise InputError(
                f"no matrix of the decoder has {pattern.pattern!r} in its name (they are called "
                f"{matrices[0].label} to {matrices[-1].label})"
            )
    chosen = [
        m
        for m in matrices
        if (not include or any(_matches(p, m) for p in include)) and not any(_matches(p, m) for p in exclude)
    ]
    if not chosen:
        raise InputError("--include and --exclude leave no matrix to prune")
    return chosen


def _matches(pattern: re.Pattern[str], matrix: Matrix) -> bool:
    return bool(pattern.search(matrix.label) or pattern.search(matrix.reads))


def identity_of(
    settings: PruneSettings,
    source: checkpoint.Source,
    subset: Subset,
    samples: Calibration,
    device: torch.device,
) -> dict[str, Any]:
    """Return all that decides the result: only a run with the same may go on where one was interrupted.

    The work folder of a run keeps these names and values as JSON.
    """
    import torch

    return {
        **settings.deciding(),
        "token_weights": hash_of(samples.weights),
        "batch_tokens": batch_positions(settings.batch_tokens, device),
        "model revision": source.revision,
        "calibration": subset.content_hash,
        # Another GPU, or another number of threads, rounds differently.
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "kernel": has_triton(device) if device.type == "cuda" else None,
        "processes": distributed.n_processes(),  # sums come out in another order
        "versions": versions(),
    }


def as_allocated(decoder: Decoder, matrices: Sequence[Matrix]) -> list[allocation.Matrix]:
    blocks = {name: block.name for block in decoder.blocks for name in block.weights}
    return [allocation.Matrix(m.label, blocks[m.weight.name], *m.shape, m.reads) for m in matrices]


def _known_shares(
    settings: PruneSettings, decoder: Decoder, matrices: Sequence[Matrix], selection: Selection
) -> dict[str, float] | None:
    """The sparsities of a file; None for those that are uniform or measured later.

    Raises:
        InputError: no such file or rule.
    """
    if settings.rule in allocation.RULES:
        return None
    assert selection.sparsity is not None
    return allocation.read_ratios(Path(settings.rule), as_allocated(decoder, matrices), selection.sparsity)


def _told_apart(allocation: str, shares: Mapping[str, float] | None) -> str:
    """What tells one allocation from another: of a file what it says, not where it lies."""
    if shares is None:
        return allocation
    return f"ratios {hashlib.sha256(json.dumps(shares).encode()).hexdigest()[:16]}"


def own_selection(selection: Selection, matrix: Matrix, shares: Mapping[str, float] | None) -> Selection:
    """How much of one matrix goes."""
    return selection if shares is None else replace(selection, sparsity=shares[matrix.label])


def check_shapes(matrices: Sequence[Matrix], selection: Selection, shares: Mapping[str, float] | None) -> None:
    for matrix in matrices:
        own_selection(selection, matrix, shares).check_shape(*matrix.shape, matrix.label.removesuffix(".weight"))


def check_subset(subset: Subset, source: checkpoint.Source, settings: PruneSettings) -> list[str]:
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
        if not settings.force:
            raise InputError(
                f"{problem}: its token ids would mean other text; select from this model's own traces, or --force"
            )
        warnings.append(f"{problem} (forced)")
    if not settings.uses_data:
        return warnings
    # A Hub model given as its snapshot folder goes by the commit in the folder's name.
    if subset.model_revision and subset.model_revision not in (source.revision, source.folder.name):
        warnings.append(
            f"the subset {subset.ref} was made by {subset.model} ({subset.model_revision[:12]}), not by {source.name} "
            f"({source.revision[:12]}): a model's own traces calibrate its pruning best"
        )
    return warnings


def _not_loaded(layout: Layout) -> list[str]:
    """A warning about matrices that transformers leaves in the files, such as those for multi-token prediction."""
    names = [n for n, stored in layout.files.stored.items() if n not in layout.target and len(stored.shape) > 1]
    if not names:
        return []
    return [
        f"{len(names)} matrices of the checkpoint, such as {names[0]}, are no part of the model that transformers "
        f"loads from it (layers for multi-token prediction, an image tower): they are copied and stay dense"
    ]


def _too_few_tokens(method: registry.Method, matrices: Sequence[Matrix], n_tokens: int) -> list[str]:
    wide = [m.shape[1] for m in matrices if m.shape[1] > n_tokens]
    if Needs.GRAM not in method.needs or not wide:
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


def find_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA when there is one, else the CPU.

    Of several processes (torchrun) each has a GPU of its own, by number: anything asked of a bare "cuda" before that is
    chosen would be asked of the first GPU, and open it.

    Raises:
        InputError: it cannot be used.
    """
    import torch

    if name is None:
        return distributed.own_gpu(torch.device("cuda")) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = distributed.own_gpu(torch.device(name))
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"the device {name!r} cannot be used: {reason}") from error
    return device


def batch_positions(given: int | None, device: torch.device) -> int:
    """Positions a micro-batch: those given, or what suits the device."""
    return given or (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS)

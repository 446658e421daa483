"""Everything that can be known of a pruning before a weight is loaded: checked, refused, or put into a plan.

Must not know: how a block is pruned, how the result is reported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from calset.errors import InputError
from calset.pruning import allocate, checkpoint, distributed, methods, workfolder
from calset.pruning.calibration import BATCH_TOKENS, CPU_BATCH_TOKENS, Calibration, Tokens, read
from calset.pruning.decoder import find_decoder
from calset.pruning.estimate import Estimate, estimate
from calset.pruning.hidden import Where
from calset.pruning.layout import Layout, Matrix
from calset.pruning.masks import Group, Pattern, Selection
from calset.pruning.stats import Needs
from calset.pruning.tensorfiles import TensorFiles, exact_dtype
from calset.pruning.updates import has_triton

if TYPE_CHECKING:
    import torch

    from calset.catalog.records import Subset
    from calset.pruning.decoder import Decoder

Propagate = Literal["pruned", "dense"]


DAMPING = 0.01  # of the mean diagonal


MAX_DEVIATION = 0.005  # of a matrix's share of zeros from the asked one, before it is worth a warning


@dataclass(frozen=True, slots=True)
class Plan:
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
    estimate: Estimate
    settings: Mapping[str, Any]  # all that decides the result, for a run that continues this one
    warnings: list[str] = field(default_factory=list)

    @property
    def uses_data(self) -> bool:
        return _uses_data(self.method, self.allocation)


def _without_effect(method: methods.Method, pattern: Pattern | None, group: str | None, damping: float) -> list[str]:
    warnings = []
    if pattern is not None and group is not None:
        warnings.append(f"--group {group} has no effect with a pattern: weights compete within {pattern.m} columns")
    if Needs.GRAM not in method.needs and damping != DAMPING:
        warnings.append(f"--damping {damping:g} has no effect: {method.name} has no damping")
    return warnings


def check_options(propagate: str, damping: float, batch_tokens: int | None, hidden: str | None) -> None:
    if propagate not in get_args(Propagate):
        raise InputError(f"propagate must be one of {', '.join(get_args(Propagate))}, not {propagate!r}")
    if not 0 < damping <= 1e4:
        raise InputError(f"damping is a positive share of the mean diagonal, such as 0.01, not {damping}")
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
    if hidden is not None and hidden not in get_args(Where):
        raise InputError(f"hidden must be one of {', '.join(get_args(Where))}, not {hidden!r}")


def make_plan(
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
    batch_tokens: int | None,
    max_length: int | None,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_partial: bool,
    hidden: Where | None,
    force: bool,
) -> Plan:
    import torch

    asked = {key: value for key, value in locals().items() if key != "torch"}
    parsed = Pattern.parse(pattern) if pattern is not None else None
    chosen = methods.find(method)
    selection = Selection(sparsity, parsed, group or chosen.group, block_size)
    check_options(propagate, damping, batch_tokens, hidden)
    patterns = _Patterns.of(include, exclude)
    source = checkpoint.open_source(model)
    allocation = str(allocation)
    uses_data = _uses_data(chosen, allocation)
    warnings = check_subset(calibration, source, uses_data, force)
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
    on_device = find_device(device)
    batch_tokens = batch_positions(batch_tokens, on_device)
    with TensorFiles(source.folder) as files:
        skeleton = source.skeleton()
        decoder = find_decoder(skeleton, allow_partial=allow_partial)
        layout = Layout.of(files, skeleton)
        layout.check(torch.float32)
        blocks = [layout.matrices(block.weights.values()) for block in decoder.blocks]
        every = [matrix for matrices in blocks for matrix in matrices]
        matrices = patterns.choose(every)
        shares = _known_shares(allocation, decoder, matrices, selection)
        check_shapes(matrices, selection, shares)
        dtypes = {name: files.stored[name].torch_dtype for name in {m.name for m in matrices}}
        dtype = exact_dtype(dtypes.values())  # the config's may round them
        needed = estimate(
            skeleton, decoder, files, matrices, samples, chosen, allocation, propagate, dtype, on_device, batch_tokens,
            hidden, Path(out),
        )  # fmt: skip
    if allocation == "uniform":
        warnings.extend(_rounded(selection, matrices))
    warnings.extend(_too_few_tokens(chosen, matrices, samples.n_counted_tokens))
    warnings.extend(_without_effect(chosen, parsed, group, damping))
    if unknown := decoder.unknown():
        warnings.append(f"{len(unknown)} decoder weights are not understood and stay dense, such as {unknown[0]}")
    warnings.extend(_not_loaded(layout))
    keys = frozenset(m.key for m in matrices)
    settings = settings_of(
        {
            **asked,
            "allocation": _told_apart(allocation, shares),
            "token_weights": hash_of(samples.weights),
            "batch_tokens": batch_tokens,
        },
        source,
        calibration,
        on_device,
    )
    workfolder.check_out(Path(out), needed.disk_bytes)
    workfolder.check_settings(Path(out), settings)
    return Plan(
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
        estimate=replace(needed, disk_there=workfolder.held_bytes(Path(out))),
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


def settings_of(
    asked: Mapping[str, Any], source: checkpoint.Source, subset: Subset, device: torch.device
) -> dict[str, Any]:
    """All that decides the result: only a run with the same may go on where one was interrupted."""
    import torch

    without_effect = ("model", "calibration", "out", "hidden", "force", "device")
    return {
        **{key: value for key, value in asked.items() if key not in without_effect},
        "model revision": source.revision,
        "calibration": subset.content_hash,
        # Another GPU, or another number of threads, rounds differently.
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "kernel": has_triton(device) if device.type == "cuda" else None,
        "processes": distributed.n_processes(),  # sums come out in another order
        "versions": versions(),
    }


def _uses_data(method: methods.Method, allocation: str) -> bool:
    return bool(method.needs) or allocation == "owl"


def as_allocated(decoder: Decoder, matrices: Sequence[Matrix]) -> list[allocate.Matrix]:
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
    return allocate.read_ratios(Path(allocation), as_allocated(decoder, matrices), selection.sparsity)


def _told_apart(allocation: str, shares: Mapping[str, float] | None) -> str:
    """What tells one allocation from another: of a file what it says, not where it lies."""
    if shares is None:
        return allocation
    return f"ratios {hashlib.sha256(json.dumps(shares).encode()).hexdigest()[:16]}"


def hash_of(weights: Sequence[Sequence[float]] | None) -> str | None:
    """What tells one set of token weights from another: they are no part of the subset's content hash."""
    return None if weights is None else hashlib.sha256(json.dumps([list(w) for w in weights]).encode()).hexdigest()


def own_selection(selection: Selection, matrix: Matrix, shares: Mapping[str, float] | None) -> Selection:
    """How much of one matrix goes."""
    return selection if shares is None else replace(selection, sparsity=shares[matrix.label])


def check_shapes(matrices: Sequence[Matrix], selection: Selection, shares: Mapping[str, float] | None) -> None:
    for matrix in matrices:
        own_selection(selection, matrix, shares).check_shape(*matrix.shape, matrix.label.removesuffix(".weight"))


def check_subset(subset: Subset, source: checkpoint.Source, uses_data: bool, force: bool) -> list[str]:
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


def _not_loaded(layout: Layout) -> list[str]:
    """A warning about matrices that transformers leaves in the files, such as those for multi-token prediction."""
    names = [n for n, stored in layout.files.stored.items() if n not in layout.target and len(stored.shape) > 1]
    if not names:
        return []
    return [
        f"{len(names)} matrices of the checkpoint, such as {names[0]}, are no part of the model that transformers "
        f"loads from it (layers for multi-token prediction, an image tower): they are copied and stay dense"
    ]


def _too_few_tokens(method: methods.Method, matrices: Sequence[Matrix], n_tokens: int) -> list[str]:
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


def batch_positions(asked: int | None, device: torch.device) -> int:
    """Positions a micro-batch: those asked for, or what suits the device."""
    return asked or (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS)


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    import torch
    import transformers

    import calset

    return {"calset": calset.__version__, "torch": torch.__version__, "transformers": transformers.__version__}

"""Reopen a pruned checkpoint and prove that it is what its ``pruning.json`` says.

Reads the files, not the pruner's memory of them. It must not know how pruning works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, VerificationError
from calset.pruning.allocate import MEASURED
from calset.pruning.checkpoint import RECORD, load_model, read_record
from calset.pruning.layout import Layout, cut, label
from calset.pruning.masks import BLOCK_SIZE, Pattern, Selection, nearest
from calset.pruning.tensorfiles import TensorFiles

if TYPE_CHECKING:
    from torch import nn

    from calset.pruning.structured_verify import DropVerifyReport

LOGIT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proved of a checkpoint. ``n_untouched``: tensors bit-equal to the base's; None when not compared."""

    directory: str
    n_matrices: int
    pattern: str | None
    sparsity: float | None
    realised_sparsity: float
    n_other_tensors: int
    base: str | None
    n_untouched: int | None
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people, a fact a line."""
        asked = f"pattern {self.pattern}" if self.pattern else f"sparsity {self.sparsity:g}"
        found = [
            f"{self.directory}: {self.n_matrices} matrices hold exactly the recorded zeros ({asked}, "
            f"{self.realised_sparsity:.4f} zeros in all)",
            "logits are finite",
        ]
        if self.n_untouched is not None:
            found.append(f"{self.n_untouched} other tensors are bit-equal to those of {self.base}")
        return found + list(self.notes)


def verify(directory: str | Path, *, base: str | Path | None = None) -> VerifyReport | DropVerifyReport:
    """Prove what ``pruning.json`` says.

    Every matrix of the decoder has the zeros that the asked sparsity or pattern means, logits are finite, and
    untouched tensors are bit-equal to the dense model's, and so are the matrices that were left dense. Of a structured
    pruning: as many experts or blocks stay as were asked, those of the highest scores, config and tensors agree, and
    every tensor is bit-equal to the dense model's under the recorded numbers.

    Args:
        base: the dense model's folder; default: where ``pruning.json`` says it was, if it is still there unchanged.

    Raises:
        InputError: no such folder, no or a corrupt ``pruning.json``, or a ``base`` that is not the recorded one.
        VerificationError: naming the matrix and the numbers that differ.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"there is no folder {directory}")
    record = read_record(folder)
    if "structure" in record:
        from calset.pruning.structured_verify import verify_structured

        return verify_structured(directory, record, *_find_base(record, base))
    selection = _selection(record, folder)
    with _files(folder) as tensors:
        n_zeros, size = 0, 0
        for entry in record["matrices"]:
            n_zeros += _check_matrix(entry, tensors, _own(selection, entry, record, folder))
            size += entry["shape"][0] * entry["shape"][1]
        _check_total(record, selection)
        pruned = {entry["name"] for entry in record["matrices"]}
        biases = set(record.get("biases", ()))
        _check_biases(biases, tensors)
        _check_model(folder, tensors, record)
        dense, notes = _find_base(record, base)
        n_untouched = None
        if dense:
            with _files(dense) as others:
                n_untouched = _check_untouched(tensors, others, pruned, biases)
    return VerifyReport(
        directory=str(directory),
        n_matrices=len(record["matrices"]),
        pattern=record.get("pattern"),
        sparsity=record.get("sparsity"),
        realised_sparsity=n_zeros / size,
        n_other_tensors=len(tensors.stored.keys() - pruned - biases),
        base=str(dense) if dense else None,
        n_untouched=n_untouched,
        notes=notes,
    )


def _files(folder: Path) -> TensorFiles:
    try:
        return TensorFiles(folder)
    except InputError as error:
        raise VerificationError(str(error)) from error


def _selection(record: Mapping[str, Any], folder: Path) -> Selection:
    """What was asked, from the record.

    Raises:
        InputError: it does not say, or not in the words and types of a pruning.
    """
    pattern = record.get("pattern")
    try:
        return Selection(
            record.get("sparsity"),
            Pattern.parse(pattern) if pattern is not None else None,
            record.get("group") or "row",
            record.get("block_size", BLOCK_SIZE),
        )
    except (InputError, TypeError) as error:
        raise InputError(f"{folder / RECORD} is corrupt: {error}") from error


def _own(selection: Selection, entry: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> Selection:
    """What was asked of one matrix: the same of all, unless an allocation shared it out."""
    if record.get("allocation", "uniform") == "uniform":
        return selection
    try:
        return replace(selection, sparsity=entry.get("asked"))
    except (InputError, TypeError) as error:
        raise InputError(f"{folder / RECORD} is corrupt: {error}") from error


def _check_total(record: Mapping[str, Any], selection: Selection) -> None:
    """Measured allocations share out the asked total, to a weight, or a weight of every row of a matrix."""
    if record.get("allocation", "uniform") not in MEASURED or selection.sparsity is None:
        return
    size = sum(entry["shape"][0] * entry["shape"][1] for entry in record["matrices"])
    want, got = nearest(selection.sparsity * size), sum(entry["n_pruned"] for entry in record["matrices"])
    step = max(entry["shape"][0] for entry in record["matrices"]) if selection.group == "row" else 0
    if abs(want - got) > step:
        raise VerificationError(
            f"{got} weights were pruned in all, but sparsity {selection.sparsity:g} of {size} is {want}"
        )


def _check_biases(biases: set[str], tensors: TensorFiles) -> None:
    for name in sorted(biases):
        if name not in tensors.stored:
            raise VerificationError(f"{name} is listed as changed but not in the checkpoint")
        if not bool(tensors.read(name).isfinite().all()):
            raise VerificationError(f"{name} holds values that are not finite")


def _label(entry: Mapping[str, Any]) -> str:
    return label(entry["name"], entry.get("expert"), entry.get("rows"))


def _check_matrix(entry: Mapping[str, Any], tensors: TensorFiles, selection: Selection) -> int:
    """Check one matrix against its entry and against what was asked of all; returns its zeros.

    Why both: an entry that was changed with its matrix would agree with it.
    """
    pattern = selection.pattern
    name, shape = entry["name"], tuple(entry["shape"])
    if name not in tensors.stored:
        raise VerificationError(f"{name} is listed as pruned but not in the checkpoint")
    try:
        weight = cut(tensors.read(name), entry.get("expert"), entry.get("rows"), entry.get("transposed", False))
    except IndexError as error:
        raise VerificationError(f"{name} has no matrix {entry.get('expert')}, recorded as pruned") from error
    name = _label(entry)
    if tuple(weight.shape) != shape:
        raise VerificationError(f"{name} is {tuple(weight.shape)}, recorded as {shape}")
    if not bool(weight.isfinite().all()):
        raise VerificationError(f"{name} holds values that are not finite")
    n_zeros = int((weight == 0).sum())
    if n_zeros != entry["n_zeros"]:
        raise VerificationError(f"{name} has {n_zeros} zeros of {weight.numel()}, recorded as {entry['n_zeros']}")
    if pattern is not None:
        kept = (weight != 0).reshape(shape[0], -1, pattern.m).sum(-1) if shape[1] % pattern.m == 0 else None
        if kept is None or int(kept.max()) > pattern.n:
            broken = "its width" if kept is None else f"{int((kept > pattern.n).sum())} of {kept.numel()} groups"
            raise VerificationError(f"{name} does not keep to {pattern}: {broken}")
    selection.check_width(shape[1], name)
    asked = str(pattern) if pattern else f"sparsity {selection.sparsity:g}"
    if entry["n_pruned"] != (want := selection.n_pruned(*shape)):
        raise VerificationError(f"{name} had {entry['n_pruned']} weights pruned, but {asked} of {shape} is {want}")
    if n_zeros < entry["n_pruned"]:
        raise VerificationError(f"{name} has {n_zeros} zeros, fewer than the {entry['n_pruned']} that were pruned")
    return n_zeros


def _check_model(folder: Path, tensors: TensorFiles, record: Mapping[str, Any]) -> None:
    """Load it as anybody would and run a few tokens: every tensor is there and the logits are finite.

    The listed matrices and those left dense must be all of its decoder's: one that is in neither list would be neither
    pruned nor missed.
    """
    try:
        model = load_model(folder, str(folder))
        _check_list(model, tensors, record)
    except InputError as error:
        raise VerificationError(str(error)) from error
    check_logits(model, folder)


def check_logits(model: Any, folder: Path) -> None:
    """Run a few tokens.

    Raises:
        VerificationError: logits that are not finite.
    """
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    input_ids = torch.arange(1, LOGIT_TOKENS + 1).remainder(vocabulary).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise VerificationError(f"{folder} gives logits that are not finite")


def _check_list(model: nn.Module, tensors: TensorFiles, record: Mapping[str, Any]) -> None:
    from calset.pruning.decoder import find_decoder

    decoder = find_decoder(model, allow_partial=True)
    found = {m.label for m in Layout.of(tensors, model).matrices(decoder.weights().values())}
    found |= set(decoder.unknown())
    listed = [_label(entry) for entry in record["matrices"]]
    left = set(record.get("left_dense", []))
    if missed := sorted(found - set(listed) - left):
        raise VerificationError(
            f"{missed[0]} is a matrix of the decoder, but not listed as pruned ({len(missed)} such)"
        )
    if odd := sorted((set(listed) | left) - found) or [n for n in listed if n in left or listed.count(n) > 1]:
        raise VerificationError(f"{odd[0]} is listed as pruned, but is no matrix of the decoder or is listed twice")


def _find_base(record: Mapping[str, Any], base: str | Path | None) -> tuple[Path | None, list[str]]:
    """The dense model's folder, when it can be compared with, and otherwise why not."""
    from calset.builder.model_info import folder_revision

    recorded = record.get("base", {})
    folder = Path(base) if base is not None else Path(recorded.get("path") or "")
    if base is None and not recorded.get("path"):
        return None, ["untouched tensors were not compared: the dense model's place is not recorded (--base)"]
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        if base is not None:
            raise InputError(f"{base} is no folder of a dense model")
        return None, [f"untouched tensors were not compared: the dense model is not at {folder} (--base)"]
    if recorded.get("revision") not in (folder_revision(folder), folder.name):
        if base is not None:
            raise InputError(f"{base} is not the model that was pruned: its revision differs from the recorded one")
        return None, [f"untouched tensors were not compared: the model at {folder} has changed since (--base)"]
    return folder, []


def _check_untouched(tensors: TensorFiles, dense: TensorFiles, pruned: set[str], biases: set[str]) -> int:
    """How many tensors are the dense model's, bit for bit; ``biases`` may differ, and need not be there."""
    import torch

    n_equal = 0
    for name in tensors.stored:
        if name not in dense.stored and name in biases:
            continue
        if name not in dense.stored:
            raise VerificationError(f"{name} is not in the dense model at {dense.folder}")
        tensor, other = tensors.read(name), dense.read(name)
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise VerificationError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, in the dense model {tuple(other.shape)} {other.dtype}"
            )
        if name in pruned | biases:
            continue
        # Bytes, so that -0.0 and NaN compare too.
        if not torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            n_changed = int((tensor != other).sum())
            raise VerificationError(f"{name} differs from the dense model's in {n_changed} of {tensor.numel()} values")
        n_equal += 1
    return n_equal

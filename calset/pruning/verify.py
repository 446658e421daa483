"""Reopen a pruned checkpoint and prove that it is what its ``pruning.json`` says.

Reads the files, not the pruner's memory of them. It must not know how pruning works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.catalog.records import Subset
from calset.catalog.references import resolve
from calset.errors import InputError, VerificationError
from calset.io.progress import OnProgress, Progress, silent
from calset.pruning import held_out_loss
from calset.pruning.blockwise.forward import check_logits
from calset.pruning.blockwise.phases import Phase
from calset.pruning.blockwise.statistics import is_finite
from calset.pruning.held_out_loss import HeldOut
from calset.pruning.methods.masks import Pattern, Selection, nearest
from calset.pruning.model.checkpoint import RECORD, open_folder
from calset.pruning.model.layout import Layout, cut, label
from calset.pruning.model.memory import enough_memory
from calset.pruning.model.tensorfiles import TensorFiles
from calset.pruning.plan import batch_positions, find_device
from calset.pruning.record import DropRecord, MatrixRecord, ZerosRecord, read_record

if TYPE_CHECKING:
    import torch

    from calset.catalog.catalog import Catalog
    from calset.pruning.model.checkpoint import Source
    from calset.pruning.structured.verify import DropVerifyReport

NOT_COMPARED = "untouched tensors were not compared: "


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proved of a checkpoint. ``n_untouched``: tensors bit-equal to the base's; None when not compared.

    ``held_out``: the losses of both models, where they were asked for.
    """

    directory: str
    n_matrices: int
    pattern: str | None
    sparsity: float | None
    realised_sparsity: float
    n_other_tensors: int
    base: str | None
    n_untouched: int | None
    notes: Sequence[str] = ()
    held_out: HeldOut | None = None

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
        if self.held_out is not None:
            found += self.held_out.lines()
        return found + list(self.notes)


def verify(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    held_out: Subset | str | Path | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    catalog: Catalog | str | Path | None = None,
    progress: OnProgress | None = None,
) -> VerifyReport | DropVerifyReport:
    """Prove what ``pruning.json`` says.

    Every matrix of the decoder has the zeros that the asked sparsity or pattern means, logits are finite, and
    untouched tensors are bit-equal to the dense model's, and so are the matrices that were left dense. Of a structured
    pruning: as many experts or blocks stay as were asked, those of the highest scores, config and tensors agree, and
    every tensor is bit-equal to the dense model's under the recorded numbers.

    Models run block by block from their files: memory holds the embeddings, the output layer, one block and the hidden
    states.

    Args:
        base: the dense model's folder; default: where ``pruning.json`` says it was, if it is still there unchanged.
        held_out: a subset, or a reference to one, on whose completions the pruned model's loss is compared with the
            dense model's; it has none of the samples that calibrated the pruning, nor of their problems.
        max_length: cut longer held-out samples.
        batch_tokens: positions of a micro-batch of held-out samples; default: 8192, on a CPU 2048.
        device: where models run; default: with held-out samples CUDA when there is one, else the CPU.
        catalog: where subsets are looked up: ``held_out`` by its name, and the one that calibrated the pruning, whose
            samples an older ``pruning.json`` does not list.
        progress: called with a ``Progress`` of matrices, then of blocks of the pruned model for its logits, then of
            tensors compared with the dense model's; with held-out samples of blocks and batches of each model.

    Raises:
        InputError: no such folder, no or a corrupt ``pruning.json``, a ``base`` that is not the recorded one; held-out
            samples that calibrated the pruning or are of another tokenizer, or no dense model to compare with.
        VerificationError: naming the matrix and the numbers that differ.
        PruningError: activations on the held-out samples that are not finite, or too little memory.
    """
    folder, progress = Path(directory), progress or silent
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if held_out is None and value is not None:
            raise InputError(f"{name}= is for held_out=: pass both or neither")
    if held_out is not None and not isinstance(held_out, Subset):
        held_out = resolve(held_out, catalog)
    if not folder.is_dir():
        raise InputError(f"there is no folder {directory}")
    record = read_record(folder)
    # A few tokens need no GPU, which may be serving something.
    place = find_device(device if device or held_out is not None else "cpu")
    dense, notes = _find_base(record, base)
    compare = None
    if held_out is not None:  # what can be refused is refused before the long part
        is_apart = _is_apart(held_out, record, catalog)
        models = _original(dense, notes), _opened(folder)
        samples = held_out_loss.read_held_out(held_out, *models, max_length)
        compare = partial(
            held_out_loss.compare, held_out, samples, *models, place, max_length=max_length, is_apart=is_apart,
            batch_tokens=batch_positions(batch_tokens, place), progress=progress,
        )  # fmt: skip
    with enough_memory("lower --batch-tokens, cut the samples with --max-length, or on a GPU use --device cpu"):
        report: VerifyReport | DropVerifyReport
        if isinstance(record, DropRecord):
            from calset.pruning.structured.verify import verify_structured

            report = verify_structured(folder, record, dense, notes, place, progress)
        else:
            report = _verify_zeros(folder, record, dense, notes, place, progress)
        report = report if compare is None else replace(report, held_out=compare())
    progress(Progress("done", 1, 1, final=True))
    return report


def _verify_zeros(
    folder: Path,
    record: ZerosRecord,
    dense: Path | None,
    notes: Sequence[str],
    device: torch.device,
    progress: OnProgress,
) -> VerifyReport:
    selection = _selection(record, folder)
    with _files(folder) as tensors:
        n_zeros, size = 0, 0
        phase = Phase("matrices", progress)
        for i, matrix in enumerate(record.matrices):
            phase.step(i, len(record.matrices))
            n_zeros += _check_matrix(matrix, tensors, _own(selection, matrix, record, folder))
            size += matrix.size
        phase.step(len(record.matrices), len(record.matrices))
        _check_total(record, selection)
        pruned = {matrix.name for matrix in record.matrices}
        _check_model(folder, tensors, record, device, Phase("logits", progress))
        n_untouched = None
        if dense:
            with _files(dense) as others:
                n_untouched = _check_untouched(tensors, others, pruned, Phase("untouched tensors", progress))
    return VerifyReport(
        directory=str(folder),
        n_matrices=len(record.matrices),
        pattern=record.pattern,
        sparsity=record.sparsity,
        realised_sparsity=n_zeros / size,
        n_other_tensors=len(tensors.stored.keys() - pruned),
        base=str(dense) if dense else None,
        n_untouched=n_untouched,
        notes=notes,
    )


def _files(folder: Path) -> TensorFiles:
    try:
        return TensorFiles(folder)
    except InputError as error:
        raise VerificationError(str(error)) from error


def _selection(record: ZerosRecord, folder: Path) -> Selection:
    """What was asked, from the record.

    Raises:
        InputError: it does not say, or not in the words and types of a pruning.
    """
    try:
        return Selection(
            record.sparsity,
            Pattern.parse(record.pattern) if record.pattern is not None else None,
            record.group or "row",
            record.block_size,
        )
    except (InputError, TypeError) as error:
        raise InputError(f"{folder / RECORD} is corrupt: {error}") from error


def _own(selection: Selection, matrix: MatrixRecord, record: ZerosRecord, folder: Path) -> Selection:
    """What was asked of one matrix: the same of all, unless an allocation shared it out."""
    if record.allocation == "uniform":
        return selection
    try:
        return replace(selection, sparsity=matrix.asked)
    except (InputError, TypeError) as error:
        raise InputError(f"{folder / RECORD} is corrupt: {error}") from error


def _check_total(record: ZerosRecord, selection: Selection) -> None:
    """Check that OWL shared out the asked total, to a weight, or a weight of every row of a matrix."""
    if record.allocation != "owl" or selection.sparsity is None:
        return
    size = sum(matrix.size for matrix in record.matrices)
    want, got = nearest(selection.sparsity * size), sum(matrix.n_pruned for matrix in record.matrices)
    step = max(matrix.shape[0] for matrix in record.matrices) if selection.group == "row" else 0
    if abs(want - got) > step:
        raise VerificationError(
            f"{got} weights were pruned in all, but sparsity {selection.sparsity:g} of {size} is {want}"
        )


def _label(matrix: MatrixRecord) -> str:
    return label(matrix.name, matrix.expert, matrix.rows)


def _check_matrix(matrix: MatrixRecord, tensors: TensorFiles, selection: Selection) -> int:
    """Check one matrix against its entry and against what was asked of all; returns its zeros.

    Why both: an entry that was changed with its matrix would agree with it.
    """
    pattern = selection.pattern
    name, shape = matrix.name, matrix.shape
    if name not in tensors.stored:
        raise VerificationError(f"{name} is listed as pruned but not in the checkpoint")
    try:
        # Of stacked experts only its own slice, or each would read them all.
        whole = tensors.read(name, matrix.expert)
        weight = cut(whole, None, matrix.rows, matrix.transposed)
    except IndexError as error:
        raise VerificationError(f"{name} has no matrix {matrix.expert}, recorded as pruned") from error
    name = _label(matrix)
    if tuple(weight.shape) != shape:
        raise VerificationError(f"{name} is {tuple(weight.shape)}, recorded as {shape}")
    if not is_finite(weight):
        raise VerificationError(f"{name} holds values that are not finite")
    n_zeros = int((weight == 0).sum())
    if n_zeros != matrix.n_zeros:
        raise VerificationError(f"{name} has {n_zeros} zeros of {weight.numel()}, recorded as {matrix.n_zeros}")
    if pattern is not None:
        kept = (weight != 0).reshape(shape[0], -1, pattern.m).sum(-1) if shape[1] % pattern.m == 0 else None
        if kept is None or int(kept.max()) > pattern.n:
            broken = "its width" if kept is None else f"{int((kept > pattern.n).sum())} of {kept.numel()} groups"
            raise VerificationError(f"{name} does not keep to {pattern}: {broken}")
    selection.check_width(shape[1], name)
    asked = str(pattern) if pattern else f"sparsity {selection.sparsity:g}"
    if matrix.n_pruned != (want := selection.n_pruned(*shape)):
        raise VerificationError(f"{name} had {matrix.n_pruned} weights pruned, but {asked} of {shape} is {want}")
    if n_zeros < matrix.n_pruned:
        raise VerificationError(f"{name} has {n_zeros} zeros, fewer than the {matrix.n_pruned} that were pruned")
    return n_zeros


def _opened(folder: Path) -> Source:
    try:
        return open_folder(folder)
    except InputError as error:
        raise VerificationError(str(error)) from error


def _check_model(folder: Path, tensors: TensorFiles, record: ZerosRecord, device: torch.device, phase: Phase) -> None:
    """Every tensor is there and the logits are finite.

    The listed matrices and those left dense must be all of its decoder's: one that is in neither list would be neither
    pruned nor missed.
    """
    source = _opened(folder)
    try:
        _check_list(source, tensors, record)
    except InputError as error:
        raise VerificationError(str(error)) from error
    check_logits(source, device, phase)


def _check_list(source: Source, tensors: TensorFiles, record: ZerosRecord) -> None:
    from calset.pruning.model.decoder import find_decoder

    model = source.skeleton()
    decoder = find_decoder(model, allow_partial=True)
    found = {m.label for m in Layout.of(tensors, model).matrices(decoder.weights().values())}
    found |= set(decoder.unknown())
    listed = [_label(matrix) for matrix in record.matrices]
    left = set(record.left_dense)
    if missed := sorted(found - set(listed) - left):
        raise VerificationError(
            f"{missed[0]} is a matrix of the decoder, but not listed as pruned ({len(missed)} such)"
        )
    if odd := sorted((set(listed) | left) - found) or [n for n in listed if n in left or listed.count(n) > 1]:
        raise VerificationError(f"{odd[0]} is listed as pruned, but is no matrix of the decoder or is listed twice")


def _find_base(record: ZerosRecord | DropRecord, base: str | Path | None) -> tuple[Path | None, list[str]]:
    """The dense model's folder, when it can be compared with, and otherwise why not."""
    from calset.io.models import folder_revision

    recorded = record.base
    folder = Path(base) if base is not None else Path(recorded.path or "")
    if base is None and not recorded.path:
        return None, [f"{NOT_COMPARED}the dense model's place is not recorded (--base)"]
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        if base is not None:
            raise InputError(f"{base} is no folder of a dense model")
        return None, [f"{NOT_COMPARED}the dense model is not at {folder} (--base)"]
    if recorded.revision not in (folder_revision(folder), folder.name):
        if base is not None:
            raise InputError(f"{base} is not the model that was pruned: its revision differs from the recorded one")
        return None, [f"{NOT_COMPARED}the model at {folder} has changed since (--base)"]
    return folder, []


def _original(dense: Path | None, notes: Sequence[str]) -> Source:
    if dense is None:
        why = notes[0].removeprefix(NOT_COMPARED)
        raise InputError(f"the held-out loss needs the dense model to compare with: {why}")
    return open_folder(dense)


def _is_apart(held_out: Subset, record: ZerosRecord | DropRecord, catalog: Catalog | str | Path | None) -> bool | None:
    """Whether the pruning saw none of these samples and problems; None where what it saw is not known.

    Raises:
        InputError: it saw some.
    """
    calibration = record.calibration
    if not calibration.used:
        return True
    if held_out.content_hash == calibration.content_hash:
        raise InputError(f"{held_out.ref} is what calibrated this pruning: it is not held out")
    if calibration.sample_ids is not None and calibration.problem_ids is not None:
        seen = (calibration.sample_ids, calibration.problem_ids)
    elif (seen := _look_up(calibration.content_hash, catalog)) is None:
        return None
    held_out_loss.check_apart(held_out, str(calibration.subset), *seen)
    return True


def _look_up(content_hash: str | None, catalog: Catalog | str | Path | None) -> tuple[list[str], list[str]] | None:
    """The sample and problem ids of a subset that the catalog holds, under whatever name."""
    from calset.catalog.catalog import Catalog

    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    if not content_hash or not store.exists():
        return None
    rows = store.rows(
        "SELECT DISTINCT i.sample_id, i.problem_id FROM subset_items i JOIN subsets s USING (name, version) "
        "WHERE s.content_hash = ?",
        [content_hash],
    )
    return ([r["sample_id"] for r in rows], [r["problem_id"] for r in rows if r["problem_id"]]) if rows else None


def _check_untouched(tensors: TensorFiles, dense: TensorFiles, pruned: set[str], phase: Phase) -> int:
    """Count the tensors that are the dense model's, bit for bit."""
    import torch

    n_equal = 0
    for i, name in enumerate(tensors.stored):
        phase.step(i, len(tensors.stored))
        if name not in dense.stored:
            raise VerificationError(f"{name} is not in the dense model at {dense.folder}")
        tensor, other = tensors.read(name), dense.read(name)
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise VerificationError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, in the dense model {tuple(other.shape)} {other.dtype}"
            )
        if name in pruned:
            continue
        # Bytes, so that -0.0 and NaN compare too.
        if not torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            n_changed = int((tensor != other).sum())
            raise VerificationError(f"{name} differs from the dense model's in {n_changed} of {tensor.numel()} values")
        n_equal += 1
    phase.step(len(tensors.stored), len(tensors.stored))
    return n_equal

"""Prove that a smaller checkpoint is what its ``pruning.json`` says: counts, config, and every byte of what stays.

Must not know: how it was made, beyond what is left of a model when units go (``reduced``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, VerificationError
from calset.io.progress import OnProgress
from calset.pruning.blockwise.forward import check_logits
from calset.pruning.blockwise.phases import Phase
from calset.pruning.model.checkpoint import RECORD, Source, open_folder
from calset.pruning.model.decoder import find_decoder
from calset.pruning.model.tensorfiles import TensorFiles
from calset.pruning.record import DropRecord
from calset.pruning.structured import copy, depth, reap
from calset.pruning.structured.reduced import make_reduced

if TYPE_CHECKING:
    import torch

    from calset.pruning.held_out_loss import HeldOut


@dataclass(frozen=True, slots=True)
class DropVerifyReport:
    """What was proved of a smaller checkpoint. ``n_equal``: tensors bit-equal to the base's; None: not compared."""

    directory: str
    method: str
    structure: str
    n_units: int
    n_kept: int
    n_tensors: int
    base: str | None
    n_equal: int | None
    notes: Sequence[str] = ()
    held_out: HeldOut | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people, a fact a line."""
        found = [
            f"{self.directory}: {self.n_kept} of {self.n_units} {self.structure} stay, those of the highest recorded "
            f"scores; the config says so",
            "logits are finite",
        ]
        if self.n_equal is not None:
            found.append(f"all {self.n_equal} tensors are bit-equal to those of {self.base} under the recorded numbers")
        return found + list(self.notes) + (self.held_out.lines() if self.held_out else [])


def verify_structured(
    directory: str | Path,
    record: DropRecord,
    dense: Path | None,
    notes: Sequence[str],
    device: torch.device,
    progress: OnProgress,
) -> DropVerifyReport:
    """Prove what a structured pruning's record says; see ``verify``.

    Args:
        dense: the dense model's folder, where it is at hand.
        device: where the model runs.
        progress: called with a ``Progress`` of blocks for the logits, then of tensors.

    Raises:
        InputError: a model that cannot be read.
        VerificationError: naming what differs.
    """
    folder, stacks = Path(directory), record.stacks
    try:
        with TensorFiles(folder) as tensors:
            n_tensors = len(tensors.stored)
            source = open_folder(folder)
            _check_counts(record, source)
            check_logits(source, device, Phase("logits", progress))
            n_equal = None
            if dense is not None:
                n_equal = _check_equal(folder, record, dense, tensors, Phase("tensors", progress))
    except InputError as error:
        raise VerificationError(str(error)) from error
    return DropVerifyReport(
        directory=str(directory),
        method=record.method,
        structure=record.structure,
        n_units=sum(len(stack.scores) for stack in stacks),
        n_kept=sum(len(stack.kept) for stack in stacks),
        n_tensors=n_tensors,
        base=None if dense is None else str(dense),
        n_equal=n_equal,
        notes=notes,
    )


def _check_counts(record: DropRecord, source: Source) -> None:
    """As many stay of each stack as were asked, those of the highest scores, and the config makes as many."""
    from torch.nn import ModuleList

    config, sparsity, stacks = source.config.get_text_config(), record.sparsity, record.stacks
    model, mixture = source.skeleton(), None
    if record.structure == "experts":
        mixture = reap.find_mixture(find_decoder(model, allow_partial=True), config)
        made = dict.fromkeys(mixture.modules.values(), mixture.n_experts)
    else:
        lists = {name: len(part) for name, part in model.named_modules() if isinstance(part, ModuleList)}
        made = {name: lists[name] for name in (stacks[0].name,) if name in lists}
    if odd := sorted(made.keys() ^ {stack.name for stack in stacks}):
        raise VerificationError(f"{odd[0]} is not both in {RECORD} and in the model that config.json makes")
    for stack in stacks:
        scores, kept, name = stack.scores, stack.kept, stack.name
        if mixture is not None:
            want = replace(mixture, n_experts=len(scores)).n_kept(sparsity)
            chosen = reap.choose(scores, want, mixture.n_groups)
        else:
            want = depth.n_kept(len(scores), sparsity)
            kinds = stack.kinds
            if kinds is not None and [kinds[i] for i in kept] != depth.kinds(config):
                raise VerificationError(f"{name} keeps blocks of other kinds than config.json says")
            chosen = depth.choose(scores, len(scores) - want, kinds)
        if len(kept) != want or made[name] != want:
            raise VerificationError(
                f"{name} is recorded to keep {len(kept)} of {len(scores)} and has {made[name]}: sparsity {sparsity:g} "
                f"means {want}"
            )
        if list(chosen) != list(kept):
            raise VerificationError(f"{name} keeps {list(kept)}: the recorded scores say {list(chosen)}")


def _check_equal(
    folder: Path,
    record: DropRecord,
    dense: Path,
    tensors: TensorFiles,
    phase: Phase,
) -> int:
    """How many tensors there are, each of them the dense model's under the recorded numbers, bit for bit."""
    kept = {stack.name: stack.kept for stack in record.stacks}
    source = open_folder(dense)
    with TensorFiles(source.folder) as files:
        try:
            left = make_reduced(source, files, record.structure, kept)
        except (InputError, KeyError, IndexError) as error:
            raise VerificationError(f"{RECORD} does not fit the dense model at {dense}: {error}") from error
        _check_config(folder, source.folder, left.switches)
        parts = {part.name: part for part in left.parts}
        if odd := sorted(parts.keys() ^ tensors.stored.keys()):
            where = "is missing" if odd[0] in parts else "is in neither the dense model nor the record"
            raise VerificationError(f"{odd[0]} {where} ({len(odd)} such tensors)")
        for i, (name, part) in enumerate(parts.items()):
            phase.step(i, len(parts))
            stored = tensors.stored[name]
            if (stored.shape, stored.dtype) != (part.shape, part.stored.dtype):
                raise VerificationError(
                    f"{name} is {stored.shape} {stored.dtype}, in the dense model {part.shape} {part.stored.dtype}"
                )
            if n_bytes := copy.n_differing(part, stored):
                raise VerificationError(f"{name} differs from {part.source} of the dense model in {n_bytes} bytes")
        phase.step(len(parts), len(parts))
    return len(parts)


def _check_config(folder: Path, dense: Path, switches: Mapping[str, Any]) -> None:
    here, there = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (folder, dense))
    wanted = {**there, **switches}
    if odd := [key for key in {**here, **wanted} if here.get(key) != wanted.get(key)]:
        raise VerificationError(f"config.json says {odd[0]} {here.get(odd[0])!r}, not {wanted.get(odd[0])!r}")

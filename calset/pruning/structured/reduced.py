"""What is left of a model when some of its experts or blocks go: its config, its tensors, and whether they fit.

The same is worked out before the weights load (for a choice not yet made), when a pruning is saved, and again when it
is verified. It must not know scores, nor how they are measured.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calset.errors import InputError, first_line
from calset.io.models import read_config
from calset.pruning.methods.registry import Structure
from calset.pruning.model.checkpoint import Source
from calset.pruning.model.decoder import Decoder, find_decoder
from calset.pruning.model.layout import Layout
from calset.pruning.model.tensorfiles import TensorFiles
from calset.pruning.structured import depth, reap
from calset.pruning.structured.copy import Part, Planned

Kept = Mapping[str, Sequence[int]]  # numbers of what stays, by the name of the module that holds them
EXTRA_HEADS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")  # of multi-token prediction


@dataclass(frozen=True, slots=True)
class Reduced:
    """``switches``: what config.json says differently. ``source``: the dense model's, with that config.

    ``left_out``: stored tensors that the model does not use and that would no longer fit it.
    """

    switches: Mapping[str, Any]
    source: Source
    parts: Sequence[Part]
    left_out: Sequence[str]

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(part.shape) for part in self.parts)

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)


def stack_name(decoder: Decoder) -> str:
    """The name of the list that holds the blocks."""
    return decoder.blocks[0].name.rpartition(".")[0]


def make_reduced(source: Source, files: TensorFiles, structure: Structure, kept: Kept) -> Reduced:
    """What is left of ``source`` (in ``files``) with only ``kept``; no weight is read.

    Raises:
        InputError: a config or a way of storing that calset cannot keep consistent.
    """
    model = source.skeleton()
    decoder = find_decoder(model, allow_partial=True)
    layout = Layout.of(files, model)
    unused, left_out = _unused(layout, decoder)
    switches = _switches(source, decoder, structure, kept, headless=bool(left_out))
    changed = _as_changed(source, switches)
    small = changed.skeleton()
    if structure == "blocks":
        own = kept[stack_name(decoder)]
        # By its name: the largest list of a model with fewer blocks may be its vision tower's.
        fewer = small.get_submodule(stack_name(decoder))
        if len(fewer) != len(own):
            raise InputError(
                f"a config that says {len(own)} blocks makes {len(fewer)} of {source.name}: calset cannot say how many "
                f"stay"
            )
        depth.check_same([block.module for block in decoder.blocks], list(fewer), own)
        parts = depth.parts(layout, [block.name for block in decoder.blocks], own, unused)
    else:
        mixture = reap.find_mixture(decoder, source.config.get_text_config())
        parts = reap.parts(layout, decoder, reap.sliced(model, small, mixture), kept, unused)
    _check(source.folder, parts, small, unused)
    return Reduced(switches, changed, parts, left_out)


def _unused(layout: Layout, decoder: Decoder) -> tuple[list[str], list[str]]:
    """Stored tensors that no parameter takes: those that stay, and those that belong to blocks or extra heads."""
    first = f"{decoder.blocks[0].name}."
    stored = next((name for name, target in layout.target.items() if target.startswith(first)), "")
    words = stored.split(".")
    number = first.split(".")[-2]
    inside = ".".join(words[: words.index(number)]) + "." if number in words else None
    names = [name for name in layout.files.stored if name not in layout.target]
    left_out = [n for n in names if n.startswith("mtp.") or (inside is not None and n.startswith(inside))]
    return [n for n in names if n not in left_out], left_out


def _switches(source: Source, decoder: Decoder, structure: Structure, kept: Kept, *, headless: bool) -> dict[str, Any]:
    raw = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config = source.config.get_text_config()
    # A model of several kinds of input has the language model's config within its own.
    inner = None if config is source.config else next((k for k in raw if getattr(source.config, k, None) is config), "")
    if inner == "":
        raise InputError(f"config.json of {source.name} has no part for the language model: calset cannot change it")
    text = raw if inner is None else raw[inner]
    if structure == "blocks":
        changes = depth.config_changes(text, config, kept[stack_name(decoder)])
    else:
        mixture = reap.find_mixture(decoder, config)
        counts = {len(numbers) for numbers in kept.values()}
        if len(counts) != 1 or kept.keys() != set(mixture.modules.values()):
            raise InputError("every mixture keeps the same number of experts: the config has one number for all")
        changes = reap.config_changes(text, config, mixture, counts.pop())
    if headless:
        changes.update({name: 0 for name in EXTRA_HEADS if text.get(name)})
    return changes if inner is None else {inner: {**text, **changes}}


def _as_changed(source: Source, switches: Mapping[str, Any]) -> Source:
    """The source with the config that transformers will read from the new checkpoint."""
    raw = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**raw, **switches}), encoding="utf-8")
        try:
            return replace(source, config=read_config(source.name, Path(folder)))
        except InputError as error:
            reason = first_line(error.__cause__ or error)
            raise InputError(f"the smaller model's config cannot be said as transformers reads it: {reason}") from error


def _check(folder: Path, parts: Sequence[Part], small: Any, unused: Sequence[str]) -> None:
    """Try the load of the new checkpoint by its names and shapes."""
    import torch

    layout = Layout.of(Planned(folder, parts), small)
    layout.check(torch.float32)
    if strange := sorted({part.name for part in parts} - layout.target.keys() - set(unused)):
        raise InputError(f"the smaller model would not take {strange[0]}: calset cannot say it in the model's config")

"""Sections that the reports of all prunings share: the dense model, the calibration subset, the card's table.

Must not know: how a model was pruned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from calset.io.markdown import code, line
from calset.version import __version__

if TYPE_CHECKING:
    import torch

    from calset.catalog.records import Subset
    from calset.pruning.calibration import Calibration
    from calset.pruning.model.checkpoint import Source


class Reported(Protocol):
    """Attributes that the table of a card shows of any report."""

    @property
    def base(self) -> Mapping[str, Any]: ...

    @property
    def seconds(self) -> float: ...

    @property
    def device(self) -> str: ...

    @property
    def versions(self) -> Mapping[str, str]: ...


def hash_of(weights: Sequence[Sequence[float]] | None) -> str | None:
    """What tells one set of token weights from another: they are no part of the subset's content hash."""
    return None if weights is None else hashlib.sha256(json.dumps([list(w) for w in weights]).encode()).hexdigest()


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"calset": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def about_base(source: Source) -> dict[str, Any]:
    """The dense model, for the record."""
    return {
        "model": source.name,
        "revision": source.revision,
        "path": str(source.folder.resolve()),
        "tokenizer_hash": source.tokenizer_hash,
    }


def about_calibration(subset: Subset, calibration: Calibration, *, used: bool) -> dict[str, Any]:
    """The subset, for the record."""
    return {
        "used": used,
        "subset": subset.ref,
        **subset.facts(),
        # What it saw, so that a held-out subset can be told from it wherever the checkpoint goes.
        "sample_ids": [s.sample_id for s in subset.samples] if used else [],
        "problem_ids": sorted({s.problem_id for s in subset.samples if s.problem_id}) if used else [],
        "token_weights": hash_of(calibration.weights) if used else None,
        # The runs and sources behind it; of a subset from the Hub also repo, commit and tag.
        "origin": dict(subset.origin) if subset.origin else None,
    }


def card_table(report: Reported, rows: Mapping[str, str]) -> str:
    """How a card begins: a title, and a table of what was done to what."""
    rows = {
        "dense model": f"{line(report.base['model'])} (revision `{code(report.base['revision'])}`)",
        **rows,
        "took": f"{report.seconds:.0f} s on {report.device}",
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"# {line(report.base['model'])}, pruned with calset\n\n| | |\n|---|---|\n{table}\n\n"


def named_calibration(calibration: Mapping[str, Any]) -> str:
    """A record's subset, in Markdown."""
    hub = (calibration["origin"] or {}).get("hub")
    place = f" of the dataset {line(hub['repo'])} (commit `{code(hub['commit'])}`)" if hub else ""
    return f"{calibration['subset']}{place}, content hash `{calibration['content_hash']}`"

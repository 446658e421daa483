"""Where imported rows come from: files, folders and Hub datasets, and the manifest that SGLang's collector writes.

Must not know: what a row holds, the catalog.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calset import ids
from calset.catalog.records import Source
from calset.errors import InputError, first_line
from calset.io.hub import PREFIX, open_dataset
from calset.io.rows import ROW_TYPES, count_rows, list_files
from calset.io.specs import parse

MANIFEST = "rac_manifest.json"  # what SGLang's collector writes beside its traces


@dataclass(frozen=True)
class Place:
    """Files that are one source: what each is called, and how it is got."""

    source: Source
    files: tuple[tuple[str, Callable[[], Path]], ...]


def open_place(spec: str, name: str | None, grader: str) -> Place:
    if spec.startswith(PREFIX):
        return _open_hub(spec, name, grader)
    path = Path(spec)
    beside = (MANIFEST, "manifest.json")  # stands beside traces and is none
    found = [file for file in list_files(path, ROW_TYPES) if file == path or file.name not in beside]
    folder = None if found == [path] else path
    revision = ids.files_hash(found, folder)
    called = name or path.name or path.resolve().name
    source = Source(ids.digest("source", "import", called, revision), called, spec, "file", revision, grader)
    return Place(source, tuple((str(file), lambda file=file: file) for file in found))


def _open_hub(spec: str, name: str | None, grader: str) -> Place:
    repo, revision, options = parse(spec.removeprefix(PREFIX), ("config", "split"))
    dataset = open_dataset(
        repo, revision=revision, config=options.get("config"), split=options.get("split"), types=ROW_TYPES
    )
    called = name or dataset.name
    source = Source(
        ids.digest("source", "import", called, dataset.revision),
        called,
        spec,
        "hub",
        dataset.revision,
        grader,
        dataset.licence,
    )
    # Each is downloaded when reading gets to it.
    return Place(source, tuple((f"{repo}/{file}", lambda file=file: dataset.fetch(file)) for file in dataset.files))


def count_all(places: Sequence[Place]) -> int | None:
    """The rows of all files, where these are here and say it (Parquet)."""
    if any(place.source.kind != "file" for place in places):
        return None
    counts = [count_rows(get()) for place in places for _, get in place.files]
    return None if None in counts else sum(filter(None, counts))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What SGLang's collector says of all traces beside it; nothing where there is no such file."""

    model: str | None = None
    system_prompt: str | None = None
    max_tokens: int | None = None
    seed: int = 0
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "system_prompt"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is no text but {getattr(self, name)!r:.80}")
        if self.max_tokens is not None and not 0 < self.max_tokens < 2**31:
            raise ValueError(f"max_new_tokens is {self.max_tokens!r:.80}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed has more than 63 bits")
        if not all(math.isfinite(value) for value in self.sampling.values()):
            raise ValueError("temperature or top_p is no number")


def read_manifest(path: Path) -> Manifest:
    beside = path.with_name(MANIFEST)
    if not beside.is_file():
        return Manifest()
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        return Manifest(
            model=found.get("model_path"),
            system_prompt=found.get("system_prompt") or None,
            max_tokens=None if found.get("max_new_tokens") is None else int(found["max_new_tokens"]),
            seed=int(found.get("seed") or 0),
            sampling={name: float(found[name]) for name in ("temperature", "top_p") if found.get(name) is not None},
        )
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"cannot read {beside}: {first_line(error)}; repair it or take it away") from error

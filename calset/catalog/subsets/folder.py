"""Subsets as folders: ``data/train.parquet`` for any tool, ``manifest.json`` for provenance and checks.

Rows are hashed, never Parquet bytes, since different writers give different bytes. A folder appears whole or not at
all. Must not know: how selections are made, the Hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.catalog.catalog import Catalog
from calset.catalog.records import Subset
from calset.catalog.subsets import versions
from calset.catalog.subsets.compare import describe
from calset.catalog.subsets.facts import Fact, facts_of, texts_of
from calset.catalog.subsets.manifest import MANIFEST_SCHEMA, moment, read_manifest, require_size
from calset.catalog.subsets.provenance import provenance_of
from calset.catalog.subsets.samplefiles import read_samples, sample_columns, write_rows
from calset.errors import InputError
from calset.io.files import drafted, written
from calset.io.jsonable import jsonable

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
DATA = Path("data") / "train.parquet"


def write_folder(catalog: Catalog, subset: Subset, directory: str | Path) -> Path:
    """Write a subset to a folder; the same subset again is fine, anything else in its way is not touched.

    Returns:
        the folder.

    Raises:
        InputError: the folder holds something else, or cannot be made.
        CatalogError: no space left.
    """
    directory = Path(directory)
    if _holds(directory, subset):
        return directory
    # One connection under all the questions: opening the file for each of them takes longer than answering.
    with catalog.reading() if catalog.exists() else nullcontext():
        facts = facts_of(catalog, subset)
        table = rows_table(subset, catalog, facts)
        manifest = manifest_of(subset, catalog, facts)
    with written(directory, "folder"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with drafted(directory) as draft:
            _write(draft, table, manifest)
            draft.replace(directory)
    return directory


def _holds(directory: Path, subset: Subset) -> bool:
    """Whether the folder is this very subset already.

    Raises:
        InputError: it holds anything else.
    """
    if not os.path.exists(directory):
        return False
    if not os.path.isdir(directory):
        raise InputError(f"{directory} is a file: name a new folder")
    if not any(directory.iterdir()):
        return False
    other = InputError(f"{directory} is not empty and not {subset.ref}: name a new folder")
    try:
        there = read_directory(directory)
    except InputError:
        raise other from None
    if (there.name, there.version, there.content_hash) != (subset.name, subset.version, subset.content_hash):
        raise other
    return True


def _write(folder: Path, table: pa.Table, manifest: Mapping[str, Any]) -> None:
    (folder / DATA).parent.mkdir(parents=True)
    write_rows(table, folder / DATA)
    # The manifest last: a reader that finds it finds everything.
    write_manifest(manifest, folder / MANIFEST)


def write_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    text = (json.dumps(jsonable(manifest), indent=2, ensure_ascii=False) + "\n").encode()
    require_size(f"the manifest of {manifest['name']}", len(text))  # or nobody could read it back
    path.write_bytes(text)


def rows_table(subset: Subset, catalog: Catalog, facts: Sequence[Fact | None]) -> pa.Table:
    """Return a row a sample: token ids, and what is known of its trace and problem.

    Args:
        facts: of ``facts_of``.
    """
    table = sample_columns(subset.samples)
    texts = texts_of(catalog, subset, facts)
    for name in texts.column_names:
        table = table.append_column(texts.schema.field(name), texts[name])
    return table


def manifest_of(subset: Subset, catalog: Catalog, facts: Sequence[Fact | None]) -> dict[str, Any]:
    """Return what a reader must know of a subset: where it comes from, its numbers, its content hash.

    Args:
        facts: of ``facts_of``.
    """
    described = describe(subset, facts)
    quantiles = {key: described[key] for key in described if key.endswith("_quantiles")}
    return {
        "schema": MANIFEST_SCHEMA,
        **subset.facts(),
        "n_problems": described["n_problems"],
        **quantiles,
        "pool": dict(subset.pool),
        "warnings": list(subset.warnings),
        "created_at": subset.created_at.isoformat(),
        **provenance_of(subset, catalog, facts),
    }


def read_directory(path: str | Path) -> Subset:
    """An exported folder as a subset.

    Raises:
        InputError: no usable manifest, one of a newer schema, or rows that do not have its content hash.
    """
    path = Path(path)
    manifest = read_manifest(path / MANIFEST)
    versions.check_name(manifest["name"])
    return read_subset(manifest, path / MANIFEST, [path / DATA])


def read_subset(
    manifest: Mapping[str, Any], where: Path, data: Sequence[Path], *, hub: Mapping[str, str] | None = None
) -> Subset:
    """A subset from its manifest and its Parquet files in order.

    Args:
        manifest: of ``read_manifest``.
        where: the manifest's file, for messages.
        hub: where on the Hub it was read: repo, commit, tag, manifest.

    Raises:
        InputError: rows that are none, or that do not have the manifest's content hash and counts.
    """
    samples = list(read_samples(data, manifest["n_samples"], manifest["n_tokens"]))
    subset = Subset(
        name=manifest["name"],
        version=manifest["version"],
        content_hash=manifest["content_hash"],
        recipe=dict(manifest["recipe"]),
        seed=manifest["seed"],
        model=manifest["model"],
        model_revision=manifest["model_revision"],
        tokenizer_hash=manifest["tokenizer_hash"],
        samples=samples,
        pool=dict(manifest["pool"]),
        warnings=list(manifest["warnings"]),
        created_at=moment(manifest["created_at"]),
        origin=_origin(manifest, hub),
        data_files=tuple(data),
    )
    if versions.hash_samples(samples) != subset.content_hash:
        raise InputError(
            f"the rows of {where.parent} do not have the content hash of its manifest: it was changed; export it again"
        )
    n_problems = len({sample.problem_id for sample in samples if sample.problem_id})
    counted = {"n_samples": subset.n_samples, "n_tokens": subset.n_tokens, "n_problems": n_problems}
    if wrong := next((key for key, n in counted.items() if manifest[key] != n), None):
        raise InputError(f"{where} says {wrong} {manifest[wrong]}, its rows have {counted[wrong]}: export it again")
    return subset


def _origin(manifest: Mapping[str, Any], hub: Mapping[str, str] | None) -> dict[str, Any]:
    known = {"hub": hub or manifest.get("hub"), "licences": manifest.get("licences")}
    listed = {key: [dict(item) for item in manifest[key]] for key in ("runs", "sources")}
    return {**{key: dict(value) for key, value in known.items() if value}, **listed}

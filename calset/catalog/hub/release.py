"""A published subset as files: how they are made, and the checks that what comes back is what was published.

Must not know: HTTP, the Hub's client library, the card's text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.catalog.hub import card
from calset.catalog.hub.names import data_folder, manifest_path, plot_path, tag_of
from calset.catalog.subsets import versions
from calset.catalog.subsets.facts import facts_of
from calset.catalog.subsets.folder import manifest_of, read_subset, rows_table, write_manifest
from calset.catalog.subsets.manifest import read_manifest
from calset.catalog.subsets.samplefiles import write_rows
from calset.errors import InputError

if TYPE_CHECKING:
    from calset.catalog.catalog import Catalog
    from calset.catalog.records import Subset

SHARD_BYTES = 400_000_000  # of rows in memory; a Parquet file is a third of it or less


# --- making one ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Release:
    """A subset's files, ready to be sent: ``files`` by their path in the repository, all but the card."""

    subset: Subset
    manifest: Mapping[str, Any]
    files: Mapping[str, Path]

    @property
    def tag(self) -> str:
        return tag_of(self.subset.name, self.subset.version)


def make(subset: Subset, catalog: Catalog, folder: Path, *, model_licence: str | None = None) -> Release:
    """Write a subset's files below a folder.

    Args:
        model_licence: what the model that made the traces is under; None when unknown.
    """
    facts = facts_of(catalog, subset)
    table = rows_table(subset, catalog, facts)
    data = _write_shards(table, folder, subset.name, max(1, -(-table.nbytes // SHARD_BYTES)))
    manifest = manifest_of(subset, catalog, facts)
    questions = {source["name"]: source.get("licence") for source in manifest["sources"]}
    manifest.setdefault("licences", {"questions": questions, "model": model_licence})  # a pulled subset has its own
    manifest["files"] = [
        {"path": path, "bytes": (folder / path).stat().st_size, "sha256": _sha256(folder / path)} for path in data
    ]
    for path in (manifest_path(subset.name), plot_path(subset.name)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write_manifest(manifest, folder / manifest_path(subset.name))
    card.draw(table, subset, folder / plot_path(subset.name))
    paths = [*data, manifest_path(subset.name), plot_path(subset.name)]
    return Release(subset, manifest, {path: folder / path for path in paths})


def _write_shards(table: Any, folder: Path, name: str, n: int) -> list[str]:
    n = min(n, max(1, table.num_rows))
    (folder / data_folder(name)).mkdir(parents=True)
    paths = []
    for i in range(n):
        start, stop = i * table.num_rows // n, (i + 1) * table.num_rows // n
        paths.append(f"{data_folder(name)}train-{i:05d}-of-{n:05d}.parquet")
        write_rows(table.slice(start, stop - start), folder / paths[-1])
    return paths


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading one --------------------------------------------------------------------------------------------------


def open_manifest(folder: Path, name: str) -> dict[str, Any]:
    """A subset's manifest in a downloaded repository, and the list of files in it, checked.

    Raises:
        InputError: none, of a newer schema, of another subset, of another shape than is read later (``manifest``), or
            with a list of files that cannot be its own.
    """
    versions.check_name(name)  # in a repository of others it is whatever a file is called
    manifest = read_manifest(folder / manifest_path(name), remedy="publish")
    if manifest["name"] != name:
        raise InputError(f"{manifest_path(name)} is not the manifest of {name}: publish the subset again")
    if manifest.get("licences") is None:
        raise InputError(f"{manifest_path(name)} names no licences: publish the subset again")
    listed = manifest.get("files")
    if not isinstance(listed, list) or not _are_shards(listed, name):
        raise InputError(f"{manifest_path(name)} lists no usable files: publish the subset again")
    return manifest


def _are_shards(files: Sequence[Any], name: str) -> bool:
    """Whether these are all shards of a subset, in order: a path of a manifest is never taken on trust."""
    if not all(isinstance(f, dict) and isinstance(f.get("path"), str) and _has_sum(f) for f in files):
        return False
    wanted = [f"{data_folder(name)}train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    return bool(files) and [f["path"] for f in files] == wanted


def _has_sum(file: Mapping[str, Any]) -> bool:
    return type(file.get("bytes")) is int and bool(re.fullmatch(r"[0-9a-f]{64}", str(file.get("sha256"))))


def damaged(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The data files that are missing or do not have the size and sha256 of the manifest."""
    return [
        file["path"]
        for file in manifest["files"]
        if not (path := folder / file["path"]).is_file()
        or path.stat().st_size != file["bytes"]
        or _sha256(path) != file["sha256"]
    ]


def read(folder: Path, manifest: Mapping[str, Any], hub: Mapping[str, str]) -> Subset:
    """The subset in a downloaded repository; its files and its content are checked against the manifest.

    Raises:
        InputError: a file or the content is not what was published.
    """
    if bad := damaged(folder, manifest):
        raise InputError(
            f"{bad[0]} of {hub['repo']} at {hub['tag']} is not the file that was published (another sha256): it was "
            "changed on the Hub; ask its owner to publish a new version"
        )
    where = folder / manifest_path(manifest["name"])
    return read_subset(manifest, where, [folder / file["path"] for file in manifest["files"]], hub=hub)

"""Calibration references: find the subset that a reference names, export it, and compare it with another.

A reference is ``name`` or ``name@2`` of a catalog, the folder of an exported subset, or ``hub:org/repo/name@2``.
Must not know: how selections are made.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from calset.catalog.catalog import Catalog
from calset.catalog.hub.names import PREFIX
from calset.catalog.hub.pull import open_reference
from calset.catalog.records import Subset
from calset.catalog.subsets import versions
from calset.catalog.subsets.compare import Difference, compare
from calset.catalog.subsets.folder import MANIFEST, read_directory, write_folder
from calset.catalog.subsets.provenance import provenance_of
from calset.errors import InputError


def resolve(ref: str | Path, catalog: Catalog | str | Path | None = None) -> Subset:
    """Return the subset that a reference names, checked against its content hash; ``origin`` says which runs made it.

    Args:
        ref: ``name`` (latest version), ``name@2``, the folder of an exported subset, or ``hub:org/repo/name@2``.
        catalog: where names are looked up; by default ``CALSET_CATALOG``, else ``calset.duckdb`` here.

    Raises:
        InputError: no such subset, or a folder whose content is not what its manifest says.
        CatalogError: stored samples without their hash.
    """
    return locate(ref, catalog)[0]


def find(ref: str | Path, catalog: Catalog | str | Path | None = None) -> Subset:
    """Do as ``resolve``, without looking for the runs of a subset that was selected here: its ``origin`` is None."""
    return _found(ref, catalog)[0]


def locate(ref: str | Path, catalog: Catalog | str | Path | None = None) -> tuple[Subset, Path | None]:
    """Do as ``resolve``, and return the exported folder too that the subset was read from, None if it was none."""
    subset, folder = _found(ref, catalog)
    if subset.origin is None:
        origin = provenance_of(subset, catalog if isinstance(catalog, Catalog) else Catalog(catalog))
        subset = replace(subset, origin=origin)
    return subset, folder


def _found(ref: str | Path, catalog: Catalog | str | Path | None) -> tuple[Subset, Path | None]:
    path = Path(ref)
    if isinstance(ref, str) and ref.startswith(PREFIX):
        return open_reference(ref), None
    if isinstance(ref, Path) or "/" in ref or os.sep in ref:
        # os.path says False, where Path's methods raise, of a text that can be no path.
        if os.path.isdir(path):
            return read_directory(path), path
        raise InputError(
            f"no calibration subset at {ref}: give NAME or NAME@VERSION of the catalog, an exported folder, or "
            "hub:ORG/REPO/NAME@VERSION"
        )
    try:
        return versions.load(catalog if isinstance(catalog, Catalog) else Catalog(catalog), ref), None
    except InputError:
        # A name means the catalog's subset; a folder of that name here counts only when there is none.
        if os.path.isfile(path / MANIFEST):
            return read_directory(path), path
        raise


def export(catalog: Catalog | str | Path, subset: Subset | str, directory: str | Path) -> Path:
    """Write a subset to a folder; the same subset again is fine, anything else in its way is not touched.

    Args:
        subset: a Subset or a reference to one.

    Returns:
        the folder.

    Raises:
        InputError: the folder holds something else, or cannot be made.
        CatalogError: no space left.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    return write_folder(catalog, find(subset, catalog) if isinstance(subset, str) else subset, directory)


def diff(catalog: Catalog | str | Path | None, a: Subset | str | Path, b: Subset | str | Path) -> Difference:
    """Compare two subsets (or references to them): what they share and how they differ.

    Samples are the same when their ids and token ids are; problems by problem id.

    Args:
        catalog: where names are looked up, and what tells the difficulty, source and verdict of samples.

    Raises:
        InputError: no such subset.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    return compare(catalog, *(s if isinstance(s, Subset) else find(s, catalog) for s in (a, b)))

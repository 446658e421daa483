"""A subset's manifest as it is read, which may be anybody's: its schema number, and the shape of all that is used.

Why one place: reports, comparisons, cards and prunings take values from deep inside, and each would end in a traceback
of its own over a text where a number belongs. What nobody takes out is kept as it came, so long as it is plain JSON of
bounded depth and numbers. Must not know: rows of samples, catalogs, the Hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import datetime, timedelta
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from calset.catalog.subsets.recipes import Recipe, RecipeError
from calset.errors import InputError
from calset.io.files import size

MANIFEST_SCHEMA = 1
MAX_BYTES = 8 << 20  # calset's own have tens of kilobytes, and 3 more for each run; JSON takes 40 times its size
MAX_DEPTH = 32  # calset's own are 6 deep; Python's stack ends some hundreds down
LONGEST_REASON = 200  # characters of a fault, which may quote the manifest

_END = object()
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Stratum(Struct):
    offered: _Count
    taken: _Count
    tokens_offered: _Count
    tokens_taken: _Count


class _Grid(Struct):
    lengths: list[str]
    taken_of: dict[str, list[tuple[_Count, _Count]]]


class _Pool(Struct):
    length_band: tuple[_Count, _Count] | None = None
    strata: dict[str, _Stratum] | None = None
    difficulty_length: _Grid | None = None


class _Run(Struct):
    run_id: str
    model: str
    engine: str
    engine_version: str
    max_tokens: _Count
    sampling: dict[str, Any]
    seed: _Integer
    started_at: str
    command: str


class _Source(Struct):
    name: str
    kind: str
    revision: str
    grader: str
    licence: str | None = None


class _Place(Struct):
    repo: str
    commit: str
    tag: str
    manifest: str


class _Licences(Struct):
    questions: dict[str, str | None]
    model: str | None = None


class _Origin(Struct):
    runs: list[_Run]
    sources: list[_Source]
    hub: _Place | None = None
    licences: _Licences | None = None


class _Manifest(Struct):
    name: str
    version: Annotated[int, Meta(ge=1, le=999_999_999)]  # as in references and tags
    content_hash: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    recipe: dict[str, Any]
    seed: _Integer
    model: str
    model_revision: str
    tokenizer_hash: str
    n_samples: _Count
    n_tokens: _Count
    n_problems: _Count
    created_at: str
    pool: _Pool
    warnings: list[str]
    runs: list[_Run]
    sources: list[_Source]
    hub: _Place | None = None
    licences: _Licences | None = None
    n_tokens_quantiles: dict[str, float] | None = None
    length_quantiles: dict[str, float] | None = None
    difficulty_quantiles: dict[str, float] | None = None


def read_manifest(path: Path, *, remedy: str = "export") -> dict[str, Any]:
    """A manifest's content, checked.

    Args:
        remedy: what to do with the subset again where it cannot be used.

    Raises:
        InputError: no manifest, one of a newer schema, or of another shape than is read later.
    """
    if not os.path.isfile(path):  # a pipe or a device would not end
        raise InputError(f"{path.parent} is not an exported subset: it has no {path.name}")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        require_size(path, len(text))
        manifest = json.loads(text.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"cannot read {path}: it is nested too deeply") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema < 1:
        raise InputError(f"{path} is not a calset manifest: it has no schema number")
    if schema > MANIFEST_SCHEMA:
        raise InputError(
            f"{path} has manifest schema {schema}, this calset knows {MANIFEST_SCHEMA}: pip install -U calset"
        )
    if wrong := _fault(manifest):
        raise InputError(f"{path} is not a calset manifest ({wrong}): {remedy} the subset again")
    return manifest


def require_size(what: Any, n_bytes: int) -> None:
    """Refuse a manifest that is too long to be parsed, before it is.

    Raises:
        InputError: it has more than ``MAX_BYTES``.
    """
    if n_bytes > MAX_BYTES:
        raise InputError(f"{what} is too long for a manifest: calset reads {size(MAX_BYTES)}, and writes far less")


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """Why a manifest cannot be used, in some words on one line; None of a good one."""
    try:
        _require_plain(manifest)
        known = msgspec.convert(manifest, _Manifest)
        moment(known.created_at)
        _require_recipe(known)
    except RecipeError as error:
        return _short(f"recipe: {error.said}")
    except (ValueError, OverflowError) as error:  # msgspec's are ValueErrors
        return _short(str(error))
    return None


def is_origin(value: Any) -> bool:
    """Return True if a value is the ``origin`` of a subset: the parts of a manifest that say where it comes from."""
    try:
        _require_plain(value)
        msgspec.convert(value, _Origin)
    except ValueError:
        return False
    return True


def moment(text: str) -> datetime:
    """A manifest's time as the catalog keeps times: UTC, without a timezone object.

    Raises:
        ValueError, OverflowError: it is none.
    """
    said = datetime.fromisoformat(text)
    return said.replace(tzinfo=None) - (said.utcoffset() or timedelta(0))


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def _require_plain(manifest: Mapping[str, Any]) -> None:
    """Refuse what JSON can say and a table, a database or a page cannot take, wherever it stands."""
    inside: list[Iterator[Any]] = [iter([manifest])]  # iterators and no list of values, which would take as much again
    while inside:
        value = next(inside[-1], _END)
        if value is _END:
            inside.pop()
        elif len(inside) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(value, str):
            value.encode("utf-8")  # a UnicodeError, which is a ValueError, of half a surrogate pair
        elif isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{value} is not a number that JSON has")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a whole number has more than 64 bits")
        elif isinstance(value, dict):
            inside.append(chain.from_iterable(value.items()))
        elif isinstance(value, list):
            inside.append(iter(value))


def _require_recipe(manifest: _Manifest) -> None:
    """The recipe is one, and says what the pool and its readers take for granted."""
    recipe = manifest.recipe
    # The others have a default in manifests that are older than they are.
    needed = ["name", "kind", "order", *(["shares"] if recipe.get("stratify") is not None else [])]
    if missing := [key for key in needed if key not in recipe]:
        raise ValueError(f"recipe lacks {missing[0]}")
    Recipe(**{field.name: recipe[field.name] for field in fields(Recipe) if field.name in recipe})
    if manifest.pool.strata and recipe.get("stratify") is None:
        raise ValueError("pool has strata, and the recipe none")
    grid = manifest.pool.difficulty_length
    if grid is not None and any(len(row) != len(grid.lengths) for row in grid.taken_of.values()):
        raise ValueError("pool has a difficulty_length of unequal rows")

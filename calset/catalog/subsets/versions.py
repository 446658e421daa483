"""Subsets: immutable, versioned, content-hashed lists of calibration samples, as the catalog keeps them.

Must not know: how a selection was made, tokenizers, exported files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import duckdb

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.records import Sample, Subset
from calset.catalog.store.inserts import append, row
from calset.catalog.store.schema import TABLES
from calset.catalog.store.sql import registered
from calset.catalog.store.values import dump_json, int_lists
from calset.catalog.subsets.manifest import is_origin
from calset.errors import CatalogError, InputError

if TYPE_CHECKING:
    import pyarrow as pa

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BATCH_ROWS = 1024  # of samples, in an Arrow batch
_REFERENCE = re.compile(r"(?P<name>[^@]*)(?:@(?P<version>[0-9]{1,9}))?")


def check_name(name: str) -> str:
    """A subset's name, which becomes file names and tags.

    Raises:
        InputError: anything but letters, digits, dot, underscore and hyphen, or "..".
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"{name!r} cannot name a subset: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or "
            "digit, without '..'"
        )
    return name


def parse_reference(ref: str) -> tuple[str, int | None]:
    """``name`` or ``name@2`` as name and version.

    Raises:
        InputError: neither.
    """
    match = _REFERENCE.fullmatch(ref)
    if not match:
        raise InputError(f"{ref!r} is not a subset of a catalog: write NAME or NAME@VERSION, such as math@2")
    return check_name(match["name"]), int(match["version"]) if match["version"] else None


def hash_samples(samples: Sequence[Sample]) -> str:
    """The content hash of samples in their order."""
    return ids.content_hash((s.sample_id, s.input_ids, s.n_prompt_tokens) for s in samples)


def prompt_sample_id(kind: str, problem_id: str, generation_key: str) -> str:
    """The id of a sample that holds a prompt and no trace: one a problem and generation key."""
    return ids.digest("sample", kind, problem_id, generation_key)


def store(catalog: Catalog, subset: Subset) -> Subset:
    """Keep a subset under the next version of its name, whatever its ``version`` says.

    Returns:
        the subset as kept; when the name's latest version has the same content, recipe and seed, that one.
    """
    check_name(subset.name)
    with catalog.transaction() as con:
        rows = con.execute(
            "SELECT version, content_hash, recipe, seed FROM subsets WHERE name = ? ORDER BY version DESC LIMIT 1",
            [subset.name],
        ).fetchall()
        if not rows:
            return _insert(con, replace(subset, version=1))
        version, content_hash, recipe, seed = rows[0]
        same = json.loads(recipe) == json.loads(dump_json(subset.recipe)) and seed == subset.seed
        if not (same and content_hash == subset.content_hash):
            return _insert(con, replace(subset, version=version + 1))
    return load(catalog, f"{subset.name}@{version}")


def keep(catalog: Catalog, subset: Subset, rows: pa.Table | None = None) -> Subset:
    """Keep a subset under its own version: one that was pulled.

    Args:
        rows: what was published beside each sample, in their order, as the columns of the table ``published_rows``.

    Returns:
        the subset as kept: the one that was there when it has the same content.

    Raises:
        InputError: the catalog holds another content under this name and version.
    """
    check_name(subset.name)
    with catalog.transaction() as con:
        there = con.execute(
            "SELECT content_hash, starts_with(origin, '{') FROM subsets WHERE name = ? AND version = ?",
            [subset.name, subset.version],
        ).fetchall()
        if there and there[0][0] != subset.content_hash:
            raise InputError(
                f"{catalog.path} holds another {subset.ref}: its content hash is {there[0][0][:12]}, not "
                f"{subset.content_hash[:12]}; pull into another catalog with --catalog"
            )
        kept = _insert(con, subset) if not there else None
        if rows is not None and (kept or there[0][1]):  # of a subset that was selected here, the traces say more
            _insert_rows(con, subset, rows)
    return kept or load(catalog, subset.ref)


def _insert(con: duckdb.DuckDBPyConnection, subset: Subset) -> Subset:
    append(con, "subsets", [row("subsets", subset)])
    known = {"name": subset.name, "version": subset.version}
    items = [
        tuple(
            known[c] if c in known else position if c == "position" else getattr(sample, c)
            for c in TABLES["subset_items"]
        )
        for position, sample in enumerate(subset.samples)
    ]
    append(con, "subset_items", items)
    return subset


def _insert_rows(con: duckdb.DuckDBPyConnection, subset: Subset, rows: pa.Table) -> None:
    """Add published rows, unless the subset has some: one that was pulled by an older calset has none."""
    known = {"name": "$name", "version": "$version", "position": "position::INTEGER", "messages": "to_json(messages)"}
    columns = ", ".join(known.get(column, column) for column in TABLES["published_rows"])
    with registered(con, "calset_batch", rows.append_column("position", [range(rows.num_rows)])):
        con.execute(
            f"INSERT INTO published_rows SELECT {columns} FROM calset_batch WHERE NOT EXISTS "
            "(FROM published_rows WHERE name = $name AND version = $version)",
            {"name": subset.name, "version": subset.version},
        ).fetchall()


def load(catalog: Catalog, ref: str) -> Subset:
    """A subset by ``name`` (its latest version) or ``name@2``, its content checked against its hash.

    Raises:
        InputError: no such subset or version.
        CatalogError: the stored samples no longer have the stored hash.
    """
    name, version = parse_reference(ref)
    with catalog.reading() as con:
        heads = catalog.rows("SELECT * FROM subsets WHERE name = ? ORDER BY version DESC", [name])
        head = next((h for h in heads if version in (None, h["version"])), None)
        if head is None:
            raise InputError(_not_found(name, version, [h["version"] for h in heads], catalog))
        items = con.sql(
            "SELECT sample_id, n_prompt_tokens, kind, trace_id, problem_id, input_ids FROM subset_items "
            "WHERE name = ? AND version = ? ORDER BY position",
            params=[name, head["version"]],
        )
        table = items.to_arrow_reader(_BATCH_ROWS).read_all()
    if head["origin"] is not None and not is_origin(head["origin"]):
        raise InputError(f"{catalog.path} holds an origin that calset did not write: use another copy of the file")
    subset, found = _read(head, table)
    if found != subset.content_hash:
        raise CatalogError(
            f"the samples of {subset.ref} in {catalog.path} no longer have its content hash "
            f"{subset.content_hash[:12]}: the file was changed or is damaged; select again or restore a backup"
        )
    return subset


def _not_found(name: str, version: int | None, versions: Sequence[int], catalog: Catalog) -> str:
    if versions:
        return f"{name} has no version {version} in {catalog.path}: there are {', '.join(map(str, sorted(versions)))}"
    return f"no subset {name!r} in {catalog.path}: calset subsets lists them, calset select makes one"


def _read(head: dict[str, Any], table: pa.Table) -> tuple[Subset, str]:
    """A subset from its row and its samples' rows, and the content hash of these."""
    sample_ids, n_prompt_tokens, *others = (table[name].to_pylist() for name in table.column_names[:-1])
    views = int_lists(table["input_ids"])
    lists = table["input_ids"].to_pylist() if views is None else [view.tolist() for view in views]
    samples = [Sample(*of) for of in zip(sample_ids, lists, n_prompt_tokens, *others, strict=True)]
    subset = Subset(**{key: head[key] for key in head if key not in ("n_samples", "n_tokens")}, samples=samples)
    if views is None:
        return subset, hash_samples(samples)
    return subset, ids.content_hash(zip(sample_ids, views, n_prompt_tokens, strict=True))


def list_subsets(catalog: Catalog) -> list[dict[str, Any]]:
    """All subsets without their samples, by name and version: the columns of the table, JSON parsed, and ``ref``."""
    heads = catalog.rows("SELECT * FROM subsets ORDER BY name, version")
    return [{**head, "ref": f"{head['name']}@{head['version']}"} for head in heads]

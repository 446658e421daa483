"""Subsets: immutable, versioned, content-hashed lists of calibration samples, as the catalog keeps them.

Must not know: how a selection was made, tokenizers, exported files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import duckdb

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.recipes import nearest_rank
from calset.catalog.records import Sample, Subset
from calset.catalog.schema import TABLES
from calset.catalog.stats import DIFFICULTY_BANDS, difficulty_band, length_bands
from calset.catalog.values import arrow_batch, dump_json
from calset.errors import CatalogError, InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REFERENCE = re.compile(r"(?P<name>[^@]*)(?:@(?P<version>[0-9]{1,9}))?")
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


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


def keep(catalog: Catalog, subset: Subset) -> Subset:
    """Keep a subset under its own version: one that was pulled.

    Returns:
        the subset as kept: the one that was there when it has the same content.

    Raises:
        InputError: the catalog holds another content under this name and version.
    """
    check_name(subset.name)
    with catalog.transaction() as con:
        rows = con.execute(
            "SELECT content_hash FROM subsets WHERE name = ? AND version = ?", [subset.name, subset.version]
        ).fetchall()
        if not rows:
            return _insert(con, subset)
    if rows[0][0] != subset.content_hash:
        raise InputError(
            f"{catalog.path} holds another {subset.ref}: its content hash is {rows[0][0][:12]}, not "
            f"{subset.content_hash[:12]}; pull into another catalog with --catalog"
        )
    return load(catalog, subset.ref)


def _insert(con: duckdb.DuckDBPyConnection, subset: Subset) -> Subset:
    row = tuple(
        dump_json(getattr(subset, column)) if kind == "JSON" else getattr(subset, column)
        for column, kind in TABLES["subsets"].items()
    )
    con.execute(f"INSERT INTO subsets VALUES ({', '.join('?' * len(row))})", row).fetchall()
    known = {"name": subset.name, "version": subset.version}
    items = [
        tuple(
            known[c] if c in known else position if c == "position" else getattr(sample, c)
            for c in TABLES["subset_items"]
        )
        for position, sample in enumerate(subset.samples)
    ]
    con.register("calset_batch", arrow_batch(TABLES["subset_items"], items))
    con.execute("INSERT INTO subset_items SELECT * FROM calset_batch").fetchall()
    con.unregister("calset_batch")
    return subset


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
        rows = con.execute(
            "SELECT sample_id, input_ids, n_prompt_tokens, kind, trace_id, problem_id FROM subset_items "
            "WHERE name = ? AND version = ? ORDER BY position",
            [name, head["version"]],
        ).fetchall()
    subset = _subset(head, [Sample(*row) for row in rows])
    if hash_samples(subset.samples) != subset.content_hash:
        raise CatalogError(
            f"the samples of {subset.ref} in {catalog.path} no longer have its content hash "
            f"{subset.content_hash[:12]}: the file was changed or is damaged; select again or restore a backup"
        )
    return subset


def _not_found(name: str, version: int | None, versions: Sequence[int], catalog: Catalog) -> str:
    if versions:
        return f"{name} has no version {version} in {catalog.path}: there are {', '.join(map(str, sorted(versions)))}"
    return f"no subset {name!r} in {catalog.path}: calset subsets lists them, calset select makes one"


def _subset(head: dict[str, Any], samples: Sequence[Sample]) -> Subset:
    return Subset(**{key: head[key] for key in head if key not in ("n_samples", "n_tokens")}, samples=samples)


def list_subsets(catalog: Catalog) -> list[dict[str, Any]]:
    """All subsets without their samples, by name and version: the columns of the table, JSON parsed, and ``ref``."""
    heads = catalog.rows("SELECT * FROM subsets ORDER BY name, version")
    return [{**head, "ref": f"{head['name']}@{head['version']}"} for head in heads]


@dataclass(frozen=True, slots=True)
class Difference:
    """Two subsets side by side.

    ``shared``, ``only_a`` and ``only_b`` count samples and problems; ``recipe`` holds the keys that differ, and
    ``distributions`` the samples of each by difficulty band, length band (quartiles of both together), source and
    verdict, as far as the catalog knows them: what -> value -> (of a, of b).
    """

    same: bool
    shared: dict[str, int]
    only_a: dict[str, int]
    only_b: dict[str, int]
    a: dict[str, Any]
    b: dict[str, Any]
    recipe: dict[str, tuple[Any, Any]]
    distributions: dict[str, dict[str, tuple[int, int]]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, Any, Any]]:
        """(what, of a, of b), for a table of two columns."""
        rows: list[tuple[str, Any, Any]] = [
            ("content hash", self.a["content_hash"][:12], self.b["content_hash"][:12]),
            ("recipe", self.a["recipe"]["name"], self.b["recipe"]["name"]),
            *((f"recipe: {key}", *values) for key, values in self.recipe.items() if key != "name"),
            ("seed", self.a["seed"], self.b["seed"]),
            ("model", self.a["model"], self.b["model"]),
        ]
        for what in ("samples", "tokens", "problems"):
            rows.append((what, self.a[f"n_{what}"], self.b[f"n_{what}"]))
        for what in ("samples", "problems"):
            rows.append((f"shared {what}", self.shared[what], self.shared[what]))
            rows.append((f"{what} only here", self.only_a[what], self.only_b[what]))
        for what in ("length", "difficulty"):
            of_a, of_b = (side[f"{what}_quantiles"] or {} for side in (self.a, self.b))
            rows += [(f"{what} {q}", of_a.get(q), of_b.get(q)) for q in {**of_a, **of_b}]
        for what, counts in self.distributions.items():
            rows += [(f"samples of {what} {value}", *of) for value, of in counts.items()]
        return rows


def diff(catalog: Catalog | str | Path | None, a: Subset | str | Path, b: Subset | str | Path) -> Difference:
    """What two subsets (or references to them) share and how they differ.

    Samples are the same when their ids and token ids are; problems by problem id.

    Raises:
        InputError: no such subset.
    """
    from calset.catalog.export import resolve

    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    a, b = (s if isinstance(s, Subset) else resolve(s, catalog) for s in (a, b))
    keys_a, keys_b = ({(s.sample_id, tuple(s.input_ids)) for s in subset.samples} for subset in (a, b))
    problems_a, problems_b = ({s.problem_id for s in subset.samples if s.problem_id} for subset in (a, b))

    def count(samples: set[Any], problems: set[Any]) -> dict[str, int]:
        return {"samples": len(samples), "problems": len(problems)}

    return Difference(
        same=a.content_hash == b.content_hash,
        shared=count(keys_a & keys_b, problems_a & problems_b),
        only_a=count(keys_a - keys_b, problems_a - problems_b),
        only_b=count(keys_b - keys_a, problems_b - problems_a),
        a=describe(a, catalog),
        b=describe(b, catalog),
        recipe={
            key: (a.recipe.get(key), b.recipe.get(key))
            for key in {**a.recipe, **b.recipe}
            if a.recipe.get(key) != b.recipe.get(key)
        },
        distributions=_distributions(catalog, a, b),
    )


def _distributions(catalog: Catalog, *subsets: Subset) -> dict[str, dict[str, tuple[int, int]]]:
    lengths = [[len(s.input_ids) - s.n_prompt_tokens for s in subset.samples] for subset in subsets]
    bands = length_bands([n for of_one in lengths for n in of_one])
    counts: dict[str, list[Counter[str]]] = {"length": [], "difficulty": [], "source": [], "verdict": []}
    for subset, of_one in zip(subsets, lengths, strict=True):
        known = trace_facts(catalog, subset) if catalog.exists() else {}
        rows = [known[s.trace_id] for s in subset.samples if s.trace_id in known]
        counts["length"].append(Counter(next(label for top, label in bands if n <= top) for n in of_one))
        counts["difficulty"].append(Counter(DIFFICULTY_BANDS[difficulty_band(row["difficulty"])] for row in rows))
        for what in ("source", "verdict"):
            counts[what].append(Counter(row[what] for row in rows))
    order = {"length": [label for _, label in bands], "difficulty": list(DIFFICULTY_BANDS)}
    return {
        what: {value: (a[value], b[value]) for value in order.get(what, sorted(a | b)) if a[value] or b[value]}
        for what, (a, b) in counts.items()
    }


def describe(subset: Subset, catalog: Catalog | None = None) -> dict[str, Any]:
    """A subset's numbers: samples, tokens, problems, quantiles of its lengths and, where known, of its difficulties.

    Quantiles are nearest-rank; ``n_tokens`` of a sample is prompt and completion, ``length`` the completion alone.
    """
    lengths = [len(s.input_ids) - s.n_prompt_tokens for s in subset.samples]
    known = trace_facts(catalog, subset) if catalog is not None and catalog.exists() else {}
    difficulties = [known[s.trace_id]["difficulty"] for s in subset.samples if s.trace_id in known]
    return {
        "ref": subset.ref,
        "recipe": dict(subset.recipe),
        "seed": subset.seed,
        "model": subset.model,
        "content_hash": subset.content_hash,
        "n_samples": subset.n_samples,
        "n_tokens": subset.n_tokens,
        "n_problems": len({s.problem_id for s in subset.samples if s.problem_id}),
        "n_tokens_quantiles": quantiles([len(s.input_ids) for s in subset.samples]),
        "length_quantiles": quantiles(lengths),
        "difficulty_quantiles": quantiles([d for d in difficulties if d is not None]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest-rank quantiles by name ("p0" to "p100"); None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{round(100 * q)}": ordered[nearest_rank(q, len(ordered)) - 1] for q in _SHARES}


def trace_facts(catalog: Catalog, subset: Subset) -> dict[str | None, dict[str, Any]]:
    """What the catalog knows of the traces in a subset: rows of the view ``trace`` by trace id.

    Of a trace that was run again since, what belongs to the subset's tokens: an earlier attempt's text and verdict.
    """
    wanted = sorted({s.trace_id for s in subset.samples if s.trace_id})
    if not wanted:
        return {}
    sql = "SELECT * FROM trace WHERE trace_id IN (SELECT unnest(?::VARCHAR[]))"
    facts: dict[str | None, dict[str, Any]] = {row["trace_id"]: row for row in catalog.rows(sql, [wanted])}
    taken = attempts_of(catalog, subset)
    old = {t: a for t, a in taken.items() if t in facts and facts[t]["attempt"] != a}
    sql = """
        SELECT t.trace_id, t.attempt, t.run_id, t.text, t.response, t.answer_start, t.n_tokens, t.n_reasoning_tokens,
            t.finish_reason, t.finish_reason = 'stop' AS finished, t.max_tokens, t.seconds, t.created_at,
            coalesce(g.verdict, 'ungraded') AS verdict, g.verdict = 'correct' AS correct,
            g.extracted, g.grader, g.detail
        FROM traces t LEFT JOIN newest_grades g ON g.trace_id = t.trace_id AND g.attempt = t.attempt
        JOIN (SELECT unnest(?::VARCHAR[]) AS trace_id, unnest(?::INTEGER[]) AS attempt) w
            ON w.trace_id = t.trace_id AND w.attempt = t.attempt
    """
    for row in catalog.rows(sql, [list(old), list(old.values())]) if old else ():
        facts[row["trace_id"]] = {**facts[row["trace_id"]], **row}
    return facts


def attempts_of(catalog: Catalog, subset: Subset) -> dict[str, int]:
    """Which attempt at a trace the samples hold: the one with their token ids, among several the catalog has."""
    samples = {s.trace_id: s for s in subset.samples if s.trace_id}
    sql = "SELECT trace_id, attempt FROM traces WHERE trace_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY ALL"
    there: dict[str, list[int]] = {}
    for row in catalog.rows(sql, [sorted(samples)]):
        there.setdefault(row["trace_id"], []).append(row["attempt"])
    several = [(trace, attempt) for trace, attempts in there.items() if len(attempts) > 1 for attempt in attempts]
    tokens = catalog.tokens(several) if several else {}
    found = {trace: attempts[-1] for trace, attempts in there.items()}
    for (trace, attempt), (prompt, completion) in sorted(tokens.items()):
        if _is_part(samples[trace], [*prompt, *completion]):
            found[trace] = attempt
    return found


def _is_part(sample: Sample, token_ids: Sequence[int]) -> bool:
    """Whether a sample is this trace, or for a window (its id says ``TRACE:START-STOP``) its part at that place."""
    window = re.fullmatch(r".+:(\d+)-(\d+)", sample.sample_id)
    start, stop = (int(window[1]), int(window[2])) if window else (0, len(token_ids))
    return list(sample.input_ids) == list(token_ids[start:stop])

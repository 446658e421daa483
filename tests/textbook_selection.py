"""Selection in plain Python, one candidate after the other, to hold the real one against.

It shares no code with ``take`` and ``select`` but ``apportion``, whose own law is proved by trying every division.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import median
from typing import Any

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.subsets.recipes import Recipe
from calset.catalog.subsets.take import Candidate, apportion
from calset.catalog.subsets.versions import prompt_sample_id


@dataclass(frozen=True)
class Taken:
    """(Candidate, first token, number of tokens) in order, and what was counted on the way."""

    samples: list[tuple[Candidate, int, int]]
    stages: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def take(candidates: Iterable[Candidate], recipe: Recipe, seed: int) -> Taken:
    """Filter, band, order, cap, cut and spend."""
    pool = list(candidates)
    stages = {"candidates": len(pool)}
    if recipe.min_k is not None:
        pool = [c for c in pool if c.k >= recipe.min_k]
        stages["min_k"] = len(pool)
    median_k = float(median(c.k for c in pool)) if pool else 0.0
    truncated = sum(not c.finished for c in pool) / len(pool) if pool else 0.0
    if recipe.correct:
        pool = [c for c in pool if c.correct]
        stages["correct"] = len(pool)
    if recipe.finished:
        pool = [c for c in pool if c.finished]
        stages["finished"] = len(pool)
    if recipe.difficulty is not None:
        low, high = recipe.difficulty
        pool = [c for c in pool if c.difficulty is not None and low <= c.difficulty <= high]
        stages["difficulty"] = len(pool)
    errors = [standard_error(c.difficulty, c.k) for c in pool if c.difficulty is not None and c.k]
    band = length_band(recipe, [c.n_tokens for c in pool])
    if band is not None:
        pool = [c for c in pool if band[0] <= c.n_tokens <= band[1]]
        stages["length"] = len(pool)
    pool.sort(key=sort_key(recipe, seed))
    if recipe.per_problem is not None:
        pool = cap(pool, recipe.per_problem)
        stages["per_problem"] = len(pool)
    if not pool:
        return Taken([], stages)
    offered = [min(c.size, recipe.window or c.size) for c in pool]
    chosen = (
        spend_by_stratum(offered, pool, recipe) if recipe.stratify else spend(offered, recipe.samples, recipe.tokens)
    )
    facts: dict[str, Any] = {"taken": len(chosen), "tokens_available": sum(offered), "median_k": median_k}
    if band is not None:
        facts["length_band"] = list(band)
    if recipe.window is not None:
        facts["cut_to_window"] = sum(offered[i] < pool[i].size for i in chosen)
    if recipe.stratify is not None:
        facts["strata"] = strata_facts(pool, offered, chosen)
    starts = [window_start(seed, pool[i].sample_id, pool[i].size, offered[i], recipe.window) for i in chosen]
    samples = [(pool[i], start, offered[i]) for i, start in zip(chosen, starts, strict=True)]
    error = float(median(errors)) if errors else 0.0
    return Taken(samples, stages, facts, warnings(recipe, facts, truncated, error))


def standard_error(difficulty: float, k: int) -> float:
    """sqrt(p (1 - p) / k), where p counts one wrong and one right one more."""
    p = (round(difficulty * k) + 1) / (k + 2)
    return math.sqrt(p * (1 - p) / k)


def length_band(recipe: Recipe, lengths: Sequence[int]) -> tuple[int, int] | None:
    """The nearest-rank quantiles, exactly: quantile q of n is the ceil(q n)-th."""
    if recipe.length_tokens is not None:
        return recipe.length_tokens
    if recipe.length_quantiles is None or not lengths:
        return None
    ranks = [max(1, math.ceil(Fraction(str(q)) * len(lengths))) for q in recipe.length_quantiles]
    return sorted(lengths)[ranks[0] - 1], sorted(lengths)[ranks[1] - 1]


def sort_key(recipe: Recipe, seed: int) -> Any:
    def tie_break(c: Candidate) -> bytes:
        return hashlib.sha256(f"calset-order-v1\0{seed}\0{c.sample_id}".encode()).digest()

    if recipe.order == "catalog":
        return lambda c: (c.problem_id, c.sample_index, c.sample_id)
    if recipe.order == "harder":
        return lambda c: (1.0 if c.difficulty is None else -c.difficulty, tie_break(c))
    return tie_break


def cap(pool: Sequence[Candidate], per_problem: int) -> list[Candidate]:
    """The first so many of each problem."""
    taken, kept = Counter[str](), []
    for candidate in pool:
        taken[candidate.problem_id] += 1
        if taken[candidate.problem_id] <= per_problem:
            kept.append(candidate)
    return kept


def spend(sizes: Sequence[int], samples: int | None, tokens: int | None) -> list[int]:
    """The positions that a budget takes: whole samples in order, passing over what would exceed what is left."""
    if tokens is None:
        return list(range(len(sizes)))[:samples]
    left, taken = tokens, []
    for position, size in enumerate(sizes):
        if size <= left:
            taken.append(position)
            left -= size
    return taken


def spend_by_stratum(sizes: Sequence[int], pool: Sequence[Candidate], recipe: Recipe) -> list[int]:
    """The same for each stratum with its share."""
    names = sorted({c.stratum for c in pool})
    members = {name: [i for i, c in enumerate(pool) if c.stratum == name] for name in names}
    offered = [sum(sizes[i] for i in members[n]) if recipe.tokens else len(members[n]) for n in names]
    budget = recipe.tokens or recipe.samples
    if budget is None:
        budget = min(offered) * len(names) if recipe.shares == "equal" else sum(offered)
    weights = [1] * len(names) if recipe.shares == "equal" else offered
    taken: list[int] = []
    for name, share in zip(names, apportion(budget, weights, offered), strict=True):
        of_it = [sizes[i] for i in members[name]]
        taken += [members[name][i] for i in (spend(of_it, None, share) if recipe.tokens else spend(of_it, share, None))]
    return sorted(taken)


def strata_facts(pool: Sequence[Candidate], sizes: Sequence[int], chosen: Sequence[int]) -> dict[str, dict[str, int]]:
    found = {}
    for name in sorted({c.stratum for c in pool}):
        there = [i for i, c in enumerate(pool) if c.stratum == name]
        taken = [i for i in chosen if pool[i].stratum == name]
        found[name] = {"offered": len(there), "taken": len(taken)}
        found[name] |= {"tokens_offered": sum(sizes[i] for i in there), "tokens_taken": sum(sizes[i] for i in taken)}
    return found


def window_start(seed: int, sample_id: str, size: int, taken: int, window: int | None) -> int:
    if taken == size:
        return 0
    found = hashlib.sha256(f"calset-window-v1\0{seed}\0{window}\0{sample_id}".encode()).digest()
    return int.from_bytes(found[:16], "big") % (size - taken + 1)


def warnings(recipe: Recipe, facts: dict[str, Any], truncated: float, error: float) -> list[str]:
    found = []
    if recipe.samples is not None and facts["taken"] < recipe.samples:
        found.append(f"the pool is too small: {facts['taken']} samples where {recipe.samples} were asked")
    if recipe.tokens is not None and facts["tokens_available"] < recipe.tokens:
        found.append(f"the pool is too small: {facts['tokens_available']} tokens where {recipe.tokens} were asked")
    half_width = (recipe.difficulty[1] - recipe.difficulty[0]) / 2 if recipe.difficulty else math.inf
    if error > half_width:
        found.append(
            f"k is too low for this band: the median pass rate in it (of {facts['median_k']:g} judged traces) has a "
            f"standard error of {error:.2f}, more than half the band's width ({half_width:.2f}); "
            "build more samples a problem"
        )
    if truncated > 0.5:
        found.append(
            f"{truncated:.0%} of the traces did not finish: long ones are missing from this pool; build "
            "again with a larger --max-tokens and --retry truncated"
        )
    if recipe.stratify is not None and recipe.shares == "equal":
        what = "tokens_offered" if recipe.tokens is not None else "offered"
        share = (recipe.tokens or recipe.samples or 0) // len(facts["strata"])
        if poor := [f"{name} ({n[what]})" for name, n in facts["strata"].items() if n[what] < share]:
            more = f" and {len(poor) - 5} more" if len(poor) > 5 else ""
            found.append(
                f"the shares are not equal: {', '.join(poor[:5])}{more} cannot fill a share; the others take what is "
                "left, if they can"
            )
    return found


# -- a whole selection ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What ``select`` should keep: its samples' hash, its counts and its warnings."""

    content_hash: str
    pool: dict[str, Any]
    warnings: list[str]


def select(
    catalog: Catalog, recipe: Recipe, seed: int, *, model: str | None = None, where: str | None = None
) -> Selection:
    """Take a subset of a model's traces, reading every one of them."""
    rows = catalog.query("SELECT * EXCLUDE (text, response) FROM trace WHERE kind = 'build'").as_dicts()
    rows = [row for row in rows if model in (None, row["model"])]
    stages = {"traces": len(rows)}
    if where is not None:
        kept = {trace for (trace,) in catalog.query(f"SELECT trace_id FROM trace WHERE ({where}\n)").rows}
        rows = [row for row in rows if row["trace_id"] in kept]
        stages["where"] = len(rows)
    if recipe.kind == "prompt":
        rows = first_of_each_problem(rows)
        stages["problems"] = len(rows)
    strata = strata_of(catalog, recipe.stratify)
    candidates, keys = [], {}
    for row in rows:
        size, sample = row["n_prompt_tokens"], row["trace_id"]
        if recipe.kind == "trace":
            size += row["n_tokens"]
        else:
            sample = prompt_sample_id(recipe.kind, row["problem_id"], row["generation_key"])
        keys[sample] = row["trace_id"], row["attempt"]
        candidates.append(
            Candidate(
                sample, row["problem_id"], row["sample_index"], row["verdict"] == "correct", row["finished"],
                row["difficulty"], row["k"], row["n_tokens"], size, strata.get(row["problem_id"], ""),
            )
        )  # fmt: skip
    taken = take(candidates, recipe, seed)
    tokens = catalog.query("SELECT trace_id, attempt, prompt_ids, completion_ids FROM trace_tokens").rows
    stored = {(trace, attempt): found for trace, attempt, *found in tokens}
    samples = []
    for c, start, size in taken.samples:
        prompt, completion = stored[keys[c.sample_id]]
        whole = [*prompt, *(completion if recipe.kind == "trace" else [])]
        name = c.sample_id if size == c.size else f"{c.sample_id}:{start}-{start + size}"
        samples.append((name, whole[start : start + size], min(max(len(prompt) - start, 0), size)))
    pool = {**stages, **taken.stages, **taken.facts}
    if recipe.kind == "trace":
        pool["difficulty_length"] = difficulty_length(candidates, [c for c, *_ in taken.samples])
    return Selection(ids.content_hash(samples), pool, taken.warnings)


def first_of_each_problem(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["generation_key"], row["sample_index"], row["trace_id"])):
        first.setdefault(row["problem_id"], row)
    return list(first.values())


def strata_of(catalog: Catalog, by: str | None) -> dict[str, str]:
    problems = catalog.problems([row["problem_id"] for row in catalog.rows("SELECT problem_id FROM problems")])
    if by == "source":
        return {name: problem.source for name, problem in problems.items()}
    return {name: str(problem.metadata.get(by, "(none)")) for name, problem in problems.items()}


BANDS = {
    "0": 0.0,
    "(0, 0.2]": 0.2,
    "(0.2, 0.4]": 0.4,
    "(0.4, 0.6]": 0.6,
    "(0.6, 0.8]": 0.8,
    "(0.8, 1)": 1 - 1e-9,
    "1": 1,
}


def difficulty_length(pool: Sequence[Candidate], taken: Sequence[Candidate]) -> dict[str, Any]:
    """[taken, candidates] by difficulty band and by quartile of the candidates' lengths; equal quartiles are one."""
    ordered = sorted(c.n_tokens for c in pool)
    quarters = [ordered[max(1, math.ceil(q * len(ordered) / 4)) - 1] for q in range(5)]
    tops = sorted(set(quarters[1:]))
    lows = [quarters[0], *(top + 1 for top in tops)]
    cells = {name: [[0, 0] for _ in tops] for name in (*BANDS, "unknown")}
    for which, candidates in enumerate((taken, pool)):
        for c in candidates:
            known = (name for name, top in BANDS.items() if c.difficulty is not None and c.difficulty <= top)
            cells[next(known, "unknown")][next(i for i, top in enumerate(tops) if c.n_tokens <= top)][which] += 1
    labels = [f"{low}..{top}" for low, top in zip(lows, tops, strict=False)]
    return {"lengths": labels, "taken_of": {name: row for name, row in cells.items() if any(n for _, n in row)}}

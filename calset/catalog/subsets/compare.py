"""Subsets in numbers: what one holds, and how two differ.

Must not know: how a selection was made, exported files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from calset.catalog.catalog import Catalog
from calset.catalog.query.stats import DIFFICULTY_BANDS, difficulty_band, length_bands
from calset.catalog.records import Subset
from calset.catalog.subsets.facts import Fact, facts_of
from calset.catalog.subsets.take import nearest_rank

_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


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


def compare(catalog: Catalog, a: Subset, b: Subset) -> Difference:
    """Compare two subsets: what they share and how they differ; see ``references.diff``."""
    with catalog.reading() if catalog.exists() else nullcontext():
        facts = [facts_of(catalog, subset) for subset in (a, b)]
    keys_a, keys_b = ({(s.sample_id, tuple(s.input_ids)) for s in subset.samples} for subset in (a, b))
    problems_a, problems_b = ({s.problem_id for s in subset.samples if s.problem_id} for subset in (a, b))

    def count(samples: set[Any], problems: set[Any]) -> dict[str, int]:
        return {"samples": len(samples), "problems": len(problems)}

    return Difference(
        same=a.content_hash == b.content_hash,
        shared=count(keys_a & keys_b, problems_a & problems_b),
        only_a=count(keys_a - keys_b, problems_a - problems_b),
        only_b=count(keys_b - keys_a, problems_b - problems_a),
        a=describe(a, facts[0]),
        b=describe(b, facts[1]),
        recipe={
            key: (a.recipe.get(key), b.recipe.get(key))
            for key in {**a.recipe, **b.recipe}
            if a.recipe.get(key) != b.recipe.get(key)
        },
        distributions=_distributions((a, b), facts),
    )


def _distributions(
    subsets: Sequence[Subset], facts: Sequence[Sequence[Fact | None]]
) -> dict[str, dict[str, tuple[int, int]]]:
    lengths = [[len(s.input_ids) - s.n_prompt_tokens for s in subset.samples] for subset in subsets]
    bands = length_bands([n for of_one in lengths for n in of_one])
    counts: dict[str, list[Counter[str]]] = {"length": [], "difficulty": [], "source": [], "verdict": []}
    for of_one, maybe in zip(lengths, facts, strict=True):
        known = [fact for fact in maybe if fact]
        counts["length"].append(Counter(next(label for top, label in bands if n <= top) for n in of_one))
        counts["difficulty"].append(Counter(DIFFICULTY_BANDS[difficulty_band(fact.difficulty)] for fact in known))
        counts["source"].append(Counter(fact.source or "" for fact in known))
        counts["verdict"].append(Counter(fact.verdict for fact in known))
    order = {"length": [label for _, label in bands], "difficulty": list(DIFFICULTY_BANDS)}
    return {
        what: {value: (a[value], b[value]) for value in order.get(what, sorted(a | b)) if a[value] or b[value]}
        for what, (a, b) in counts.items()
    }


def describe(subset: Subset, facts: Sequence[Fact | None]) -> dict[str, Any]:
    """Return a subset's numbers: samples, tokens, problems, quantiles of its lengths and known difficulties.

    Quantiles are nearest-rank; ``n_tokens`` of a sample is prompt and completion, ``length`` the completion alone.

    Args:
        facts: of ``facts_of``.
    """
    lengths = [len(s.input_ids) - s.n_prompt_tokens for s in subset.samples]
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
        "difficulty_quantiles": quantiles([f.difficulty for f in facts if f and f.difficulty is not None]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest-rank quantiles by name ("p0" to "p100"); None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{round(100 * q)}": ordered[nearest_rank(q, len(ordered)) - 1] for q in _SHARES}


def tables(subset: Subset) -> list[tuple[str, list[str], list[tuple[Any, ...]]]]:
    """What was taken and from how many, as (title, column names, rows): the stages, the strata, difficulty x length."""
    stages = [(stage, n) for stage, n in subset.pool.items() if not isinstance(n, dict)]
    found: list[tuple[str, list[str], list[tuple[Any, ...]]]] = [("", ["stage", "candidates"], stages)]
    if strata := subset.pool.get("strata"):
        keys = ("taken", "offered", "tokens_taken", "tokens_offered")
        rows = [(name, *(n[key] for key in keys)) for name, n in strata.items()]
        found.append((f"by {subset.recipe['stratify']}", ["stratum", *keys], rows))
    if cells := subset.pool.get("difficulty_length"):
        rows = [(band, *(f"{t}/{n}" if n else "" for t, n in row)) for band, row in cells["taken_of"].items()]
        found.append(("difficulty x length: taken / candidates", ["difficulty", *cells["lengths"]], rows))
    return found

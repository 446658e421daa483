"""What a recipe takes of candidates, and why.

``take`` is pure: the same candidates, recipe and seed give the same samples in the same order, whatever the rows'
order, the machine or the DuckDB version. Ties are broken by hashing (seed, sample id), and every quantile is taken
here, over integers, not by a database. Candidates are columns, because there may be millions of them. Must not know:
the catalog, tokenizers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np

from calset.catalog.store.values import text_array, to_arrow, to_numpy
from calset.catalog.subsets.recipes import Order, Recipe
from calset.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Candidate(NamedTuple):
    """One candidate, where there are few; see ``Candidates``. ``difficulty`` is None where nothing was judged."""

    sample_id: str
    problem_id: str
    sample_index: int
    correct: bool
    finished: bool
    difficulty: float | None
    k: int
    n_tokens: int
    size: int
    stratum: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Samples that could be taken, as columns of one length: entry i of each column belongs to candidate i.

    Args:
        sample_id: texts, no two alike.
        problem: whole numbers, one for each problem, ascending as the problem ids.
        sample_index: whole numbers.
        correct: bool; the verdict is correct.
        finished: bool; the finish reason is "stop".
        difficulty: float64; NaN where nothing was judged.
        k: number of judged traces of the problem.
        n_tokens: length of the trace in completion tokens.
        size: tokens of the whole sample, prompt included.
        stratum: position in ``strata`` of what a stratified recipe divides its budget by.
        strata: names of the strata, ascending.
    """

    sample_id: pa.Array | pa.ChunkedArray
    problem: np.ndarray
    sample_index: np.ndarray
    correct: np.ndarray
    finished: np.ndarray
    difficulty: np.ndarray
    k: np.ndarray
    n_tokens: np.ndarray
    size: np.ndarray
    stratum: np.ndarray | None = None
    strata: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.problem)

    @classmethod
    def of(cls, rows: Sequence[Candidate]) -> Candidates:
        """Return rows as columns."""
        stratum, strata = _numbers([c.stratum for c in rows])
        return cls(
            text_array([c.sample_id for c in rows]),
            problem=_numbers([c.problem_id for c in rows])[0],
            sample_index=np.array([c.sample_index for c in rows], np.int32),
            correct=np.array([c.correct for c in rows], bool),
            finished=np.array([c.finished for c in rows], bool),
            difficulty=np.array([c.difficulty for c in rows], float),
            k=np.array([c.k for c in rows], np.int32),
            n_tokens=np.array([c.n_tokens for c in rows], np.int32),
            size=np.array([c.size for c in rows], np.int32),
            stratum=stratum,
            strata=strata,
        )

    def ids(self, at: np.ndarray) -> list[str]:
        """Return the sample ids at some positions."""
        return self.sample_id.take(to_arrow(at)).to_pylist()


def _numbers(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return names as positions in the list of the different ones, and that list, ascending."""
    different = sorted(set(names))
    number = {name: i for i, name in enumerate(different)}
    return np.array([number[name] for name in names], np.int32), different


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """Samples that a recipe takes of candidates, in its order, and the reasons.

    Args:
        at: positions among the candidates.
        start: first token of each sample: 0 unless the sample is a window of a longer one.
        size: tokens of each sample.
        stages: stage -> number of candidates that passed it, in the order of the stages. Where a number is 0, nothing
            is taken, and ``facts`` and ``warnings`` are empty.
        facts: other counts by name, JSON-able.
        warnings: one line each.
    """

    at: np.ndarray
    start: np.ndarray
    size: np.ndarray
    stages: dict[str, int]
    facts: dict[str, Any]
    warnings: list[str]


def take(candidates: Candidates, recipe: Recipe, seed: int) -> Taken:
    """Filter candidates, order them, and take what the budget allows.

    Pure: the order of the candidates makes no difference.

    Raises:
        InputError: the budget is smaller than the smallest candidate.
    """
    c, stages = candidates, {}

    def passed(stage: str, at: np.ndarray) -> np.ndarray:
        stages[stage] = len(at)
        return at

    pool = passed("candidates", np.arange(len(c)))
    if recipe.min_k is not None:
        pool = passed("min_k", pool[c.k[pool] >= recipe.min_k])
    judged = pool
    if recipe.correct:
        pool = passed("correct", pool[c.correct[pool]])
    if recipe.finished:
        pool = passed("finished", pool[c.finished[pool]])
    if recipe.difficulty is not None:
        pool = passed("difficulty", pool[_within(recipe.difficulty, c.difficulty[pool])])
    of_band = pool
    lengths = length_band(recipe, c.n_tokens[pool])
    if lengths is not None:
        pool = passed("length", pool[_within(lengths, c.n_tokens[pool])])
    pool = pool[_order(recipe.order, seed, c, pool)]
    if recipe.per_problem is not None:
        pool = passed("per_problem", pool[_first_of_each(recipe.per_problem, c.problem[pool])])
    if not len(pool):
        return Taken(pool, pool, pool, stages, {}, [])
    offered = c.size[pool]
    if recipe.window is not None:
        offered = np.minimum(offered, min(recipe.window, np.iinfo(offered.dtype).max))
    strata = c.stratum[pool] if recipe.stratify is not None and c.stratum is not None else None
    chosen = _spend(recipe, offered, strata)
    at, size = pool[chosen], offered[chosen]
    facts: dict[str, Any] = {"taken": len(at), "tokens_available": int(offered.sum())}
    facts["median_k"] = float(np.median(c.k[judged]))
    if lengths is not None:
        facts["length_band"] = list(lengths)
    if recipe.window is not None:
        facts["cut_to_window"] = int(np.count_nonzero(size < c.size[at]))
    if strata is not None:
        facts["strata"] = _strata_facts(c.strata, strata, offered, chosen)
    error = _median_error(c.difficulty[of_band], c.k[of_band])
    unfinished = np.count_nonzero(~c.finished[judged]) / len(judged)
    return Taken(at, _starts(c, at, size, seed), size, stages, facts, _warnings(recipe, facts, error, unfinished))


def length_band(recipe: Recipe, lengths: np.ndarray) -> tuple[int, int] | None:
    """Return the band of lengths, both ends included, in tokens; None when the recipe has none or nothing is left."""
    if recipe.length_tokens is not None:
        return recipe.length_tokens
    if recipe.length_quantiles is None or not len(lengths):
        return None
    ranks = [nearest_rank(q, len(lengths)) - 1 for q in recipe.length_quantiles]
    low, high = np.partition(lengths, ranks)[ranks].tolist()
    return low, high


def nearest_rank(q: float, n: int) -> int:
    """ceil(q n), at least 1, exactly: 0.35 * 20 is 7 here, where floats say 7.000000000000001 or 6.999999999999999."""
    return max(1, -(-(Fraction(str(q)) * n) // 1))


def _within(band: tuple[float, float], values: np.ndarray) -> np.ndarray:
    return (values >= band[0]) & (values <= band[1])


def _order(order: Order, seed: int, c: Candidates, pool: np.ndarray) -> np.ndarray:
    """Return the places in ``pool`` in the recipe's order."""
    if order == "catalog":
        import pyarrow as pa

        keys = {"problem": to_arrow(c.problem[pool]), "index": to_arrow(c.sample_index[pool])}
        table = pa.table({**keys, "id": c.sample_id.take(to_arrow(pool)), "place": to_arrow(np.arange(len(pool)))})
        return to_numpy(table.sort_by([(key, "ascending") for key in (*keys, "id")])["place"])
    places = seeded_order(seed, c.sample_id, pool)
    if order == "harder":
        difficulty = c.difficulty[pool][places]
        places = places[np.argsort(np.where(np.isnan(difficulty), 1.0, -difficulty), kind="stable")]
    return places


def tie_break(seed: int, sample_id: str) -> bytes:
    """The seeded, position-free key that orders equals."""
    return hashlib.sha256(f"calset-order-v1\0{seed}\0{sample_id}".encode()).digest()


_FEW = 5000  # that many ids are hashed while DuckDB starts


def seeded_order(seed: int, sample_ids: pa.Array | pa.ChunkedArray, at: np.ndarray, digits: int = 16) -> np.ndarray:
    """Return the places in ``at`` in the order of ``tie_break`` of the sample ids there.

    Many are hashed by DuckDB, which takes a fifth of the time that hashlib takes.

    Args:
        at: ascending positions in ``sample_ids``.
        digits: hexadecimal digits of the hash (at most 16) to sort many by; the whole hash decides between equals.
    """
    if len(at) <= _FEW:
        return _by_tie_break(seed, sample_ids.take(to_arrow(at)).to_pylist())
    import pyarrow as pa

    chosen = np.zeros(len(sample_ids), bool)
    chosen[at] = True
    with duckdb.connect() as con:
        con.register("samples", pa.table({"id": sample_ids, "chosen": to_arrow(chosen)}))
        sql = "SELECT ('0x' || left(sha256(? || id), ?))::UBIGINT AS hash FROM samples WHERE chosen"
        hashes = con.execute(sql, [f"calset-order-v1\0{seed}\0", digits]).fetchnumpy()["hash"]
    places = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(np.diff(hashes[places]) == 0)
    for run in np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1) if len(equal) else ():
        tied = slice(run[0], run[-1] + 2)
        names = sample_ids.take(to_arrow(at[places[tied]])).to_pylist()
        places[tied] = places[tied][_by_tie_break(seed, names)]
    return places


def _by_tie_break(seed: int, names: Sequence[str]) -> np.ndarray:
    return np.array(sorted(range(len(names)), key=lambda i: tie_break(seed, names[i])), int)


def _first_of_each(n: int, problems: np.ndarray) -> np.ndarray:
    """Return the places of the first ``n`` entries of each problem, in order."""
    grouped = np.argsort(problems, kind="stable")
    begins = np.flatnonzero(np.diff(problems[grouped], prepend=-1))
    nth = np.arange(len(grouped)) - np.repeat(begins, np.diff(begins, append=len(grouped)))
    return np.sort(grouped[nth < n])


# -- the budget -----------------------------------------------------------------------------------------------------


def _spend(recipe: Recipe, sizes: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
    """Return the places of the ordered samples that the recipe's budget takes.

    Raises:
        InputError: it takes none.
    """
    if strata is None:
        taken = spend(sizes, samples=recipe.samples, tokens=recipe.tokens)
    else:
        taken = spend_by_stratum(sizes, strata, recipe)
    if len(taken):
        return taken
    share = " (divided among the strata)" if recipe.stratify else ""
    raise InputError(f"the smallest candidate has {sizes.min()} tokens, more than the budget of {recipe.tokens}{share}")


_BLOCK = 4096


def spend(sizes: np.ndarray, *, samples: int | None, tokens: int | None) -> np.ndarray:
    """Return the places of the ordered samples that a budget takes.

    A token budget takes whole samples in order, passes over one that would exceed what is left and goes on, so the
    total is never above the budget.

    Args:
        sizes: tokens of each sample (prompt and completion), in order.
    """
    if tokens is None:
        return np.arange(len(sizes))[:samples]
    left, taken = tokens, [np.arange(0)]
    for begin in range(0, len(sizes), _BLOCK):
        fitting = begin + np.flatnonzero(sizes[begin : begin + _BLOCK] <= left)
        while len(fitting):  # as many as fit one after the other, then what fits in the rest
            ends = np.cumsum(sizes[fitting])
            n = int(np.count_nonzero(ends <= left))
            taken.append(fitting[:n])
            left -= int(ends[n - 1])
            fitting = fitting[n:][sizes[fitting[n:]] <= left]
    return np.concatenate(taken)


def spend_by_stratum(sizes: np.ndarray, strata: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return the places of the ordered samples that the recipe's budget takes, divided among strata.

    Each stratum gets its share of the samples or tokens (``apportion``) and spends it as ``spend`` does; a share of
    tokens is never exceeded, so the total is not either. Weights are 1 each for equal shares; for proportional ones,
    the samples or tokens that each stratum offers. Without a budget, equal shares are as many samples of each stratum
    as the smallest has, and proportional ones all.

    Args:
        sizes: tokens of each sample, in order.
        strata: a whole number for the stratum of each.
    """
    _, which, counts = np.unique(strata, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    in_tokens = recipe.tokens is not None
    offered = [int(sizes[member].sum()) if in_tokens else len(member) for member in members]
    budget = recipe.tokens if in_tokens else recipe.samples
    if budget is None:
        budget = min(offered, default=0) * len(members) if recipe.shares == "equal" else sum(offered)
    shares = apportion(budget, [1] * len(members) if recipe.shares == "equal" else offered, offered)
    taken = [
        member[spend(sizes[member], samples=None if in_tokens else share, tokens=share if in_tokens else None)]
        for member, share in zip(members, shares, strict=True)
    ]
    return np.sort(np.concatenate(taken))


def apportion(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Divide ``total`` by weight into whole shares of at most ``caps``, exactly (largest remainder, Hare and Niemeyer).

    Each gets the whole part of total x weight / sum of weights; the rest goes one each to the largest remainders, of
    equal ones to the first. Whoever would get more than its cap gets the cap, and what is left is divided among the
    others in the same way, until the total or every cap is used up.
    """
    given = [0] * len(weights)
    open_, left = [i for i, weight in enumerate(weights) if weight > 0], total
    while open_ and left > 0:
        shares = _largest_remainder(left, [weights[i] for i in open_])
        over = [i for i, share in zip(open_, shares, strict=True) if share > caps[i]]
        for i, share in zip(open_, shares, strict=True):
            if not over or i in over:
                given[i] = caps[i] if over else share
        left -= sum(given[i] for i in (over or open_))
        open_ = [i for i in open_ if i not in over] if over else []
    return given


def _largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    whole = [total * weight // sum(weights) for weight in weights]
    remainders = [total * weight % sum(weights) for weight in weights]
    first = sorted(range(len(weights)), key=lambda i: (-remainders[i], i))
    for i in first[: total - sum(whole)]:
        whole[i] += 1
    return whole


def window_start(seed: int, sample_id: str, size: int, window: int) -> int:
    """Where the window of a sample of ``size`` tokens begins: uniform over 0 .. size - window by hash, 0 if it fits."""
    if size <= window:
        return 0
    found = hashlib.sha256(f"calset-window-v1\0{seed}\0{window}\0{sample_id}".encode()).digest()
    return int.from_bytes(found[:16], "big") % (size - window + 1)


def _starts(c: Candidates, at: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """Return the first token of each sample: that of its window where it is cut to one."""
    starts, cut = np.zeros(len(at), int), np.flatnonzero(sizes < c.size[at])
    samples = zip(c.ids(at[cut]), c.size[at[cut]].tolist(), sizes[cut].tolist(), strict=True)
    starts[cut] = [window_start(seed, *sample) for sample in samples]
    return starts


# -- the reasons ----------------------------------------------------------------------------------------------------


def standard_error(difficulty: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return the standard errors of difficulties (or pass rates) measured on k judged traces: sqrt(p (1 - p) / k).

    p is the share of wrong ones with one of each sort added, (wrong + 1) / (k + 2), in the manner of Agresti and Coull:
    without, 0 of 2 wrong would count as known exactly.
    """
    p = (np.rint(difficulty * k) + 1) / (k + 2)
    return np.sqrt(p * (1 - p) / k)


def _median_error(difficulty: np.ndarray, k: np.ndarray) -> float:
    known = ~np.isnan(difficulty) & (k > 0)
    return float(np.median(standard_error(difficulty[known], k[known]))) if known.any() else 0.0


def _strata_facts(
    names: Sequence[str], strata: np.ndarray, sizes: np.ndarray, chosen: np.ndarray
) -> dict[str, dict[str, int]]:
    """Return stratum -> samples and tokens offered and taken."""

    def counts(at: np.ndarray | slice) -> list[list[int]]:
        tokens = np.bincount(strata[at], sizes[at], len(names))
        return [np.bincount(strata[at], minlength=len(names)).tolist(), tokens.astype(int).tolist()]

    (offered, tokens_offered), (taken, tokens_taken) = counts(slice(None)), counts(chosen)
    keys = ("offered", "taken", "tokens_offered", "tokens_taken")
    columns = zip(names, offered, taken, tokens_offered, tokens_taken, strict=True)
    return {name: dict(zip(keys, n, strict=True)) for name, *n in columns if n[0]}


def _warnings(recipe: Recipe, facts: Mapping[str, Any], error: float, unfinished: float) -> list[str]:
    """Return what is wrong with the candidates or the budget.

    Args:
        error: median standard error of the difficulties inside the band.
        unfinished: share of the traces that did not finish.
    """
    warnings = budget_warnings(recipe, facts["taken"], facts["tokens_available"])
    if recipe.difficulty is not None:
        half_width = (recipe.difficulty[1] - recipe.difficulty[0]) / 2
        if error > half_width:
            warnings.append(
                f"k is too low for this band: the median pass rate in it (of {facts['median_k']:g} judged traces) has "
                f"a standard error of {error:.2f}, more than half the band's width ({half_width:.2f}); "
                "build more samples a problem"
            )
    if unfinished > 0.5:
        warnings.append(
            f"{unfinished:.0%} of the traces did not finish: long ones are missing from this pool; build "
            "again with a larger --max-tokens and --retry truncated"
        )
    if recipe.stratify is not None and recipe.shares == "equal":
        warnings += _share_warnings(recipe, facts["strata"])
    return warnings


def budget_warnings(recipe: Recipe, n_samples: int, available: int) -> list[str]:
    """Return a warning when the budget is more than there is, ``available`` tokens."""
    if recipe.samples is not None and n_samples < recipe.samples:
        return [f"the pool is too small: {n_samples} samples where {recipe.samples} were asked"]
    if recipe.tokens is not None and available < recipe.tokens:
        return [f"the pool is too small: {available} tokens where {recipe.tokens} were asked"]
    return []


def _share_warnings(recipe: Recipe, strata: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Name the strata that have less than an equal share of the budget."""
    what = "tokens_offered" if recipe.tokens is not None else "offered"
    budget = recipe.tokens if recipe.tokens is not None else recipe.samples
    poor = [name for name, n in strata.items() if n[what] < (budget or 0) // len(strata)]
    if not poor:
        return []
    listed = ", ".join(f"{name} ({strata[name][what]})" for name in poor[:5])
    more = f" and {len(poor) - 5} more" if len(poor) > 5 else ""
    return [f"the shares are not equal: {listed}{more} cannot fill a share; the others take what is left, if they can"]

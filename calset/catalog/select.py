"""Selection: a recipe applied to a catalog, kept as the next version of a named subset.

The catalog is asked once for candidates and once for the token ids of what was taken; everything between is the pure
``calset.catalog.subsets.recipes``. Only traces of build runs are candidates, never those of an evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import duckdb

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.contamination.overlap import Decontaminator
from calset.catalog.query.stats import DIFFICULTY_BANDS, difficulty_band, length_bands
from calset.catalog.records import Sample, Subset
from calset.catalog.references import resolve
from calset.catalog.store.connection import opened
from calset.catalog.store.schema import VIEWS
from calset.catalog.store.sql import check_select
from calset.catalog.store.values import chunks, clean, clean_params
from calset.catalog.subsets import versions
from calset.catalog.subsets.recipes import (
    Candidate,
    Ranking,
    Recipe,
    RecipeOptions,
    get_recipe,
    rank,
    spend,
    spend_by_stratum,
    tie_break,
    window_start,
)
from calset.catalog.subsets.text import Corpus, open_corpus
from calset.catalog.subsets.where import require_stable
from calset.errors import InputError, did_you_mean, first_line
from calset.io.keywords import shows


@dataclass(frozen=True, slots=True)
class _Model:
    """Whose token ids these are. Subsets never mix two."""

    model: str
    revision: str
    tokenizer_hash: str


@dataclass(frozen=True, slots=True)
class _Pool:
    """The candidates of one model, and by sample id where their tokens are: (trace id, attempt)."""

    owner: _Model
    candidates: list[Candidate]
    sources: dict[str, tuple[str, int]]
    sizes: dict[str, tuple[int, int]]  # prompt and completion tokens
    stages: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A candidate to take: what follows its prompt (None: its own completion), and the part of the tokens to keep."""

    candidate: Candidate
    tail: Sequence[int] | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@shows(RecipeOptions)
def select(
    catalog: Catalog | str | Path,
    name: str,
    recipe: str | Path | Recipe = "ssgr",
    *,
    model: str | None = None,
    where: str | None = None,
    seed: int = 0,
    text: str | Path | None = None,
    exclude: Decontaminator | None = None,
    held_out_from: Sequence[Subset | str | Path] = (),
    **options: Unpack[RecipeOptions],
) -> Subset:
    """Take a subset from a catalog by a recipe, and keep it as a new immutable version of ``name``.

    Pure in (catalog content, recipe, seed): the same samples in the same order and the same content hash anywhere.

    Args:
        catalog: where the traces are.
        name: letters, digits, '.', '_' and '-'.
        recipe: a name in ``RECIPES``, a TOML file or a Recipe.
        model: whose traces, ``MODEL`` or ``MODEL@REVISION``; needed when the catalog holds several models'.
        where: a SQL condition over the view ``trace`` that candidates must meet.
        seed: orders equals, and everything where the recipe's order is random.
        text: the plain text of a ``text`` recipe: a file, a folder, a file of rows (``FILE?text=COLUMN``) or a dataset
            (``hf:org/name@revision?config=&split=&text=COLUMN``).
        exclude: evaluation questions whose problems are left out (``calset.against_sources("math500")``): those of an
            equal normalised text, and those that share n-grams of words (docs/decontamination.md). Part of the recipe.
        held_out_from: subsets, or references to them, whose problems are left out: the same recipe then gives another
            split of the same family. Part of the recipe, by their content hashes.
        options: fields of Recipe (``samples``, ``tokens``, ``difficulty``, ``window``, ...) in their place.

    Returns:
        the kept subset; when the latest version of ``name`` has this content, recipe and seed already, that version.

    Raises:
        InputError: nothing to take (and at which stage it vanished), several models, a bad recipe, name or condition.
        CatalogError: this thread has a ``catalog.connect()`` open: a selection writes, so close that first.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    versions.check_name(name)
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise InputError(f"seed must be a whole number of at most 63 bits, not {seed!r}")
    chosen = get_recipe(recipe).with_options(**options)
    if chosen.kind == "text":
        if exclude is not None or held_out_from:
            raise InputError(f"recipe {chosen.name} takes windows of a text: it has no problems to exclude")
        return _select_text(catalog, name, chosen, model=model, where=where, seed=seed, text=text)
    if text is not None:
        raise InputError(f"recipe {chosen.name} takes no text file: --text is for recipes of the kind text")
    others = [s if isinstance(s, Subset) else resolve(s, catalog) for s in held_out_from]
    pool = _pool(catalog, chosen, model, where, exclude, others)
    ranking = rank(pool.candidates, chosen, seed)
    _require_some(ranking, pool)
    offered = _offered(catalog, chosen, pool, ranking, seed)
    taken = [offered[i] for i in _spend(chosen, offered)]
    if not taken:
        smallest = min(item.size for item in offered)
        share = " (divided among the strata)" if chosen.stratify else ""
        raise InputError(
            f"the smallest candidate has {smallest} tokens, more than the budget of {chosen.tokens}{share}"
        )
    samples = _read_tokens(catalog, chosen, taken, pool)
    facts = _facts(chosen, pool, ranking, offered, taken)
    warnings = _warnings(chosen, ranking, facts, samples)
    resolved = _resolved(chosen, where, None, exclude, others)
    return _keep(catalog, name, resolved, seed, pool.owner, samples, facts, warnings)


# -- candidates -----------------------------------------------------------------------------------------------------

_CANDIDATES = """
    SELECT t.trace_id, t.attempt, t.problem_id, t.sample_index, t.verdict = 'correct', t.finished, t.difficulty, t.k,
        t.n_tokens, t.n_prompt_tokens, t.generation_key, t.model, t.model_revision, r.tokenizer_hash
    FROM trace t JOIN runs r ON r.run_id = t.run_id
    WHERE t.kind = 'build' AND (? IS NULL OR t.model = ? OR t.model || '@' || t.model_revision = ? OR r.model_path = ?)
"""


def _pool(
    catalog: Catalog,
    recipe: Recipe,
    model: str | None,
    where: str | None,
    exclude: Decontaminator | None,
    held_out_from: Sequence[Subset],
) -> _Pool:
    with opened(catalog.path, "query", catalog.lock_timeout) as con:
        rows = con.execute(_CANDIDATES, clean_params([model, model, model, _folder(model)])).fetchall()
        stages = {"traces": len(rows)}
        if where is not None:
            kept = _matching(con, where)
            rows = [row for row in rows if row[0] in kept]
            stages["where"] = len(rows)
    if not rows:
        said = f" of {model}" if model else ""
        raise InputError(
            f"no trace{said} in {catalog.path} meets --where"
            if stages["traces"]
            else f"no build traces{said} in {catalog.path}: calset stats shows what is there"
        )
    owner = _single_model({_Model(*row[11:14]) for row in rows})
    if exclude is not None:
        found = _overlapping(catalog, exclude, sorted({row[2] for row in rows}))
        rows = [row for row in rows if row[2] not in found]
        stages["exclude_problems_of"] = len(rows)
    if held_out_from:
        taken = {problem for subset in held_out_from for problem in _problems_in(subset)}
        rows = [row for row in rows if row[2] not in taken]
        stages["held_out_from"] = len(rows)
    if recipe.kind != "trace":
        rows = _first_of_each_problem(rows)
        stages["problems"] = len(rows)
    if recipe.kind == "gold" and (without := _without_reference(catalog)):
        rows = [row for row in rows if row[2] not in without]
        stages["reference"] = len(rows)
    strata = _strata(catalog, recipe.stratify, {row[2] for row in rows}) if recipe.stratify else {}
    candidates, sources, sizes = [], {}, {}
    for trace, attempt, problem, index, correct, finished, difficulty, k, n_tokens, n_prompt, key, *_ in rows:
        sample = trace if recipe.kind == "trace" else versions.prompt_sample_id(recipe.kind, problem, key)
        stratum = strata.get(problem, "")
        candidates.append(Candidate(sample, problem, index, correct, finished, difficulty, k, n_tokens, stratum))
        sources[sample] = (trace, attempt)
        sizes[sample] = (n_prompt, n_tokens)
    return _Pool(owner, candidates, sources, sizes, stages)


def _problems_in(subset: Subset) -> set[str]:
    """
    Raises:
        InputError: there are none.
    """
    if found := {s.problem_id for s in subset.samples if s.problem_id}:
        return found
    raise InputError(f"{subset.ref} holds no problems to hold others out from: its samples are of no problem")


_PAGE = 512  # problems compared at a time


def _overlapping(catalog: Catalog, exclude: Decontaminator, problem_ids: Sequence[str]) -> set[str]:
    """Which of the problems an evaluation source holds too."""
    return {
        problem.problem_id
        for part in chunks(problem_ids, _PAGE)
        for problem in catalog.problems(part).values()
        if exclude.check(problem)
    }


def _without_reference(catalog: Catalog) -> set[str]:
    """Problems that only a scorer can judge: there is neither an answer nor a solution."""
    rows = catalog.rows(
        "SELECT problem_id FROM problems "
        "WHERE answer = '' AND coalesce(json_extract_string(metadata, '$.solution'), '') = ''"
    )
    return {row["problem_id"] for row in rows}


UNNAMED = "(none)"  # the stratum of problems without the metadata key


def _strata(catalog: Catalog, by: str, problem_ids: set[str]) -> dict[str, str]:
    """Problem id -> its stratum: its source, or the text of a key of its metadata.

    Raises:
        InputError: no problem has the key.
    """
    wanted = sorted(problem_ids)
    if by == "source":
        rows = catalog.rows(
            "SELECT problem_id, source AS stratum FROM problems WHERE problem_id IN (SELECT unnest(?::VARCHAR[]))",
            [wanted],
        )
        return {row["problem_id"]: row["stratum"] for row in rows}
    pointer = "/" + by.replace("~", "~0").replace("/", "~1")  # a JSON pointer takes any key as it is
    rows = catalog.rows(
        "SELECT problem_id, json_extract_string(metadata, ?) AS stratum FROM problems "
        "WHERE problem_id IN (SELECT unnest(?::VARCHAR[]))",
        [pointer, wanted],
    )
    if wanted and all(row["stratum"] is None for row in rows):
        keys = catalog.rows(
            "SELECT DISTINCT unnest(json_keys(metadata)) AS name FROM problems "
            "WHERE problem_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY 1 LIMIT 20",
            [wanted],
        )
        there = ["source", *(row["name"] for row in keys)]
        near = did_you_mean(by, there)
        raise InputError(f"no problem has the metadata key {by!r} to stratify by{near}; there are {', '.join(there)}")
    return {row["problem_id"]: UNNAMED if row["stratum"] is None else row["stratum"] for row in rows}


def _first_of_each_problem(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """One row a problem, for recipes that need its prompt only: the least (generation key, sample index, trace id)."""
    first: dict[str, tuple[Any, ...]] = {}
    for row in sorted(rows, key=lambda row: (row[10], row[3], row[0])):
        first.setdefault(row[2], row)
    return list(first.values())


def _single_model(owners: set[_Model]) -> _Model:
    if len(owners) > 1:
        listed = sorted(f"{o.model}@{o.revision} (tokenizer {o.tokenizer_hash[:8]})" for o in owners)
        raise InputError(
            f"the candidates come from {len(listed)} models: {'; '.join(listed)}; pass --model MODEL or MODEL@REVISION"
        )
    return next(iter(owners))


def _matching(con: duckdb.DuckDBPyConnection, where: str) -> set[str]:
    """The trace ids that meet a user's condition.

    Raises:
        InputError: not one SQL expression, or one whose value changes from call to call.
    """
    where = clean(where)
    try:
        duckdb.SQLExpression(where)  # one expression: "true) UNION ..." does not parse
        sql = f"SELECT trace_id FROM trace WHERE (\n{where}\n)"
        check_select(con, sql)
        require_stable(con, sql, views=VIEWS)
        return {trace for (trace,) in con.execute(sql).fetchall()}
    except duckdb.InterruptException:  # Ctrl-C
        raise
    except duckdb.Error as error:
        raise InputError(f"--where {where!r} is not a condition over the view trace: {first_line(error)}") from error


def _require_some(ranking: Ranking, pool: _Pool) -> None:
    stages = {**pool.stages, **ranking.stages}
    gone = next((stage for stage, n in stages.items() if not n), None)
    if gone is None:
        return
    counts = ", ".join(f"{stage} {n}" for stage, n in stages.items())
    raise InputError(f"no candidate is left after the filter {gone!r} ({counts}): loosen it, or build more traces")


# -- sizes and tokens -----------------------------------------------------------------------------------------------


def _offered(catalog: Catalog, recipe: Recipe, pool: _Pool, ranking: Ranking, seed: int) -> list[_Taken]:
    """The ranked candidates as they would be taken: whole, or cut to the recipe's window."""
    if recipe.kind == "gold":
        tails: list[list[int] | None] = list(_solutions(catalog, pool.owner, [c.problem_id for c in ranking.order]))
    else:
        tails = [[] if recipe.kind == "prompt" else None] * len(ranking.order)
    offered = []
    for candidate, tail in zip(ranking.order, tails, strict=True):
        n_prompt, n_tokens = pool.sizes[candidate.sample_id]
        size = n_prompt + (n_tokens if tail is None else len(tail))
        window = min(recipe.window or size, size)
        start = window_start(seed, candidate.sample_id, size, window)
        offered.append(_Taken(candidate, tail, start, start + window))
    return offered


def _spend(recipe: Recipe, offered: Sequence[_Taken]) -> list[int]:
    """Which of what is offered the budget takes, by position."""
    sizes = [item.size for item in offered]
    if recipe.stratify is not None:
        return spend_by_stratum(sizes, [item.candidate.stratum for item in offered], recipe)
    return spend(sizes, samples=recipe.samples, tokens=recipe.tokens)


def _solutions(catalog: Catalog, owner: _Model, problem_ids: Sequence[str]) -> Iterable[list[int]]:
    """The reference solutions (else answers) in the model's own tokens, with its end token, as a finished trace has."""
    tokenizer = load_tokenizer(catalog, owner)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    problems = catalog.problems(problem_ids)
    for problem_id in problem_ids:
        yield tokenizer.encode(problems[problem_id].reference_solution, add_special_tokens=False) + end


def _folder(model: str | None) -> str | None:
    """The full path of a model given as a folder, as runs keep it."""
    folder = os.path.expanduser(model or "")
    # os.path says False, where Path.is_dir raises, of a text that can be no path.
    return os.path.realpath(folder) if os.path.isdir(folder) else None


def load_tokenizer(catalog: Catalog, owner: _Model) -> Any:
    """The tokenizer of the model that made the traces: from where its folder was, else from the Hub or its cache.

    Raises:
        InputError: it cannot be loaded, or is not the one that the traces were made with.
    """
    from transformers import AutoTokenizer

    runs = [r for r in catalog.runs() if (r.model, r.model_revision) == (owner.model, owner.revision)]
    folders = [r.model_path for r in reversed(runs) if r.model_path and Path(r.model_path).is_dir()]
    place, revision = (folders[0], None) if folders else (owner.model, owner.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds
        raise InputError(
            f"cannot load the tokenizer of {owner.model}, which this recipe needs: {first_line(error)}; run where the "
            "model's folder or the Hub can be reached"
        ) from error
    if ids.vocabulary_hash(tokenizer.get_vocab()) != owner.tokenizer_hash:
        raise InputError(
            f"the tokenizer at {place} is no longer the one that the traces of {owner.model} were made with"
        )
    return tokenizer


def _read_tokens(catalog: Catalog, recipe: Recipe, taken: Sequence[_Taken], pool: _Pool) -> list[Sample]:
    """The samples, with the stored tokens; a window's id is its trace's and its place: ``TRACE:START-STOP``."""
    found = catalog.tokens([pool.sources[item.candidate.sample_id] for item in taken])
    samples = []
    for item in taken:
        sample_id, problem_id = item.candidate.sample_id, item.candidate.problem_id
        prompt, completion = found[pool.sources[sample_id]]
        trace = pool.sources[sample_id][0] if item.tail is None else None
        whole = [*prompt, *(completion if item.tail is None else item.tail)]
        if item.size < len(whole):
            sample_id = f"{sample_id}:{item.start}-{item.stop}"
        n_prompt = min(max(len(prompt) - item.start, 0), item.size)
        samples.append(Sample(sample_id, whole[item.start : item.stop], n_prompt, recipe.kind, trace, problem_id))
    return samples


# -- plain text -----------------------------------------------------------------------------------------------------


POOL_WINDOWS = 4  # windows to choose from for each one of the budget, where the order is seeded


def _select_text(
    catalog: Catalog,
    name: str,
    recipe: Recipe,
    *,
    model: str | None,
    where: str | None,
    seed: int,
    text: str | Path | None,
) -> Subset:
    """Windows of a plain text, consecutive, without overlap, taken in seeded order; a rest at the end is left out.

    Documents follow each other with the end token between them. Of a corpus of many only as many are read, from the
    start, as hold what the budget takes, four times over where the order is seeded: the seed needs a choice.
    """
    if text is None:
        raise InputError(f"recipe {recipe.name} needs a plain-text file: pass --text FILE")
    if where is not None or recipe.difficulty or recipe.correct or recipe.finished or recipe.min_k:
        raise InputError(f"recipe {recipe.name} takes windows of a text: it has no verdict, difficulty or condition")
    corpus = open_corpus(text)
    if corpus.endless and recipe.samples is None and recipe.tokens is None:
        raise InputError(f"{text} is too large to be taken whole: give a budget with --tokens or --samples")
    owner = _builder(catalog, model)
    tokenizer = load_tokenizer(catalog, owner)
    window = recipe.window or 0
    token_ids, n_documents = _token_ids(corpus, tokenizer, None if corpus.whole else _pool_tokens(recipe, window))
    windows = [
        Sample(ids.digest("sample", "text", corpus.digest, window, start), token_ids[start : start + window], 0, "text")
        for start in range(0, len(token_ids) - window + 1, window)
    ]
    if not windows:
        raise InputError(f"{text} has {len(token_ids)} tokens, less than one window of {window}: lower --window")
    if recipe.order != "catalog":
        windows.sort(key=lambda s: tie_break(seed, s.sample_id))
    taken = spend([window] * len(windows), samples=recipe.samples, tokens=recipe.tokens)
    if not taken:
        raise InputError(f"a window of {window} tokens is more than the budget of {recipe.tokens}: lower --window")
    samples = [windows[i] for i in taken]
    facts = {"documents": n_documents, "tokens": len(token_ids), "windows": len(windows), "taken": len(samples)}
    warnings = _budget_warnings(recipe, len(samples), len(windows) * window)
    resolved = _resolved(recipe, None, dict(corpus.facts), None)
    return _keep(catalog, name, resolved, seed, owner, samples, facts, warnings)


def _pool_tokens(recipe: Recipe, window: int) -> int | None:
    """How many tokens of a corpus are enough to choose from; None for all."""
    budget = recipe.samples if recipe.samples is not None else recipe.tokens and -(-recipe.tokens // window)
    return budget and budget * window * (1 if recipe.order == "catalog" else POOL_WINDOWS)


def _token_ids(corpus: Corpus, tokenizer: Any, enough: int | None) -> tuple[list[int], int]:
    """The first documents' tokens, one after the other, and how many documents that took."""
    tokenizer.model_max_length = 1 << 40  # the text is cut into windows: no warning about its length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    token_ids: list[int] = []
    n = 0
    for document in corpus.documents():
        token_ids += end if n else []
        token_ids += tokenizer.encode(document, add_special_tokens=False)
        n += 1
        if enough is not None and len(token_ids) >= enough:
            break
    return token_ids, n


def _builder(catalog: Catalog, model: str | None) -> _Model:
    """The one model of the catalog's build runs."""
    asked = {model, _folder(model)} - {None}
    owners = {
        _Model(r.model, r.model_revision, r.tokenizer_hash)
        for r in catalog.runs("build")
        if not asked or asked & {r.model, f"{r.model}@{r.model_revision}", r.model_path}
    }
    if not owners:
        raise InputError(f"no build run{f' of {model}' if model else ''} in {catalog.path}: its tokenizer is needed")
    return _single_model(owners)


# -- the result -----------------------------------------------------------------------------------------------------


def _resolved(
    recipe: Recipe,
    where: str | None,
    text: dict[str, Any] | None,
    exclude: Decontaminator | None,
    held_out_from: Sequence[Subset] = (),
) -> dict[str, Any]:
    """The recipe as it is kept; exclusion is left out where there is none, as every key that came later."""
    found: dict[str, Any] = {**recipe.as_dict(), "where": where, "text": text}
    if exclude is not None:
        found["exclude_problems_of"] = exclude.facts()
    if held_out_from:
        known = {subset.content_hash: subset.ref for subset in held_out_from}
        found["held_out_from"] = [{"subset": known[key], "content_hash": key} for key in sorted(known)]
    return found


def _facts(
    recipe: Recipe, pool: _Pool, ranking: Ranking, offered: Sequence[_Taken], taken: Sequence[_Taken]
) -> dict[str, Any]:
    facts: dict[str, Any] = {**pool.stages, **ranking.stages, "taken": len(taken)}
    facts["tokens_available"] = sum(item.size for item in offered)
    facts["median_k"] = ranking.median_k
    if ranking.length_band is not None:
        facts["length_band"] = list(ranking.length_band)
    if recipe.window is not None:
        facts["cut_to_window"] = sum(item.size < sum(pool.sizes[item.candidate.sample_id]) for item in taken)
    if recipe.stratify is not None:
        facts["strata"] = _strata_facts(offered, taken)
    if recipe.kind == "trace":
        facts["difficulty_length"] = _difficulty_length(pool.candidates, [item.candidate for item in taken])
    return facts


def _strata_facts(offered: Sequence[_Taken], taken: Sequence[_Taken]) -> dict[str, dict[str, int]]:
    """Stratum -> samples and tokens offered and taken."""
    facts = {
        name: {"offered": 0, "taken": 0, "tokens_offered": 0, "tokens_taken": 0}
        for name in sorted({item.candidate.stratum for item in offered})
    }
    for what, items in (("offered", offered), ("taken", taken)):
        for item in items:
            facts[item.candidate.stratum][what] += 1
            facts[item.candidate.stratum][f"tokens_{what}"] += item.size
    return facts


def _difficulty_length(pool: Sequence[Candidate], taken: Sequence[Candidate]) -> dict[str, Any]:
    """How many were taken of how many candidates, by difficulty band and by quartile of the candidates' lengths."""
    bands = length_bands([c.n_tokens for c in pool])
    cells: dict[tuple[str, str], list[int]] = {}
    for which, candidates in ((1, pool), (0, taken)):
        for c in candidates:
            length = next(label for longest, label in bands if c.n_tokens <= longest)
            cells.setdefault((DIFFICULTY_BANDS[difficulty_band(c.difficulty)], length), [0, 0])[which] += 1
    labels = [label for _, label in bands]
    rows = {
        band: [cells.get((band, length), [0, 0]) for length in labels]
        for band in DIFFICULTY_BANDS
        if any((band, length) in cells for length in labels)
    }
    return {"lengths": labels, "taken_of": rows}


def _warnings(recipe: Recipe, ranking: Ranking, facts: dict[str, Any], samples: Sequence[Sample]) -> list[str]:
    warnings = _budget_warnings(recipe, len(samples), facts["tokens_available"])
    if recipe.difficulty is not None:
        half_width = (recipe.difficulty[1] - recipe.difficulty[0]) / 2
        if ranking.median_error > half_width:
            warnings.append(
                f"k is too low for this band: the median pass rate in it (of {ranking.median_k:g} judged traces) has a "
                f"standard error of {ranking.median_error:.2f}, more than half the band's width ({half_width:.2f}); "
                "build more samples a problem"
            )
    if ranking.truncated_share > 0.5:
        warnings.append(
            f"{ranking.truncated_share:.0%} of the traces did not finish: long ones are missing from this pool; build "
            "again with a larger --max-tokens and --retry truncated"
        )
    if recipe.stratify is not None and recipe.shares == "equal":
        warnings += _share_warnings(recipe, facts["strata"])
    return warnings


def _share_warnings(recipe: Recipe, strata: dict[str, dict[str, int]]) -> list[str]:
    """Strata that have less than an equal share of the budget."""
    what = "tokens_offered" if recipe.tokens is not None else "offered"
    budget = recipe.tokens if recipe.tokens is not None else recipe.samples
    poor = [name for name, n in strata.items() if n[what] < (budget or 0) // len(strata)]
    if not poor:
        return []
    listed = ", ".join(f"{name} ({strata[name][what]})" for name in poor[:5])
    more = f" and {len(poor) - 5} more" if len(poor) > 5 else ""
    return [f"the shares are not equal: {listed}{more} cannot fill a share; the others take what is left, if they can"]


def _budget_warnings(recipe: Recipe, n_samples: int, available: int) -> list[str]:
    if recipe.samples is not None and n_samples < recipe.samples:
        return [f"the pool is too small: {n_samples} samples where {recipe.samples} were asked"]
    if recipe.tokens is not None and available < recipe.tokens:
        return [f"the pool is too small: {available} tokens where {recipe.tokens} were asked"]
    return []


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


def _keep(
    catalog: Catalog,
    name: str,
    recipe: dict[str, Any],
    seed: int,
    owner: _Model,
    samples: Sequence[Sample],
    pool: dict[str, Any],
    warnings: Sequence[str],
) -> Subset:
    draft = Subset(
        name=name,
        version=0,
        content_hash=versions.hash_samples(samples),
        recipe=json.loads(json.dumps(recipe)),
        seed=seed,
        model=owner.model,
        model_revision=owner.revision,
        tokenizer_hash=owner.tokenizer_hash,
        samples=samples,
        pool=pool,
        warnings=list(warnings),
    )
    return versions.store(catalog, draft)

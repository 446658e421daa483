"""Selection: a recipe applied to a catalog, kept as the next version of a named subset.

Read candidates, take (``calset.catalog.subsets.take``, which is pure), read the token ids of what was taken, keep. Only
traces of build runs are candidates, never those of an evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.contamination.overlap import Decontaminator
from calset.catalog.query.stats import DIFFICULTY_BANDS, difficulty_bands, length_bands
from calset.catalog.records import Sample, Subset
from calset.catalog.references import resolve
from calset.catalog.store.values import to_arrow
from calset.catalog.subsets import versions
from calset.catalog.subsets.candidates import Model, Pool, folder_of, read_pool, single_model
from calset.catalog.subsets.recipes import Kind, Recipe, RecipeOptions, get_recipe
from calset.catalog.subsets.take import Candidates, Taken, budget_warnings, spend, take, tie_break
from calset.catalog.subsets.text import Corpus, open_corpus
from calset.errors import InputError, first_line
from calset.io.keywords import shows


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
    pool = read_pool(catalog, chosen, model=model, where=where, exclude=exclude, held_out_from=others)
    if chosen.kind == "gold":
        pool = _with_solutions(catalog, chosen, pool, seed)
    taken = take(pool.candidates, chosen, seed)
    stages = {**pool.stages, **taken.stages}
    _require_some(stages)
    facts: dict[str, Any] = {**stages, **taken.facts}
    if chosen.kind == "trace":
        facts["difficulty_length"] = _difficulty_length(pool.candidates, taken.at)
    samples = _samples(catalog, chosen.kind, pool, taken)
    resolved = _resolved(chosen, where, None, exclude, others)
    return _keep(catalog, name, resolved, seed, pool.owner, samples, facts, taken.warnings)


def _require_some(stages: Mapping[str, int]) -> None:
    gone = next((stage for stage, n in stages.items() if not n), None)
    if gone is None:
        return
    counts = ", ".join(f"{stage} {n}" for stage, n in stages.items())
    raise InputError(f"no candidate is left after the filter {gone!r} ({counts}): loosen it, or build more traces")


def _samples(catalog: Catalog, kind: Kind, pool: Pool, taken: Taken) -> list[Sample]:
    """Return the samples, with the stored tokens; a window's id is its trace's and its place: ``TRACE:START-STOP``."""
    c, at = pool.candidates, taken.at
    traces = pool.trace_ids.take(to_arrow(at)).to_pylist()
    problems = pool.problem_ids.take(to_arrow(c.problem[at])).to_pylist()
    keys = list(zip(traces, pool.attempts[at].tolist(), strict=True))
    found = catalog.tokens(keys)
    samples = []
    columns = (at.tolist(), c.ids(at), problems, keys, taken.start.tolist(), taken.size.tolist())
    for i, name, problem, key, start, size in zip(*columns, strict=True):
        prompt, completion = found.pop(key)
        whole = prompt + (completion if kind == "trace" else pool.tails.get(i, []))
        if size < len(whole):
            name = f"{name}:{start}-{start + size}"
        n_prompt = min(max(len(prompt) - start, 0), size)
        trace = key[0] if kind == "trace" else None
        samples.append(Sample(name, whole[start : start + size], n_prompt, kind, trace, problem))
    return samples


# -- recipes that tokenise ------------------------------------------------------------------------------------------


def _with_solutions(catalog: Catalog, recipe: Recipe, pool: Pool, seed: int) -> Pool:
    """Return the pool with the solutions, in tokens, of the candidates that pass all but the budget."""
    passed = take(pool.candidates, replace(recipe, samples=None, tokens=None, stratify=None), seed).at
    if not len(passed):
        return pool
    problem_ids = pool.problem_ids.take(to_arrow(pool.candidates.problem[passed])).to_pylist()
    tails = dict(zip(passed.tolist(), _solutions(catalog, pool.owner, problem_ids), strict=True))
    size = pool.candidates.size.copy()
    size[passed] += np.array([len(tail) for tail in tails.values()], size.dtype)
    return replace(pool, candidates=replace(pool.candidates, size=size), tails=tails)


def _solutions(catalog: Catalog, owner: Model, problem_ids: Sequence[str]) -> Iterable[list[int]]:
    """The reference solutions (else answers) in the model's own tokens, with its end token, as a finished trace has."""
    tokenizer = load_tokenizer(catalog, owner)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    problems = catalog.problems(problem_ids)
    for problem_id in problem_ids:
        yield tokenizer.encode(problems[problem_id].reference_solution, add_special_tokens=False) + end


def load_tokenizer(catalog: Catalog, owner: Model) -> Any:
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
    taken = spend(np.full(len(windows), window), samples=recipe.samples, tokens=recipe.tokens)
    if not len(taken):
        raise InputError(f"a window of {window} tokens is more than the budget of {recipe.tokens}: lower --window")
    samples = [windows[i] for i in taken]
    facts = {"documents": n_documents, "tokens": len(token_ids), "windows": len(windows), "taken": len(samples)}
    warnings = budget_warnings(recipe, len(samples), len(windows) * window)
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


def _builder(catalog: Catalog, model: str | None) -> Model:
    """The one model of the catalog's build runs."""
    asked = {model, folder_of(model)} - {None}
    owners = {
        Model(r.model, r.model_revision, r.tokenizer_hash)
        for r in catalog.runs("build")
        if not asked or asked & {r.model, f"{r.model}@{r.model_revision}", r.model_path}
    }
    if not owners:
        raise InputError(f"no build run{f' of {model}' if model else ''} in {catalog.path}: its tokenizer is needed")
    return single_model(owners)


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


def _difficulty_length(c: Candidates, taken: np.ndarray) -> dict[str, Any]:
    """Count what was taken of how many, by difficulty band and by quartile of the candidates' lengths."""
    bands = length_bands(c.n_tokens)
    shape = (len(DIFFICULTY_BANDS), len(bands))
    cell = difficulty_bands(c.difficulty) * len(bands) + np.searchsorted([top for top, _ in bands], c.n_tokens)
    n_taken, n = (np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape) for cells in (cell[taken], cell))
    counts = np.stack([n_taken, n], axis=-1).tolist()
    rows = {band: row for band, row in zip(DIFFICULTY_BANDS, counts, strict=True) if any(there for _, there in row)}
    return {"lengths": [label for _, label in bands], "taken_of": rows}


def _keep(
    catalog: Catalog,
    name: str,
    recipe: dict[str, Any],
    seed: int,
    owner: Model,
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

"""Selection: a recipe applied to a catalog, kept as the next version of a named subset.

The catalog is asked once for candidates and once for the token ids of what was taken; everything between is the pure
``calset.catalog.recipes``. Only traces of build runs are candidates, never those of an evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from calset import ids
from calset.catalog import subsets
from calset.catalog.catalog import Catalog, check_select
from calset.catalog.conditions import require_stable
from calset.catalog.connection import opened
from calset.catalog.corpus import Corpus, open_corpus
from calset.catalog.recipes import Candidate, Kind, Ranking, Recipe, get_recipe, rank, spend, tie_break
from calset.catalog.records import Sample, Subset
from calset.catalog.values import clean, clean_params
from calset.errors import InputError, first_line


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


def select(
    catalog: Catalog | str | Path,
    name: str,
    recipe: str | Path | Recipe = "ssgr",
    *,
    model: str | None = None,
    where: str | None = None,
    seed: int = 0,
    text: str | Path | None = None,
    **options: Any,
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
        options: any field of Recipe (``samples``, ``tokens``, ``difficulty``, ``window``, ...) in its place.

    Returns:
        the kept subset; when the latest version of ``name`` has this content, recipe and seed already, that version.

    Raises:
        InputError: nothing to take (and at which stage it vanished), several models, a bad recipe, name or condition.
        CatalogError: this thread has a ``catalog.connect()`` open: a selection writes, so close that first.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subsets.check_name(name)
    chosen = get_recipe(recipe).with_options(**options)
    if chosen.kind == "text":
        return _select_text(catalog, name, chosen, model=model, where=where, seed=seed, text=text)
    if text is not None:
        raise InputError(f"recipe {chosen.name} takes no text file: --text is for recipes of the kind text")
    pool = _pool(catalog, chosen, model, where)
    ranking = rank(pool.candidates, chosen, seed)
    _require_some(ranking, pool)
    ordered, sizes = _sized(catalog, chosen, pool, ranking)
    taken = [ordered[i] for i in spend(sizes, samples=chosen.samples, tokens=chosen.tokens)]
    if not taken:
        raise InputError(f"the smallest candidate has {min(sizes)} tokens, more than the budget of {chosen.tokens}")
    samples = _read_tokens(catalog, chosen.kind, taken, pool)
    facts = _facts(pool, ranking, sum(sizes), samples)
    warnings = _warnings(chosen, ranking, samples, sum(sizes))
    return _keep(catalog, name, _resolved(chosen, where, None), seed, pool.owner, samples, facts, warnings)


# -- candidates -----------------------------------------------------------------------------------------------------

_CANDIDATES = """
    SELECT t.trace_id, t.attempt, t.problem_id, t.sample_index, t.verdict = 'correct', t.finished, t.difficulty, t.k,
        t.n_tokens, t.n_prompt_tokens, t.generation_key, t.model, t.model_revision, r.tokenizer_hash
    FROM trace t JOIN runs r ON r.run_id = t.run_id
    WHERE t.kind = 'build' AND (? IS NULL OR t.model = ? OR t.model || '@' || t.model_revision = ? OR r.model_path = ?)
"""


def _pool(catalog: Catalog, recipe: Recipe, model: str | None, where: str | None) -> _Pool:
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
    if recipe.kind != "trace":
        rows = _first_of_each_problem(rows)
        stages["problems"] = len(rows)
    candidates, sources, sizes = [], {}, {}
    for trace, attempt, problem, index, correct, finished, difficulty, k, n_tokens, n_prompt, key, *_ in rows:
        sample = trace if recipe.kind == "trace" else subsets.prompt_sample_id(recipe.kind, problem, key)
        candidates.append(Candidate(sample, problem, index, correct, finished, difficulty, k, n_tokens))
        sources[sample] = (trace, attempt)
        sizes[sample] = (n_prompt, n_tokens)
    return _Pool(owner, candidates, sources, sizes, stages)


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
        require_stable(con, sql)
        return {trace for (trace,) in con.execute(sql).fetchall()}
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


def _sized(
    catalog: Catalog, recipe: Recipe, pool: _Pool, ranking: Ranking
) -> tuple[list[tuple[Candidate, list[int] | None]], list[int]]:
    """The ranked candidates, each with what follows its prompt (None: its own completion), and their token counts."""
    if recipe.kind == "gold":
        tails: list[list[int] | None] = list(_solutions(catalog, pool.owner, [c.problem_id for c in ranking.order]))
    else:
        tails = [[] if recipe.kind == "prompt" else None] * len(ranking.order)
    sizes = []
    for candidate, tail in zip(ranking.order, tails, strict=True):
        n_prompt, n_tokens = pool.sizes[candidate.sample_id]
        sizes.append(n_prompt + (n_tokens if tail is None else len(tail)))
    return list(zip(ranking.order, tails, strict=True)), sizes


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


def _read_tokens(
    catalog: Catalog, kind: Kind, taken: Sequence[tuple[Candidate, list[int] | None]], pool: _Pool
) -> list[Sample]:
    found = catalog.tokens([pool.sources[candidate.sample_id] for candidate, _ in taken])
    samples = []
    for candidate, tail in taken:
        prompt, completion = found[pool.sources[candidate.sample_id]]
        trace = pool.sources[candidate.sample_id][0] if tail is None else None
        input_ids = [*prompt, *(completion if tail is None else tail)]
        samples.append(Sample(candidate.sample_id, input_ids, len(prompt), kind, trace, candidate.problem_id))
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
    warnings = _budget_warnings(recipe, samples, len(windows) * window)
    return _keep(catalog, name, _resolved(recipe, None, dict(corpus.facts)), seed, owner, samples, facts, warnings)


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


def _resolved(recipe: Recipe, where: str | None, text: dict[str, Any] | None) -> dict[str, Any]:
    return {**recipe.as_dict(), "where": where, "text": text}


def _facts(pool: _Pool, ranking: Ranking, available: int, samples: Sequence[Sample]) -> dict[str, Any]:
    facts: dict[str, Any] = {**pool.stages, **ranking.stages, "taken": len(samples)}
    facts["tokens_available"] = available
    facts["median_k"] = ranking.median_k
    if ranking.length_band is not None:
        facts["length_band"] = list(ranking.length_band)
    return facts


def _warnings(recipe: Recipe, ranking: Ranking, samples: Sequence[Sample], available: int) -> list[str]:
    warnings = _budget_warnings(recipe, samples, available)
    if recipe.difficulty is not None:
        half_width = (recipe.difficulty[1] - recipe.difficulty[0]) / 2
        error = 0.5 / max(ranking.median_k, 1) ** 0.5
        if error > half_width:
            warnings.append(
                f"the median candidate's problem has {ranking.median_k:g} judged traces: its difficulty has a standard "
                f"error of up to {error:.2f}, more than half the band; build more samples a problem"
            )
    if ranking.truncated_share > 0.5:
        warnings.append(
            f"{ranking.truncated_share:.0%} of the traces did not finish: long ones are missing from this pool; build "
            "again with a larger --max-tokens and --retry truncated"
        )
    return warnings


def _budget_warnings(recipe: Recipe, samples: Sequence[Sample], available: int) -> list[str]:
    if recipe.samples is not None and len(samples) < recipe.samples:
        return [f"the pool is too small: {len(samples)} samples where {recipe.samples} were asked"]
    if recipe.tokens is not None and available < recipe.tokens:
        return [f"the pool is too small: {available} tokens where {recipe.tokens} were asked"]
    return []


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
        content_hash=subsets.hash_samples(samples),
        recipe=json.loads(json.dumps(recipe)),
        seed=seed,
        model=owner.model,
        model_revision=owner.revision,
        tokenizer_hash=owner.tokenizer_hash,
        samples=samples,
        pool=pool,
        warnings=list(warnings),
    )
    return subsets.store(catalog, draft)

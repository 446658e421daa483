"""The report of a subset: one self-contained HTML page for whoever must decide whether to calibrate with it.

It asks nothing of the network (a content security policy forbids it), runs no script, and holds every text escaped:
questions and traces are untrusted. What stands where is in ``page.html.jinja``. Must not know: how a selection is
made, the Hub.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calset.catalog.catalog import Catalog
from calset.catalog.query.show import fold, parts
from calset.catalog.records import Sample, Subset
from calset.catalog.references import find
from calset.catalog.report import chart
from calset.catalog.subsets.compare import describe, tables
from calset.catalog.subsets.facts import Fact, facts_of, published_texts, traces_of
from calset.catalog.subsets.provenance import provenance_of
from calset.io.files import whole_file
from calset.io.templates import open_template
from calset.io.terminal import cell, clean

N_SAMPLES = 6  # to read
LONGEST_TEXT = 20_000  # characters of one reasoning on the page
LONGEST_QUESTION = 110  # characters of a sample's first line
_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def report(catalog: Catalog | str | Path | None, subset: Subset | str, path: str | Path) -> Path:
    """Write the report of a subset as one HTML file, in place of one that is there.

    Args:
        catalog: where the subset and its traces are.
        subset: a Subset or a reference to one.

    Returns:
        the file.

    Raises:
        InputError: no such subset, or the file cannot be written.
        CatalogError: stored samples without their hash, or no space left.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subset = find(subset, catalog) if isinstance(subset, str) else subset
    # One connection under all the small questions: opening the file for each of them takes longer than answering.
    with catalog.reading() if catalog.exists() else nullcontext():
        page = open_template(_TEMPLATE, clean).render(_content(catalog, subset))
    with whole_file(Path(path)) as draft:
        draft.write_text(page, encoding="utf-8")
    return Path(path)


def _content(catalog: Catalog, subset: Subset) -> dict[str, Any]:
    """The values of the page, none of them escaped."""
    facts = facts_of(catalog, subset)
    pool = _pool(catalog, subset)
    shown = tables(subset)
    recipe = [(key, value) for key, value in subset.recipe.items() if value not in (None, False)]
    return {
        "subset": subset,
        "n_samples": f"{subset.n_samples:,}",
        "sentence": _sentence(subset),
        "numbers": _numbers(subset, describe(subset, facts)),
        "recipe": _table(["key", "value"], [*recipe, ("seed", subset.seed)]),
        "stages": [_table(columns, rows, title) for title, columns, rows in shown if "difficulty" not in title],
        "picture": _picture(catalog, subset, facts, pool),
        "grids": [_table(columns, rows, title) for title, columns, rows in shown if "difficulty" in title],
        "verdicts": _verdicts(facts, pool),
        "samples": _samples(catalog, subset, facts),
        "origin": _origin(catalog, subset, facts),
        "commands": _commands(subset),
        "python": _python(subset),
        "catalog": catalog.path.name,
        "created_at": cell(subset.created_at),
    }


# -- sections -------------------------------------------------------------------------------------------------------


def _numbers(subset: Subset, described: Mapping[str, Any]) -> list[tuple[str, str]]:
    lengths, difficulties = described["length_quantiles"] or {}, described["difficulty_quantiles"] or {}
    return [
        ("samples", f"{subset.n_samples:,}"),
        ("tokens", f"{subset.n_tokens:,}"),
        ("problems", f"{described['n_problems']:,}"),
        ("median length", f"{lengths['p50']:,}" if lengths else "-"),
        ("median difficulty", f"{difficulties['p50']:.2f}" if difficulties else "-"),
    ]


def _sentence(subset: Subset) -> str:
    """The recipe in words."""
    r = subset.recipe
    what = {
        "trace": "traces",
        "prompt": "prompts",
        "gold": "prompts with their reference solutions",
        "text": "windows of text",
    }
    adjectives = [word for word in ("correct", "finished") if r.get(word)]
    said = f"{' and '.join(adjectives)} {what[r['kind']]}".strip().capitalize() + f" of {subset.model}"
    if r.get("difficulty"):
        said += ", difficulty {:g} to {:g}".format(*r["difficulty"])
    if band := subset.pool.get("length_band"):
        quantiles = (
            " ({:.0%} to {:.0%} of the lengths)".format(*r["length_quantiles"]) if r.get("length_quantiles") else ""
        )
        said += f", {band[0]:,} to {band[1]:,} tokens long{quantiles}"
    if r.get("per_problem"):
        said += f", at most {r['per_problem']} a problem"
    order = {"harder": "harder ones first", "random": "in seeded order", "catalog": "in the catalog's order"}
    said += f", {order[r['order']]}"
    if r.get("window"):
        said += f", in windows of {r['window']:,} tokens"
    if r.get("stratify"):
        said += f", {r['shares']} shares by {r['stratify']}"
    return said + "."


@dataclass(frozen=True, slots=True)
class _Pool:
    """The traces of the subset's model: how many have each verdict, and the judged ones' number and lengths."""

    verdicts: Mapping[str, int]
    n_judged: int = 0
    lengths: Sequence[int] = ()  # the shortest and the longest


_OF_MODEL = "FROM trace WHERE kind = 'build' AND model = ? AND model_revision = ?"


def _pool(catalog: Catalog, subset: Subset) -> _Pool:
    if not catalog.exists():
        return _Pool({})
    rows = catalog.rows(
        "SELECT verdict, count(*) AS n, count(difficulty) AS n_judged, "
        "min(n_tokens) FILTER (WHERE difficulty IS NOT NULL) AS shortest, "
        f"max(n_tokens) FILTER (WHERE difficulty IS NOT NULL) AS longest {_OF_MODEL} GROUP BY verdict",
        [subset.model, subset.model_revision],
    )
    judged = [row for row in rows if row["n_judged"]]
    return _Pool(
        {row["verdict"]: row["n"] for row in rows},
        sum(row["n_judged"] for row in judged),
        [length for row in judged for length in (row["shortest"], row["longest"])],
    )


def _picture(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None], pool: _Pool) -> dict[str, Any] | None:
    from markupsafe import Markup

    dots = [
        chart.Dot(sample.sample_id, fact.difficulty, fact.n_tokens)
        for sample, fact in zip(subset.samples, facts, strict=True)
        if fact and fact.difficulty is not None
    ]
    if not dots:
        return None
    lengths = [dot.n_tokens for dot in dots] + list(pool.lengths)
    scale = chart.Scale.of(min(lengths), max(lengths))
    cells = _cells(catalog, subset, scale) if pool.n_judged else {}
    return {
        "svg": Markup(chart.draw(cells, dots, scale, "Pool and selection by difficulty and length")),  # numbers only
        "n_pool": f"{pool.n_judged:,}",
        "n_taken": f"{len(dots):,}",
        "n_drawn": f"{chart.MAX_DOTS:,}" if len(dots) > chart.MAX_DOTS else "",
    }


def _cells(catalog: Catalog, subset: Subset, scale: chart.Scale) -> dict[tuple[int, int], int]:
    """The judged traces of the model by cell of the picture."""
    column, row = chart.cell_sql("difficulty", "n_tokens", scale)
    sql = f"SELECT {column} AS i, {row} AS j, count(*) AS n {_OF_MODEL} AND difficulty IS NOT NULL GROUP BY ALL"
    rows = catalog.rows(sql, [subset.model, subset.model_revision])
    return {(row["i"], row["j"]): row["n"] for row in rows}


def _verdicts(facts: Sequence[Fact | None], pool: _Pool) -> _Table:
    taken = Counter(fact.verdict for fact in facts if fact)
    found = {verdict: pool.verdicts.get(verdict, 0) for verdict in {**pool.verdicts, **taken}} if taken else {}
    rows = [(verdict, taken[verdict], n) for verdict, n in sorted(found.items(), key=lambda x: (-x[1], x[0]))]
    return _table(["verdict", "in the subset", "in the pool"], rows)


def _samples(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> list[dict[str, Any]]:
    n = subset.n_samples
    chosen = sorted({i * (n - 1) // max(1, min(N_SAMPLES, n) - 1) for i in range(min(N_SAMPLES, n))})
    if published := published_texts(catalog, subset, chosen):
        found = [_published(subset.samples[i], row) for i, row in zip(chosen, published, strict=True)]
    else:
        traces = traces_of(catalog, [subset.samples[i] for i in chosen], [facts[i] for i in chosen])
        found = [_sample(catalog, subset.samples[i], traces) for i in chosen]
    return [{"number": i + 1, **one} for i, one in zip(chosen, found, strict=True) if one]


def _sample(catalog: Catalog, sample: Sample, traces: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if (sample.trace_id or "") in traces:
        return _trace(sample, traces[sample.trace_id or ""])
    problem = catalog.problems([sample.problem_id]).get(sample.problem_id) if sample.problem_id else None
    if problem is None:
        return {}
    texts = [("Question", problem.question)]
    texts += [("Reference solution", problem.reference_solution)] * (sample.kind == "gold")
    return _shown_sample(problem.question, f"{len(sample.input_ids):,} tokens", texts)


def _published(sample: Sample, row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of which the catalog has what was published, and not the trace."""
    titles = (("Question", "question"), ("Text", "text"), ("Reference answer", "answer"), ("Verdict", "verdict"))
    said = f"difficulty {_rate(row['difficulty'])} · {len(sample.input_ids):,} tokens"
    texts = [(title, row[key]) for title, key in titles if row[key]]
    return _shown_sample(row["question"] or "", said, texts) if texts else {}


def _trace(sample: Sample, row: Mapping[str, Any]) -> dict[str, Any]:
    reasoning, answer = parts(row)
    said = f"difficulty {_rate(row['difficulty'])} · {row['n_tokens']:,} tokens · {row['verdict']}"
    if sample.sample_id != sample.trace_id:
        said += f" · a window of it: {sample.sample_id.partition(':')[2]}"
    why = "; ".join(
        f"{what} {row[key]}" for what, key in (("grader", "grader"), ("extracted", "extracted")) if row[key]
    )
    after = [("Answer", answer), ("Reference answer", row["answer"]), ("Verdict", f"{row['verdict']}; {why}")]
    after += [("Why", row["detail"])] if row["detail"] else []
    text = reasoning if len(reasoning) <= LONGEST_TEXT else fold(reasoning[: LONGEST_TEXT // 2])
    thought = {"length": f"{row['n_reasoning_tokens']:,} tokens", "text": text}
    return _shown_sample(row["question"], said, [("Question", row["question"])], thought, after)


def _shown_sample(
    question: str,
    said: str,
    before: Sequence[tuple[str, str]],
    reasoning: Mapping[str, str] | None = None,
    after: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    first = " ".join(question.split())
    first = first if len(first) <= LONGEST_QUESTION else first[: LONGEST_QUESTION - 1] + "…"
    return {"question": first, "said": said, "before": before, "reasoning": reasoning, "after": after}


def _rate(difficulty: float | None) -> str:
    return "unknown" if difficulty is None else f"{difficulty:.2f}"


def _origin(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> list[_Table]:
    origin = provenance_of(subset, catalog, facts)
    model = [
        ("model", subset.model),
        ("revision", subset.model_revision),
        ("tokenizer hash", subset.tokenizer_hash),
        ("content hash", subset.content_hash),
    ]
    runs = [
        (
            r["run_id"],
            r["engine"],
            r["engine_version"],
            r["max_tokens"],
            r["sampling"],
            r["seed"],
            r["started_at"],
            r["command"],
        )
        for r in origin["runs"]
    ]
    sources = [
        (s["name"], s["kind"], s["revision"], s["licence"] or "not stated", s["grader"]) for s in origin["sources"]
    ]
    model += [(f"Hub {key}", value) for key, value in origin.get("hub", {}).items()]
    found = [_table([], model)]
    if sources:
        found.append(_table(["source", "kind", "revision", "licence", "grader"], sources, "Problems"))
    columns = ["run", "engine", "version", "max tokens", "sampling", "seed", "started", "command"]
    return found + [_table([], list(zip(columns, run, strict=True)), f"Run {run[0]}") for run in runs]


def _commands(subset: Subset) -> str:
    model = shlex.quote(clean(subset.model))
    return (
        f"calset prune {model} --calibration {subset.ref} --method sparsegpt --sparsity 0.5 -o pruned\n"
        f"calset export {subset.ref} -o {subset.name}-{subset.version}"
    )


def _python(subset: Subset) -> str:
    return (
        "import calset, polars as pl\n\n"
        f'subset = calset.resolve("{subset.ref}")  # checked against its content hash\n'
        f'rows = pl.read_parquet("{subset.name}-{subset.version}/data/train.parquet")  # as exported: input_ids, ...'
    )


# -- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """Cells as texts, each with whether its column holds numbers."""

    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[tuple[str, bool]]]
    title: str = ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> _Table:
    listed = [list(row) for row in rows]
    numeric = [all(_is_number(value) for value in column) for column in zip(*listed, strict=True)]
    numeric = numeric or [False] * len(columns)
    shown = [list(zip(map(_shown, row), numeric, strict=True)) for row in listed]
    return _Table(list(zip(columns, numeric, strict=True)) if columns else [], shown, title)


def _shown(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 else cell(value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

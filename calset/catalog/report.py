"""The report of a subset: one self-contained HTML page for whoever must decide whether to calibrate with it.

It asks nothing of the network (a content security policy forbids it), runs no script, and holds every text escaped:
questions and traces are untrusted. Must not know: how a selection is made, the Hub.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import Any

from calset.catalog import picture
from calset.catalog.catalog import Catalog
from calset.catalog.compare import describe
from calset.catalog.facts import Fact, facts_of, published_texts, trace_at
from calset.catalog.provenance import provenance_of
from calset.catalog.records import Sample, Subset
from calset.catalog.references import resolve
from calset.catalog.selection import tables
from calset.catalog.show import fold, parts
from calset.files import whole_file
from calset.terminal import cell, clean

N_SAMPLES = 6  # to read
LONGEST_TEXT = 20_000  # characters of one reasoning on the page
_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_CSS = Path(__file__).with_name("report.css")


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
    subset = resolve(subset, catalog) if isinstance(subset, str) else subset
    # One connection under all the small questions: opening the file for each of them takes longer than answering.
    with catalog.reading() if catalog.exists() else nullcontext():
        page = _page(catalog, subset)
    with whole_file(Path(path)) as draft:
        draft.write_text(page, encoding="utf-8")
    return Path(path)


def _page(catalog: Catalog, subset: Subset) -> str:
    facts = facts_of(catalog, subset)
    body = [
        _head(subset, describe(subset, facts)),
        _section("Recipe", _recipe(subset)),
        _section("Difficulty and length", _difficulty_length(catalog, subset, facts)),
        _section("Verdicts", _verdicts(catalog, subset, facts)),
        _section("Samples to read", _samples(catalog, subset, facts)),
        _section("Where it comes from", _origin(catalog, subset, facts)),
        _section("How to use it", _usage(subset)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(subset.ref)} · calibration subset</title>\n"
        f"<style>\n{_CSS.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<main>\n{''.join(body)}</main>\n"
        f"<footer>Made by calset from {_text(catalog.path.name)}; "
        f"selected {_text(cell(subset.created_at))} UTC.</footer>\n"
        "</body>\n</html>\n"
    )


# -- sections -------------------------------------------------------------------------------------------------------


def _head(subset: Subset, described: Mapping[str, Any]) -> str:
    lengths, difficulties = described["length_quantiles"] or {}, described["difficulty_quantiles"] or {}
    numbers = [
        ("samples", f"{subset.n_samples:,}"),
        ("tokens", f"{subset.n_tokens:,}"),
        ("problems", f"{described['n_problems']:,}"),
        ("median length", f"{lengths['p50']:,}" if lengths else "-"),
        ("median difficulty", f"{difficulties['p50']:.2f}" if difficulties else "-"),
    ]
    facts = "".join(f"<div><dt>{_text(what)}</dt><dd>{_text(value)}</dd></div>" for what, value in numbers)
    warnings = "".join(f'<p class="warning">{_text(warning)}</p>' for warning in subset.warnings)
    return (
        f'<p class="eyebrow">Calibration subset</p>\n<h1>{_text(subset.ref)}</h1>\n'
        f'<p class="lead">{_text(_sentence(subset))}</p>\n<dl class="facts">{facts}</dl>\n{warnings}'
        f'<p class="note">Content hash <code>{_text(subset.content_hash)}</code></p>\n'
    )


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


def _recipe(subset: Subset) -> str:
    rows = [(key, value) for key, value in subset.recipe.items() if value not in (None, False)]
    stages = [_table(columns, rows, title) for title, columns, rows in tables(subset) if "difficulty" not in title]
    return (
        _table(["key", "value"], [*rows, ("seed", subset.seed)])
        + "<h3>How many were left at each stage</h3>"
        + "".join(stages)
    )


def _difficulty_length(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> str:
    dots = [
        picture.Dot(sample.sample_id, fact.difficulty, fact.n_tokens)
        for sample, fact in zip(subset.samples, facts, strict=True)
        if fact and fact.difficulty is not None
    ]
    if not dots:
        return "<p>There is no picture: the catalog knows no difficulty of these samples.</p>"
    *span, total = _span(catalog, subset)
    lengths = [dot.n_tokens for dot in dots] + [n for n in span if n is not None]
    scale = picture.Scale.of(min(lengths), max(lengths))
    drawn = picture.draw(_cells(catalog, subset, scale), dots, scale, "Pool and selection by difficulty and length")
    thinned = f" (the first {picture.MAX_DOTS:,} are drawn)" if len(dots) > picture.MAX_DOTS else ""
    caption = (
        f'<span class="key"></span> {total:,} judged traces of the model, darker where there are more (logarithmic) '
        f'<br><span class="key dot"></span> {len(dots):,} taken{thinned}'
    )
    grid = [_table(columns, rows, title) for title, columns, rows in tables(subset) if "difficulty" in title]
    return f"<figure>\n{drawn}\n<figcaption>{caption}</figcaption>\n</figure>\n{''.join(grid)}"


_POOL = "FROM trace WHERE kind = 'build' AND model = ? AND model_revision = ? AND difficulty IS NOT NULL"


def _span(catalog: Catalog, subset: Subset) -> tuple[int | None, int | None, int]:
    """The shortest and longest judged trace of the subset's model, and how many there are."""
    sql = f"SELECT min(n_tokens) AS low, max(n_tokens) AS high, count(*) AS n {_POOL}"
    (row,) = catalog.rows(sql, [subset.model, subset.model_revision])
    return row["low"], row["high"], row["n"]


def _cells(catalog: Catalog, subset: Subset, scale: picture.Scale) -> dict[tuple[int, int], int]:
    sql = f"SELECT difficulty, n_tokens, count(*) AS n {_POOL} GROUP BY ALL"
    cells: Counter[tuple[int, int]] = Counter()
    for row in catalog.rows(sql, [subset.model, subset.model_revision]):
        cells[picture.column(row["difficulty"]), scale.row(row["n_tokens"])] += row["n"]
    return cells


def _verdicts(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> str:
    taken = Counter(fact.verdict for fact in facts if fact)
    if not taken:
        return "<p>No trace of these samples is in the catalog.</p>"
    sql = (
        "SELECT verdict, count(*) AS n FROM trace WHERE kind = 'build' AND model = ? AND model_revision = ? GROUP BY 1"
    )
    pool = {row["verdict"]: row["n"] for row in catalog.rows(sql, [subset.model, subset.model_revision])}
    found = {verdict: pool.get(verdict, 0) for verdict in {**pool, **taken}}  # a pulled subset's traces are elsewhere
    rows = [(verdict, taken[verdict], n) for verdict, n in sorted(found.items(), key=lambda x: (-x[1], x[0]))]
    return _table(["verdict", "in the subset", "in the pool"], rows)


def _samples(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> str:
    n = subset.n_samples
    chosen = sorted({i * (n - 1) // max(1, min(N_SAMPLES, n) - 1) for i in range(min(N_SAMPLES, n))})
    if published := published_texts(catalog, subset, chosen):
        read = [_published_sample(i, subset.samples[i], row) for i, row in zip(chosen, published, strict=True)]
    else:
        read = [_sample(catalog, i, subset.samples[i], facts[i]) for i in chosen]
    if not any(read):
        return "<p>The catalog holds no text of these samples.</p>"
    return f'<p class="note">{len(chosen)} of {n:,}, spread over the order of the subset.</p>\n{"".join(read)}'


def _sample(catalog: Catalog, position: int, sample: Sample, fact: Fact | None) -> str:
    if fact and sample.trace_id:
        # Of a trace that was run again since, the attempt whose tokens these are.
        return _trace(position, sample, trace_at(catalog, sample.trace_id, fact.attempt))
    problem = catalog.problems([sample.problem_id]).get(sample.problem_id) if sample.problem_id else None
    if problem is None:
        return ""
    texts = [("Question", problem.question)]
    texts += [("Reference solution", problem.reference_solution)] * (sample.kind == "gold")
    return _details(f"{position + 1}", f"{len(sample.input_ids):,} tokens", problem.question, _texts(texts))


def _published_sample(position: int, sample: Sample, row: Mapping[str, Any]) -> str:
    """A sample of which the catalog has what was published, and not the trace."""
    titles = (("Question", "question"), ("Text", "text"), ("Reference answer", "answer"), ("Verdict", "verdict"))
    said = f"difficulty {_rate(row['difficulty'])} · {len(sample.input_ids):,} tokens"
    texts = [(title, row[key]) for title, key in titles if row[key]]
    return _details(f"{position + 1}", said, row["question"] or "", _texts(texts)) if texts else ""


def _rate(difficulty: float | None) -> str:
    return "unknown" if difficulty is None else f"{difficulty:.2f}"


def _trace(position: int, sample: Sample, row: Mapping[str, Any]) -> str:
    reasoning, answer = parts(row)
    said = f"difficulty {_rate(row['difficulty'])} · {row['n_tokens']:,} tokens · {row['verdict']}"
    if sample.sample_id != sample.trace_id:
        said += f" · a window of it: {sample.sample_id.partition(':')[2]}"
    long = reasoning if len(reasoning) <= LONGEST_TEXT else fold(reasoning[: LONGEST_TEXT // 2])
    why = "; ".join(
        f"{what} {row[key]}" for what, key in (("grader", "grader"), ("extracted", "extracted")) if row[key]
    )
    texts = _texts([("Question", row["question"])])
    summary = f"<summary>Reasoning <span>{row['n_reasoning_tokens']:,} tokens</span></summary>"
    texts += f"<details>{summary}<pre>{_text(long)}</pre></details>"
    texts += _texts([("Answer", answer), ("Reference answer", row["answer"]), ("Verdict", f"{row['verdict']}; {why}")])
    texts += _texts([("Why", row["detail"] or "")]) if row["detail"] else ""
    return _details(f"{position + 1}", said, row["question"], texts)


def _origin(catalog: Catalog, subset: Subset, facts: Sequence[Fact | None]) -> str:
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
    found = _table(["", ""], model)
    if sources:
        found += _table(["source", "kind", "revision", "licence", "grader"], sources, "Problems")
    if runs:
        columns = ["run", "engine", "version", "max tokens", "sampling", "seed", "started", "command"]
        for run in runs:
            found += _table(["", ""], list(zip(columns, run, strict=True)), f"Run {run[0]}")
    return found


def _usage(subset: Subset) -> str:
    model = shlex.quote(clean(subset.model))
    commands = (
        f"calset prune {model} --calibration {subset.ref} --method sparsegpt --sparsity 0.5 -o pruned\n"
        f"calset export {subset.ref} -o {subset.name}-{subset.version}"
    )
    python = (
        "import calset, polars as pl\n\n"
        f'subset = calset.resolve("{subset.ref}")  # checked against its content hash\n'
        f'rows = pl.read_parquet("{subset.name}-{subset.version}/data/train.parquet")  # as exported: input_ids, ...'
    )
    return f"<pre>{_text(commands)}</pre>\n<pre>{_text(python)}</pre>"


# -- HTML -----------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """Anything as HTML text or attribute value: no markup, no control or bidirectional characters."""
    return escape(clean(value), quote=True)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> str:
    listed = [list(row) for row in rows]
    numeric = [bool(listed) and all(_is_number(row[i]) for row in listed) for i in range(len(columns))]

    def line(tag: str, values: Sequence[Any]) -> str:
        marks = (' class="number"' if number else "" for number in numeric)
        return (
            "<tr>"
            + "".join(f"<{tag}{m}>{_text(_shown(v))}</{tag}>" for m, v in zip(marks, values, strict=True))
            + "</tr>"
        )

    head = f"<thead>{line('th', columns)}</thead>" if any(columns) else ""
    heading = f"<h3>{_text(title)}</h3>" if title else ""
    body = "".join(line("td", row) for row in listed)
    return f'{heading}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>\n'


def _shown(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 else cell(value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(texts: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<h3>{_text(title)}</h3><pre>{_text(text.strip(chr(10)))}</pre>" for title, text in texts)


def _details(number: str, said: str, question: str, body: str) -> str:
    first = " ".join(question.split())
    first = first if len(first) <= 110 else first[:109] + "…"
    summary = f"<summary>{_text(number)} · {_text(first)}<br><span>{_text(said)}</span></summary>"
    return f"<details>{summary}\n{body}</details>\n"

"""The promise of a recipe: the same content, recipe and seed give the same subset, on any DuckDB and any machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import catalog as benchmark
import duckdb
import pytest
import textbook_selection as textbook
from conftest import fewer
from factories import make_grade, make_problem, make_run, make_source, make_trace
from hypothesis import given
from hypothesis import strategies as st

from calset import ids
from calset.catalog.catalog import Catalog
from calset.catalog.records import Grade, Problem, Subset, Trace
from calset.catalog.select import select
from calset.catalog.subsets.recipes import RECIPES, Recipe
from calset.errors import InputError

ROOT = Path(__file__).parent.parent
OLDER = Path(sys.prefix) / "duckdb-1.5"
SOURCES = ("algebra", "sums", "words")
# Recipe and options; every order, budget, band, cut and share is among them.
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("ssgr", {"tokens": 900}),
    ("rac", {"tokens": 1500}),
    ("hard-long", {}),
    ("easy", {"samples": 7}),
    ("random", {"window": 24, "per_problem": 2}),
    ("correct", {"stratify": "source", "samples": 20}),
    ("rac", {"stratify": "domain", "shares": "proportional", "tokens": 1000, "window": 40}),
    ("prompts", {"order": "catalog", "samples": 9}),
    ("random", {"where": "n_tokens % 3 > 0", "length_tokens": (20, 80)}),
]


def content() -> tuple[list[Problem], list[Trace], list[Grade]]:
    """90 problems x 4 traces, one in nine of them cut; thirds and other difficulties that are no binary fractions."""
    run = make_run()
    problems = [
        make_problem(n, SOURCES[n % 5 % 3], metadata={"domain": f"d{n % 4}"} if n % 7 else {}) for n in range(90)
    ]
    traces, grades = [], []
    for n, problem in enumerate(problems):
        for i in range(3 + n % 2):
            cut = (n + i) % 9 == 0
            trace = make_trace(problem, run, i, 5 + (n * 37 + i * 53) % 97, finish_reason="length" if cut else "stop")
            traces.append(trace)
            grades.append(make_grade(trace, "truncated" if cut else "correct" if i < n % 5 else "incorrect"))
    return problems, traces, grades


def keep(path: Path, problems: list[Problem], traces: list[Trace], grades: list[Grade], batch: int = 10_000) -> Catalog:
    catalog = Catalog(path)
    catalog.add_run(make_run())
    for source in SOURCES:
        catalog.add_source(make_source(source))
    catalog.add_problems(problems)
    by_trace = {grade.trace_id: grade for grade in grades}
    for start in range(0, len(traces), batch):
        part = traces[start : start + batch]
        catalog.record(part, [by_trace[t.trace_id] for t in part])
    return catalog


def answers(catalog: Catalog, seed: int = 5, **model: str) -> list[Any]:
    """What each question comes to: the content hash, what was counted on the way, the warnings."""
    found = []
    for i, (recipe, options) in enumerate(QUESTIONS):
        subset = select(catalog, f"q{i}", recipe, seed=seed, **model, **options)
        found.append(json.loads(json.dumps([subset.content_hash, subset.pool, subset.warnings])))
    return found


def by_the_textbook(catalog: Catalog, seed: int = 5, **model: str) -> list[Any]:
    found = []
    for name, options in QUESTIONS:
        recipe = RECIPES[name].with_options(**{key: value for key, value in options.items() if key != "where"})
        taken = textbook.select(catalog, recipe, seed, where=options.get("where"), **model)
        found.append(json.loads(json.dumps([taken.content_hash, taken.pool, taken.warnings])))
    return found


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return keep(tmp_path_factory.mktemp("laws") / "c.duckdb", *content())


@pytest.fixture(scope="module")
def expected(catalog: Catalog) -> list[Any]:
    return by_the_textbook(catalog)


def test_a_selection_is_the_textbook_s(catalog: Catalog, expected: list[Any]) -> None:
    assert answers(catalog) == expected


def test_the_order_of_rows_and_of_their_coming_makes_no_difference(tmp_path: Path, expected: list[Any]) -> None:
    problems, traces, grades = content()
    shuffler = random.Random(0)
    for rows in (problems, traces, grades):
        shuffler.shuffle(rows)
    assert answers(keep(tmp_path / "shuffled.duckdb", problems, traces, grades, batch=90)) == expected


# -- large catalogs: hashed by DuckDB, read in parts ------------------------------------------------------------------

MODEL = benchmark.MODELS[0]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """24,000 traces of two models, some of them retried, some graded again."""
    path = tmp_path_factory.mktemp("large") / "c.duckdb"
    benchmark.fill(path, 24_000, texts=False)
    return Catalog(path)


@pytest.fixture(scope="module")
def expected_of_large(large: Catalog) -> list[Any]:
    return by_the_textbook(large, model=MODEL)


def test_a_selection_from_many_is_the_textbook_s(large: Catalog, expected_of_large: list[Any]) -> None:
    assert answers(large, model=MODEL) == expected_of_large


@pytest.mark.skipif(not OLDER.is_dir(), reason="DuckDB 1.5 is not installed beside DuckDB 2")
def test_duckdb_1_5_in_a_process_of_its_own_makes_no_difference(
    catalog: Catalog, large: Catalog, expected: list[Any], expected_of_large: list[Any], tmp_path: Path
) -> None:
    copies = [tmp_path / "small.duckdb", tmp_path / "large.duckdb"]
    for one, copy in zip((catalog, large), copies, strict=True):
        shutil.copy(one.path, copy)
    code = (
        "import sys, json, duckdb; from test_select_laws import MODEL, answers; from calset import Catalog\n"
        "small, large = map(Catalog, sys.argv[1:])\n"
        "print(json.dumps([duckdb.__version__, answers(small), answers(large, model=MODEL)]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (OLDER, ROOT, ROOT / "tests", ROOT / "benchmarks")))}
    done = subprocess.run([sys.executable, "-c", code, *copies], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, *found = json.loads(done.stdout)
    assert version.startswith("1.5.")
    assert found == [expected, expected_of_large]


@pytest.mark.nightly
def test_the_number_of_threads_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many rows as DuckDB gives to several threads."""
    catalog, connect = Catalog(tmp_path / "c.duckdb"), duckdb.connect
    benchmark.fill(catalog.path, 400_000, texts=False)
    expected = by_the_textbook(catalog, model=MODEL)
    for threads in (1, 4):

        def with_threads(*args: Any, config: Any = None, n: int = threads, **options: Any) -> Any:
            return connect(*args, config={**(config or {}), "threads": n}, **options)

        monkeypatch.setattr(duckdb, "connect", with_threads)
        assert catalog.rows("SELECT current_setting('threads') AS n") == [{"n": threads}]
        assert answers(catalog, model=MODEL) == expected


def test_another_seed_is_another_subset_of_the_same_pool(catalog: Catalog, expected: list[Any]) -> None:
    other = answers(catalog, seed=6)
    for (recipe, options), one, two in zip(QUESTIONS, expected, other, strict=True):
        if options.get("order") == "catalog":
            assert one[0] == two[0]
        else:
            assert one[0] != two[0], recipe
        assert one[1]["candidates"] == two[1]["candidates"]


@fewer(50)
@given(st.data())
def test_one_changed_token_is_another_hash_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    problems, traces, grades = (rows[:12] for rows in content())
    folder = tmp_path_factory.mktemp("token")
    every = Recipe("every", per_problem=None)
    one = select(keep(folder / "one.duckdb", problems, traces, grades), "x", every)
    i = data.draw(st.integers(0, len(traces) - 1))
    trace = traces[i]
    part = data.draw(st.sampled_from(["prompt_ids", "completion_ids"]))
    tokens = list(getattr(trace, part))
    at = data.draw(st.integers(0, len(tokens) - 1))
    tokens[at] += data.draw(st.sampled_from([-1, 1, 1000]))
    traces[i] = replace(trace, **{part: tuple(tokens)})
    two = select(keep(folder / "two.duckdb", problems, traces, grades), "x", every)
    assert one.content_hash != two.content_hash
    assert [s.sample_id for s in one.samples] == [s.sample_id for s in two.samples]
    assert sum(a.input_ids != b.input_ids for a, b in zip(one.samples, two.samples, strict=True)) == 1


def selected(catalog: Catalog, name: str, seed: int, options: dict[str, Any]) -> Subset | None:
    """The subset, or None where there is nothing that could be taken."""
    try:
        return select(catalog, "held", name, seed=seed, **options)
    except InputError as error:
        if "no candidate is left" in str(error) or "more than the budget" in str(error):
            return None
        raise


bands = st.tuples(st.sampled_from([0, 0.2, 1 / 3, 0.5]), st.sampled_from([0.5, 2 / 3, 0.8, 1]))
budgets = st.sampled_from([{}, {"samples": 1}, {"samples": 11}, {"tokens": 60}, {"tokens": 777}, {"tokens": 10**6}])


@pytest.mark.slow
@fewer(2)
@given(
    st.sampled_from(sorted(set(RECIPES) - {"text", "gold"})),
    budgets,
    st.none() | bands,
    st.none() | st.sampled_from([(0, 30), (25, 25), (40, 200)]),
    st.none() | st.integers(1, 60),
    st.sampled_from([None, "source", "domain"]),
    st.sampled_from(["equal", "proportional"]),
    st.none() | st.integers(1, 3),
    st.integers(0, 3),
)
def test_every_budget_band_cap_and_share_holds_exactly(
    catalog: Catalog,
    name: str,
    budget: dict[str, int],
    difficulty: tuple[float, float] | None,
    lengths: tuple[int, int] | None,
    window: int | None,
    stratify: str | None,
    shares: str,
    per_problem: int | None,
    seed: int,
) -> None:
    options: dict[str, Any] = {**budget, "stratify": stratify, "shares": shares, "per_problem": per_problem}
    options |= {"difficulty": difficulty} if difficulty else {}
    options |= {"length_tokens": lengths} if lengths else {}
    options |= {"window": window} if name != "prompts" else {}
    subset = selected(catalog, name, seed, options)
    if subset is None:
        return
    recipe = RECIPES[name].with_options(**options)
    known = {row["trace_id"]: row for row in catalog.rows("SELECT * FROM trace")}
    if recipe.samples is not None:
        offered = subset.pool.get("per_problem", subset.pool["candidates"])
        assert subset.n_samples <= recipe.samples
        if recipe.stratify is None or recipe.shares == "equal":
            stages = [n for stage, n in subset.pool.items() if stage in ("candidates", "length", "per_problem")]
            assert subset.n_samples == min(recipe.samples, stages[-1], offered)
    if recipe.tokens is not None:
        assert subset.n_tokens <= recipe.tokens
    if recipe.per_problem is not None:
        assert max(Counter(s.problem_id for s in subset.samples).values()) <= recipe.per_problem
    for sample in subset.samples:
        assert window is None or name == "prompts" or len(sample.input_ids) <= window
        if sample.trace_id is None:
            continue
        row = known[sample.trace_id]
        assert row["correct"] or not recipe.correct
        assert row["finished"] or not recipe.finished
        if recipe.difficulty is not None:
            assert recipe.difficulty[0] <= row["difficulty"] <= recipe.difficulty[1]
        if recipe.length_tokens is not None:
            assert recipe.length_tokens[0] <= row["n_tokens"] <= recipe.length_tokens[1]
    if stratify is not None:
        strata = subset.pool["strata"]
        assert sum(s["taken"] for s in strata.values()) == subset.n_samples
        assert sum(s["tokens_taken"] for s in strata.values()) == subset.n_tokens
        assert all(s["taken"] <= s["offered"] for s in strata.values())
        if (
            recipe.tokens is not None
            and shares == "equal"
            and all(s["tokens_offered"] >= recipe.tokens for s in strata.values())
        ):
            assert all(s["tokens_taken"] <= -(-recipe.tokens // len(strata)) for s in strata.values())


def test_the_same_content_under_another_name_has_the_same_hash(catalog: Catalog) -> None:
    assert select(catalog, "one", "rac", seed=3).content_hash == select(catalog, "two", "rac", seed=3).content_hash
    assert ids.content_hash([]) != ids.content_hash([("", [], 0)])

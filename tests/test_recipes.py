"""What recipes ask beyond filters: the ablation grid, windows, strata, exclusion; and files that say what is wrong."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from factories import make_grade, make_problem, make_run, make_source, make_trace, rows_of

from calset.catalog.catalog import Catalog
from calset.catalog.contamination.overlap import Decontaminator
from calset.catalog.records import Sample
from calset.catalog.references import export
from calset.catalog.select import select
from calset.catalog.subsets.candidates import UNNAMED
from calset.catalog.subsets.compare import tables
from calset.catalog.subsets.recipes import RECIPES, get_recipe
from calset.catalog.subsets.take import Candidate, Candidates, take
from calset.errors import InputError

BANDS = {"easy": (0, 1 / 3), "medium": (1 / 3, 2 / 3), "hard": (2 / 3, 1)}
THIRDS = {"short": 0, "moderate": 1, "long": 2}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """72 problems of three sources (36, 24 and 12) x 4 traces; their metadata name a domain, but for one source's.

    Problem n has n % 5 correct of 4 traces, of 10 to 100 tokens behind a prompt of 3.
    """
    catalog = Catalog(tmp_path_factory.mktemp("recipes") / "c.duckdb")
    run = make_run()
    problems = []
    for n in range(72):
        source = ("algebra", "algebra", "algebra", "sums", "sums", "words")[n % 6]
        meta = {} if source == "words" else {"domain": f"d{n % 4}", "a/b~c": "odd", "level": n % 2}
        problems.append(make_problem(n, source, metadata=meta))
    traces, grades = [], []
    for n, problem in enumerate(problems):
        for i in range(4):
            trace = make_trace(problem, run, i, 10 + (n * 31 + i * 17) % 91)
            traces.append(trace)
            grades.append(make_grade(trace, "correct" if i < n % 5 else "incorrect"))
    for source in {p.source for p in problems}:
        catalog.add_source(make_source(source))
    catalog.add_problems(problems)
    catalog.add_run(run)
    catalog.record(traces, grades)
    return catalog


# -- the grid --------------------------------------------------------------------


def test_the_grid_has_each_band_alone_and_each_pair() -> None:
    names = [*BANDS, *THIRDS, *(f"{a}-{b}" for a, b in itertools.product(BANDS, THIRDS))]
    assert len(names) == 15
    for name in names:
        recipe = RECIPES[name]
        assert recipe.correct
        assert recipe.finished
        assert (recipe.difficulty is not None) == (name.split("-")[0] in BANDS)
        assert (recipe.length_quantiles is not None) == (name.split("-")[-1] in THIRDS)


def test_every_difficulty_of_fewer_than_200_traces_is_in_exactly_one_band_of_the_grid() -> None:
    for wrong, k in ((i, n) for n in range(1, 200) for i in range(n + 1)):
        difficulty = wrong / k
        found = [name for name in BANDS if _within(difficulty, RECIPES[name].difficulty)]
        assert len(found) == 1
        third = min(2, int(Fraction(wrong, k) * 3))
        # Thirds, but for a strip of a hundredth and a bit at their edges.
        if all(abs(difficulty - edge) > 0.0134 for edge in (1 / 3, 2 / 3)):
            assert found == [list(BANDS)[third]]


def _within(value: float, band: tuple[float, float] | None) -> bool:
    assert band is not None
    return band[0] <= value <= band[1]


def test_the_lengths_of_the_grid_are_thirds_of_what_the_other_filters_leave() -> None:
    pool = Candidates.of([Candidate(f"s{n}", f"p{n}", 0, True, True, 0.5, 8, n + 1, n + 1) for n in range(100)])
    taken = {name: set(take(pool, RECIPES[f"medium-{name}"], 0).size.tolist()) for name in THIRDS}
    assert taken == {"short": set(range(1, 34)), "moderate": set(range(34, 67)), "long": set(range(67, 101))}


def test_a_cell_of_the_grid_takes_what_it_says(catalog: Catalog) -> None:
    found = rows_of(catalog, select(catalog, "cell", "hard-short"))
    assert found
    assert all(r["correct"] and r["finished"] and r["difficulty"] == 0.75 for r in found)
    everything = select(catalog, "column", "hard")
    longest = select(catalog, "cell", "hard-short").pool["length_band"][1]
    assert {s.sample_id for s in everything.samples if len(s.input_ids) - s.n_prompt_tokens <= longest} == {
        s.sample_id for s in select(catalog, "cell", "hard-short").samples
    }


# -- windows --------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 5, 40, 1000])
def test_windows_are_the_stored_tokens_at_the_place_that_the_id_names(catalog: Catalog, window: int) -> None:
    subset = select(catalog, f"windows{window}", "random", window=window, seed=3)
    stored = {
        trace: ids_of for (trace, _), ids_of in catalog.tokens([(s.trace_id or "", 0) for s in subset.samples]).items()
    }
    cut = 0
    for sample in subset.samples:
        prompt, completion = stored[sample.trace_id or ""]
        whole = prompt + completion
        start, stop = 0, len(whole)
        if len(whole) > window:
            trace, _, place = sample.sample_id.partition(":")
            assert trace == sample.trace_id
            start, stop = map(int, place.split("-"))
            assert stop - start == window
            cut += 1
        else:
            assert sample.sample_id == sample.trace_id
        assert list(sample.input_ids) == whole[start:stop]
        assert sample.n_prompt_tokens == len(range(start, min(stop, len(prompt))))
    assert subset.pool["cut_to_window"] == cut
    assert subset.recipe["window"] == window
    if window == 40:
        starts = {s.sample_id.partition(":")[2] for s in subset.samples if ":" in s.sample_id}
        assert len(starts) > 10
        again = select(catalog, "windows-again", "random", window=window, seed=4)
        assert {s.sample_id for s in again.samples} != {s.sample_id for s in subset.samples}


def test_a_token_budget_counts_windows_and_an_export_gives_them_no_text(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    subset = select(catalog, "budget", "random", window=20, tokens=105)
    assert [len(s.input_ids) for s in subset.samples] == [20] * 5 or subset.n_tokens <= 105
    assert subset.n_tokens > 85
    exported = pq.read_table(export(catalog, subset, tmp_path / "out") / "data" / "train.parquet").to_pylist()
    whole = [row["sample_id"] == row["trace_id"] for row in exported]
    assert [row["text"] is not None for row in exported] == whole
    assert not all(whole)


@pytest.mark.parametrize("kind", ["prompts", "gold"])
def test_windows_are_of_traces_and_texts_only(kind: str) -> None:
    with pytest.raises(InputError, match="window is for recipes of the kind text or trace"):
        RECIPES[kind].with_options(window=8)


# -- strata --------------------------------------------------------------------


def test_equal_and_proportional_shares_of_sources(catalog: Catalog) -> None:
    equal = select(catalog, "equal", "random", stratify="source", samples=30)
    assert Counter(r["source"] for r in rows_of(catalog, equal)) == {"algebra": 10, "sums": 10, "words": 10}
    assert {name: s["taken"] for name, s in equal.pool["strata"].items()} == {"algebra": 10, "sums": 10, "words": 10}
    assert not [w for w in equal.warnings if "shares" in w]
    proportional = select(catalog, "proportional", "random", stratify="source", shares="proportional", samples=30)
    assert Counter(r["source"] for r in rows_of(catalog, proportional)) == {"algebra": 15, "sums": 10, "words": 5}
    smallest = select(catalog, "smallest", "random", stratify="source")
    assert Counter(r["source"] for r in rows_of(catalog, smallest)) == {"algebra": 12, "sums": 12, "words": 12}
    short = select(catalog, "short", "random", stratify="source", samples=60)
    assert Counter(r["source"] for r in rows_of(catalog, short)) == {"algebra": 24, "sums": 24, "words": 12}
    assert [w for w in short.warnings if "shares are not equal: words (12)" in w]
    tokens = select(catalog, "tokens", "random", stratify="source", tokens=900)
    spent = Counter[str]()
    for sample, row in zip(tokens.samples, rows_of(catalog, tokens), strict=True):
        spent[row["source"]] += len(sample.input_ids)
    assert all(300 - 103 < n <= 300 for n in spent.values())
    assert [title for title, *_ in tables(tokens)] == ["", "by source", "difficulty x length: taken / candidates"]


def test_strata_may_be_any_key_of_the_metadata(catalog: Catalog) -> None:
    by_domain = select(catalog, "domain", "random", stratify="domain", samples=50)
    assert {name: s["taken"] for name, s in by_domain.pool["strata"].items()} == {
        UNNAMED: 10, "d0": 10, "d1": 10, "d2": 10, "d3": 10
    }  # fmt: skip
    assert set(select(catalog, "odd", "random", stratify="a/b~c").pool["strata"]) == {UNNAMED, "odd"}
    assert set(select(catalog, "level", "random", stratify="level").pool["strata"]) == {UNNAMED, "0", "1"}
    with pytest.raises(InputError, match=r"no problem has the metadata key 'domian'.*did you mean 'domain'.*level"):
        select(catalog, "none", "random", stratify="domian")


def test_the_order_of_a_subset_does_not_change_with_its_strata(catalog: Catalog) -> None:
    order = [s.sample_id for s in select(catalog, "free", "random").samples]
    stratified = [s.sample_id for s in select(catalog, "strata", "random", stratify="source", samples=30).samples]
    assert stratified == [s for s in order if s in set(stratified)]


# -- exclusion --------------------------------------------------------------------


def test_problems_of_an_evaluation_are_left_out_whatever_their_spelling(catalog: Catalog) -> None:
    held_out = [make_problem(n, "held out", question=f"what is {n}+{n}") for n in (0, 3, 6, 500)]
    exclude = Decontaminator([(make_source("held out"), held_out)])
    subset = select(catalog, "clean", "random", exclude=exclude)
    left_out = {"What is 0 + 0?", "What is 3 + 3?", "What is 6 + 6?"}
    assert left_out.isdisjoint(r["question"] for r in rows_of(catalog, subset))
    assert subset.n_samples == 72 - 3
    assert (subset.pool["traces"], subset.pool["exclude_problems_of"]) == (288, 288 - 12)
    recorded = subset.recipe["exclude_problems_of"]
    (source,) = recorded["sources"]
    assert (source["name"], source["revision"], source["questions"]) == ("held out", "1", 4)
    assert recorded["rule"]["n"] == [8, 13]
    other = Decontaminator([(replace(make_source("held out"), revision="2"), held_out)])
    assert select(catalog, "clean", "random", exclude=other).version == 2  # another question, though the same answer
    assert "exclude_problems_of" not in select(catalog, "unclean", "random").recipe


@pytest.mark.parametrize(("seed", "samples", "by_reference"), [(0, 20, True), (3, 1, False)])
def test_a_split_held_out_from_others_has_none_of_their_problems_and_all_others(
    catalog: Catalog, seed: int, samples: int, by_reference: bool
) -> None:
    first = select(catalog, "first", "random", samples=samples, seed=seed)
    second = select(catalog, "second", "correct", samples=5, seed=seed + 1)
    others = [first.ref, second.ref] if by_reference else [second, first]
    rest = select(catalog, "rest", "random", seed=seed, held_out_from=others)
    taken = {s.problem_id for subset in (first, second) for s in subset.samples}
    assert {s.problem_id for s in rest.samples} == set(_problem_ids(catalog)) - taken
    assert rest.pool["held_out_from"] == 4 * (72 - len(taken))
    recorded = {(o["subset"], o["content_hash"]) for o in rest.recipe["held_out_from"]}
    assert recorded == {(s.ref, s.content_hash) for s in (first, second)}
    again = select(catalog, "rest", "random", seed=seed, held_out_from=[first, second])
    assert (again.version, again.content_hash) == (rest.version, rest.content_hash)
    assert "held_out_from" not in first.recipe


def test_a_text_has_no_problems_to_hold_out(catalog: Catalog, tmp_path: Path) -> None:
    windows = replace(select(catalog, "some", "random", samples=1), samples=[Sample("w", [1, 2], 0, "text")])
    with pytest.raises(InputError, match="some@1 holds no problems"):
        select(catalog, "rest", "random", held_out_from=[windows])
    with pytest.raises(InputError, match="has no problems to exclude"):
        select(catalog, "rest", "text", text=tmp_path / "t.txt", held_out_from=["some"])


def test_when_every_problem_is_excluded_it_says_so(catalog: Catalog) -> None:
    exclude = Decontaminator([(make_source("same"), list(catalog.problems(_problem_ids(catalog)).values()))])
    with pytest.raises(InputError, match=r"filter 'exclude_problems_of' \(traces 288, exclude_problems_of 0"):
        select(catalog, "none", "random", exclude=exclude)


def _problem_ids(catalog: Catalog) -> list[str]:
    return [row["problem_id"] for row in catalog.rows("SELECT problem_id FROM problems")]


# -- what a selection says --------------------------------------------------------------------


def test_a_selection_shows_what_it_took_of_how_many_by_difficulty_and_length(catalog: Catalog) -> None:
    subset = select(catalog, "shown", "ssgr")
    cells = subset.pool["difficulty_length"]
    counted = [cell for row in cells["taken_of"].values() for cell in row]
    assert sum(taken for taken, _ in counted) == subset.n_samples
    assert sum(n for _, n in counted) == 288
    assert all(taken <= n for taken, n in counted)
    for label, i in zip(cells["lengths"], range(4), strict=True):
        low, high = map(int, label.split(".."))
        there = catalog.query(f"SELECT count(*) FROM trace WHERE n_tokens BETWEEN {low} AND {high}").rows[0][0]
        assert sum(row[i][1] for row in cells["taken_of"].values()) == there
    assert (
        sum(n for _, n in cells["taken_of"]["0"])
        == catalog.query("SELECT count(*) FROM trace WHERE difficulty = 0").rows[0][0]
    )


@pytest.mark.parametrize(("recipe", "warned"), [("ssgr", False), ("medium", True), ("hard", True)])
def test_k_is_too_low_when_the_error_is_more_than_half_the_band(catalog: Catalog, recipe: str, warned: bool) -> None:
    # Of 4 traces, 2 wrong: an error of 0.25, against half widths of 0.3 (ssgr) and 0.155; 3 wrong: 0.24 against 0.17.
    warnings = [w for w in select(catalog, f"k-{recipe}", recipe).warnings if "k is too low" in w]
    assert len(warnings) == warned
    if warned:
        assert "standard error of 0.2" in warnings[0]


# -- recipe files --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('base = "ssgr"\n\n# why\ndifficulty = [0.9, 0.1]\n', 4, "difficulty must be two numbers"),
        ('base = "ssgr"\ndificulty = [0.1, 0.9]\n', 2, "unknown option 'dificulty', did you mean 'difficulty'"),
        ('samples = 5\nlength_tokens = [\n  1,\n  # 2\n  "x",\n]\nseed = 1\n', 7, "unknown option 'seed'"),
        ('samples = 5\nlength_tokens = [\n  1,\n  # 2\n  "x",\n]\n', 2, "length_tokens must be"),
        ('\n\nbase = "hard-shrt"', 3, "base must be one of .*did you mean 'hard-short'"),
        ("correct = true\nsamples = 1\ntokens = 2\n", 3, "samples or in tokens"),
        ('name = """\ndifficulty = 3\n"""\nper_problem = 0\n', 4, "per_problem must be"),
        ('kind = "gold"\n"window" = 3\n', 2, "window is for"),
        ('stratify = 3\n', 1, "stratify must be"),
        ('[sub]\nx = 1\n', 1, "unknown option 'sub'"),
        ('correct = true\nshares = "most"\n', 2, "shares must be one of equal, proportional"),
        ("correct = true\nsamples = = 1\n", 2, "not TOML"),
        ("correct = true\ncorrect = false\n", 2, "not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_file_is_answered_with_its_line_and_key(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"my\.toml:{line}: .*{message}") as caught:
        get_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_file_may_use_every_key(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "medium-long"\nwindow = 16\nstratify = "domain"\nshares = "proportional"\nmin_k = 4\ntokens = 160\n'
    )
    subset = select(catalog, "mine", path)
    assert subset.n_tokens <= 160
    expected = {"name": "mine", "window": 16, "stratify": "domain", "shares": "proportional", "tokens": 160}
    assert {key: subset.recipe[key] for key in expected} == expected


def test_a_recipe_without_the_newer_keys_is_the_question_it_was(catalog: Catalog) -> None:
    assert {"stratify", "shares", "min_k"}.isdisjoint(RECIPES["ssgr"].as_dict())
    assert RECIPES["ssgr"].with_options(stratify="source").as_dict()["shares"] == "equal"

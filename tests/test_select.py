"""Selection: what each recipe takes from a real catalog."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import fewer
from factories import fill, make_grade, make_problem, make_run, make_source, make_trace, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calset import bundled, ids
from calset.catalog.catalog import Catalog
from calset.catalog.select import select
from calset.catalog.subsets import recipes
from calset.catalog.subsets.recipes import RECIPES, Recipe, get_recipe
from calset.errors import InputError

SSGR = RECIPES["ssgr"]


@pytest.mark.nightly  # test_select_laws.py has the same law on one catalog and every sort of recipe
@settings(fewer(5), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["correct", "incorrect", "truncated"]), st.integers(1, 30)), max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_select_is_pure_in_content_recipe_and_seed(
    tmp_path_factory: pytest.TempPathFactory, plan: list[list[tuple[str, int]]], seed: int, shuffler: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("pure")
    if not any(plan):
        return
    one = fill(folder / "one.duckdb", plan)
    two = Catalog(folder / "two.duckdb")
    _copy_shuffled(one, two, shuffler)
    for recipe in ("rac", "random"):
        outcomes = []
        for catalog in (one, two):
            try:
                subset = select(catalog, "x", recipe, seed=seed, tokens=40)
                assert subset.n_tokens <= 40
                outcomes.append((subset.content_hash, subset.pool, tuple(subset.warnings)))
            except InputError as error:
                outcomes.append((str(error).replace(str(catalog.path), "catalog"),))
        assert outcomes[0] == outcomes[1]


def _copy_shuffled(one: Catalog, two: Catalog, shuffler: random.Random) -> None:
    """The same content in another order of insertion, in batches of one."""
    for run in one.runs():
        two.add_run(run)
    ids_of = [row["trace_id"] for row in one.rows("SELECT trace_id FROM traces")]
    traces = list(one.load_traces(ids_of).values())
    shuffler.shuffle(traces)
    problems = list(one.problems([t.problem_id for t in traces]).values())
    two.add_problems(problems[::-1])
    verdicts = dict(one.query("SELECT trace_id, verdict FROM trace").rows)
    for start in range(0, len(traces), 3):
        batch = traces[start : start + 3]
        two.record(batch, [make_grade(t, verdicts[t.trace_id]) for t in batch])


# -- recipes on a catalog -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """60 problems x 8 traces; problem n has n % 9 correct traces of 8, the last sample of every third is truncated."""
    plan = []
    for n in range(60):
        samples = [("correct" if i < n % 9 else "incorrect", 10 + (n * 7 + i * 13) % 90) for i in range(8)]
        if n % 3 == 0 and n % 9 < 8:
            samples[7] = ("truncated", 100)
        plan.append(samples)
    return fill(tmp_path_factory.mktemp("catalog") / "c.duckdb", plan)


def test_ssgr_takes_correct_finished_moderately_long_traces_harder_first(catalog: Catalog) -> None:
    subset = select(catalog, "ssgr")
    rows = rows_of(catalog, subset)
    assert all(r["correct"] and r["finished"] and 0.2 <= r["difficulty"] <= 0.8 for r in rows)
    passed = "correct AND finished AND difficulty BETWEEN 0.2 AND 0.8"
    pool = catalog.query(f"SELECT n_tokens, problem_id FROM trace WHERE {passed} ORDER BY 1").rows
    low, high = pool[-(-len(pool) // 4) - 1][0], pool[-(-3 * len(pool) // 4) - 1][0]
    assert subset.pool["length_band"] == [low, high]
    assert {r["problem_id"] for r in rows} == {p for n, p in pool if low <= n <= high}
    assert len({r["problem_id"] for r in rows}) == len(rows)
    difficulties = [r["difficulty"] for r in rows]
    assert difficulties == sorted(difficulties, reverse=True)
    assert subset.pool["difficulty"] == len(pool)
    assert (subset.model, subset.recipe["name"], subset.seed) == ("tiny", "ssgr", 0)


def test_ssgr_samples_hold_the_stored_tokens(catalog: Catalog) -> None:
    for sample in select(catalog, "tokens", samples=3).samples:
        assert sample.trace_id is not None
        row = catalog.trace(sample.trace_id)
        assert list(sample.input_ids) == row["prompt_ids"] + row["completion_ids"]
        assert sample.n_prompt_tokens == len(row["prompt_ids"])


def test_rac_takes_every_trace_as_it_came(catalog: Catalog) -> None:
    subset = select(catalog, "rac", "rac")
    assert subset.n_samples == 480
    assert subset.recipe["tokens"] == 1_000_000
    assert any("too small" in warning for warning in subset.warnings)
    small = select(catalog, "rac", "rac", tokens=1000)
    assert 1000 - 13 < small.n_tokens <= 1000  # the smallest sample has 13 tokens
    assert [s.sample_id for s in small.samples] != sorted(s.sample_id for s in small.samples)
    assert not small.warnings


def test_correct_and_random_take_finished_traces_one_a_problem(catalog: Catalog) -> None:
    right = rows_of(catalog, select(catalog, "correct", "correct"))
    assert all(r["correct"] and r["finished"] for r in right)
    assert len(right) == len({r["problem_id"] for r in right}) == 53  # n % 9 == 0 has none
    anyone = rows_of(catalog, select(catalog, "random", "random"))
    assert all(r["finished"] for r in anyone)
    assert len(anyone) == 60
    assert len(rows_of(catalog, select(catalog, "more", "random", per_problem=3))) == 180


def test_prompts_take_each_prompt_once(catalog: Catalog) -> None:
    subset = select(catalog, "prompts", "prompts", samples=10)
    assert [(list(s.input_ids), s.n_prompt_tokens, s.kind, s.trace_id) for s in subset.samples] == [
        ([1, 2, 3], 3, "prompt", None)
    ] * 10
    assert len({s.problem_id for s in subset.samples}) == 10
    assert select(catalog, "prompts", "prompts", tokens=20).n_tokens == 18


def test_the_content_hash_is_the_same_on_any_machine_and_duckdb(catalog: Catalog) -> None:
    # Golden values, equal on DuckDB 1.5.6 and 2.0.0: a change here breaks the promise that a recipe can be run again.
    assert select(catalog, "golden-ssgr", tokens=1500, seed=7).content_hash == GOLDEN_SSGR
    assert select(catalog, "golden-rac", "rac", tokens=1500, seed=7).content_hash == GOLDEN_RAC


GOLDEN_SSGR = "0e8433ff691f9046b3228addaa0f3965774b65f948d4e5c6573cdcdacb3f94ae"
GOLDEN_RAC = "f5b75495a9c8066c9eaf8b40594159b09de7803b12e0f14678c53bf9959a0f12"


def test_the_same_question_gives_the_same_version_another_a_new_one(catalog: Catalog) -> None:
    first = select(catalog, "versions", samples=4)
    again = select(catalog, "versions", samples=4)
    assert (first.ref, again.ref, again.content_hash) == ("versions@1", "versions@1", first.content_hash)
    assert again.samples == first.samples
    other = select(catalog, "versions", samples=4, seed=1)
    assert other.ref == "versions@2"
    assert select(catalog, "versions", samples=4).ref == "versions@3"


def test_where_narrows_the_candidates_not_the_difficulties(catalog: Catalog) -> None:
    subset = select(catalog, "where", "random", where="n_tokens > 50 AND source = 'demo' -- long ones")
    rows = rows_of(catalog, subset)
    assert rows
    assert all(r["n_tokens"] > 50 and r["k"] == 8 for r in rows)
    assert subset.recipe["where"].startswith("n_tokens > 50")
    assert subset.pool["where"] == catalog.query("SELECT count(*) FROM trace WHERE n_tokens > 50").rows[0][0]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Six traces: conditions are read the same over any number."""
    return fill(tmp_path_factory.mktemp("few") / "c.duckdb", [[("correct", 40), ("incorrect", 90)]] * 3)


@pytest.mark.parametrize(
    "where",
    [
        "", "nope = 1", "true; DROP TABLE traces", "true) UNION ALL (SELECT problem_id FROM problems",
        "true ORDER BY 1", "'open", "(SELECT count(*) FROM read_text('/etc/passwd')) > 0", "random() < 0.5",
        "created_at < now()",
        "'\ud800'", "current_date > created_at", "1 = 1) OR (1 = 1",
    ],
)  # fmt: skip
def test_a_bad_condition_is_one_clear_line(few: Catalog, where: str) -> None:
    with pytest.raises(InputError, match="--where") as caught:
        select(few, "bad", "random", where=where)
    assert "\n" not in str(caught.value)


def _window(condition: str) -> str:
    return f"trace_id IN (SELECT trace_id FROM trace QUALIFY {condition})"


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("created_at < now()::TIMESTAMP", r"now \(write the value itself\)"),
        ('"Now"() > created_at', "now"),
        ("created_at < ago(INTERVAL 1 DAY)", "ago"),
        ('created_at::TIME < "localtime"', "localtime"),
        ("created_at < current_timestamp::TIMESTAMP", "current_timestamp"),
        ("trace_id > main.uuidv4()::VARCHAR", "uuidv4"),
        ("length('it''s') > random/* */()", "random"),
        ("(SELECT count(*) FROM query('SELECT random()')) > 0", "query"),
        ("n_tokens > (SELECT count(*) FROM duckdb_memory())", "duckdb_memory"),
        (
            "trace_id IN (SELECT any_value(trace_id) FROM trace GROUP BY problem_id)",
            r"any_value over rows in no order \(write ORDER BY inside its parentheses\)",
        ),
        ("trace_id = (SELECT arg_max(trace_id, k) FROM trace)", "arg_max"),
        ("trace_id = (SELECT list(trace_id)[1] FROM trace)", "list"),
        ("'4' IN (SELECT json_group_array(k)::VARCHAR FROM trace)", "json_group_array"),
        (_window("row_number() OVER () < 9"), r"row_number over rows in no order \(write ORDER BY inside OVER\)"),
        (_window("lag(k) OVER (PARTITION BY model) > 1"), "lag"),
        (_window("first_value(trace_id) OVER () = trace_id"), "first"),
        (_window("list(k) OVER () = [1]"), "list"),
        (_window("sum(k) OVER (ROWS UNBOUNDED PRECEDING) < 9"), "sum"),
    ],
)
def test_a_condition_that_changes_or_depends_on_the_order_of_rows_is_refused(
    few: Catalog, where: str, named: str
) -> None:
    with pytest.raises(InputError, match=rf"--where may not use {named}.*: a selection must be the same") as caught:
        select(few, "bad", "random", where=where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "where",
    [
        "question NOT LIKE '%random() limit sample now() localtime%'",
        "question <> $$age(now()) LIMIT 5$$ -- LIMIT 5, random()",
        "text NOT IN ('using sample', 'it''s now()')",
        "n_tokens > (SELECT min(n_tokens) FROM trace) OR source = 'demo'",
        _window("rank() OVER (PARTITION BY model ORDER BY trace_id) < 9"),
        _window("row_number() OVER (PARTITION BY model ORDER BY trace_id) < 9"),
        _window("lag(n_tokens, 1, 0) OVER (ORDER BY trace_id ROWS UNBOUNDED PRECEDING) < 900"),
        _window("n_tokens <= median(n_tokens) OVER (PARTITION BY problem_id)"),
        _window("sum(n_tokens) OVER (PARTITION BY problem_id ORDER BY sample_index) < 900"),
        "trace_id IN (SELECT first(trace_id ORDER BY trace_id) FROM trace GROUP BY problem_id)",
        "n_tokens > (SELECT avg(t.n_tokens) FROM trace t)",
        "difficulty <= (SELECT avg(difficulty) FROM trace)",
        "n_tokens + 1 > 2 AND n_tokens - 1 >= 0 AND created_at + INTERVAL 1 DAY > created_at",
        "(SELECT count(*) FROM json_each('[1]')) + (SELECT count(*) FROM range(2)) + (SELECT unnest([1])) = 4",
        " OR ".join(f"n_tokens = {n}" for n in range(400)),
    ],
)
def test_a_condition_may_speak_of_what_it_may_not_use(few: Catalog, where: str) -> None:
    assert select(few, "good", "random", where=where).n_samples > 0


def test_a_condition_rests_on_what_calset_keeps_and_not_on_views_and_macros_of_ones_own(tmp_path: Path) -> None:
    """A view may hold a LIMIT, a macro may draw a number; neither comes along when catalogs are merged."""
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 4), ("correct", 9)]] * 3)
    with duckdb.connect(str(catalog.path)) as con:
        con.execute("CREATE VIEW few AS SELECT trace_id FROM trace LIMIT 2; CREATE TABLE chosen AS FROM few")
        con.execute("CREATE MACRO draw() AS random(); CREATE MACRO twice(x) AS 2 * x")
    for where, named in (
        ("trace_id IN (FROM Few)", "the view few"),
        ("draw() < 0.5", "the macro draw"),
        ("twice(n_tokens) < 10", "the macro twice"),
    ):
        with pytest.raises(InputError, match=f"--where may not use {named}"):
            select(catalog, "bad", "random", where=where)
    assert select(catalog, "good", "rac", where="trace_id IN (FROM chosen)").n_samples == 2


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "1", None, True])
def test_a_seed_that_the_catalog_could_not_keep_as_it_is_is_refused(catalog: Catalog, seed: Any) -> None:
    with pytest.raises(InputError, match="seed must be a whole number of at most 63 bits"):
        select(catalog, "bad", "random", seed=seed)


def test_an_empty_selection_says_where_the_candidates_went(catalog: Catalog) -> None:
    with pytest.raises(InputError, match=r"filter 'length' \(traces 480.*difficulty \d+, length 0"):
        select(catalog, "none", length_tokens=(5000, 6000))
    with pytest.raises(InputError, match=r"no trace .*meets --where"):
        select(catalog, "none", where="n_tokens > 5000")
    with pytest.raises(InputError, match="no build traces of nobody"):
        select(catalog, "none", model="nobody")
    with pytest.raises(InputError, match="smallest candidate has"):
        select(catalog, "none", tokens=2)
    assert catalog.query("SELECT count(*) FROM subsets WHERE name = 'none'").rows == [(0,)]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", ".hidden", "-x", "a@1", "ü", "x" * 65, "a b", "a\n"])
def test_bad_names_are_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a subset"):
        select(catalog, name)


def test_two_models_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    problem = make_problem()
    catalog = Catalog(path)
    catalog.add_problems([problem])
    for run in (make_run("a"), make_run("a", revision="r2"), make_run("b")):
        catalog.add_run(run)
        catalog.add_traces([make_trace(problem, run)])
    with pytest.raises(InputError, match=r"3 models: a@r1 .*a@r2 .*b@r1 .*pass --model"):
        select(catalog, "x", "random")
    with pytest.raises(InputError, match="2 models"):
        select(catalog, "x", "random", model="a")
    subset = select(catalog, "x", "random", model="a@r2")
    assert (subset.model, subset.model_revision) == ("a", "r2")


def test_evaluation_traces_are_never_candidates(tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    fill(path, [[("correct", 5)]] * 3)
    catalog = fill(path, [[("correct", 6)]] * 3, kind="evaluate")
    assert select(catalog, "x", "rac").n_samples == 3


def test_min_k_leaves_out_problems_with_fewer_judged_traces(tmp_path: Path) -> None:
    whole = [("correct", 10)] * 2 + [("incorrect", 10)] * 2
    catalog = fill(tmp_path / "c.duckdb", [whole, [("correct", 10), ("incorrect", 10)], [*whole[:3], ("timeout", 10)]])
    every = Recipe("every", per_problem=None)
    assert select(catalog, "all", every).n_samples == 10
    subset = select(catalog, "whole", every, min_k=4)
    assert {row["k"] for row in rows_of(catalog, subset)} == {4}
    assert (subset.n_samples, subset.pool["min_k"], subset.pool["median_k"]) == (4, 4, 4.0)
    assert subset.recipe["min_k"] == 4
    with pytest.raises(InputError, match=r"filter 'min_k' \(traces 10, candidates 10, min_k 0"):
        select(catalog, "none", every, min_k=5)


def test_a_recipe_without_min_k_is_the_question_it_was_before_there_was_one() -> None:
    assert "min_k" not in SSGR.as_dict()
    assert SSGR.with_options(min_k=8).as_dict()["min_k"] == 8


def test_superseded_and_ungraded_traces(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("truncated", 5), ("ungraded", 7)]])
    first = catalog.rows("SELECT trace_id FROM trace WHERE n_tokens = 5")[0]["trace_id"]
    old = catalog.load_traces([first])[first]
    catalog.add_traces([replace(old, attempt=1, completion_ids=(9,) * 12, finish_reason="stop")])
    subset = select(catalog, "x", "rac")
    assert sorted(len(s.input_ids) for s in subset.samples) == [10, 15]
    with pytest.raises(InputError, match="'correct'"):
        select(catalog, "y", "correct")


def test_warnings_for_a_poor_pool(tmp_path: Path) -> None:
    plan = [[("correct", 5), ("incorrect", 6)]] * 2 + [[("truncated", 9), ("truncated", 9)]] * 3
    catalog = fill(tmp_path / "c.duckdb", plan)
    warnings = " | ".join(select(catalog, "x", length_quantiles=None, samples=5).warnings)
    assert "2 samples where 5 were asked" in warnings
    assert "standard error" in warnings
    assert "60% of the traces did not finish" in warnings
    # max_tokens is not part of the generation key: the same catalog would keep its truncated traces.
    assert "with a larger --max-tokens and --retry truncated" in warnings


# -- recipes as data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"difficulty": (0.8, 0.2)}, {"difficulty": (-0.1, 0.5)}, {"difficulty": (0, 1.5)}, {"difficulty": 0.5},
        {"difficulty": (0.1, float("nan"))}, {"length_quantiles": (0.5, 2)}, {"length_tokens": (5, 1)},
        {"length_tokens": (0.5, 9)}, {"samples": 0}, {"tokens": -1}, {"samples": True}, {"tokens": 1.5},
        {"samples": 3, "tokens": 5}, {"length_tokens": (1, 2), "length_quantiles": (0.1, 0.2)}, {"order": "easier"},
        {"kind": "image"}, {"correct": "yes"}, {"per_problem": 0}, {"min_k": 0}, {"windows": 5}, {"name": ""},
    ],
)  # fmt: skip
def test_bad_options_name_the_key(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        SSGR.with_options(**options)
    assert next(iter(options)) in str(caught.value) or "budget" in str(caught.value)


def test_an_option_of_one_sort_replaces_the_default_of_the_other() -> None:
    assert SSGR.with_options(length_tokens=(2000.0, 8000.0)).length_tokens == (2000, 8000)
    assert SSGR.with_options(length_tokens=(1, 2)).length_quantiles is None
    assert RECIPES["rac"].with_options(samples=5).tokens is None


def test_a_recipe_file_is_read_over_its_base(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "ssgr"\ndifficulty = [0.5, 1]\nlength_tokens = [10, 60]\nsamples = 3\n')
    recipe = get_recipe(path)
    assert recipe == replace(
        SSGR, name="mine", difficulty=(0.5, 1), length_tokens=(10, 60), length_quantiles=None, samples=3
    )
    assert select(catalog, "mine", path).recipe["name"] == "mine"
    path.write_text('kind = "text"\n')
    assert recipes.read_recipe(path).window == 2048


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("difficulty = [0.9, 0.1]", "difficulty must be"),
        ("dificulty = [0.1, 0.9]", "unknown option 'dificulty'"),
        ('base = "sgsr"', "base must be one of"),
        ("samples = = 1", "not TOML.*line 1"),
        ("samples = 1\ntokens = 2", "samples or in tokens"),
        ("name = 3", "name must be"),
        ('base = ["ssgr"]', r"base must be one of .*not \['ssgr'\]"),
        ("base = {ssgr = 1}", "base must be one of"),
    ],
)
def test_a_bad_recipe_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"bad\.toml.*{message}"):
        get_recipe(path)


def test_an_unknown_recipe_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe 'sgsr': there are ssgr, rac"):
        get_recipe("sgsr")
    for name in (str(tmp_path / "missing.toml"), "x" * 300 + ".toml", "nul\0.toml"):
        with pytest.raises(InputError, match="cannot read the recipe") as caught:
            get_recipe(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte", "two\nlines"])
def test_a_text_that_can_be_no_path_is_no_recipe_and_no_model(catalog: Catalog, name: str) -> None:
    with pytest.raises(InputError, match="no recipe") as caught:
        get_recipe(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no build traces of"):
        select(catalog, "x", "rac", model=name)


# -- recipes that tokenise ------------------------------------------------------------------------------------------


def tokenised(path: Path, tokenizer: Any, model: str | None = None) -> Catalog:
    """A catalog whose run names a real model folder."""
    catalog = Catalog(path)
    run = make_run(model or str(bundled.MODEL), tokenizer_hash=ids.vocabulary_hash(tokenizer.get_vocab()))
    problems = [make_problem(1), make_problem(2, metadata={"solution": "2 + 2 makes 4"})]
    catalog.add_source(make_source())
    catalog.add_problems(problems)
    catalog.add_run(run)
    catalog.add_traces([make_trace(p, run, i) for p in problems for i in range(2)])
    return catalog


def test_gold_takes_prompt_and_reference_solution(tmp_path: Path, tokenizer: Any) -> None:
    subset = select(tokenised(tmp_path / "c.duckdb", tokenizer), "gold", "gold")
    texts = {tokenizer.decode(s.input_ids[s.n_prompt_tokens : -1]) for s in subset.samples}
    assert texts == {"2", "2 + 2 makes 4"}
    assert all(s.input_ids[-1] == tokenizer.eos_token_id for s in subset.samples)
    assert all((list(s.input_ids[:3]), s.n_prompt_tokens, s.kind) == ([1, 2, 3], 3, "gold") for s in subset.samples)


def test_gold_leaves_out_what_only_a_scorer_can_judge(tmp_path: Path, tokenizer: Any) -> None:
    catalog = tokenised(tmp_path / "c.duckdb", tokenizer)
    run = catalog.runs()[0]
    bare, worked = make_problem(3, answer=""), make_problem(4, answer="", metadata={"solution": "4 + 4 makes 8"})
    catalog.add_problems([bare, worked])
    catalog.add_traces([make_trace(problem, run, 0) for problem in (bare, worked)])
    subset = select(catalog, "gold", "gold")
    texts = {tokenizer.decode(s.input_ids[s.n_prompt_tokens : -1]) for s in subset.samples}
    assert texts == {"2", "2 + 2 makes 4", "4 + 4 makes 8"}
    assert len(select(catalog, "prompts", "prompts").samples) == 4


def test_text_takes_windows_of_a_file(tmp_path: Path, tokenizer: Any) -> None:
    catalog = tokenised(tmp_path / "c.duckdb", tokenizer)
    text = tmp_path / "prose.txt"
    text.write_text("It was a bright cold day. " * 40)
    whole = tokenizer.encode(text.read_text(), add_special_tokens=False)
    subset = select(catalog, "text", "text", text=text, window=32, tokens=200)
    assert [len(s.input_ids) for s in subset.samples] == [32] * 6
    windows = [whole[i : i + 32] for i in range(0, len(whole) - 31, 32)]
    assert all(list(s.input_ids) in windows for s in subset.samples)
    assert subset.recipe["text"] == {"file": "prose.txt", "sha256": ids.text_hash(text.read_text())}
    assert subset.n_samples == len({s.sample_id for s in subset.samples})
    assert select(catalog, "text", "text", text=text, window=32, tokens=200, seed=1).version == 2
    ordered = select(catalog, "ordered", "text", text=text, window=32, order="catalog")
    assert [list(s.input_ids) for s in ordered.samples] == windows


def test_text_and_gold_say_what_is_missing(tmp_path: Path, tokenizer: Any) -> None:
    catalog = tokenised(tmp_path / "c.duckdb", tokenizer)
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\xff")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"text": None}, "pass --text"),
        ({"text": tmp_path / "missing.txt"}, "cannot read the text"),
        ({"text": short, "window": 512}, "less than one window of 512"),
        ({"text": short, "window": 4, "tokens": 3}, "more than the budget"),
        ({"text": binary}, "binary is not UTF-8 text"),
        ({"text": short, "where": "true"}, "windows of a text"),
        ({"text": short, "model": "other"}, "no build run of other"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            select(catalog, "x", "text", **options)
    with pytest.raises(InputError, match="takes no text file"):
        select(catalog, "x", "rac", text=short)
    gone = tokenised(tmp_path / "gone.duckdb", tokenizer, model=str(tmp_path / "no-model"))
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        select(gone, "x", "gold")
    other = fill(tmp_path / "other.duckdb", [[("correct", 3)]], model=str(bundled.MODEL))
    with pytest.raises(InputError, match="no longer the one"):
        select(other, "x", "gold")

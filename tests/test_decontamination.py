"""Decontamination: what is caught, what is not, what is kept of it, and that a selection can leave it out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from factories import make_grade, make_problem, make_run, make_source, make_trace
from hypothesis import given
from hypothesis import strategies as st
from warm import calset

from calset import Catalog, InputError, decontaminate, select
from calset.builder.problems import load_problems
from calset.catalog.contamination.overlap import Decontaminator, OverlapRule, clean
from calset.catalog.contamination.words import normalise
from calset.catalog.records import Contamination, Problem, Source

GSM = (
    "A baker sells 14 trays of rolls every morning and 9 trays every evening. Each tray holds 24 rolls and each roll "
    "costs 0.75 dollars. How much money does the baker make in a week?"
)
NAMES = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "rho",
    "sigma",
    "tau",
    "phi",
    "chi",
]


def asked(question: str, row: int | str = 0, source: str = "train") -> Problem:
    return make_problem(0, source, problem_id=f"{source}-{row}", source_row=str(row), question=question)


def evaluation(questions: Sequence[str], name: str = "held-out") -> tuple[Source, list[Problem]]:
    return make_source(name), [asked(question, row, name) for row, question in enumerate(questions)]


def found(question: str, questions: Sequence[str], *n: int, **options: float) -> list[Contamination]:
    return Decontaminator([evaluation(questions)], n or (8, 13), **options).check(asked(question))


def facts(evidence: Sequence[Contamination]) -> list[tuple[object, ...]]:
    """All but when it was found."""
    return [(c.evaluation_source, c.evaluation_row, c.n, c.n_shared, c.share, c.evidence) for c in evidence]


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Let $f(x) = 2x + 3$.", "let f(x)=2x+3"),
        (r"Find \frac{1}{2} of \left( x^{2} \right)", r"find $\dfrac12$ of (x^2)"),
        (r"What is $3 \times 4 \cdot 5$?", "What is 3 * 4 × 5"),
        ("It costs 1,000 dollars", "it costs $1000$ dollars"),
        (r"x \leq 5, y \ne 2", "x ≤ 5 y ≠ 2"),
        ("Area: x² m", "area x^2 m"),
        ("A well-known trick", "a well known trick"),
        ("Tom — a boy's dog", "Tom, a boys dog"),
        ("- one\n- two", "* One\n* Two"),
        ("**Note** it", "note it!"),
        (r"\text{The end} of it", "the end of it"),
        ("２ ＋ ２ ＝ ４".replace("＋", "+").replace("＝", "="), "2+2=4"),
    ],
)
def test_one_question_written_in_two_ways_has_the_same_words(one: str, other: str) -> None:
    assert normalise(one).words == normalise(other).words


@pytest.mark.parametrize(
    ("one", "other"), [("3 + 4", "3 - 4"), ("x^2", "x2"), ("5 < 6", "5 > 6"), ("1.5 m", "15 m"), ("x - y", "x y")]
)
def test_what_changes_the_meaning_changes_the_words(one: str, other: str) -> None:
    assert normalise(one).words != normalise(other).words


def test_a_formula_is_one_word_and_a_character_of_chinese_is_one() -> None:
    assert normalise("solve 1 + 2 - 3 = now").words == ("solve", "1+2-3=now")
    assert normalise("求 x 的值").words == ("求", "x", "的", "值")


@given(st.text())
def test_words_stand_where_their_spans_say(text: str) -> None:
    words, spans = normalise(text)
    assert len(words) == len(spans)
    assert bool(words) == bool(text.strip())
    ends = [at for span in spans for at in span]
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert ends == sorted(ends)


# --- what is caught ----------------------------------------------------------------------------------------------

WORD = st.text("abcdefghijklmnopqrstuvwxyzäéжλ", min_size=1, max_size=7)
MARKS = st.sampled_from([" ", "  ", "\n", ", ", ". ", "! ", '" ', " (", ") ", "; "])


@given(st.lists(WORD, min_size=1, max_size=30), st.data())
def test_an_identical_question_is_caught_whatever_its_case_and_punctuation(
    words: list[str], data: st.DataObject
) -> None:
    written = ""
    for word in words:
        cased = word if data.draw(st.booleans()) else word.upper()
        written += cased + data.draw(MARKS)
    evidence = found(written, ["something else entirely", " ".join(words)])
    assert [c.evaluation_row for c in evidence] == ["1"] * len(evidence)
    assert evidence[0].share == 1.0


@given(st.text(min_size=1))
def test_any_text_is_caught_against_itself(text: str) -> None:
    evidence = found(text, ["something else entirely", text])
    assert bool(evidence) == bool(text.strip())


@given(st.text("0123456789 .,+-*/()$\\{}^_abcxyzABC=", min_size=1, max_size=60))
def test_any_formula_is_caught_against_itself_among_a_hundred_of_its_kind(text: str) -> None:
    """Its grams are all template there; being the same question still counts."""
    family = [f"{text} variant {i}" for i in range(100)]
    assert bool(found(text, [*family, text])) == bool(text.strip())


@given(
    st.lists(st.sampled_from(NAMES[:10]), min_size=1, max_size=40),
    st.lists(st.lists(st.sampled_from(NAMES[10:]), min_size=1, max_size=40), min_size=1, max_size=5),
)
def test_disjoint_vocabularies_are_never_contaminated(mine: list[str], theirs: list[list[str]]) -> None:
    assert not found(" ".join(mine), [" ".join(words) for words in theirs], 2, 3)


SHORT_TEXTS = st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(" ".join)


@given(SHORT_TEXTS, SHORT_TEXTS)
def test_the_counts_are_the_same_seen_from_either_side(one: str, other: str) -> None:
    there = found(one, [other], 2, 3, min_share=1e-9)
    back = found(other, [one], 2, 3, min_share=1e-9)
    assert [(c.n, c.n_shared, c.share) for c in there] == [(c.n, c.n_shared, c.share) for c in back]


@given(SHORT_TEXTS, SHORT_TEXTS)
def test_the_counts_are_those_of_sets_of_grams(one: str, other: str) -> None:
    """Against a count by hand, templates being impossible with one question."""

    def grams(text: str, n: int) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    want = {n: len(grams(one, n) & grams(other, n)) for n in (2, 3)}
    got = {c.n: (c.n_shared, c.share) for c in found(one, [other], 2, 3, min_share=1e-9)}
    if one != other:
        sizes = {n: min(len(grams(one, n)), len(grams(other, n))) for n in want}
        assert got == {n: (k, k / sizes[n]) for n, k in want.items() if k}


@given(st.lists(st.lists(SHORT_TEXTS, max_size=5), min_size=1, max_size=4), SHORT_TEXTS, st.randoms())
def test_the_order_of_the_sources_does_not_matter(listed: list[list[str]], question: str, rng: random.Random) -> None:
    sources = [evaluation([*questions, "x"], f"source-{i}") for i, questions in enumerate(listed)]
    shuffled = [*sources, sources[0]]
    rng.shuffle(shuffled)
    one = Decontaminator(sources, (2, 3)).check(asked(question))
    assert facts(one) == facts(Decontaminator(shuffled, (2, 3)).check(asked(question)))


def test_a_question_with_another_end_is_caught_with_the_shared_words_as_written() -> None:
    changed = GSM.replace("How much money does the baker make in a week?", "How many rolls are sold in a year?")
    evidence = found("Read this. " + changed.upper(), ["What is 2 + 2?", GSM])
    assert [(c.evaluation_row, c.n) for c in evidence] == [("1", 8), ("1", 13)]
    assert evidence[0].evidence.startswith("A BAKER SELLS 14 TRAYS")
    assert evidence[0].evidence.endswith("0.75 DOLLARS. HOW")
    assert all(0 < c.share < 1 for c in evidence)


def test_a_question_inside_a_long_text_is_caught() -> None:
    filler = " ".join(f"word{i}" for i in range(400))
    assert found(f"{filler}. {GSM} {filler}", [GSM])


def test_one_subject_in_other_words_is_not_caught() -> None:
    assert not found(
        "Each morning a bakery makes 30 trays of rolls with 20 rolls on each tray. It sells a roll for 0.75 dollars. "
        "How much does it earn when 45 rolls stay unsold?",
        [GSM],
    )


def test_a_short_question_counts_only_as_a_whole() -> None:
    short = "What is the capital of France?"
    assert facts(found("what is the capital of FRANCE", [short])) == [
        ("held-out", "0", 6, 1, 1.0, "what is the capital of FRANCE")
    ]
    assert not found("What is the capital of Spain?", [short])
    assert not found(f"{short} Answer in one word and nothing else, please", [short])


def test_eight_words_count_by_their_share_and_thirteen_at_once() -> None:
    theirs = " ".join(NAMES)  # 20 words: 13 grams of 8, 8 of 13
    half = " ".join([*NAMES[:14], "one", "two", "three", "four", "five", "six"])  # 7 of its 13 grams
    assert {(c.n, c.n_shared) for c in found(half, [theirs])} == {(8, 7), (13, 2)}
    few = " ".join([*NAMES[:12], "one", "two", "three", "four", "five", "six", "seven", "eight"])  # 5 of 13
    assert not found(few, [theirs])
    assert found(few, [theirs], min_share=5 / 13)
    assert found(few, [theirs], 8)  # open-r1's rule: any shared 8-gram


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "size", "at_most"),
    # Measured with these draws; the bound leaves a little room for another reasoning-gym.
    [
        ("chain_sum", 500, 0.0),
        ("chain_sum", 30, 0.0),
        ("leg_counting", 500, 0.0),
        ("countdown", 60, 0.02),
        ("lcm", 500, 0.0),
        ("family_relationships", 500, 0.02),
        ("letter_counting", 500, 0.05),
    ],
)
def test_another_draw_of_a_templated_task_is_not_thrown_out(task: str, size: int, at_most: float) -> None:
    held_out = load_problems(f"gym:{task}?size={size}&seed=900000")
    _, fresh = load_problems(f"gym:{task}?size=200&seed=0")
    decontaminator = Decontaminator([held_out])
    same = {normalise(problem.question).words for problem in held_out[1]}
    others = [problem for problem in fresh if normalise(problem.question).words not in same]
    twins = [problem for problem in fresh if normalise(problem.question).words in same]
    assert sum(bool(decontaminator.check(problem)) for problem in others) <= at_most * len(others)
    assert all(decontaminator.check(problem) for problem in twins)


def test_without_the_template_rule_every_draw_would_be_thrown_out() -> None:
    held_out = load_problems("gym:leg_counting?size=50&seed=900000")
    _, fresh = load_problems("gym:leg_counting?size=50&seed=0")
    strict = Decontaminator([held_out], template_share=1.0)
    assert all(strict.check(problem) for problem in fresh)


def test_a_phrase_of_contest_papers_is_template_and_a_copied_question_is_not() -> None:
    tail = "The answer can be written as m/n where m and n are relatively prime positive integers. Find m + n."
    rng = random.Random(0)
    bodies = [" ".join(rng.choices([f"w{i}" for i in range(400)], k=30)) for _ in range(30)]
    held_out = [f"{body}. {tail}" if i < 4 else body for i, body in enumerate(bodies)]
    assert not found(f"A new body that nobody has seen before. {tail}", held_out)
    assert found(f"{bodies[2]}. Another end.", held_out)
    assert found(held_out[1].upper(), held_out)


def test_a_question_that_a_source_repeats_is_no_template() -> None:
    assert found(GSM.replace("week", "month"), [GSM] * 50)


# --- rules and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"n": ()}, {"n": (1,)}, {"n": (8, True)}, {"min_share": 0}, {"template_share": -1}])
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, object]) -> None:
    with pytest.raises(InputError):
        OverlapRule(**rule)  # type: ignore[arg-type]


def test_an_evaluation_without_questions_is_refused() -> None:
    with pytest.raises(InputError, match="no evaluation questions"):
        Decontaminator([evaluation([])])


def test_clean_takes_one_problem_at_a_time() -> None:
    taken: list[str] = []

    def stream():
        for i, question in enumerate([GSM, "What is 2 + 2?"]):
            taken.append(question)
            yield asked(question, i)

    pairs = clean(stream(), Decontaminator([evaluation([GSM])]))
    problem, evidence = next(pairs)
    assert (problem.question, bool(evidence), len(taken)) == (GSM, True, 1)
    assert [bool(evidence) for _, evidence in pairs] == [False]


# --- the catalog -------------------------------------------------------------------------------------------------


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"question": "what is 3+3", "answer": "6"}) + "\n")
    return str(path)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Problems "What is n + n?" for n below 6 with two calibration traces each."""
    catalog = Catalog(tmp_path / "c.duckdb")
    problems, run = [make_problem(n) for n in range(6)], make_run()
    traces = [make_trace(problem, run, i) for problem in problems for i in range(2)]
    catalog.add_source(make_source())
    catalog.add_problems(problems)
    catalog.add_run(run)
    catalog.record(traces, [make_grade(trace) for trace in traces])
    return catalog


def test_the_evidence_is_kept_and_a_selection_leaves_it_out(catalog: Catalog, held_out: str) -> None:
    everything = select(catalog, "all", "random", per_problem=2)
    report = decontaminate(catalog, held_out)
    assert (report.n_evaluation, report.n_checked, report.n_contaminated, report.n_traces) == (1, 6, 1, 2)
    assert report.by_source == {"held_out.jsonl": 1}
    (row,) = catalog.query("SELECT * FROM excluded").as_dicts()
    assert (row["question"], row["evaluation_source"], row["evidence"]) == (
        "What is 3 + 3?",
        "held_out.jsonl",
        "What is 3 + 3",
    )
    where = "problem_id NOT IN (SELECT problem_id FROM excluded)"
    left = select(catalog, "clean", "random", per_problem=2, where=where)
    assert {s.problem_id for s in everything.samples} - {s.problem_id for s in left.samples} == {row["problem_id"]}
    assert left.n_samples == 10


def test_checking_twice_keeps_the_evidence_once(catalog: Catalog, held_out: str) -> None:
    first, second = decontaminate(catalog, held_out), decontaminate(catalog, held_out)
    assert first.n_contaminated == second.n_contaminated == 1
    assert catalog.query("SELECT count(*) FROM excluded").rows == [(1,)]


def test_problems_kept_by_an_evaluation_are_no_finding_but_calibration_traces_of_them_are(
    catalog: Catalog, held_out: str
) -> None:
    source, (problem,) = load_problems(held_out)
    catalog.add_source(source)
    catalog.add_problems([problem])
    evaluated = make_run(kind="evaluate")
    catalog.add_run(evaluated)
    catalog.add_traces([make_trace(problem, evaluated)])
    assert decontaminate(catalog, held_out).n_checked == 6
    run = make_run()
    catalog.add_traces([make_trace(problem, run)])
    report = decontaminate(catalog, held_out)
    assert (report.n_checked, report.n_contaminated, report.n_traces) == (7, 2, 3)


def test_named_problems_are_checked_and_only_contaminated_ones_kept(tmp_path: Path, held_out: str) -> None:
    fresh = tmp_path / "fresh.jsonl"
    fresh.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in ("What is 3 + 3?", "Why?")))
    catalog = Catalog(tmp_path / "new.duckdb")
    clean_file = tmp_path / "clean.jsonl"
    clean_file.write_text(json.dumps({"question": "Why?", "answer": "1"}) + "\n")
    assert decontaminate(catalog, held_out, problems=str(clean_file)).n_contaminated == 0
    assert not catalog.exists()
    report = decontaminate(catalog, held_out, problems=[str(fresh)])
    assert (report.n_checked, report.n_contaminated, report.n_traces) == (2, 1, 0)
    assert catalog.query("SELECT question FROM problems").rows == [("What is 3 + 3?",)]
    assert [s.name for s in catalog.sources()] == ["fresh.jsonl"]


def test_the_command_reports_in_words_and_in_json(catalog: Catalog, held_out: str) -> None:
    home = catalog.path.parent
    command = ["decontaminate", "--against", held_out, "--catalog", str(catalog.path)]
    report = json.loads(calset(*command, "--json", cwd=home).stdout)
    assert (report["n_checked"], report["n_contaminated"]) == (6, 1)
    assert report["examples"][0]["evidence"] == "What is 3 + 3"
    said = calset(*command, cwd=home).stdout
    assert "1 of 6 problems" in said
    assert "NOT IN (SELECT problem_id FROM excluded)" in said
    missing = calset(*command[:-1], "nowhere.duckdb", cwd=home)
    assert missing.returncode == 2

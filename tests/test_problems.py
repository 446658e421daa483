"""Problems from every kind of source, and one clear line for each way a source can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest

from calset.builder.problems import load_problems, open_gym
from calset.errors import InputError

ROWS = [{"question": "1+1?", "answer": "2", "level": 3}, {"question": "2+2?", "answer": 4, "level": None}]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(path: Path) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, ROWS)
    if path.suffix == ".csv":
        path.write_text("question,answer,level\n1+1?,2,3\n2+2?,4,\n", encoding="utf-8")
        return path
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE t AS SELECT * FROM (VALUES ('1+1?', '2', 3), ('2+2?', '4', NULL)) v(question, answer, level)"
    )
    connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_gives_its_rows(tmp_path: Path, suffix: str):
    source, problems = load_problems(str(make(tmp_path / f"sums{suffix}")))
    assert (source.name, source.kind, source.grader) == (f"sums{suffix}", "file", "math")
    assert [(p.question, p.answer) for p in problems] == [("1+1?", "2"), ("2+2?", "4")]
    assert str(problems[0].metadata["level"]) == "3"
    assert problems[1].metadata.get("level") in (None, "")


def test_other_columns_can_be_chosen_and_equal_problems_collapse(tmp_path: Path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"q": "x?", "a": "1"}, {"q": "x?", "a": "1"}, {"q": "x?", "a": "2"}])
    _, problems = load_problems(str(path), question="q", answer="a")
    assert [(p.question, p.answer) for p in problems] == [("x?", "1"), ("x?", "2")]
    assert len(load_problems(str(path), question="q", answer="a", limit=1)[1]) == 1


def test_ids_depend_on_content_and_source_name_alone(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = load_problems(str(write_jsonl(tmp_path / "a" / "q.jsonl", ROWS)))[1]
    two = load_problems(str(write_jsonl(tmp_path / "b" / "q.jsonl", list(reversed(ROWS)))))[1]
    assert {p.problem_id for p in one} == {p.problem_id for p in two}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": \n', r"bad\.jsonl:2 is not JSON"),
        ('["a"]\n', r"bad\.jsonl:1 is not a JSON object"),
        ("", "holds no problems"),
        ("\n\n", "holds no problems"),
        ('{"prompt": "a", "gold": "b"}\n', "no column 'question'; its columns: prompt, gold"),
        ('{"question": null, "answer": null}\n', r"bad\.jsonl:1 holds nothing in column 'question'"),
        ('{"question": "a", "answer": " "}\n', r"bad\.jsonl:1 holds nothing in column 'answer'"),
        ('{"question": ["a"], "answer": "b"}\n', "holds a list in column 'question'"),
        ('{"question": "\\ud800", "answer": "b"}\n', "half a surrogate"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_its_line(tmp_path: Path, content: str, says: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_problems(str(path))


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path: Path):
    for name in ("bad.parquet", "bad.jsonl", "bad.csv"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01junk")
        with pytest.raises(InputError, match=r"bad\."):
            load_problems(str(tmp_path / name))
    with pytest.raises(InputError, match="no file"):
        load_problems(str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match="no file"):
        load_problems("x" * 300 + ".jsonl")


@pytest.mark.parametrize("spec", ["gsm9k", "demo:eval", "questions.txt", "", "http://x/y"])
def test_an_unknown_spec_lists_what_is_accepted(spec: str):
    with pytest.raises(InputError, match=r"pass a \.jsonl, \.json, \.parquet or \.csv file .*gym:TASK"):
        load_problems(spec)


def test_a_gym_task_gives_problems_its_own_scorer_accepts():
    source, problems = load_problems("gym:chain_sum?min_terms=2&max_terms=3&size=5&seed=7")
    assert (source.name, source.kind, source.grader, len(problems)) == ("gym:chain_sum", "gym", "gym", 5)
    dataset = open_gym("chain_sum", {"seed": 7, "size": 5, "min_terms": 2, "max_terms": 3})
    assert [p.question for p in problems] == [entry["question"] for entry in dataset]
    assert problems[0].metadata["task"] == "chain_sum"
    assert problems[0].metadata["options"] == {"min_terms": 2, "max_terms": 3}
    json.dumps(dict(problems[0].metadata))


def test_overlapping_draws_of_a_task_share_their_problems():
    first = {p.problem_id for p in load_problems("gym:chain_sum?size=10&seed=0")[1]}
    second = {p.problem_id for p in load_problems("gym:chain_sum?size=10&seed=4")[1]}
    assert len(first & second) == 6


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gym:chain_sun", "no task 'chain_sun'; did you mean chain_sum"),
        ("gym:zzzzzz", "no task 'zzzzzz'; there are "),
        ("gym:chain_sum?terms=3", "no option 'terms'; it has .*max_terms"),
        ("gym:chain_sum?min_terms=9&max_terms=2", "refuses .*max_terms must be >= min_terms"),
        ("gym:chain_sum?max_terms=many", "refuses"),
        ("gym:chain_sum?size=0", "size must be a positive whole number"),
        ("gym:chain_sum?size=x", "size must be a positive whole number"),
        ("gym:chain_sum?size", "size must be a positive whole number"),
        ("gym:chain_sum?size=3&&seed=1", "cannot read the options"),
        ("gym:chain_sum?seed=NaN", "must be a finite number, not NaN"),
        ("gym:chain_sum?seed=-Infinity", "must be a finite number, not -Infinity"),
        ("gym:chain_sum?max_terms=1e999", "must be a finite number, not 1e999"),
        ("gym:chain_sum?seed=one", "seed must be a whole number, not 'one'"),
        ("gym:chain_sum?terms=" + "9" * 300, "no option 'terms'"),  # longer than a file name may be
    ],
)
def test_a_bad_gym_spec_says_what_would_do(spec: str, says: str):
    with pytest.raises(InputError, match=says):
        load_problems(spec)


def test_the_demos_sets_are_disjoint_and_stable():
    source, build = load_problems("demo")
    _, held_out = load_problems("demo:evaluate")
    assert source.name == "demo"
    assert not {p.question for p in build} & {p.question for p in held_out}
    assert len(build) > 200
    assert len(held_out) > 200
    assert [p.problem_id for p in build] == [p.problem_id for p in load_problems("demo")[1]]


def test_graders_are_checked():
    with pytest.raises(InputError, match="unknown grader 'maths'; did you mean math"):
        load_problems("demo", grader="maths")
    assert load_problems("demo", grader="math", limit=2)[1][0].grader == "math"


def test_the_gym_grader_needs_a_gym_source(tmp_path: Path):
    with pytest.raises(InputError, match="use --grader math"):
        load_problems(str(make(tmp_path / "sums.jsonl")), grader="gym")

"""Problems from every kind of source, and one clear line for each way a source can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.problems import load_problems, open_problems
from calset.errors import InputError
from calset.io.reasoning_gym import open_gym

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


def packed(path: Path, packing: str) -> Path:
    target = path.with_name(path.name + packing)
    content = path.read_bytes()
    target.write_bytes(gzip.compress(content) if packing == ".gz" else pa.Codec("zstd").compress(content, asbytes=True))
    return target


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".jsonl.zst", ".csv.zst"])
def test_a_file_gives_its_rows(tmp_path: Path, suffix: str):
    kind, dot, packing = suffix[1:].partition(".")
    path = make(tmp_path / f"sums.{kind}")
    source, problems = load_problems(str(packed(path, dot + packing) if packing else path))
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


printable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(printable, printable), min_size=1, max_size=8))
@fewer(3)
def test_all_formats_tell_the_same(rows: list[tuple[str, str]]):
    named = [{"question": question, "answer": answer} for question, answer in rows]
    expected = list(dict.fromkeys(rows))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"q.{kind}" for kind in ("jsonl", "json", "parquet", "csv")]
        write_jsonl(paths[0], named)
        paths[1].write_text(json.dumps(named, indent=2, ensure_ascii=False), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(named), paths[2])
        with paths[3].open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("question", "answer"), *rows])
        for path in (*paths, packed(paths[0], ".gz"), packed(paths[3], ".zst")):
            assert [(p.question, p.answer) for p in load_problems(str(path))[1]] == expected


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_holds_an_array_or_lines(tmp_path: Path, indent: int | None):
    long = [{"question": "x" * 700_000 + f"{n}", "answer": "1"} for n in range(4)]  # longer than what is read at once
    array = tmp_path / "array.json"
    array.write_text("\n " + json.dumps([*ROWS, *long], indent=indent))
    lines = write_jsonl(tmp_path / "lines.json", ROWS)
    assert [p.question for p in load_problems(str(array))[1]] == [row["question"] for row in [*ROWS, *long]]
    assert [p.question for p in load_problems(str(lines))[1]] == [row["question"] for row in ROWS]
    for content, says in [
        ('[{"question": "a", "answer": 1}, {"question', "array.json: row 2 is not JSON"),
        ('[{"question": "a", "answer": 1}', "array.json: row 2 is not JSON"),
        ("[1]", "row 1 is not a JSON object but a int"),
        ("[]", "holds no problems"),
        ("", "holds no problems"),
    ]:
        array.write_text(content)
        with pytest.raises(InputError, match=says):
            load_problems(str(array))


def test_a_folder_is_one_source_whatever_the_machine_lists_first(tmp_path: Path):
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", [{"question": "b?", "answer": "2"}])
    write_jsonl(folder / "deep" / "a.jsonl", [{"question": "c?", "answer": "3"}, {"question": "a?", "answer": "1"}])
    packed(write_jsonl(folder / "a.jsonl", [{"question": "a?", "answer": "1"}]), ".gz")
    (folder / "README.md").write_text("no data")
    (folder / ".hidden.jsonl").write_text("{")
    source, problems = load_problems(str(folder))
    assert (source.name, source.kind) == ("set", "file")
    rows = [("a?", "a.jsonl:1"), ("b?", "b.jsonl:1"), ("c?", "deep/a.jsonl:1")]
    assert [(p.question, p.source_row) for p in problems] == rows
    before = source.revision
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert load_problems(str(folder))[0].revision != before
    (folder / "c.jsonl").write_text('{"question": "b?"}')
    with pytest.raises(InputError, match=r"c\.jsonl:1 has no column 'answer'"):
        load_problems(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the folder .*empty holds no \.jsonl"):
        load_problems(str(tmp_path / "empty"))


def test_a_spec_can_name_its_own_columns_and_grader(tmp_path: Path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"q": "x?", "deep": {"a": 7}, "answer": "1"}])
    source, (problem,) = load_problems(f"{path}?question=q&answer=deep.a&grader=math", answer="answer")
    assert (problem.question, problem.answer, source.name) == ("x?", "7", "q.jsonl")
    with pytest.raises(InputError, match="takes no option 'split'; it takes question, answer, grader"):
        load_problems(f"{path}?split=test")
    with pytest.raises(InputError, match="cannot read the options"):
        load_problems(f"{path}?question=q&&answer=x")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_or_something_else_is_named(tmp_path: Path, packing: str):
    # Random enough not to shrink to a few bytes, of which half might still be whole.
    whole = packed(
        write_jsonl(
            tmp_path / "q.jsonl", [{"question": f"{random.Random(n).random()}?", "answer": "1"} for n in range(5000)]
        ),
        packing,
    )
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"q\.jsonl\{packing}.*(not a whole gzip file|Truncated)"):
        load_problems(str(whole))
    whole.write_bytes(b"plainly something else")
    with pytest.raises(InputError, match=rf"q\.jsonl\{packing}"):
        load_problems(str(whole))


# --- streaming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["demo", "gym:chain_sum?size=30&seed=3", "FILE", "PARQUET"])
def test_a_source_can_be_read_again_and_gives_the_same(tmp_path: Path, spec: str):
    spec = {"FILE": str(make(tmp_path / "q.jsonl")), "PARQUET": str(make(tmp_path / "q.parquet"))}.get(spec, spec)
    source = open_problems(spec)
    first, second = iter(source), list(source)
    assert [next(first), *first] == second == load_problems(spec)[1]  # two readings do not disturb each other
    assert source.size in (None, len(second))
    few = open_problems(spec, limit=2)
    assert list(few) == second[:2]
    assert few.size in (None, 2)


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + "not JSON\n")
    source = open_problems(str(path))
    assert [p.question for p in islice(source, 1)] == ["1+1?"]
    assert source.preview(1)[1] is None
    with pytest.raises(InputError, match=r"q\.jsonl:2 is not JSON"):
        list(source)
    assert open_problems(str(write_jsonl(path, ROWS))).preview(5) == (load_problems(str(path))[1], 2)
    assert open_problems(str(path)).preview(1, count=True)[1] == 2


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "q.jsonl", ROWS)
    source = open_problems(str(path))
    assert len(list(source)) == 2
    write_jsonl(path, [*ROWS, {"question": "new?", "answer": "1"}])
    with pytest.raises(InputError, match="has changed since it was opened"):
        list(source)


# VmHWM: the peak that getrusage tells is the parent's where that was larger.
GROWTH = """
import re, sys
from itertools import islice
from calset.builder.problems import open_problems
import pyarrow.parquet
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
path, action = sys.argv[1:]
before = peak()
source = open_problems(path)
n = len(list(islice(source, 5))) if action == "preview" else sum(1 for _ in source)
print(n, peak() - before)
"""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path, suffix: str):
    """200,000 problems of 500 characters, over 100 MB as text alone: MB by which a process that reads them grows."""
    noise = random.Random(0)
    rows = [{"question": f"{n} {noise.randbytes(245).hex()}", "answer": str(n), "level": n % 7} for n in range(200_000)]
    path = tmp_path / f"many.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    del rows

    def grown(action: str) -> tuple[int, int]:
        command = [sys.executable, "-c", GROWTH, str(path), action]
        n, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(n), int(megabytes)

    n, megabytes = grown("preview")
    assert n == 5
    assert megabytes < 40
    n, megabytes = grown("read")
    assert n == 200_000
    assert megabytes < 80  # of which the ids of what was seen are 20


# --- bad rows ----------------------------------------------------------------------------------------------------


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
        ('{"question": "a", "answer": "b", "deep": ' + "[" * 700 + "]" * 700 + "}\n", r"bad\.jsonl:1 nests too deep"),
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


SETS = ["isomorphic_strings", "ransom_note", "polynomial_multiplication", "word_ladder", "codeio", "knight_swap"]
DRAWN = """
import hashlib, json, sys
from dataclasses import astuple

from calset.builder.problems import load_problems

digests = {}
for task in sys.argv[2:]:
    source, problems = load_problems(f"gym:{task}?size={sys.argv[1]}&seed=42")
    entries = [astuple(problem) for problem in problems]
    for *_, metadata in entries if task == "time_intervals" else ():
        # The day on which it was drawn, of which neither a question nor an answer says anything.
        del metadata["entry"]["start_time"], metadata["entry"]["end_time"]
    digests[task] = hashlib.sha256(json.dumps([source.source_id, source.revision, entries]).encode()).hexdigest()
print(json.dumps(digests))
"""


def drawn(hash_seed: str, size: int, tasks: list[str]) -> dict[str, str]:
    """Draw tasks in a new interpreter; a digest of each one's source and problems."""
    run = subprocess.run(
        [sys.executable, "-c", DRAWN, str(size), *tasks],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return json.loads(run.stdout)


def test_tasks_that_iterate_over_sets_draw_the_same_problems_in_every_process():
    assert drawn("1", 12, SETS) == drawn("2", 12, SETS[::-1])


@pytest.mark.nightly
def test_every_task_draws_the_same_problems_in_every_process_and_in_any_order():
    from reasoning_gym.factory import DATASETS

    tasks = sorted(set(DATASETS) - {"composite"})
    assert drawn("1", 40, tasks) == drawn("2", 40, tasks[::-1])


def test_what_a_task_fails_to_draw_is_one_line():
    """Some options are found wrong only when a problem is drawn."""
    problems = iter(open_problems("gym:calendar_arithmetic?year=99999&size=30"))
    assert next(problems).source_row == "calendar_arithmetic:0+0"
    says = r"calendar_arithmetic makes no problem 1 of 'year=99999&size=30' \(.*out of range\); take another seed"
    with pytest.raises(InputError, match=says):
        next(problems)


def test_a_drawing_process_that_is_killed_costs_no_problem():
    expected = load_problems("gym:chain_sum?size=600&seed=5")[1]
    problems = iter(open_problems("gym:chain_sum?size=600&seed=5"))
    first = next(problems)
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    (child,) = (int(line.split()[0]) for line in listed.stdout.splitlines() if "calset.io.reasoning_gym" in line)
    os.kill(child, signal.SIGKILL)
    assert [first, *problems] == expected


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
        ("gym:chain_sum?size=1000000000000000000000", "size must be a positive whole number, below"),
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

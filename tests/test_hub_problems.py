"""Problems of Hub datasets, over HTTP from a Hub of our own: presets, pinned revisions, bad access, bad connections."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
import yaml
from conftest import ScriptedEngine
from hypothesis import given
from hypothesis import strategies as st
from local_hub import TOKEN, Client, LocalHub, hurry

from calset import ids
from calset.builder.problems import PRESETS
from calset.builder.problems.presets import shuffled
from calset.catalog.records import Problem, Source
from calset.errors import CalsetError, InputError
from calset.io.hub import lay_out

SUMS = [{"question": f"{n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(6)]


def load(spec: str, **options: Any) -> tuple[Source, list[Problem]]:
    """Runs in the client's process."""
    from calset.builder.problems import load_problems

    return load_problems(spec, **options)


def first(spec: str, n: int) -> list[Problem]:
    from calset.builder.problems import open_problems

    return list(islice(open_problems(spec), n))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_text(rows: list[dict[str, Any]]) -> bytes:
    import csv

    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


def card(configs: Mapping[str, Mapping[str, str]] | None = None, **more: Any) -> bytes:
    """A dataset card; ``configs`` is config -> split -> pattern."""
    data: dict[str, Any] = dict(more)
    if configs:
        data["configs"] = [
            {"config_name": name, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
            for name, splits in configs.items()
        ]
    return f"---\n{yaml.safe_dump(data)}---\n# A dataset\n".encode()


# --- presets, each on a miniature of its repository --------------------------------------------------------------

GPQA = {
    "Record ID": "rec1",
    "Question": "Which particle carries the strong force?",
    "Correct Answer": "gluon\n",
    "Incorrect Answer 1": "photon",
    "Incorrect Answer 2": "W boson",
    "Incorrect Answer 3": "graviton",
    "Explanation": "QCD.",
    "Subdomain": "High-energy particle physics",
    "High-level domain": "Physics",
    "Canary String": "do not train on this",
}
COMMONSENSE = {
    "id": "1afa",
    "question": "Where would you put a plate?",
    "question_concept": "plate",
    "choices": {"label": ["A", "B", "C"], "text": ["cupboard", "roof", "river"]},
    "answerKey": "A",
}
NUMINA = {"problem": "1+1?", "solution": "It is 2.", "answer": "2", "problem_type": "Algebra", "source": "amc"}
# preset -> the repository's files, and (question, answer, some of the metadata) of each problem it gives
MINIATURES: dict[str, tuple[dict[str, bytes], list[tuple[str, str, dict[str, Any]]]]] = {
    "gsm8k": (
        {
            "README.md": card(
                {"main": {"train": "main/train-*", "test": "main/test-*"}, "socratic": {"train": "socratic/train-*"}},
                license=["mit"],
                dataset_info=[{"config_name": "main", "splits": [{"name": "train", "num_examples": 1}]}],
            ),
            "main/train-00000-of-00001.parquet": parquet(
                [{"question": "48 and half?", "answer": "48/2 = <<48/2=24>>24, 48+24 = 72 ####\n#### 1,072"}]
            ),
            "main/test-00000-of-00001.parquet": parquet([{"question": "t?", "answer": "#### 1"}]),
            "socratic/train-00000-of-00001.parquet": parquet([{"question": "s?", "answer": "#### 1"}]),
        },
        [("48 and half?", "1072", {"solution": "48/2 = 24, 48+24 = 72 ####"})],
    ),
    "math500": (
        {
            "README.md": card(task_categories=["text-generation"]),
            "test.jsonl": json_lines(
                [
                    {
                        "problem": "$1+1$?",
                        "solution": "So $\\boxed{2}$.",
                        "answer": "2",
                        "subject": "Prealgebra",
                        "level": 1,
                        "unique_id": "test/prealgebra/1.json",
                    }
                ]
            ),
        },
        [("$1+1$?", "2", {"subject": "Prealgebra", "level": 1, "solution": "So $\\boxed{2}$."})],
    ),
    "aime24": (
        {
            "README.md": card({"default": {"train": "data/train-*"}}),
            "data/train-00000-of-00001.parquet": parquet(
                [{"id": 60, "problem": "p?", "solution": "s", "answer": "204", "url": "u", "year": "2024"}]
            ),
        },
        [("p?", "204", {"year": "2024", "id": 60})],
    ),
    "aime25": (
        {
            "README.md": card({"default": {"test": "test.jsonl"}}, license="apache-2.0"),
            "test.jsonl": json_lines([{"problem": "p?", "answer": "70", "id": "0"}]),
        },
        [("p?", "70", {"id": "0"})],
    ),
    "gpqa-diamond": (
        {
            "README.md": card(license="cc-by-4.0")[:-16]
            + b"configs:\n- config_name: gpqa_main\n  data_files: gpqa_main.csv\n"
            + b"- config_name: gpqa_diamond\n  data_files: gpqa_diamond.csv\n---\n",
            "gpqa_diamond.csv": csv_text([GPQA]),
            "gpqa_main.csv": csv_text([{**GPQA, "Question": "another?"}]),
        },
        [
            (
                "Which particle carries the strong force?\n\nA) W boson\nB) photon\nC) gluon\nD) graviton\n\n"
                "Answer with the letter of the right option.",
                "C",
                {"domain": "Physics", "choices": ["W boson", "photon", "gluon", "graviton"]},
            )
        ],
    ),
    "openr1-math": (
        {
            "README.md": card({"all": {"train": "all/*"}, "default": {"train": "data/train-*"}}, license="apache-2.0"),
            "data/train-00000-of-00001.parquet": parquet(
                [
                    {**NUMINA, "question_type": "math-word-problem", "uuid": "1", "generations": ["<think>"] * 2},
                    {**NUMINA, "question_type": "proof", "uuid": "2", "generations": []},
                ]
            ),
            "all/default-00000-of-00001.parquet": parquet([NUMINA]),
        },
        [("1+1?", "2", {"problem_type": "Algebra", "solution": "It is 2.", "uuid": "1"})],
    ),
    "numina-math": (
        {
            "README.md": card({"default": {"train": "data/train-*"}}, license="apache-2.0"),
            "data/train-00000-of-00002.parquet": parquet([{**NUMINA, "answer": a} for a in ("2", "proof", None)]),
            "data/train-00001-of-00002.parquet": parquet(
                [
                    {**NUMINA, "answer": "notfound", "problem_is_valid": "Yes"},
                    {**NUMINA, "answer": "5", "problem_is_valid": "Incomplete"},
                    {**NUMINA, "answer": "3", "problem_is_valid": "Yes"},
                ]
            ),
        },
        [("1+1?", "2", {"source": "amc"}), ("1+1?", "3", {"source": "amc"})],
    ),
    "bigmath": (
        {
            "README.md": card({"default": {"train": "data/train-*"}}, license="apache-2.0"),
            "data/train-00000-of-00001.parquet": parquet(
                [
                    {
                        "problem": "p?",
                        "answer": "5",
                        "source": "orca_math",
                        "domain": ["Mathematics -> Algebra"],
                        "llama8b_solve_rate": float("nan"),
                    }
                ]
            ),
        },
        [("p?", "5", {"domain": ["Mathematics -> Algebra"], "llama8b_solve_rate": None})],
    ),
    "open-reasoner": (
        {
            "orz_math.json": json.dumps(
                [
                    [
                        {"from": "human", "value": f"{n}?"},
                        {"from": "assistant", "ground_truth": {"value": str(n), "pass_at_n": None}},
                    ]
                    for n in (1, 2)
                ],
                indent=1,
            ).encode()
        },
        [("1?", "1", {}), ("2?", "2", {})],
    ),
    "commonsense-qa": (
        {
            "README.md": card({"default": {"train": "data/train-*", "test": "data/test-*"}}, license=["mit"]),
            "data/train-00000-of-00001.parquet": parquet([COMMONSENSE]),
            "data/test-00000-of-00001.parquet": parquet([{**COMMONSENSE, "answerKey": ""}]),
        },
        [
            (
                "Where would you put a plate?\n\nA) cupboard\nB) roof\nC) river\n\n"
                "Answer with the letter of the right option.",
                "A",
                {"subject": "plate", "choices": ["cupboard", "roof", "river"]},
            )
        ],
    ),
}


@pytest.fixture(scope="module")
def miniatures(hub: LocalHub) -> dict[str, str]:
    """Every preset's repository; the commit of each."""
    for preset in PRESETS.values():
        hub.create(preset.repo, gated=preset.gated)
    return {name: hub.commit(PRESETS[name].repo, files) for name, (files, _) in MINIATURES.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_its_datasets_columns(name: str, client: Client, miniatures: dict[str, str]) -> None:
    preset, expected = PRESETS[name], MINIATURES[name][1]
    source, problems = client(load, name)
    assert (source.name, source.spec, source.kind) == (name, name, "hub")
    assert (source.revision, source.grader) == (miniatures[name], preset.grader)
    assert source.licence == preset.licence
    assert preset.grader in ("math", "choice")
    assert [(p.question, p.answer) for p in problems] == [(q, a) for q, a, _ in expected]
    for problem, (_, _, metadata) in zip(problems, expected, strict=True):
        assert {key: problem.metadata.get(key) for key in metadata} == metadata
        assert not {"generations", "Canary String", "Question"} & set(problem.metadata)
        json.dumps(dict(problem.metadata), allow_nan=False)


def test_a_presets_other_split_is_another_source(client: Client, miniatures: dict[str, str]) -> None:
    source, problems = client(load, "gsm8k?split=test")
    assert (source.name, [p.question for p in problems]) == ("gsm8k:test", ["t?"])
    source, problems = client(load, "gsm8k?config=socratic")
    assert (source.name, [p.question for p in problems]) == ("gsm8k:socratic", ["s?"])
    with pytest.raises(InputError, match=r"openai/gsm8k has no split 'validation'; it has train, test"):
        client(load, "gsm8k?split=validation")
    with pytest.raises(InputError, match="holds nothing in column 'answerKey'"):
        client(load, "commonsense-qa?split=test")


def test_a_gated_dataset_says_how_to_get_access(stranger: Client, client: Client, miniatures: dict[str, str]) -> None:
    with pytest.raises(InputError, match=GATED):
        stranger(load, "gpqa-diamond")
    assert len(client(load, "gpqa-diamond")[1]) == 1


GATED = r"Idavidrein/gpqa is gated: accept its conditions .* `hf auth login`$"


@pytest.mark.slow
def test_a_login_without_access_to_a_gated_dataset_is_told_the_same(
    hub: LocalHub, miniatures: dict[str, str], tmp_path: Path
) -> None:
    with hub.client(tmp_path, token="hf_of_somebody_else") as somebody, pytest.raises(InputError, match=GATED):
        somebody(load, "gpqa-diamond")


@given(st.text(), st.lists(st.text(), min_size=2, max_size=6, unique=True), st.randoms())
def test_options_are_ordered_by_their_texts_alone(question: str, options: list[str], shuffler: Any) -> None:
    before = shuffled(question, options)
    assert sorted(before) == sorted(options)
    shuffler.shuffle(options)
    assert shuffled(question, options) == before


def test_the_right_option_stands_anywhere() -> None:
    places = [shuffled(f"question {n}", ["right", "x", "y", "z"]).index("right") for n in range(400)]
    assert all(60 < places.count(place) < 140 for place in range(4))


# --- any dataset -------------------------------------------------------------------------------------------------


def test_any_dataset_is_read_by_its_columns(hub: LocalHub, client: Client) -> None:
    row = {"q": "x?", "deep": {"gold": 7}, "level": "hard", "solution": "s" * 2000, "trace": "t" * 2000, "all": [1]}
    hub.commit("org/any", {"README.md": card(license="mit"), "train.jsonl": json_lines([row])})
    source, (problem,) = client(load, "hf:org/any?question=q&answer=deep.gold&grader=math")
    assert (source.name, source.licence, source.kind) == ("org/any:train", "mit", "hub")
    assert (problem.question, problem.answer, problem.source_row) == ("x?", "7", "train.jsonl:1")
    # Long texts and nested values stay out, a solution does not.
    assert problem.metadata == {"level": "hard", "solution": "s" * 2000}
    assert client(load, "hf:org/any", question="q", answer="level")[1][0].answer == "hard"


def test_choices_are_kept_and_hidden_folders_are_no_data(hub: LocalHub, client: Client) -> None:
    row = {"id": "1", "question": "The capital of France?", "choices": {"text": ["Rome", "Paris"], "label": ["1", "2"]},
           "answerKey": "2", "traces": [{"text": "x"}]}  # fmt: skip
    files = {"train.parquet": parquet([row]), ".cache/train.parquet": b"no data", "__old__/train.parquet": b"no data"}
    hub.commit("org/arc", files)
    _, (problem,) = client(load, "hf:org/arc?answer=answerKey&grader=choice")
    assert (problem.answer, problem.grader) == ("B", "choice")
    assert problem.metadata == {"id": "1", "choices": ["Rome", "Paris"]}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet", "json"])
def test_each_format_gives_the_same_rows(hub: LocalHub, client: Client, suffix: str) -> None:
    import gzip

    write = {"csv": csv_text, "parquet": parquet, "json": lambda rows: json.dumps(rows).encode()}
    content = write.get(suffix, json_lines)(SUMS)
    hub.commit(f"org/{suffix}", {f"test.{suffix}": gzip.compress(content) if suffix.endswith("gz") else content})
    _, problems = client(load, f"hf:org/{suffix}?split=test")
    assert [(p.question, p.answer) for p in problems] == [(r["question"], r["answer"]) for r in SUMS]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hf:org/nowhere", r"the Hub has no dataset org/nowhere; if it is private, log in"),
        ("hf:org", "'org' is no dataset's name"),
        ("hf:", "is no dataset's name; write hf:ORG/NAME"),
        ("hf:a b/c", "is no dataset's name"),
        ("hf:org/sums@v9", r"org/sums has no revision 'v9'"),
        ("hf:org/sums@" + "0" * 40, "org/sums has no revision '0000"),
        ("hf:org/sums?config=hard", r"org/sums has no config 'hard'; it has one, two"),
        ("hf:org/sums", r"org/sums has several configs: one, two; add config=NAME"),
        ("hf:org/sums?config=two", r"org/sums has several splits: a, b; add split=NAME"),
        ("hf:org/sums?config=one&split=test", r"org/sums has no split 'test'; it has train"),
        ("hf:org/sums?config=one&question=text", r"one.parquet has no column 'text'; its columns: question, answer"),
        ("hf:org/sums?columns=x", r"takes no option 'columns'; it takes config, split, question"),
        ("hf:org/sums?config=", "the option 'config' .* has no value"),
        ("hf:org/sums?config=one&grader=maths", "unknown grader 'maths'"),
        ("hf:org/sums?config=one&grader=gym", "the gym grader needs problems of a gym: source"),
        ("gsm8k?question=x", "takes no option 'question'"),
        ("hf:org/script", r"org/script keeps its split train in files of the type .py, .* @refs/convert/parquet"),
        ("hf:org/empty", "org/empty has no data files"),
        ("hf:org/hidden", "the Hub has no dataset org/hidden"),
    ],
)
def test_a_bad_hub_spec_says_what_there_is(hub: LocalHub, stranger: Client, spec: str, says: str) -> None:
    if ("dataset", "org/sums") not in hub.repos:
        configs = {"one": {"train": "one.parquet"}, "two": {"a": "a.jsonl", "b": "b.jsonl"}}
        files = {"README.md": card(configs), "one.parquet": parquet(SUMS), "a.jsonl": b"{}", "b.jsonl": b"{}"}
        hub.commit("org/sums", files)
        hub.commit("org/script", {"script.py": b"print()"})
        hub.commit("org/empty", {"README.md": b"# nothing"})
        hub.create("org/hidden", private=True)
        hub.commit("org/hidden", {"a.jsonl": json_lines(SUMS)})
    with pytest.raises(InputError, match=says) as caught:
        stranger(load, spec)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_preview_downloads_the_first_file_only(hub: LocalHub, client: Client) -> None:
    hub.commit("org/many", {f"data/train-0000{n}-of-00003.jsonl": json_lines([SUMS[n]]) for n in range(3)})
    assert [p.answer for p in client(first, "hf:org/many", 1)] == ["0"]
    assert len(hub.asked("GET .*org/many/resolve/.*jsonl")) == 1
    assert len(client(load, "hf:org/many")[1]) == 3


# --- pinned revisions --------------------------------------------------------------------------------------------


def test_a_recorded_revision_gives_the_same_problems_after_the_branch_moved(hub: LocalHub, tmp_path: Path) -> None:
    old = hub.commit("org/moving", {"README.md": card(), "train.jsonl": json_lines(SUMS[:3])})
    with hub.client(tmp_path) as client:
        source, before = client(load, "hf:org/moving")
        assert source.revision == old
        new = hub.commit("org/moving", {"train.jsonl": json_lines(SUMS[3:])})
        asked = len(hub.log)
        again, after = client(load, "hf:org/moving", revision=old)
        assert (again, after) == (source, before)
        assert len(hub.log) == asked  # nothing was asked
        assert client(load, f"hf:org/moving@{old}")[1] == [p for p in before if p.problem_id]
        moved, others = client(load, "hf:org/moving")
        assert moved.revision == new
        assert not {p.problem_id for p in others} & {p.problem_id for p in before}
    with hub.client(tmp_path, offline=True) as client:
        asked = len(hub.log)
        assert client(load, "hf:org/moving", revision=old) == (source, before)
        assert client(load, "hf:org/moving", revision=new) == (moved, others)
        assert client(load, "hf:org/moving") == (moved, others)  # where the branch pointed when it was last asked
        unknown = "f" * 40
        with pytest.raises(CalsetError, match=rf"org/moving@{unknown} is not in the cache, and the Hub cannot be"):
            client(load, "hf:org/moving", revision=unknown)
        with pytest.raises(CalsetError, match=r"org/never is not in the cache"):
            client(load, "hf:org/never")
        assert len(hub.log) == asked


def test_a_revision_may_be_a_tag_or_a_converted_branch(hub: LocalHub, client: Client) -> None:
    sha = hub.commit("org/tagged", {"train.jsonl": json_lines(SUMS[:1])})
    hub.repos["dataset", "org/tagged"].refs["v1"] = sha
    hub.commit("org/tagged", {"train.jsonl": json_lines(SUMS[1:])})
    hub.commit("org/tagged", {"one/train/0000.parquet": parquet(SUMS[2:4])}, branch="refs/convert/parquet")
    source, problems = client(load, "hf:org/tagged@v1")
    assert (source.revision, len(problems)) == (sha, 1)
    assert len(client(load, "hf:org/tagged@refs/convert/parquet?config=one")[1]) == 2


def test_what_is_in_the_cache_needs_no_hub_and_what_is_not_is_named(tmp_path: Path) -> None:
    with LocalHub() as hub:
        files = {f"data/train-0000{n}-of-00002.jsonl": json_lines([SUMS[n]]) for n in range(2)}
        sha = hub.commit("org/half", {"README.md": card(), **files})
        with hub.client(tmp_path) as client:
            assert len(client(first, "hf:org/half", 1)) == 1
    with hub.client(tmp_path) as client:  # the Hub is gone, and nobody said so
        client(hurry)
        assert len(client(first, f"hf:org/half@{sha}", 1)) == 1
        assert len(client(first, "hf:org/half", 1)) == 1
        with pytest.raises(CalsetError, match=r"the Hub cannot be reached \(ConnectError\) for org/other"):
            client(load, "hf:org/other")
    half = r"org/half@.*, file data/train-00001-of-00002.jsonl, is not in the cache, and the Hub cannot be reached"
    with hub.client(tmp_path, offline=True) as client, pytest.raises(CalsetError, match=half):
        client(load, "hf:org/half")


def built(spec: str, path: str) -> list[tuple[str, str, str, int]]:
    """Runs in the client's process: a real build, and what the catalog says of its sources."""
    import calset
    from calset import bundled

    report = calset.build(bundled.MODEL, spec, samples=1, max_tokens=12, engine="transformers", catalog=path)
    sql = "SELECT name, kind, revision FROM sources"
    return [(*row, report.n_new) for row in calset.Catalog(path).query(sql).rows]


@pytest.mark.slow
def test_a_build_records_the_commit_of_its_problems(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    sha = hub.commit("org/built", {"README.md": card(), "train.jsonl": json_lines(SUMS[:2])})
    assert client(built, "hf:org/built", str(tmp_path / "c.duckdb")) == [("org/built:train", "hub", sha, 2)]


def without_held_out(problems: Path, path: Path) -> tuple[int, int, int, dict[str, str]]:
    """Runs in the client's process: a build without what hf:org/held-out holds, and the catalog's sources."""
    import calset
    from calset import bundled

    options = {"samples": 1, "max_tokens": 12, "engine": ScriptedEngine(""), "graded": False, "catalog": path}
    report = calset.build(bundled.MODEL, str(problems), decontaminate="hf:org/held-out", **options)
    return report.n_excluded, report.n_new, report.n_existing, calset.Catalog(path).source_revisions()


def n_held_out(path: Path, spec: str) -> int:
    import calset

    return calset.decontaminate(path, spec).n_evaluation


def test_what_a_build_leaves_out_stays_the_same_when_the_evaluation_moves(
    hub: LocalHub, client: Client, tmp_path: Path
) -> None:
    old = hub.commit("org/held-out", {"README.md": card(), "train.jsonl": json_lines(SUMS[:1])})
    problems, path = tmp_path / "sums.jsonl", tmp_path / "c.duckdb"
    problems.write_bytes(json_lines(SUMS))
    *counts, revisions = client(without_held_out, problems, path)
    assert (counts, revisions["hf:org/held-out"]) == ([1, 5, 0], old)
    new = hub.commit("org/held-out", {"train.jsonl": json_lines(SUMS[1:4])})
    *counts, again = client(without_held_out, problems, path)
    assert (counts, again) == ([1, 0, 5], revisions)
    assert client(n_held_out, path, "hf:org/held-out") == 1
    assert client(n_held_out, path, f"hf:org/held-out@{new}") == 3
    assert client(without_held_out, problems, tmp_path / "fresh.duckdb")[0] == 3


# --- bad connections ---------------------------------------------------------------------------------------------


# The library itself waits a second before it asks again: each case takes that long.
@pytest.mark.parametrize(
    ("pattern", "kind", "status"),
    [
        (r"GET /api/datasets/[^/]+/[^/]+$", "status", 429),
        (r"GET .*/resolve/.*\.jsonl", "drop", 0),
        (r"GET .*/lfs/.*", "truncate", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (r"GET /api/datasets/[^/]+/[^/]+$", "status", 503),
                (r"GET /api/datasets/[^/]+/[^/]+$", "drop", 0),
                (r"GET .*/tree/", "status", 503),
                (r"HEAD .*\.jsonl", "status", 503),
                (r"GET .*/resolve/.*\.jsonl", "status", 503),
                (r"GET .*/resolve/.*\.jsonl", "status", 429),
                (r"GET .*/resolve/.*\.jsonl", "truncate", 0),
            )
        ),
    ],
)
def test_a_passing_failure_costs_a_moment(
    hub: LocalHub, client: Client, pattern: str, kind: str, status: int, request: pytest.FixtureRequest
) -> None:
    name = f"org/failing-{ids.digest(request.node.name)}"
    hub.commit(name, {"README.md": card(), "train.jsonl": json_lines(SUMS[:3]), "test.parquet": parquet(SUMS[3:])})
    hub.fail(pattern, kind, status=status)
    split = "test" if "lfs" in pattern else "train"
    assert len(client(load, f"hf:{name}?split={split}")[1]) == 3
    assert hub.faults[0].times == 0  # it did fail


def test_a_hub_that_stays_down_is_said_in_a_line_and_the_command_can_be_repeated(hub: LocalHub, client: Client) -> None:
    hub.commit("org/down", {"README.md": card(), "train.jsonl": json_lines(SUMS)})
    hub.fail(r"GET .*org/down/resolve/.*jsonl", status=503, times=4)
    with pytest.raises(CalsetError, match=r"the Hub answers 503 for org/down@.*train\.jsonl.*again later") as caught:
        client(load, "hf:org/down")
    assert not isinstance(caught.value, InputError)
    assert len(client(load, "hf:org/down")[1]) == 6


# --- the command line --------------------------------------------------------------------------------------------


def test_the_command_line_previews_a_dataset(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/shown", {"README.md": card(), "train.jsonl": json_lines(SUMS)})

    def calset(*arguments: str) -> subprocess.CompletedProcess[str]:
        return warm.calset("problems", *arguments, cwd=tmp_path, **hub.settings(tmp_path))

    done = calset("hf:org/shown", "--limit", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert (shown["source"], shown["n"], len(shown["problems"])) == ("org/shown:train", None, 2)
    assert json.loads(calset("hf:org/shown", "--limit", "2", "--json", "--count").stdout)["n"] == 6
    assert [json.loads(line)["name"] for line in calset("--json").stdout.splitlines()] == list(PRESETS)
    done = calset("hf:org/shwon")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# --- files by config and split -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "files", "config", "expected"),
    [
        ({}, ["a.jsonl", "b.jsonl"], None, {"default": {"train": ("a.jsonl", "b.jsonl")}}),
        ({}, ["x/test.csv", "x/dev.csv"], None, {"default": {"test": ("x/test.csv",), "validation": ("x/dev.csv",)}}),
        ({}, ["train/1.csv", "eval/1.csv"], None, {"default": {"train": ("train/1.csv",), "test": ("eval/1.csv",)}}),
        ({}, ["latest.csv"], None, {"default": {"train": ("latest.csv",)}}),  # "test" within a word is no split
        (
            {},
            ["data/odd-00000-of-00002.parquet", "data/odd-00001-of-00002.parquet"],
            None,
            {"default": {"odd": ("data/odd-00000-of-00002.parquet", "data/odd-00001-of-00002.parquet")}},
        ),
        ({}, ["main/test-1.csv", "other/test-1.csv"], "main", {"main": {"test": ("main/test-1.csv",)}}),
        (
            {"configs": [{"config_name": "en", "data_files": [{"split": "train", "path": "en/c4-train.*.json.gz"}]}]},
            ["en/c4-train.0.json.gz", "en/c4-validation.0.json.gz", "en/sub/c4-train.1.json.gz"],
            None,
            {"en": {"train": ("en/c4-train.0.json.gz",)}},
        ),
        ({"configs": [{"data_files": "a.csv"}]}, ["a.csv", "b.csv"], None, {"default": {"train": ("a.csv",)}}),
        (
            {"configs": [{"config_name": "a", "data_dir": "a"}]},
            ["a/test.csv", "b/test.csv"],
            None,
            {"a": {"test": ("a/test.csv",)}},
        ),
        (
            {"configs": [{"data_files": {"test": ["**/t*.csv"]}}]},
            ["t.csv", "deep/er/t1.csv", "u.csv"],
            None,
            {"default": {"test": ("t.csv", "deep/er/t1.csv")}},
        ),
    ],
)  # fmt: skip
def test_files_are_laid_out_as_the_card_or_their_names_say(
    metadata: dict[str, Any], files: list[str], config: str | None, expected: dict[str, dict[str, tuple[str, ...]]]
) -> None:
    assert lay_out(metadata, files, config) == expected

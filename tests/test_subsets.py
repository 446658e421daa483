"""Subsets as kept, compared, exported and read back: immutable, and never other tokens than their hash says."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow.parquet as pq
import pytest
from factories import fill, make_grade, make_problem, make_run, make_source, make_trace
from hypothesis import given
from hypothesis import strategies as st

from calset.catalog.catalog import Catalog
from calset.catalog.records import Sample, Subset
from calset.catalog.references import diff, export, resolve
from calset.catalog.report.page import report
from calset.catalog.select import select
from calset.catalog.subsets import versions
from calset.catalog.subsets.folder import DATA, MANIFEST, MANIFEST_SCHEMA, read_directory
from calset.catalog.subsets.versions import hash_samples, list_subsets, load
from calset.errors import CalsetError, CatalogError, InputError

PLAN = [[("correct", 10 + n), ("correct", 20 + n), ("incorrect", 30), ("truncated", 40)] for n in range(12)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return fill(tmp_path / "c.duckdb", PLAN)


@pytest.fixture
def subset(catalog: Catalog) -> Subset:
    return select(catalog, "math", samples=6)


def same(a: Subset, b: Subset) -> bool:
    """Equal in everything, whatever sequence types hold the tokens."""
    plain = [replace(s, samples=[replace(x, input_ids=tuple(x.input_ids)) for x in s.samples]) for s in (a, b)]
    return plain[0] == plain[1]


# -- in the catalog -------------------------------------------------------------------------------------------------


def test_a_subset_comes_back_by_name_and_by_version(catalog: Catalog, subset: Subset) -> None:
    second = select(catalog, "math", samples=3)
    assert same(load(catalog, "math@1"), subset)
    assert same(load(catalog, "math"), second)
    assert (second.version, second.ref) == (2, "math@2")
    listed = list_subsets(catalog)
    assert [(s["ref"], s["n_samples"], s["n_tokens"]) for s in listed] == [
        ("math@1", 6, subset.n_tokens),
        ("math@2", 3, second.n_tokens),
    ]
    assert listed[0]["recipe"]["name"] == "ssgr"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("nothing", "no subset 'nothing'"),
        ("math@7", "no version 7.*there are 1"),
        ("math@", "not a subset"),
        ("math@x", "not a subset"),
        ("math@-1", "not a subset"),
        ("", "cannot name"),
        ("..", "cannot name"),
        ("a@1@2", "not a subset"),
        ("hub:org", "write hub:ORG/REPO/NAME"),
        ("hub:org/repo/math@1", "not in the cache, and the Hub cannot be reached"),
        ("no/such/folder", "NAME or NAME@VERSION of the catalog, an exported folder"),
    ],
)
def test_a_reference_to_nothing_is_one_clear_line(catalog: Catalog, subset: Subset, ref: str, message: str) -> None:
    with pytest.raises(CalsetError, match=message) as caught:
        resolve(ref, catalog)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE subset_items SET input_ids[2] = input_ids[2] + 1 WHERE position = 3",
        "UPDATE subset_items SET n_prompt_tokens = 2 WHERE position = 0",
        "UPDATE subset_items SET sample_id = 'other' WHERE position = 0",
        "DELETE FROM subset_items WHERE position = 5",
        "UPDATE subset_items SET position = 1 - position WHERE position < 2",
    ],
)
def test_damaged_samples_are_never_handed_out(catalog: Catalog, subset: Subset, damage: str) -> None:
    with duckdb.connect(str(catalog.path)) as con:
        try:
            con.execute(damage).fetchall()
        except duckdb.Error:
            con.execute("UPDATE subset_items SET input_ids = list_append(input_ids, 7) WHERE position = 3").fetchall()
    with pytest.raises(CatalogError, match=r"math@1 .*content hash") as caught:
        load(catalog, "math")
    assert not isinstance(caught.value, InputError)


@given(
    st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)), min_size=1),
    st.data(),
)
def test_one_changed_token_is_another_hash(rows: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    samples = [Sample(name, ids, len(ids) // 2) for name, ids in rows]
    assert hash_samples(samples) == hash_samples([replace(s, input_ids=tuple(s.input_ids)) for s in samples])
    at = data.draw(st.integers(0, len(samples) - 1))
    ids = list(samples[at].input_ids)
    where = data.draw(st.integers(0, len(ids) - 1))
    ids[where] = (ids[where] + data.draw(st.integers(1, 1000))) % 2**31
    changed = [*samples[:at], replace(samples[at], input_ids=ids), *samples[at + 1 :]]
    assert hash_samples(changed) != hash_samples(samples)


def test_a_subset_outlives_what_happens_to_its_traces(catalog: Catalog, subset: Subset) -> None:
    trace_id = subset.samples[0].trace_id
    assert trace_id is not None
    old = catalog.load_traces([trace_id])[trace_id]
    catalog.add_traces([replace(old, attempt=1, completion_ids=(5, 6))])
    assert same(load(catalog, "math@1"), subset)


def test_diff_counts_what_is_shared_and_sets_distributions_side_by_side(catalog: Catalog, subset: Subset) -> None:
    other = select(catalog, "other", "random", per_problem=None)
    result = diff(catalog, "math", other)
    assert not result.same
    assert result.shared == {"samples": 6, "problems": 6}
    assert result.only_a == {"samples": 0, "problems": 0}
    assert result.only_b == {"samples": 30, "problems": 6}
    assert result.b["length_quantiles"]["p0"] == 10
    assert result.b["length_quantiles"]["p100"] == 31
    assert result.a["difficulty_quantiles"]["p50"] == 0.5
    assert json.loads(json.dumps(result.as_dict()))["shared"]["samples"] == 6
    assert ("samples", 6, 36) in result.rows()
    itself = diff(catalog, "math", "math@1")
    assert itself.same
    assert itself.only_a == itself.only_b == {"samples": 0, "problems": 0}


def test_two_selections_at_once_get_two_versions(catalog: Catalog) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda seed: select(Catalog(catalog.path), "race", samples=3, seed=seed).version, range(4))
        )
    assert sorted(found) == [1, 2, 3, 4]


def test_a_name_means_the_catalog_and_a_folder_only_when_that_has_none(
    catalog: Catalog, subset: Subset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math").mkdir()
    assert resolve("math", catalog).ref == "math@1"
    export(catalog, subset, tmp_path / "kept")
    assert resolve("kept", catalog).ref == "math@1"
    assert resolve("kept", tmp_path / "no.duckdb").ref == "math@1"
    assert resolve(tmp_path / "kept").ref == "math@1"


# -- as a folder ----------------------------------------------------------------------------------------------------


def test_an_exported_folder_reads_back_as_the_same_subset(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    folder = export(catalog, "math@1", tmp_path / "out" / "math")
    assert same(read_directory(folder), subset)
    assert same(resolve(str(folder)), subset)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [str(DATA), MANIFEST]
    assert os.listdir(tmp_path / "out") == ["math"]


def test_the_parquet_is_flat_and_any_tool_reads_it(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    folder = export(catalog, subset, tmp_path / "out")
    with duckdb.connect() as con:
        rows = con.execute("SELECT * FROM read_parquet(?)", [str(folder / DATA)])
        names = [c[0] for c in rows.description or []]
        row = dict(zip(names, rows.fetchall()[0], strict=True))
    first = subset.samples[0]
    assert row["input_ids"] == list(first.input_ids)
    assert row["n_tokens"] == len(first.input_ids) - first.n_prompt_tokens
    assert (row["verdict"], row["difficulty"], row["source"]) == ("correct", 0.5, "demo")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == row["question"]


def test_the_manifest_says_where_everything_comes_from(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    manifest = json.loads((export(catalog, subset, tmp_path / "out") / MANIFEST).read_text())
    assert manifest["content_hash"] == subset.content_hash
    assert manifest["recipe"]["name"] == "ssgr"
    assert (manifest["n_samples"], manifest["n_tokens"], manifest["schema"]) == (6, subset.n_tokens, MANIFEST_SCHEMA)
    assert manifest["runs"][0]["model"] == manifest["model"] == "tiny"
    assert manifest["sources"][0]["licence"] == "MIT"
    assert manifest["pool"]["taken"] == 6


def _prompted(path: Path) -> Catalog:
    """One problem with and one without a worked solution, run with a system prompt, then one without."""
    catalog = Catalog(path)
    problems = [make_problem(1), make_problem(2, metadata={"solution": "2 + 2 makes 4"})]
    catalog.add_problems(problems)
    for prompt in ("Think in French.", None):
        run = make_run("said", system_prompt=prompt, generation_key=f"key of {prompt}")
        catalog.add_run(run)
        catalog.add_traces([make_trace(problem, run) for problem in problems])
    return catalog


def test_messages_are_the_prompt_that_was_served_and_what_followed(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    catalog = _prompted(tmp_path / "c.duckdb")
    subset = select(catalog, "all", "rac")
    served = {
        row["trace_id"]: row
        for row in catalog.rows("SELECT t.*, r.system_prompt FROM trace t JOIN runs r USING (run_id)")
    }
    for row in pq.read_table(export(catalog, subset, tmp_path / "all") / DATA).to_pylist():
        system = served[row["trace_id"]]["system_prompt"]
        expected = [("system", system)] if system else []
        expected += [("user", row["question"]), ("assistant", served[row["trace_id"]]["text"])]
        assert [(m["role"], m["content"]) for m in row["messages"]] == expected
    assert {row["system_prompt"] for row in served.values()} == {"Think in French.", None}


@pytest.mark.parametrize("kind", ["prompt", "gold"])
@pytest.mark.parametrize("prompt", ["Think in French.", None])
def test_messages_of_prompts_and_gold_know_the_system_prompt_too(
    tmp_path: Path, kind: Literal["prompt", "gold"], prompt: str | None
) -> None:
    import pyarrow.parquet as pq

    catalog = _prompted(tmp_path / "c.duckdb")
    key = f"key of {prompt}"
    traces = catalog.rows("SELECT trace_id, problem_id FROM trace WHERE generation_key = ?", [key])
    samples = [
        Sample(versions.prompt_sample_id(kind, t["problem_id"], key), [1, 2], 2, kind, None, t["problem_id"])
        for t in traces
    ]
    recipe = {"name": kind}
    subset = Subset("x", 1, hash_samples(samples), recipe, 0, "said", "r1", "tok", samples)
    rows = pq.read_table(export(catalog, subset, tmp_path / "x") / DATA).to_pylist()
    system = [("system", prompt)] if prompt else []
    said = {row["question"]: [(m["role"], m["content"]) for m in row["messages"]] for row in rows}
    solutions = {"What is 1 + 1?": "2", "What is 2 + 2?": "2 + 2 makes 4"}
    for question, solution in solutions.items():
        assistant = [("assistant", solution)] if kind == "gold" else []
        assert said[question] == [*system, ("user", question), *assistant]


def test_the_manifest_tells_no_machine_path(tmp_path: Path) -> None:
    catalog, problem = Catalog(tmp_path / "c.duckdb"), make_problem()
    run = make_run(
        model_path="/home/me/models/tiny",
        command="/home/me/bin/calset build --model '/home/me/my models/tiny' --problems=/data/q.jsonl --limit 3 "
        "--server http://localhost:8000/v1 --out ~/runs/a here/b",
    )
    catalog.add_source(replace(make_source(), spec="/home/me/questions.jsonl"))
    catalog.add_problems([problem])
    catalog.add_run(run)
    catalog.add_traces([make_trace(problem, run)])
    text = (export(catalog, select(catalog, "x", "rac"), tmp_path / "out") / MANIFEST).read_text()
    assert not [word for word in ("/home", "/data", "~", "my models", str(tmp_path)) if word in text]
    manifest = json.loads(text)
    assert manifest["runs"][0]["command"] == (
        "calset build --model tiny --problems=q.jsonl --limit 3 --server http://localhost:8000/v1 --out a here/b"
    )
    assert manifest["sources"][0]["spec"] == "questions.jsonl"


def test_nulls_only_columns_keep_their_types(catalog: Catalog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    prompts = export(catalog, select(catalog, "prompts", "prompts"), tmp_path / "prompts")
    traces = export(catalog, select(catalog, "traces", "rac"), tmp_path / "traces")
    assert pq.read_schema(prompts / DATA).equals(pq.read_schema(traces / DATA))
    assert same(read_directory(prompts), load(catalog, "prompts"))


def test_export_again_is_fine_and_never_touches_anything_else(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    folder = export(catalog, subset, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert export(catalog, subset, folder) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    other = select(catalog, "math", samples=2)
    with pytest.raises(InputError, match=r"not math@2: name a new folder"):
        export(catalog, other, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        export(catalog, subset, tmp_path / "mine")
    with pytest.raises(InputError, match="is a file"):
        export(catalog, subset, tmp_path / "mine" / "notes.txt")
    (tmp_path / "empty").mkdir()
    export(catalog, subset, tmp_path / "empty")
    assert same(read_directory(folder), subset)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_an_export_that_fails_leaves_nothing(
    catalog: Catalog, subset: Subset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(CatalogError, match="No space left"):
        export(catalog, subset, tmp_path / "out" / "math")
    assert os.listdir(tmp_path / "out") == []


def _edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(changes)
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_a_tampered_folder_is_refused(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = export(catalog, subset, tmp_path / "good")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    table = pq.read_table(good / DATA)
    rows = table.to_pylist()
    rows[2]["input_ids"][5] += 1
    one_token = copy("one-token")
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), one_token / DATA)
    fewer = copy("fewer")
    pq.write_table(table.slice(0, 5), fewer / DATA)
    for folder in (one_token, fewer):
        with pytest.raises(InputError, match="content hash"):
            read_directory(folder)
    hashed = copy("hashed")
    _edit(hashed, content_hash="0" * 64)
    with pytest.raises(InputError, match="content hash"):
        read_directory(hashed)


def test_a_folder_that_is_not_an_export_says_why(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    good = export(catalog, subset, tmp_path / "good")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    newer, missing, unnamed, cut, nothing, words, column = map(
        copy, ["newer", "missing", "unnamed", "cut", "nothing", "words", "column"]
    )
    _edit(newer, schema=MANIFEST_SCHEMA + 1)
    _edit(missing, seed=None)
    _edit(unnamed, name="../x")
    (cut / DATA).write_bytes((good / DATA).read_bytes()[:500])
    (nothing / MANIFEST).unlink()
    (words / MANIFEST).write_text("[]")
    with duckdb.connect() as con:
        target = str(column / DATA)
        con.execute(
            f"COPY (SELECT sample_id FROM read_parquet('{good / DATA}')) TO '{target}' (FORMAT parquet)"
        ).fetchall()
    expected = {
        newer: "manifest schema 2, this calset knows 1",
        missing: "missing required field `seed`",
        unnamed: "cannot name a subset",
        cut: "cannot read",
        nothing: "not an exported subset",
        words: "no schema number",
        column: "cannot read",
    }
    for folder, message in expected.items():
        with pytest.raises(InputError, match=message) as caught:
            resolve(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("input_ids", None), ("input_ids", [1, None]), ("input_ids", ["1", "2"]), ("input_ids", [-1, 2]),
        ("input_ids", [2**31, 2]), ("input_ids", [2**63 - 1]), ("input_ids", [1.5]), ("input_ids", "12"),
        ("input_ids", [True]), ("n_prompt_tokens", None), ("n_prompt_tokens", -1), ("n_prompt_tokens", 10**6),
        ("n_prompt_tokens", "3"), ("sample_id", None), ("sample_id", 5), ("kind", "image"), ("kind", None),
        ("trace_id", 7), ("problem_id", [1]),
    ],
)  # fmt: skip
def test_rows_that_are_no_samples_are_one_clear_line(
    catalog: Catalog, subset: Subset, tmp_path: Path, column: str, value: object
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = export(catalog, subset, tmp_path / "out")
    table = pq.read_table(folder / DATA)
    odd = pa.array([value] * len(table))
    pq.write_table(table.set_column(table.column_names.index(column), column, odd), folder / DATA)
    with pytest.raises(InputError, match=rf"cannot read .*row 0 .*{column}.*export the subset again") as caught:
        read_directory(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"seed": float("inf")}, {"seed": [1]}, {"name": 3}, {"recipe": 5}, {"created_at": 1}, {"warnings": 2}]
)
def test_a_manifest_of_odd_values_is_one_clear_line(
    catalog: Catalog, subset: Subset, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = export(catalog, subset, tmp_path / "out")
    _edit(folder, **change)
    with pytest.raises(InputError, match="is not a calset manifest") as caught:
        read_directory(folder)
    assert "\n" not in str(caught.value)


def test_a_name_too_long_to_be_a_file_is_one_clear_line(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    for ref in ("x" * 300, "a/" + "x" * 300):
        with pytest.raises(InputError) as caught:
            resolve(ref, catalog)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot write"):
        export(catalog, subset, tmp_path / ("x" * 300))


def test_check_name_accepts_what_it_promises() -> None:
    for name in ("a", "math-ssgr_1.5", "0", "x" * 64):
        assert versions.check_name(name) == name


def test_an_export_of_a_trace_that_was_run_again_has_the_text_verdict_and_run_of_its_tokens(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c.duckdb")
    problem, first, second = make_problem(0), make_run(), replace(make_run(), run_id="again")
    old = make_trace(problem, first, 0, 5, text="cut short", finish_reason="length")
    new = make_trace(problem, second, 0, 9, text="to the end", attempt=1, completion_ids=(7, 8, 9))
    catalog.add_source(make_source())
    catalog.add_run(first)
    catalog.record([old], [make_grade(old, "truncated")], problems=[problem])
    select(catalog, "before", "rac")
    catalog.add_run(second)
    catalog.record([new], [make_grade(new)])
    select(catalog, "after", "rac")
    for name, trace, verdict in (("before", old, "truncated"), ("after", new, "correct")):
        folder = export(catalog, f"{name}@1", tmp_path / name)
        (row,) = pq.read_table(folder / "data" / "train.parquet").to_pylist()
        assert row["input_ids"][3:] == list(trace.completion_ids)
        assert (row["text"], row["verdict"], row["finish_reason"]) == (trace.text, verdict, trace.finish_reason)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert [run["run_id"] for run in manifest["runs"]] == [trace.run_id]
        page = report(catalog, f"{name}@1", tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert [text in page for text in ("cut short", "to the end")] == [trace is old, trace is new]


def test_no_folder_of_the_building_machine_is_in_the_engine_options(tmp_path: Path) -> None:
    options = {"download_dir": "/home/me/hub", "nested": {"files": ["/home/me/a.jsonl", "plain"]}, "n": 2}
    catalog, run, problem = Catalog(tmp_path / "c.duckdb"), make_run(), make_problem(0)
    run = replace(run, engine_options=options, command="calset build --engine-option download_dir=/home/me/hub")
    trace = make_trace(problem, run)
    catalog.add_source(make_source())
    catalog.add_run(run)
    catalog.record([trace], [make_grade(trace)], problems=[problem])
    select(catalog, "all", "rac")
    (made,) = json.loads((export(catalog, "all@1", tmp_path / "out") / "manifest.json").read_text())["runs"]
    assert made["engine_options"] == {"download_dir": "hub", "nested": {"files": ["a.jsonl", "plain"]}, "n": 2}
    assert made["command"] == "calset build --engine-option download_dir=hub"


def test_no_secret_of_an_engine_is_in_a_manifest(tmp_path: Path) -> None:
    options = {"hf_token": "hf_abc", "nested": {"API_KEY": "sk-1"}, "tokenizer": "org/t", "token_ids": "kept", "n": 2}
    catalog, run, problem = Catalog(tmp_path / "c.duckdb"), make_run(), make_problem(0)
    command = "calset build --engine http://me:pa55@host:8000/v1,https://t0ken@other --engine-option hf_token=hf_abc"
    command += """ --engine-option=hf_token=hf_abc --engine-option 'hf_overrides={"api_key": "sk-1", "n": 2}'"""
    trace = make_trace(problem, replace(run, engine_options=options, command=f"{command} --api-key=sk-1"))
    catalog.add_source(replace(make_source(), spec="hf:me/x?text=a@b"))
    catalog.add_run(replace(run, engine_options=options, command=f"{command} --api-key=sk-1"))
    catalog.record([trace], [make_grade(trace)], problems=[problem])
    select(catalog, "all", "rac")
    text = (export(catalog, "all@1", tmp_path / "out") / "manifest.json").read_text()
    assert not [secret for secret in ("hf_abc", "sk-1", "pa55", "t0ken@") if secret in text]
    (made,) = json.loads(text)["runs"]
    hidden = {"hf_token": "***", "nested": {"API_KEY": "***"}}
    assert made["engine_options"] == {**options, **hidden}
    assert shlex.split(made["command"])[2:] == [
        "--engine", "http://***@host:8000/v1,https://***@other", "--engine-option", "hf_token=***",
        "--engine-option=hf_token=***", "--engine-option", 'hf_overrides={"api_key": "***", "n": 2}', "--api-key=***",
    ]  # fmt: skip
    assert json.loads(text)["sources"][0]["spec"] == "hf:me/x?text=a@b"

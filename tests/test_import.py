"""Importing traces: the file's token ids stay, text is marked as tokenised, verdicts are our own, twice is once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from local_hub import Client, LocalHub

import calset
from calset import bundled, import_traces
from calset.builder.importing.layouts import Columns, Draft, RowError, drafts
from calset.builder.importing.report import ImportReport
from calset.builder.importing.tokenize import Tokenization
from calset.builder.model.info import ModelInfo, inspect
from calset.catalog.catalog import Catalog
from calset.errors import InputError
from calset.io.progress import Progress

PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=3&max_digits=2&size=6&seed=3"
OPENR1 = {"problem": "What is 1 + 2?", "answer": "3"}
ASKED = {"problem": "What is 1 + 2?"}  # without a reference no grader starts, which saves a second
GOOD = "<think>1 + 2</think>3"


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return inspect(bundled.MODEL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """18 real traces of the bundled model, some of them cut."""
    catalog = Catalog(tmp_path_factory.mktemp("built") / "built.duckdb")
    calset.build(bundled.MODEL, PROBLEMS, samples=3, catalog=catalog, engine="transformers", max_tokens=60)
    return catalog


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(tmp_path: Path, rows: list[Any], **options: Any) -> tuple[ImportReport, list[dict[str, Any]]]:
    """Import rows from one file; the report and the traces."""
    path = lines(tmp_path / "traces.jsonl", rows)
    catalog = Catalog(tmp_path / "c.duckdb")
    report = import_traces(options.pop("model", bundled.MODEL), path, catalog=catalog, **options)
    return report, catalog.query("FROM trace ORDER BY question, text").as_dicts()


def kept(catalog: Catalog) -> Counter[Any]:
    """What makes traces what they are, whatever their ids: problem, tokens, offsets, verdict."""
    sql = """
        SELECT t.problem_id, k.prompt_ids::VARCHAR, k.completion_ids::VARCHAR, t.reasoning_start, t.reasoning_end,
            t.answer_start, t.finish_reason, t.text, t.response, g.verdict, g.extracted
        FROM traces t JOIN trace_tokens k USING (trace_id, attempt) JOIN newest_grades g USING (trace_id, attempt)
    """
    return Counter(catalog.query(sql).rows)


def served(catalog: Catalog) -> list[dict[str, Any]]:
    """The traces as SGLang's collector writes them: token ids and where the prompt ends, no question, no answer."""
    rows = catalog.query("SELECT prompt_ids, completion_ids FROM trace_tokens ORDER BY ALL").rows
    return [{"input_ids": [*p, *c], "num_prompt_tokens": len(p), "num_decode_tokens": len(c)} for p, c in rows]


# -- the same as built ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_token_ids_of_a_file_become_the_traces_that_a_build_keeps(
    built: Catalog, tmp_path: Path, info: ModelInfo
) -> None:
    rows = [{**row, "text": info.tokenizer.decode(row["input_ids"])} for row in served(built)]
    path = lines(tmp_path / "traces.jsonl", rows)
    (tmp_path / "rac_manifest.json").write_text(
        json.dumps({"model_path": "org/tiny-lrm", "max_new_tokens": 60, "temperature": 0.6, "top_p": 0.95, "seed": 42})
    )
    catalog = Catalog(tmp_path / "c.duckdb")
    report = import_traces(bundled.MODEL, path, catalog=catalog, problems=PROBLEMS)
    assert (report.n_traces, report.n_from_file, report.n_matched, report.n_bad) == (18, 18, 18, 0)
    assert report.warnings == ()
    assert kept(catalog) == kept(built)
    sql = "SELECT problem_id, k, pass_rate, difficulty FROM problem ORDER BY 1"
    assert catalog.query(sql).rows == built.query(sql).rows
    (kept_run,) = catalog.runs()
    assert (kept_run.engine, kept_run.engine_version, kept_run.seed) == ("import", "token ids of the file", 42)
    assert kept_run.sampling == {"temperature": 0.6, "top_p": 0.95}
    assert kept_run.generation_key != built.runs()[0].generation_key
    assert calset.select(catalog, "all", "rac").n_tokens == calset.select(built, "all", "rac").n_tokens


@pytest.mark.slow
def test_text_is_tokenised_to_what_was_served_and_says_so(built: Catalog, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": text}],
            "answer": answer,
            "finish_reason": reason,
        }
        for q, answer, text, reason in built.query("SELECT question, answer, text, finish_reason FROM trace").rows
    ]
    report, _ = run(tmp_path, rows, problems=PROBLEMS)
    catalog = Catalog(tmp_path / "c.duckdb")
    assert (report.n_from_text, report.n_matched) == (18, 18)
    assert "18 traces were tokenised from their text" in report.warnings[0]
    (kept_run,) = catalog.runs()
    assert (kept_run.engine, kept_run.engine_version) == ("import", "tokenised from text")
    assert kept_run.engine_options is not None
    assert kept_run.engine_options["token_ids"] == "tokenised from text"
    # This model spells each text in one way, so even the ids are the served ones.
    assert kept(catalog) == kept(built)


@pytest.mark.slow
def test_an_exported_subset_comes_back(built: Catalog, tmp_path: Path) -> None:
    calset.select(built, "all", "rac")
    folder = calset.export(built, "all", tmp_path / "out")
    (data,) = folder.rglob("*.parquet")
    report = import_traces(bundled.MODEL, data, catalog=tmp_path / "c.duckdb", problems=PROBLEMS)
    assert (report.n_traces, report.n_from_file, report.n_bad) == (18, 18, 0)
    assert kept(Catalog(tmp_path / "c.duckdb")) == kept(built)


@pytest.mark.slow
def test_again_and_in_another_order_adds_nothing(built: Catalog, tmp_path: Path) -> None:
    rows = served(built)
    rows.append(rows[0])  # said twice: both count
    report, _ = run(tmp_path, rows, problems=PROBLEMS)
    assert report.n_traces == 19
    before = (tmp_path / "c.duckdb").read_bytes()
    random.Random(1).shuffle(rows)
    again, _ = run(tmp_path, rows, problems=PROBLEMS, commit_size=4)
    assert (again.n_traces, again.n_existing) == (0, 19)
    catalog = Catalog(tmp_path / "c.duckdb")
    assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM traces").rows == [(19, 19)]
    assert catalog.query("SELECT count(*) FROM grades").rows == [(19,)]
    assert len(before) > 0


# -- formats --------------------------------------------------------------------------------------------------------


def test_open_r1_rows_are_graded_here_whatever_they_say(tmp_path: Path) -> None:
    row = {
        **OPENR1,
        "solution": "Add them.",
        "problem_type": "Algebra",
        "generations": [GOOD, "<think>1 + 2</think>4", "<think>1 + ", "<think>1 +"],
        "correctness_math_verify": [False, True, True, True],
        "finish_reasons": ["stop", "stop", "length", None],
        "is_reasoning_complete": [True, True, False, False],
        "messages": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "other"}],
    }
    report, traces = run(tmp_path, [row])
    assert (report.n_traces, report.n_problems, report.n_rows) == (4, 1, 1)
    assert Counter(t["verdict"] for t in traces) == {"correct": 1, "incorrect": 1, "truncated": 2}
    assert {t["question"] for t in traces} == {"What is 1 + 2?"}
    problem = Catalog(tmp_path / "c.duckdb").problem(traces[0]["problem_id"])
    assert problem.metadata == {"solution": "Add them.", "problem_type": "Algebra"}


def test_reasons_of_other_servers_and_columns_of_the_wrong_kind(tmp_path: Path) -> None:
    texts = [f"<think>\\n{n}\\n</think>\\n\\n\\\\boxed{{{n}}}" for n in range(4)]
    reasons = ["eos_token", "max_tokens", {"type": "stop"}, "abort"]
    odd = {"problem": "1 + 2 = ?", "answer": "3", "generations": ["<think>3</think>3"], "finish_reasons": 5}
    rows = [{"problem": "1 + 1 = ?", "answer": "2", "generations": texts, "finish_reasons": reasons}, odd]
    report, kept_rows = run(tmp_path, [*rows, {**odd, "finish_reasons": "stop", "is_reasoning_complete": True}])
    found = Counter(row["finish_reason"] for row in kept_rows)
    assert (report.n_bad, found["length"], found["abort"]) == (0, 1, 2)
    assert found["stop"] >= 2
    assert any("'5'" in warning for warning in report.warnings)  # no reason that anybody writes: not taken for an end


def formats(question: str) -> list[dict[str, Any]]:
    """One trace in every format."""
    user = {"role": "user", "content": question}
    parts = {"role": "user", "content": [{"type": "text", "text": question}]}
    rendered = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return [
        {"messages": [user, {"role": "assistant", "content": GOOD}]},
        {"messages": [parts, {"role": "assistant", "content": "3", "reasoning_content": "1 + 2"}]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": GOOD}]},
        {"prompt": rendered, "completion": GOOD, "prompt_tokens": 19, "completion_tokens": 9},
        {"prompt": question, "completion": GOOD},
        {"prompt": [user], "completion": [{"role": "assistant", "content": GOOD}]},
        {"question": question, "generations": [GOOD]},
    ]


def test_each_format_gives_the_question_the_prompt_and_the_verdict(tmp_path: Path, info: ModelInfo) -> None:
    rows = [{**row, "answer": 3} for row in formats("What is 1 + 2?")]
    report, traces = run(tmp_path, rows)
    assert (report.n_traces, report.n_from_text, report.n_bad) == (len(rows), len(rows), 0)
    catalog = Catalog(tmp_path / "c.duckdb")
    expected = ("What is 1 + 2?", "3", "correct", "stop")
    for trace in traces:
        assert (trace["question"], trace["answer"], trace["verdict"], trace["finish_reason"]) == expected
        prompt, completion = catalog.tokens([(trace["trace_id"], 0)])[trace["trace_id"], 0]
        assert tuple(prompt) == info.prompt_ids("What is 1 + 2?")
        assert completion[-1] == info.tokenizer.eos_token_id
        assert trace["n_reasoning_tokens"] > 0
    texts = Counter(trace["text"] for trace in traces)
    assert texts == {GOOD: len(rows) - 1, "<think>\n1 + 2\n</think>\n\n3": 1}


def test_columns_of_other_names_and_rows_without_a_reference(tmp_path: Path) -> None:
    rows = [
        {"task": {"q": "What is 1 + 2?"}, "gold": "3", "generations": [GOOD]},
        {"task": {"q": "What is 1 + 1?"}, "gold": None, "generations": [GOOD]},
    ]
    report, traces = run(tmp_path, rows, question="task.q", answer="gold")
    assert [t["verdict"] for t in traces] == ["ungraded", "correct"]
    assert report.n_without_reference == 1
    assert "no reference answer" in report.warnings[-1]
    assert traces[0]["difficulty"] is None


def test_a_system_prompt_makes_a_run_of_its_own(tmp_path: Path, info: ModelInfo) -> None:
    said = {"role": "assistant", "content": GOOD}
    asked = {"role": "user", "content": "What is 1 + 2?"}
    rows = [{"messages": [{"role": "system", "content": s}, asked, said]} for s in ("one", "two", "one")]
    report, traces = run(tmp_path, rows)
    catalog = Catalog(tmp_path / "c.duckdb")
    assert sorted(str(r.system_prompt) for r in catalog.runs()) == ["one", "two"]
    assert (len(report.run_ids), len(traces), report.n_problems) == (2, 3, 1)
    prompts = {tuple(p) for p, _ in catalog.tokens([(t["trace_id"], 0) for t in traces]).values()}
    assert prompts == {info.prompt_ids("What is 1 + 2?", s) for s in ("one", "two")}


def test_each_import_is_a_run_that_names_its_own_file_and_problems(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c.duckdb")
    for name in ("a", "b"):
        lines(tmp_path / f"{name}-problems.jsonl", [{"question": ASKED["problem"], "answer": "3"}])
    saying = [lines(tmp_path / f"{i}.jsonl", [ASKED | {"generations": [f"{GOOD}{i}"]}]) for i in range(2)]

    def take(file: Path, problems: str) -> ImportReport:
        return import_traces(
            bundled.MODEL, file, catalog=catalog, problems=str(tmp_path / f"{problems}-problems.jsonl")
        )

    reports = [take(saying[0], "a"), take(saying[1], "a"), take(saying[0], "b")]
    # The same question and answer of two files of problems are two problems: their sources have two names.
    assert [(r.n_traces, r.n_existing) for r in reports] == [(1, 0)] * 3
    runs = {run.run_id: run.engine_options or {} for run in catalog.runs()}
    named = [{Path(runs[i][key]).name for i in r.run_ids for key in ("file", "problems")} for r in reports]
    assert named == [{"0.jsonl", "a-problems.jsonl"}, {"1.jsonl", "a-problems.jsonl"}, {"0.jsonl", "b-problems.jsonl"}]
    again = take(saying[0], "a")
    assert (again.n_traces, again.n_existing, again.run_ids) == (0, 1, reports[0].run_ids)
    assert len(catalog.runs()) == 3


def test_what_a_manifest_says_otherwise_is_another_run_of_the_traces_that_are_new(tmp_path: Path) -> None:
    path, catalog = tmp_path / "traces.jsonl", Catalog(tmp_path / "c.duckdb")
    rows = [ASKED | {"generations": [f"<think>1 + 2</think>{i}"]} for i in range(3)]

    def take(n: int, **told: int) -> ImportReport:
        (tmp_path / "rac_manifest.json").write_text(json.dumps(told))
        return import_traces(bundled.MODEL, lines(path, rows), catalog=catalog, limit=n)

    first, longer, seeded = (take(1, max_new_tokens=60), take(2, max_new_tokens=90), take(3, max_new_tokens=90, seed=7))
    assert [(r.n_traces, r.n_existing) for r in (first, longer, seeded)] == [(1, 0), (1, 1), (1, 2)]
    sql = "SELECT r.max_tokens, r.seed, count(*) FROM runs r JOIN traces t USING (run_id) GROUP BY ALL ORDER BY ALL"
    assert catalog.query(sql).rows == [(60, 0, 1), (90, 0, 1), (90, 7, 1)]
    nothing_new = take(3, max_new_tokens=120)
    runs = tuple(sorted(run.run_id for run in catalog.runs()))
    assert (nothing_new.n_existing, nothing_new.run_ids) == (3, runs)  # those that the traces are of: none says 120
    assert len(catalog.runs()) == 3


@pytest.fixture(scope="module")
def r1_style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a template that opens the thinking itself."""
    folder = tmp_path_factory.mktemp("models") / "r1-style"
    shutil.copytree(bundled.MODEL, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("assistant\n'", "assistant\n<think>\n'"))
    return folder


def test_thinking_that_the_template_opens_is_not_opened_twice(tmp_path: Path, r1_style: Path) -> None:
    info = inspect(r1_style)
    assert info.reasoning.opened_by_template
    row = {**ASKED, "generations": ["<think>\n1 + 2\n</think>\n\n3", "1 + 2\n</think>\n\n3"]}
    _, traces = run(tmp_path, [row], model=r1_style)
    catalog = Catalog(tmp_path / "c.duckdb")
    tokens = {t["trace_id"]: catalog.tokens([(t["trace_id"], 0)])[t["trace_id"], 0] for t in traces}
    texts = {info.tokenizer.decode([*p, *c]) for p, c in tokens.values()}
    assert texts == {
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n1 + 2\n</think>\n\n3<|im_end|>"
    }
    assert {t["response"].strip() for t in traces} == {"3"}


def test_a_question_is_found_under_a_system_prompt_that_nobody_named(info: ModelInfo) -> None:
    recover = Tokenization(info)
    for system in (None, "You are a helpful assistant."):
        draft = Draft(prompt_ids=info.prompt_ids("What is\n1 + 2?", system), completion_ids=(19, 2))
        assert recover.question(draft) == ("What is\n1 + 2?", system, True)
    named = Tokenization(info, "Think first.").question(Draft(prompt_ids=info.prompt_ids("Why?", "Think first.")))
    assert named == ("Why?", "Think first.", True)
    just_text = tuple(info.tokenizer("just a text", add_special_tokens=False)["input_ids"])
    free = recover.question(Draft(prompt_ids=just_text, completion_ids=(19, 2)))
    assert free == ("just a text", None, False)


# -- rows that are left out -----------------------------------------------------------------------------------------

BAD: list[tuple[Any, str]] = [
    ("not json", "is not JSON"),
    ("[1, 2]", "is not a JSON object but a list"),
    ({"foo": 1}, "holds no trace: it has none of generations, messages"),
    ({**OPENR1, "generations": []}, "has no list in generations"),
    ({**OPENR1, "generations": [None]}, "has no text in generations"),
    ({**OPENR1, "generations": ["\ud800"]}, "half a surrogate pair"),
    ({"messages": [{"role": "user", "content": "x"}]}, "is a conversation of user: "),
    ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]}, "one question"),
    ({"messages": ["x"]}, "a message that is no object"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]},
     "more than text"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "an empty answer"),
    ({"input_ids": [1, 2, 3]}, "no n_prompt_tokens or num_prompt_tokens"),
    ({"input_ids": [1, 2, 3], "num_prompt_tokens": 3}, "there must be a prompt and a completion"),
    ({"input_ids": [1, 2, "3"], "num_prompt_tokens": 1}, "no list of token ids in input_ids"),
    ({"input_ids": [1, True, 3], "num_prompt_tokens": 1}, "no list of token ids in input_ids"),
    ({"input_ids": [1, -2, 3], "num_prompt_tokens": 1}, "no list of token ids in input_ids"),
    ({"input_ids": [1, 2, 2**31], "num_prompt_tokens": 1}, "no list of token ids in input_ids"),
    ({"input_ids": [1, 2, 512], "num_prompt_tokens": 1}, "has the token id 512, outside the vocabulary of tiny-lrm"),
    ({"input_ids": [512, 2, 3], "num_prompt_tokens": 1}, "has the token id 512, outside the vocabulary of tiny-lrm"),
    ({"input_ids": [1, 2, 151_643], "num_prompt_tokens": 1}, "has the token id 151643"),
    ({"input_ids": [1, 311, 19], "num_prompt_tokens": 1, "text": "another text"}, "its token ids do not say"),
    ({"prompt_ids": [], "completion_ids": [1]}, "has no tokens in prompt_ids"),
]  # fmt: skip


def test_bad_rows_are_named_by_their_line_and_the_others_are_kept(tmp_path: Path) -> None:
    good = {**ASKED, "generations": [GOOD]}
    path = lines(tmp_path / "mixed.jsonl", [good, *(row for row, _ in BAD), {**good, "problem": "And 4?"}])
    path.write_bytes(path.read_bytes() + b'{"problem": "\xff\xfe", "generations": ["x"]}\n')
    report = import_traces(bundled.MODEL, path, catalog=tmp_path / "c.duckdb")
    assert (report.n_traces, report.n_bad) == (2, len(BAD) + 1)
    for number, (bad, (_, why)) in enumerate(zip(report.bad, [*BAD, ({}, "is not UTF-8 text")], strict=False), 2):
        line = number if number < len(BAD) + 2 else number + 1
        assert bad.where == f"{path}:{line}", bad
        assert why in bad.why, bad


def test_what_was_read_before_a_file_breaks_off_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text(json.dumps([{**ASKED, "generations": [GOOD]}])[:-1] + ', {"problem": ')
    with pytest.raises(InputError, match="row 2 is not JSON"):
        import_traces(bundled.MODEL, path, catalog=tmp_path / "c.duckdb")
    assert Catalog(tmp_path / "c.duckdb").query("SELECT response FROM trace").rows == [("3",)]


@pytest.mark.parametrize(
    "text",
    [
        '{"max_new_tokens": 1e400}', '{"max_new_tokens": 4294967296}', '{"max_new_tokens": -1}',
        '{"seed": 1000000000000000000000000000000}',
        '{"temperature": NaN}', '{"top_p": "x"}', '{"model_path": 5}', '{"system_prompt": ["x"]}', "[]",
        "[" * 100_000, "{",
    ],
)  # fmt: skip
def test_a_manifest_beside_traces_that_makes_no_sense_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "rac_manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"cannot read .*rac_manifest\.json: .*; repair it or take it away") as caught:
        run(tmp_path, [ASKED | {"generations": [GOOD]}])
    assert "\n" not in str(caught.value)
    assert not Catalog(tmp_path / "c.duckdb").exists()


def test_a_file_without_one_trace_is_an_error_that_quotes_the_first_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match=r"t\.jsonl holds no trace: .*t\.jsonl:1 holds no trace"):
        import_traces(bundled.MODEL, path, catalog=tmp_path / "c.duckdb")
    assert not (tmp_path / "c.duckdb").exists()


def test_a_draft_needs_no_answer_and_keeps_short_facts_only() -> None:
    row = {"problem": "q", "generations": ["x"], "uuid": "1", "long": "x" * 2000, "nested": [1], "level": 3}
    (draft,) = drafts(row, Columns())
    assert (draft.answer, draft.metadata) == (None, {"uuid": "1", "level": 3})
    with pytest.raises(RowError, match="no column 'nope'"):
        list(drafts(row, Columns(answer="nope")))


# -- whose traces ---------------------------------------------------------------------------------------------------


def test_traces_of_another_model_are_kept_as_its_own_when_named(tmp_path: Path, info: ModelInfo) -> None:
    rows = [{**ASKED, "generations": [GOOD], "model": "deepseek-ai/DeepSeek-R1"}]
    report, _ = run(tmp_path, rows)
    assert "--generated-by deepseek-ai/DeepSeek-R1" in report.warnings[0]
    (tmp_path / "c.duckdb").unlink()
    report, (trace,) = run(tmp_path, rows, generated_by="deepseek-ai/DeepSeek-R1")
    assert not any("--generated-by" in warning for warning in report.warnings)
    assert (trace["model"], trace["model_revision"]) == ("deepseek-ai/DeepSeek-R1", "unknown")
    subset = calset.select(tmp_path / "c.duckdb", "theirs", "rac")
    assert (subset.model, subset.tokenizer_hash) == ("deepseek-ai/DeepSeek-R1", info.tokenizer_hash)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grader": "nope"}, "unknown grader"),
        ({"grader": "gym"}, "--problems gym:TASK"),
        ({"template_options": {"nope": 1}}, "reads no option 'nope'"),
        ({"problems": "nope"}, "unknown problems"),
    ],
)
def test_bad_options_are_found_before_anything_is_read(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(tmp_path, [{**OPENR1, "generations": [GOOD]}], **options)
    assert not (tmp_path / "c.duckdb").exists()


# -- streams, the Hub, the command line -----------------------------------------------------------------------------


def test_progress_counts_rows_of_parquet_folders_and_limits(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(2):
        rows = [{"problem": f"What is {i} + {n}?", "generations": [GOOD]} for i in range(5)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{n}.parquet")
    events: list[Progress] = []
    report = import_traces(bundled.MODEL, folder, catalog=tmp_path / "c.duckdb", commit_size=3, progress=events.append)
    assert (report.n_rows, report.n_traces) == (10, 10)
    assert events[-1] == Progress("done", 10, 10, facts={"traces": 10, "there": 0, "bad": 0}, final=True)
    assert [e.facts["traces"] for e in events] == [3, 6, 9, 10, 10]
    assert Catalog(tmp_path / "c.duckdb").sources()[0].name == "shards"
    again = import_traces(bundled.MODEL, folder, catalog=tmp_path / "c.duckdb", limit=4)
    assert (again.n_rows, again.n_existing) == (4, 4)


@pytest.mark.slow
def test_the_command_line_reports_bad_lines_and_ends_well(tmp_path: Path) -> None:
    lines(tmp_path / "t.jsonl", [{**OPENR1, "generations": [GOOD]}, "oops\x1b[31m"])
    done = warm.calset("import", "t.jsonl", "--model", bundled.MODEL, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "t.jsonl:2 is not JSON" in done.stderr
    assert "\x1b" not in done.stderr
    assert json.loads(done.stdout)["verdicts"] == {"correct": 1}
    done = warm.calset("import", "none.jsonl", "--model", bundled.MODEL, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "calset: no file none.jsonl"
    done = warm.calset("import", "t.jsonl", "--model", bundled.MODEL, "--catalog", "b.duckdb", cwd=tmp_path)
    assert "1 new traces of 1 problems" in done.stdout
    done = warm.calset("merge", "b.duckdb", "none.duckdb", cwd=tmp_path)
    assert (done.returncode, "there is no catalog at none.duckdb" in done.stderr) == (2, True)
    done = warm.calset("merge", "b.duckdb", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["n_added"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_import_is_finished_by_the_same_command(tmp_path: Path) -> None:
    rows = [
        {"problem": f"What is {n} + 1?", "answer": str(n + 1), "generations": [GOOD, f"<think>{n} + 1</think>{n + 1}"]}
        for n in range(400)
    ]
    lines(tmp_path / "t.jsonl", rows)
    import_traces(bundled.MODEL, tmp_path / "t.jsonl", catalog=tmp_path / "whole.duckdb")
    code = """if True:
        import sys, calset
        def said(event): print(event.facts["traces"], flush=True)
        calset.import_traces(*sys.argv[1:3], catalog=sys.argv[3], commit_size=32, progress=said)
    """
    command = ("python", "-c", code, bundled.MODEL, tmp_path / "t.jsonl", tmp_path / "c.duckdb")
    found = []
    for commits in (1, 3, 1):
        read, write = os.pipe()
        process = warm.warm().start(*command, cwd=tmp_path, streams=[0, write, 2])
        os.close(write)
        with open(read) as said:
            saved = [int(said.readline()) for _ in range(commits)][-1]
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        found.append(
            Catalog(tmp_path / "c.duckdb").query("SELECT count(*) FROM traces JOIN grades USING (trace_id)").rows[0][0]
        )
        assert found[-1] >= (found[-2] if len(found) > 1 else 0) + saved
    assert 0 < found[0] < 800
    report = import_traces(bundled.MODEL, tmp_path / "t.jsonl", catalog=tmp_path / "c.duckdb")
    assert (report.n_traces + report.n_existing, report.n_existing > 0) == (800, True)
    assert kept(Catalog(tmp_path / "c.duckdb")) == kept(Catalog(tmp_path / "whole.duckdb"))


def import_from_hub(spec: str, catalog: Path) -> ImportReport:
    """Runs in the client's process."""
    return import_traces(bundled.MODEL, spec, catalog=catalog)


@pytest.mark.slow
def test_a_dataset_on_the_hub_is_imported_at_its_commit(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": GOOD}]}
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{**row, "num_tokens": 9, "source": "x"}]), table)
    sha = hub.commit("org/mixture", {"data/train-00000-of-00001.parquet": table.getvalue().to_pybytes()})
    report = client(import_from_hub, "hf:org/mixture", tmp_path / "c.duckdb")
    assert report.n_traces == 1
    (source,) = Catalog(tmp_path / "c.duckdb").sources()
    assert (source.kind, source.revision, source.name) == ("hub", str(sha), "org/mixture:train")

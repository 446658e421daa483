"""References, questions and conversations in the shapes that public files have; rows without a problem left out."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from hypothesis import given
from hypothesis import strategies as st
from test_import import ASKED, GOOD, OPENR1, lines, run

import calset
from calset import bundled
from calset.builder.importing.layouts import Columns, Draft, RowError, drafts
from calset.builder.model.info import inspect
from calset.builder.problems import load_problems, open_problems
from calset.builder.problems.columns import Columns as ProblemColumns
from calset.builder.problems.values import Unreadable, look_up, reference_of, text_of
from calset.catalog.catalog import Catalog
from calset.errors import BuildWarning, InputError
from calset.io.hub import lay_out

USER, SAID = {"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": GOOD}


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path
    return lines(path, rows)


# --- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("42", "42"), (42, "42"), (0.1, "0.1"), (42.0, "42.0"), (["42"], "42"), ([42], "42"), ([["42"]], "42"),
        (("42",), "42"), (["42", "42"], "42"), (["42", None], "42"), (Decimal("0.10"), "0.10"), (1e-05, "0.00001"),
        (1e22, "1" + "0" * 22), (Decimal("1E+3"), "1000"), (-2.5e-07, "-0.00000025"), (0, "0"), ("  ", None),
        ([], None), (None, None), ([None], None), (float("nan"), None), ([float("nan")], None), (Decimal("NaN"), None),
        ("nan", None), ("NaN", None), ("none", "none"), ("[1, 2]", "[1, 2]"), ("banana", "banana"),
    ],
)  # fmt: skip
def test_a_reference_is_read_as_it_is_written(value: Any, text: str | None) -> None:
    assert reference_of(value) == text


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (["42", "43"], "a list of 2"),
        (True, "a bool"),
        ({"value": 1}, "a dict"),
        ([{"a": 1}], "a dict"),
        (b"x", "a bytes"),
    ],
)
def test_a_reference_that_is_no_text_is_named(value: Any, what: str) -> None:
    with pytest.raises(Unreadable, match=what):
        reference_of(value)


@given(
    st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.decimals(allow_nan=False, allow_infinity=False)
)
def test_a_number_as_text_is_the_number(value: Any) -> None:
    text = text_of(value)
    assert text is not None
    assert type(value)(text) == value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a", 1), ("b.c", 2), ("d.0", 3), ("d.-1", 4), ("e.1.f", 5), ("g.h.0", 6), ("dotted.name", 7), ("i.1.j", 8),
        ("b.x", None), ("d.9", None), ("d.c", None), ("a.b", None), ("b.c.0", None), ("none.0", None), ("d.²", None),
    ],
)  # fmt: skip
def test_a_path_goes_through_objects_lists_and_json_text(path: str, value: Any) -> None:
    row = {"a": 1, "b": {"c": 2}, "d": [3, 4], "e": [{}, {"f": 5}], "g": '{"h": [6]}', "dotted.name": 7, "none": None,
           "i": {"1": {"j": 8}}}  # fmt: skip
    assert look_up(row, path) == value


REFERENCES: list[tuple[dict[str, Any], str | None]] = [
    ({"answer": ["3"]}, None),
    ({"final_answer": ["3"]}, None),
    ({"final_answer": ["3", "4"]}, "final_answer.0"),
    ({"messages": [{**USER, "info": {"reference_answer": "3"}}, SAID]}, "messages.0.info.reference_answer"),
    ({"reward_model": {"ground_truth": "3", "style": "rule"}}, None),
    ({"reward_model": {"ground_truth": ["3"]}}, None),
    ({"extra_info": '{"answer": ["3"]}'}, "extra_info.answer"),
]


@pytest.mark.parametrize(("row", "named"), REFERENCES)
def test_an_import_finds_references_in_lists_and_behind_paths(
    tmp_path: Path, row: dict[str, Any], named: str | None
) -> None:
    rows = [{"messages": [USER, SAID], **row}]
    report, (trace,) = run(tmp_path, rows, answer=named)
    assert (trace["verdict"], trace["answer"], report.n_without_reference) == ("correct", "3", 0)


@pytest.mark.parametrize(("value", "what"), [(["3", "4"], "a list of 2 in answer"), (True, "a bool in answer")])
def test_a_reference_that_is_several_or_none_is_reported(tmp_path: Path, value: Any, what: str) -> None:
    report, _ = run(tmp_path, [{**ASKED, "answer": value, "generations": [GOOD]}])
    assert report.n_without_reference == 1
    assert any(f"1 traces have {what} for a reference answer" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "kind", [pa.float32(), pa.float16(), pa.decimal128(3, 1), pa.float64(), pa.list_(pa.float32())]
)
def test_numbers_of_parquet_are_the_ones_that_were_written(tmp_path: Path, kind: pa.DataType) -> None:
    value: Any = Decimal("0.1") if pa.types.is_decimal(kind) else [0.1] if pa.types.is_list(kind) else 0.1
    schema = pa.schema([("question", pa.string()), ("answer", kind), ("generations", pa.list_(pa.string()))])
    rows = [{"question": "1/10?", "answer": value, "generations": ["<think>a</think>0.1"]},
            {"question": "and?", "answer": None, "generations": ["<think>a</think>0.1"]}]  # fmt: skip
    path = write(tmp_path / "a.parquet", rows, schema)
    assert [p.answer for p in open_problems(str(path), limit=1)] == ["0.1"]
    report = calset.import_traces(bundled.MODEL, path, catalog=tmp_path / "c.duckdb")
    assert report.n_without_reference == 1
    assert sorted(Catalog(tmp_path / "c.duckdb").query("SELECT answer FROM trace").rows) == [("",), ("0.1",)]


def test_float32_inside_objects_and_maps_too(tmp_path: Path) -> None:
    inner = pa.struct([("value", pa.float32()), ("more", pa.map_(pa.string(), pa.list_(pa.float32())))])
    schema = pa.schema([("question", pa.string()), ("final", inner)])
    row = {"question": "q", "final": {"value": 0.1, "more": [("a", [0.2, None])]}}
    path = write(tmp_path / "a.parquet", [row, {"question": "r", "final": None}], schema)
    source = open_problems(str(path), answer="final.value", limit=1)
    assert [p.answer for p in source] == ["0.1"]
    assert [p.answer for p in open_problems(str(path), answer="final.more.a.0", limit=1)] == ["0.2"]


# --- conversations -------------------------------------------------------------------------------------------------

CHATS: list[Any] = [
    [USER, SAID],
    {"role": ["user", "assistant"], "content": [USER["content"], GOOD]},
    [[["role", "user"], ["content", USER["content"]]], [["role", "assistant"], ["content", GOOD]]],
    json.dumps([USER, SAID]),
    json.dumps({"role": ["user", "assistant"], "content": [USER["content"], GOOD]}),
    [json.dumps(USER), json.dumps(SAID)],
    [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": GOOD}],
    [{"role": "user", "parts": [{"text": USER["content"]}]}, {"role": "model", "parts": [{"text": GOOD}]}],
]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("chat", CHATS)
def test_a_conversation_is_read_in_every_shape(chat: Any, column: str) -> None:
    (draft,) = drafts({column: chat}, Columns())
    assert (draft.question, draft.text) == (USER["content"], GOOD)


def test_messages_as_python_prints_them_are_named() -> None:
    with pytest.raises(RowError, match="has messages that are text, and not JSON of messages"):
        list(drafts({"messages": str([USER, SAID])}, Columns()))


def test_a_conversation_of_parquet_maps_is_read(tmp_path: Path) -> None:
    schema = pa.schema([("messages", pa.list_(pa.map_(pa.string(), pa.string())))])
    row = {"messages": [list(USER.items()), list(SAID.items())]}
    calset.import_traces(bundled.MODEL, write(tmp_path / "t.parquet", [row], schema), catalog=tmp_path / "c.duckdb")
    assert Catalog(tmp_path / "c.duckdb").query("SELECT question, response FROM trace").rows == [(USER["content"], "3")]


PROMPT = [{"role": "user", "content": "What is 1 + 2?"}]
ASKING: list[Any] = [PROMPT, json.dumps(PROMPT), {"role": ["user"], "content": ["What is 1 + 2?"]}, PROMPT[0],
                     [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 2?"}]}]]  # fmt: skip


@pytest.mark.parametrize("prompt", ASKING)
def test_a_question_may_be_a_list_of_messages(tmp_path: Path, prompt: Any) -> None:
    row = {"prompt": prompt, "reward_model": {"ground_truth": "3", "style": "rule"}, "data_source": "dapo"}
    path = write(tmp_path / "q.jsonl", [row])
    (problem,) = open_problems(f"{path}?question=prompt&answer=reward_model.ground_truth")
    assert (problem.question, problem.answer, problem.metadata["data_source"]) == ("What is 1 + 2?", "3", "dapo")
    (draft,) = drafts({**row, "output": GOOD}, Columns("prompt", completion=("output",)))
    assert (draft.question, draft.answer, draft.text) == ("What is 1 + 2?", "3", GOOD)


def test_a_system_prompt_of_a_question_is_kept(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, *PROMPT]
    (problem,) = open_problems(str(write(tmp_path / "q.jsonl", [{"question": prompt, "answer": "3"}])))
    assert (problem.question, problem.metadata["system_prompt"]) == ("What is 1 + 2?", "Be brief.")
    (draft,) = drafts({"question": prompt, "generations": [GOOD]}, Columns())
    assert (draft.question, draft.system_prompt) == ("What is 1 + 2?", "Be brief.")


def test_a_question_of_several_turns_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": [USER, SAID, USER], "answer": "3"}])
    with pytest.raises(InputError, match="holds a conversation of user, assistant, user in column 'question'"):
        load_problems(str(path))


# --- generations ---------------------------------------------------------------------------------------------------


def test_one_null_among_generations_costs_only_itself(tmp_path: Path) -> None:
    rows = [{**OPENR1, "generations": [GOOD, None, "<think>a</think>4", "", {"content": None}, ["x", 1]]}]
    report, traces = run(tmp_path, rows)
    assert (report.n_traces, report.n_bad) == (2, 4)
    assert sorted(t["verdict"] for t in traces) == ["correct", "incorrect"]
    assert report.bad[0].where.endswith("traces.jsonl:1")
    assert report.bad[0].why == "has no text in generations (2 of 6)"
    (tmp_path / "c.duckdb").unlink()
    report, _ = run(tmp_path, [*rows, {**OPENR1, "generations": [None, "", None]}])
    assert (report.n_traces, report.n_bad) == (2, 5)  # a row of nothing else is one bad row
    assert report.bad[-1].why == "has no text in generations (1 of 3)"


def test_generations_may_be_an_object_of_lists() -> None:
    row = {**ASKED, "generations": {"text": [GOOD, "4"], "finish_reason": ["stop", "length"]}}
    assert [(d.text, d.end and d.end.reason) for d in drafts(row, Columns())] == [(GOOD, "stop"), ("4", "length")]


# --- choices -------------------------------------------------------------------------------------------------------

ARC = {"text": ["Rome", "Paris"], "label": ["A", "B"]}
CHOICES: list[tuple[Any, str, Any]] = [
    (ARC, "B", ["Rome", "Paris"]),
    (["Rome", "Paris"], "B", ["Rome", "Paris"]),
    ({"text": ["Rome", "Paris"], "label": ["1", "2"]}, "2", ["Rome", "Paris"]),
    ([{"label": "A", "text": "Rome"}, {"label": "B", "text": "Paris"}], "B", ["Rome", "Paris"]),
    ({"A": "Rome", "B": "Paris"}, "B", ["Rome", "Paris"]),
    ({"text": ["Rome", "Paris"], "label": ["B", "A"]}, "A", {"B": "Rome", "A": "Paris"}),
    (json.dumps(ARC), "B", ["Rome", "Paris"]),
]


@pytest.mark.parametrize(("choices", "answer", "kept"), CHOICES)
def test_choices_are_kept_and_graded_by(tmp_path: Path, choices: Any, answer: str, kept: Any) -> None:
    row = {"question": "The capital of France?", "choices": choices, "answer": answer}
    (problem,) = open_problems(str(write(tmp_path / "q.jsonl", [row])))
    rows = [{**row, "generations": ["<think>a</think>\\boxed{Paris}", "<think>a</think>\\boxed{Rome}"]}]
    _, traces = run(tmp_path, rows, grader="choice")
    assert sorted(t["verdict"] for t in traces) == ["correct", "incorrect"]
    imported = Catalog(tmp_path / "c.duckdb").problem(traces[0]["problem_id"])
    assert problem.metadata["choices"] == imported.metadata["choices"] == kept
    assert problem.answer == imported.answer
    assert problem.answer in "AB"


def test_a_dataset_on_the_hub_keeps_its_choices_and_reads_no_other_nested_column() -> None:
    columns = ProblemColumns("question", "answerKey", short=True)
    names = {"question": False, "answerKey": False, "choices": True, "traces": True, "id": False}
    assert columns.choose(names, "arc") == ["question", "answerKey", "choices", "id"]
    draft = columns.draft({"question": "q", "answerKey": "2", "choices": {"text": ["a", "b"], "label": ["1", "2"]}})
    assert draft is not None
    assert (draft.answer, draft.metadata) == ("B", {"choices": ["a", "b"]})
    draft = columns.draft({"question": "q", "answerKey": "2", "choices": ["x"] * 40})
    assert draft is not None
    assert draft.metadata == {}


def test_what_is_called_choices_and_is_none_is_left_alone(tmp_path: Path) -> None:
    (draft,) = drafts({**ASKED, "generations": [GOOD], "choices": [{"message": SAID}]}, Columns())
    assert "choices" not in draft.metadata


# --- bad rows of problem sources -----------------------------------------------------------------------------------

BAD_ROWS: list[tuple[Any, str]] = [
    ({"question": "a?", "answer": None}, "holds nothing in column 'answer'"),
    ({"question": None, "answer": "1"}, "holds nothing in column 'question'"),
    ({"question": "b?", "answer": float("nan")}, "holds nothing in column 'answer'"),
    ({"question": "c?", "answer": ["1", "2"]}, "holds a list of 2 in column 'answer'; .*answer.0"),
    ({"question": "d?"}, "has no column 'answer'"),
    ({"question": ["e?"], "answer": "1"}, "holds a list in column 'question'"),
    ("not JSON", "is not JSON"),
    ("[1]", "is not a JSON object but a list"),
]
GOOD_ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]


def mixed(path: Path) -> Path:
    return lines(path, [GOOD_ROWS[0], *(row for row, _ in BAD_ROWS), *GOOD_ROWS[1:]])


def test_rows_without_a_problem_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = mixed(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match=r"q\.jsonl:2 holds nothing in column 'answer'.*skip_bad="):
        load_problems(str(path))
    source = open_problems(str(path), skip_bad=True)
    for _ in range(2):  # read again: the same rows
        assert [p.question for p in source] == [row["question"] for row in GOOD_ROWS]
        assert len(source.bad) == len(BAD_ROWS)
    for row, (number, (_, why)) in zip(source.bad.first, enumerate(BAD_ROWS, 2), strict=True):
        assert row.where == f"{path}:{number}"
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(row.why)
    with pytest.warns(BuildWarning, match=r"8 rows of .*q\.jsonl hold no problem and are left out: .*q\.jsonl:2 holds"):
        assert len(load_problems(str(path), skip_bad=True)[1]) == 3


def test_a_source_of_nothing_but_bad_rows_is_an_error_that_quotes_the_first(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match=r"holds no problems: .*q\.jsonl:1 has no column 'question'"):
        load_problems(str(path), skip_bad=True)


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv"])
def test_bad_rows_of_every_format_are_left_out(tmp_path: Path, suffix: str) -> None:
    rows = [GOOD_ROWS[0], {"question": "a?", "answer": None}, GOOD_ROWS[1]]
    path = tmp_path / f"q{suffix}"
    if suffix == ".parquet":
        write(path, rows)
    elif suffix == ".csv":
        path.write_text("question,answer\n0 + 1?,1\na?,\n1 + 1?,2\n")
    else:
        path.write_text(json.dumps([*rows, 5]))
    source = open_problems(str(path), skip_bad=True)
    assert [p.answer for p in source] == ["1", "2"]
    assert len(source.bad) == (2 if suffix == ".json" else 1)


def test_a_build_says_which_rows_it_left_out(tmp_path: Path, scripted_engine: Any) -> None:
    path = mixed(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="skip_bad="):
        calset.build(
            bundled.MODEL,
            str(path),
            catalog=tmp_path / "c.duckdb",
            engine=scripted_engine(inspect(bundled.MODEL).revision),
        )
    report = calset.build(
        bundled.MODEL, str(path), samples=1, max_tokens=20, catalog=tmp_path / "c.duckdb",
        engine=scripted_engine(inspect(bundled.MODEL).revision), skip_bad=True,
    )  # fmt: skip
    assert (report.n_problems, report.n_bad, len(report.bad)) == (3, len(BAD_ROWS), len(BAD_ROWS))
    assert any("8 rows of" in warning for warning in report.warnings)
    planned = calset.dry_run(
        bundled.MODEL, str(path), catalog=tmp_path / "d.duckdb", tokens_per_second=10, skip_bad=True
    )
    assert any("8 rows of" in warning for warning in planned.warnings)


def test_an_import_leaves_out_rows_of_its_problems(tmp_path: Path) -> None:
    path = lines(tmp_path / "problems.jsonl", [{"question": "a?"}, {"question": ASKED["problem"], "answer": "3"}])
    rows = [{**ASKED, "generations": [GOOD]}]
    with pytest.raises(InputError, match="has no column 'answer'"):
        run(tmp_path, rows, problems=str(path))
    report, (trace,) = run(tmp_path, rows, problems=str(path), skip_bad=True)
    assert (trace["verdict"], report.n_matched) == ("correct", 1)
    assert any("1 rows of" in warning for warning in report.warnings)


@pytest.mark.slow
def test_the_command_line_leaves_bad_rows_out_and_names_them(tmp_path: Path) -> None:
    mixed(tmp_path / "q.jsonl")
    done = warm.calset("problems", "q.jsonl", cwd=tmp_path)
    assert (done.returncode, "q.jsonl:2 holds nothing" in done.stderr, "--skip-bad" in done.stderr) == (2, True, True)
    done = warm.calset("problems", "q.jsonl", "--skip-bad", "--json", "--count", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (found["n"], found["n_bad"]) == (3, len(BAD_ROWS))
    assert "q.jsonl:9 is not a JSON object" in done.stderr
    build = ("build", "--model", bundled.MODEL, "--problems", "q.jsonl", "--samples", "1", "--max-tokens", "8")
    done = warm.calset(*build, "--skip-bad", "--engine", "transformers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "q.jsonl:9 is not a JSON object" in done.stderr
    lines(
        tmp_path / "e.jsonl",
        [{"question": "a?"}, {"question": "What is five plus six plus seven plus one?", "answer": 1}],
    )
    decontaminate = ("decontaminate", "--against", "e.jsonl", "--problems", "q.jsonl", "--skip-bad", "--json")
    done = warm.calset(*decontaminate, cwd=tmp_path)
    assert json.loads(done.stdout)["n_checked"] == 3, done.stderr
    assert "1 rows of e.jsonl hold no problem" in done.stderr


# --- --completion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "texts"),
    [
        ({**ASKED, "out": GOOD}, ("out",), [GOOD]),
        ({**ASKED, "out": {"text": [GOOD, "4"]}}, ("out.text",), [GOOD, "4"]),
        ({**ASKED, "a": GOOD, "b": "4"}, ("a", "b"), [GOOD, "4"]),
        ({**ASKED, "a": GOOD, "b": None}, ("a", "b"), [GOOD]),
        ({**ASKED, "b": GOOD}, ("a", "b"), [GOOD]),
        ({**ASKED, "r": {"choices": [{"message": SAID}]}}, ("r.choices.0.message",), [GOOD]),
        ({**ASKED, "r": {"choices": [{"message": SAID}]}}, ("r.choices",), [GOOD]),
        ({**ASKED, "r": json.dumps({"choices": [{"message": SAID}]})}, ("r.choices.0.message.content",), [GOOD]),
        ({"messages": [USER, SAID]}, ("messages.-1.content",), [GOOD]),
        ({"prompt": [USER], "responses": [GOOD, "4"]}, ("responses",), [GOOD, "4"]),
        ({**ASKED, "out": [USER, SAID]}, ("out",), [GOOD]),
        ({**ASKED, "out": [{"type": "text", "text": GOOD}]}, ("out",), [GOOD]),
        ({**ASKED, "out": "[1, 2]"}, ("out",), ["[1, 2]"]),
    ],
)
def test_any_column_or_path_can_be_the_completion(
    row: dict[str, Any], columns: tuple[str, ...], texts: list[str]
) -> None:
    found = list(drafts(row, Columns(completion=columns)))
    assert [draft.text for draft in found] == texts
    assert {draft.question for draft in found} == {USER["content"]}


@pytest.mark.parametrize("said", ['[{"type": "string"}]', '["42"]', "[1, 2]", '{"a": 1}', '{"text": "x"}'])
def test_an_answer_that_is_json_stays_text(said: str) -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": said}]}, {**ASKED, "generations": [said]},
            {"prompt": "q", "completion": said}, {**ASKED, "out": said}]  # fmt: skip
    for row in rows:
        (draft,) = drafts(row, Columns(completion=("out",) if "out" in row else ()))
        assert draft.text == said


def test_what_stands_on_the_way_to_a_completion_says_how_it_ended() -> None:
    choice = {"message": SAID, "finish_reason": "length"}
    row = {**ASKED, "r": {"choices": [choice, {**choice, "finish_reason": "stop"}]}}
    for path in ("r.choices.0.message", "r.choices.0.message.content", "r.choices.0"):
        (draft,) = drafts(row, Columns(completion=(path,)))
        assert draft.end is not None
        assert draft.end.reason == "length"
    assert [d.end and d.end.reason for d in drafts(row, Columns(completion=("r.choices",)))] == ["length", "stop"]
    sglang = {**ASKED, "out": {"text": GOOD, "meta_info": {"finish_reason": {"type": "length"}}}}
    (draft,) = drafts(sglang, Columns(completion=("out.text",)))
    assert draft.end is not None
    assert draft.end.reason == "length"


def test_thinking_in_a_column_of_its_own() -> None:
    row = {**ASKED, "attempt": "3", "thought": ["1 + 2"], "other": "4", "second": "2 + 2"}
    (draft,) = drafts(row, Columns(completion=("attempt",), thinking=("thought",)))
    assert (draft.text, draft.reasoning) == ("3", "1 + 2")
    both = Columns(completion=("attempt", "other"), thinking=("thought", "second"))
    assert [(d.text, d.reasoning) for d in drafts(row, both)] == [("3", "1 + 2"), ("4", "2 + 2")]
    (cut,) = drafts({**row, "attempt": None}, Columns(completion=("attempt",), thinking=("thought",)))
    assert (cut.text, cut.reasoning) == ("", "1 + 2")


@pytest.mark.parametrize(
    ("row", "columns", "why"),
    [
        ({**ASKED, "out": GOOD}, Columns(completion=("nope",)), "has no column 'nope' \\(--completion\\)"),
        ({**ASKED, "out": GOOD}, Columns(completion=("out",), thinking=("nope",)), "no column 'nope' \\(--thinking\\)"),
        ({**ASKED, "out": None}, Columns(completion=("out",)), "has no text in out"),
        ({**ASKED, "out": 5}, Columns(completion=("out",)), "has no text in out"),
        ({"out": GOOD}, Columns(completion=("out",)), "has no question in problem, question, .*--question"),
        (
            {**ASKED, "a": "1", "b": "2", "c": "3"},
            Columns(completion=("a", "b", "c"), thinking=("a", "b")),
            "3 columns",
        ),
    ],
)
def test_a_completion_that_is_not_there_is_one_clear_line(row: dict[str, Any], columns: Columns, why: str) -> None:
    with pytest.raises(RowError, match=why):
        list(drafts(row, columns))


def test_rows_that_nest_too_deep_are_left_out() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(RowError, match=r"nests too deep|holds a"):
        list(
            drafts(
                {**ASKED, "generations": [GOOD], "reasoning": deep, "meta_info": deep, "question": deep},
                Columns("question"),
            )
        )
    assert Draft().end is None


def test_thinking_without_a_completion_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name that one too"):
        run(tmp_path, [{**ASKED, "generations": [GOOD]}], thinking="thought")


# --- the Hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "files", "expected"),
    [
        ({}, [".cache/train.jsonl", "data/train.jsonl"], ("data/train.jsonl",)),
        ({}, ["data/.hidden/train.jsonl", "data/train.jsonl", "__old__/train.jsonl"], ("data/train.jsonl",)),
        ({}, [".train.jsonl", "train.jsonl"], ("train.jsonl",)),
        ({"configs": [{"data_files": "**/*.jsonl"}]}, [".cache/a.jsonl", "data/a.jsonl"], ("data/a.jsonl",)),
        ({"configs": [{"data_files": ".cache/*.jsonl"}]}, [".cache/a.jsonl", "data/a.jsonl"], (".cache/a.jsonl",)),
        ({"configs": [{"data_dir": "data"}]}, ["data/.x/train.jsonl", "data/train.jsonl"], ("data/train.jsonl",)),
    ],
)
def test_hidden_folders_of_a_repository_are_no_data(
    card: dict[str, Any], files: list[str], expected: tuple[str, ...]
) -> None:
    assert lay_out(card, sorted(files)) == {"default": {"train": expected}}

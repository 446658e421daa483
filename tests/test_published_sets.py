"""docs/import.md's command for each published set, on rows of the schema that the set publishes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from test_import import lines
from test_import import r1_style as r1_style  # a fixture

from calset import bundled, import_traces
from calset.catalog.catalog import Catalog
from calset.cli import cli

DOCS = Path(__file__).parents[1] / "docs" / "import.md"
Q = "What is 1 + 2?"
THOUGHT, ANSWER = "One and two, or \\boxed{4}? No.", "So it is \\boxed{3}."
WHOLE = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
BEGIN = f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>{ANSWER}<|end_of_solution|>"

# Spec of the documented command -> a row of the set's schema.
ROWS: dict[str, dict[str, Any]] = {
    "hf:open-r1/OpenR1-Math-220k": {
        "problem": Q, "solution": "Add.", "answer": "3", "problem_type": "Algebra", "question_type": "MCQ",
        "source": "olympiads", "uuid": "u", "is_reasoning_complete": [True, False],
        "generations": [WHOLE, "<think>\n1"],
        "correctness_math_verify": [True, False], "correctness_llama": None, "finish_reasons": None,
        "correctness_count": 1, "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": WHOLE}],
    },
    "hf:open-r1/Mixture-of-Thoughts?config=math": {
        "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": WHOLE}], "num_tokens": 9,
        "source": "open-r1/OpenR1-Math-220k",
    },
    "hf:open-thoughts/OpenThoughts-114k?config=metadata": {
        "problem": Q, "deepseek_reasoning": THOUGHT, "deepseek_solution": ANSWER, "ground_truth_solution": "Add.",
        "domain": "math", "source": "numina_math", "test_cases": None, "starter_code": None,
    },
    "hf:open-thoughts/OpenThoughts-114k?config=default": {
        "system": "Think first.",
        "conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": BEGIN}],
    },
    "hf:simplescaling/s1K": {
        "solution": "3", "question": Q, "cot_type": "math", "source_type": "AIME", "metadata": "{}", "cot": None,
        "thinking_trajectories": [THOUGHT], "attempt": ANSWER,
    },
    "hf:simplescaling/s1K-1.1": {
        "solution": "3", "question": Q, "cot_type": "math", "source_type": "AIME", "metadata": "{}",
        "gemini_thinking_trajectory": "Other.", "gemini_attempt": "\\boxed{9}", "deepseek_thinking_trajectory": THOUGHT,
        "deepseek_attempt": ANSWER,
    },
    "hf:zwhe99/DeepMath-103K": {
        "question": Q, "final_answer": "3", "difficulty": 4.5, "topic": "Algebra",
        **{f"r1_solution_{n}": f"{THOUGHT} {n}\n</think>\n\n{ANSWER}" for n in (1, 2, 3)},
    },
    "hf:nvidia/OpenMathReasoning?split=cot": {
        "expected_answer": "3", "problem_type": "has_answer_extracted", "problem_source": "aops_c4_high_school_math",
        "generation_model": "DeepSeek-R1", "pass_rate_72b_tir": "0.5", "problem": Q, "generated_solution": WHOLE,
        "inference_mode": "cot", "used_in_kaggle": True,
    },
    "hf:nvidia/Llama-Nemotron-Post-Training-Dataset?config=SFT&split=math": {
        "input": [{"role": "user", "content": Q}], "output": WHOLE, "category": "math", "license": "cc-by-4.0",
        "reasoning": "on", "generator": "DeepSeek-R1", "used_in_training": ["Ultra"], "version": "v1.1",
        "system_prompt": "detailed thinking on",
    },
    "hf:nvidia/AceReason-1.1-SFT": {"category": "math", "source": "NuminaMath", "input": Q, "output": WHOLE},
    "hf:nvidia/OpenScience?config=OS-Q3-235B-4": {"input": Q, "output": WHOLE},
    "hf:glaiveai/reasoning-v1-20m": {"prompt": Q, "response": WHOLE},
    "hf:GAIR/LIMO": {"question": Q, "solution": f"{THOUGHT} {ANSWER}", "answer": "3"},
}  # fmt: skip
GRADED = {"OpenR1-Math-220k", "s1K", "s1K-1.1", "DeepMath-103K", "OpenMathReasoning", "LIMO"}
COMMANDS = {
    words[2]: words[3:]
    for line in DOCS.read_text(encoding="utf-8").splitlines()
    if line.startswith(("calset import hf:", 'calset import "hf:')) and (words := shlex.split(line))
}


def test_every_command_of_the_docs_is_tried() -> None:
    assert set(COMMANDS) == set(ROWS)


@pytest.mark.parametrize("template", ["plain", "r1"])
@pytest.mark.parametrize("spec", sorted(ROWS))
def test_the_command_in_the_docs_reads_a_row_of_the_set(
    tmp_path: Path, r1_style: Path, spec: str, template: str
) -> None:
    parsed = cli.commands["import"].make_context("import", [spec, *COMMANDS[spec]]).params
    options = {name: parsed[name] for name in ("completion", "thinking", "reasoning", "question", "answer")}
    path = lines(tmp_path / "rows.jsonl", [ROWS[spec]])
    model = r1_style if template == "r1" else bundled.MODEL
    report = import_traces(
        model, path, catalog=tmp_path / "c.duckdb", generated_by=parsed["generated_by"], **options
    )  # fmt: skip
    traces = Catalog(tmp_path / "c.duckdb").query("FROM trace").as_dicts()
    n = {"OpenR1-Math-220k": 2, "DeepMath-103K": 3}.get(name := spec.partition("/")[2].partition("?")[0], 1)
    assert (report.n_traces, report.n_bad) == (n, 0)
    assert {t["question"] for t in traces} == {Q}
    cut = [t for t in traces if t["finish_reason"] != "stop"]
    assert len(cut) == (name == "OpenR1-Math-220k")
    whole = [t for t in traces if t not in cut]
    assert {t["verdict"] for t in whole} == ({"correct"} if name in GRADED else {"ungraded"})
    assert all(t["response"].strip().endswith(("\\boxed{3}.", "<|end_of_solution|>")) for t in whole)
    if name != "LIMO":
        assert all("\\boxed{4}" in t["text"] and "\\boxed{4}" not in t["response"] for t in whole)
        assert all(t["n_reasoning_tokens"] > 0 for t in whole)
    system = {r.system_prompt for r in Catalog(tmp_path / "c.duckdb").runs()}
    assert system == {
        {"Llama-Nemotron-Post-Training-Dataset": "detailed thinking on"}.get(name, ROWS[spec].get("system"))
    }
    assert not any("mark their thinking" in w or "does not know" in w for w in report.warnings)

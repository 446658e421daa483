"""Well-known question sets by name: which Hub dataset, config, split, columns, grader and licence.

Each was looked up on its card or in code that reads it. A preset decides what ``hf:org/name?...`` cannot say: what of a
row is the answer, how options are lettered, which rows hold no gradable answer. Must not know: how files are found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calset.builder.problems.choices import LETTERS, read_choices
from calset.builder.problems.columns import Columns, Draft
from calset.io.rows import Row

# What NuminaMath and its descendants write where a problem has no answer to compare with.
_NO_ANSWER = {"", "proof", "notfound", "not found", "nan"}


@dataclass(frozen=True, slots=True)
class Preset:
    """A named question set.

    Args:
        licence: of the questions, as the card or, where it has none, their origin says; None where neither does.
        gated: the Hub asks for a login and a consent before it gives the files.
        note: what to know before using it.
    """

    name: str
    repo: str
    config: str
    split: str
    grader: str
    licence: str | None
    columns: Columns
    gated: bool = False
    note: str = ""


def lettered(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question as the model gets it."""
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question.strip()}\n\n{listed}\n\nAnswer with the letter of the right option."


def _gsm8k(row: Row) -> Draft:
    """The answer follows ``####``; before it stands the solution, with calculator marks (``<<48/2=24>>``) to drop."""
    solution, _, answer = str(row["answer"] or "").rpartition("####")
    metadata = {"solution": re.sub(r"<<.*?>>", "", solution).strip()}
    return Draft(row["question"], answer.strip().replace(",", ""), metadata)


def _with_answer(*keep: str) -> Any:
    """Rows of ``problem`` and ``answer``, without proofs, rows without an answer and those that are marked invalid."""

    def convert(row: Row) -> Draft | None:
        answer = row["answer"]
        valid = all(row.get(column) in (None, "Yes") for column in ("problem_is_valid", "solution_is_valid"))
        gradable = answer is not None and str(answer).strip().lower() not in _NO_ANSWER
        if not (valid and gradable) or row.get("question_type") == "proof":
            return None
        return Draft(row["problem"], answer, {name: row.get(name) for name in keep})

    return convert


def _gpqa(row: Row) -> Draft:
    """The right answer always comes first in the data: the order is one that the question alone decides."""
    question = str(row["Question"] or "").strip()
    right = str(row["Correct Answer"] or "").strip()
    wrong = [str(row[f"Incorrect Answer {n}"] or "").strip() for n in (1, 2, 3)]
    options = shuffled(question, [right, *wrong])
    metadata = {
        "choices": options,
        "domain": row.get("High-level domain"),
        "subdomain": row.get("Subdomain"),
        "solution": row.get("Explanation"),
        "record": row.get("Record ID"),
    }
    return Draft(question and lettered(question, options), LETTERS[options.index(right)], metadata)


def shuffled(question: str, options: Sequence[str]) -> list[str]:
    """Options in an order that depends on the question's text and theirs alone: the same on any machine, for ever."""

    def key(option: str) -> bytes:
        return hashlib.sha256(f"calset-options-v1\0{question}\0{option}".encode("utf-8", "surrogatepass")).digest()

    return sorted(options, key=key)


def _commonsense_qa(row: Row) -> Draft:
    choices = read_choices(row["choices"])
    options = choices.texts if choices is not None else []
    answer = str(row["answerKey"] or "").strip()
    letter = choices.letter(answer) if choices is not None else answer
    metadata = {"choices": options, "subject": row.get("question_concept"), "id": row.get("id")}
    return Draft(lettered(str(row["question"] or ""), options), letter, metadata)


def _math(*keep: str) -> Columns:
    return Columns("problem", "answer", metadata=keep)


_NUMINA = ("solution", "problem_type", "question_type", "source", "problem_is_valid", "solution_is_valid")
_OPENR1 = ("solution", "problem_type", "question_type", "source", "uuid")
_GPQA_NEEDED = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_GPQA_KEPT = ("High-level domain", "Subdomain", "Explanation", "Record ID")

_ALL = (
    Preset(
        "gsm8k", "openai/gsm8k", "main", "train", "math", "MIT",
        Columns(metadata=(), convert=_gsm8k),
        note="grade-school word problems; ?split=test to evaluate",
    ),
    Preset(
        "math500", "HuggingFaceH4/MATH-500", "default", "test", "math", "MIT",
        _math("solution", "subject", "level", "unique_id"),
        note="an evaluation set; the card names no licence, MATH's own is MIT",
    ),
    Preset(
        "aime24", "HuggingFaceH4/aime_2024", "default", "train", "math", None,
        _math("solution", "id", "url", "year"),
        note="an evaluation set; the card names no licence",
    ),
    Preset(
        "aime25", "math-ai/aime25", "default", "test", "math", "Apache-2.0", _math("id"), note="an evaluation set"
    ),
    Preset(
        "gpqa-diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", "choice", "CC-BY-4.0",
        Columns("Question", "Correct Answer", _GPQA_KEPT, needed=_GPQA_NEEDED, convert=_gpqa),
        gated=True,
        note="an evaluation set; its authors ask not to publish its questions in the clear",
    ),
    Preset(
        "openr1-math", "open-r1/OpenR1-Math-220k", "default", "train", "math", "Apache-2.0",
        Columns("problem", "answer", _OPENR1, convert=_with_answer(*_OPENR1)),
        note="the problems only, without R1's traces; ?config=all for the rest",
    ),
    Preset(
        "numina-math", "AI-MO/NuminaMath-1.5", "default", "train", "math", "Apache-2.0",
        Columns("problem", "answer", _NUMINA, convert=_with_answer(*_NUMINA)),
        note="proofs and rows without an answer or marked invalid are left out: 683k of 896k remain",
    ),
    Preset(
        "bigmath", "SynthLabsAI/Big-Math-RL-Verified", "default", "train", "math", "Apache-2.0",
        _math("source", "domain", "llama8b_solve_rate"),
        gated=True,
        note="with the solve rate of Llama-3.1-8B",
    ),
    Preset(
        "open-reasoner", "Open-Reasoner-Zero/orz_math_57k_collection", "default", "train", "math", "MIT",
        Columns("0.value", "1.ground_truth.value", metadata=()),
        note="the core set of Open-Reasoner-Zero",
    ),
    Preset(
        "commonsense-qa", "tau/commonsense_qa", "default", "train", "choice", "MIT",
        Columns("question", "answerKey", ("question_concept", "id"), needed=("choices",), convert=_commonsense_qa),
        note="?split=validation to evaluate; the test split has no answers",
    ),
)  # fmt: skip
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _ALL}

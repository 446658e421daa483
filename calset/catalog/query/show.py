"""One trace as a person reads it: what was asked, how the model got there, what it answered, how that was judged.

Why apart from printing: what is folded and what counts as reasoning is decided here, once, on the row that
``Catalog.trace`` gives. Must not know: terminals, connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

HEAD_LINES, TAIL_LINES = 8, 6
HEAD_CHARACTERS, TAIL_CHARACTERS = 900, 600

Table = tuple[str, list[str], list[tuple[Any, ...]]]


class Parts(NamedTuple):
    """A completion's text in two: the reasoning with its marks, and the answer."""

    reasoning: str
    answer: str


def parts(row: Mapping[str, Any]) -> Parts:
    """Where the reasoning ends and the answer begins, in text.

    The stored offsets count tokens, and tokens are never decoded again; but the answer's text is stored too, and is the
    end of the completion's. Where it cannot be found (special tokens inside it), the whole text stands as reasoning.
    """
    text, answer = row["text"], row["response"]
    if row["answer_start"] < 0:
        return Parts(text, "")
    at = text.rfind(answer) if answer else len(text)
    return Parts(text if at < 0 else text[:at], answer)


def facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) lines about a trace: where it is from, what it cost, what was judged and why."""
    k, rate = row["k"], row["pass_rate"]
    judged = "unjudged" if rate is None else f"{1 - rate:.3f} ({round(rate * k)} of {k} judged samples correct)"
    grade = _present_grade(row)
    by = f" (by {grade['grader']} {grade['grader_version']})" if grade else ""
    tokens = (
        f"{row['n_prompt_tokens']} prompt, {row['n_tokens']} completion, {row['n_reasoning_tokens']} of it reasoning"
    )
    attempt = f", attempt {row['attempt']}" if row["attempt"] else ""
    listed = [
        ("trace", f"{row['trace_id']} (sample {row['sample_index']}{attempt} of run {row['run_id']})"),
        ("model", f"{row['model']}@{row['model_revision'][:12]}"),
        ("source", f"{row['source']}, problem {row['problem_id']}"),
        ("difficulty", judged),
        ("tokens", f"{tokens}; finish reason {row['finish_reason']}"),
        ("verdict", f"{row['verdict']}{by}"),
        ("why", row["detail"]),
        ("extracted", row["extracted"]),
        ("reference", row["answer"]),
    ]
    return [(what, str(value)) for what, value in listed if value not in (None, "")]


def _present_grade(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The grade that counts: the newest of the attempt that is shown."""
    return next((g for g in reversed(row["grades"]) if g["attempt"] == row["attempt"]), None)


def texts(row: Mapping[str, Any], *, full: bool) -> list[tuple[str, str]]:
    """(title, text): the question, the reasoning and the answer; long ones folded unless ``full``."""
    reasoning, answer = parts(row)
    n, start, end = row["n_tokens"], row["reasoning_start"], row["reasoning_end"]
    where = f"tokens {start} to {end} of {n}" if start >= 0 else "none marked"
    ended = "" if row["answer_start"] >= 0 else "; it never ended, so there is no answer"
    listed = [("question", row["question"])]
    if reasoning.strip():
        listed.append((f"reasoning ({where}{ended})", reasoning))
    if row["answer_start"] >= 0:
        listed.append((f"answer (from token {row['answer_start']})", answer))
    return [(title, text.strip("\n") if full else fold(text)) for title, text in listed]


def fold(text: str) -> str:
    """The first and last lines of a long text, and how much is between them."""
    text = text.strip("\n")
    lines = text.split("\n")
    head = "\n".join(lines[:HEAD_LINES])[:HEAD_CHARACTERS]
    tail = "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]
    hidden = len(text) - len(head) - len(tail)
    # To hide less than the line that says so would help nobody.
    if hidden <= 80:
        return text
    return f"{head}\n… {hidden:,} characters folded; --full shows all …\n{tail}"


def tables(row: Mapping[str, Any]) -> list[Table]:
    """(title, column names, rows): earlier grades, judgements, and the other samples of the problem."""
    found: list[Table] = []
    if earlier := [grade for grade in row["grades"] if grade is not _present_grade(row)]:
        keys = ["attempt", "grader", "grader_version", "verdict", "extracted", "detail", "graded_at"]
        found.append(("earlier grades", keys, [tuple(grade[key] for key in keys) for grade in earlier]))
    if judgements := row["judgements"]:
        keys = ["attempt", "judge", "verdict", "extracted", "detail", "judged_at"]
        found.append(("judgements", keys, [tuple(judgement[key] for key in keys) for judgement in judgements]))
    columns = ["sample", "trace", "verdict", "tokens", "finish reason", "extracted"]
    others = [
        (s["sample_index"], s["trace_id"][:12], s["verdict"], s["n_tokens"], s["finish_reason"], s["extracted"])
        for s in row["siblings"]
    ]
    if others:
        found.append(("other samples of this problem", columns, others))
    return found

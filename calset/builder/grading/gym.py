"""The ``gym`` grader: the reasoning-gym task's own scorer on the answer that the response states.

Correct means a score of 1. Most tasks give partial credit below it (an answer buried in a sentence, a board half
right); that is incorrect here, and the score is in the grade's detail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version as package_version
from typing import Any

from calset.builder.grading import Outcome, last_boxed
from calset.builder.grading.answers import last_tagged

RULES = "2"  # raise when a change here can change a verdict

# Compared with the tuples of a parsed answer, which the catalog's JSON keeps as lists.
_BOARDS = {"arc_agi": ("output",), "rearc": ("output",)}
_LEAD = re.compile(r"(?i)^(?:so,?\s+|therefore,?\s+|thus,?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*")
_FENCE = re.compile(r"(?m)^[ \t]*```.*$")
_BLANK = re.compile(r"\n\s*\n")
_INTRODUCTION = re.compile(r"^[^\n]*:[ \t]*\n")  # "Here is the board:"


def version() -> str:
    return f"{RULES}+reasoning-gym-{package_version('reasoning-gym')}"


def grade(answer: str, response: str, metadata: Mapping[str, Any]) -> Outcome:
    """Score the stated answer as the task in ``metadata`` would."""
    task = metadata.get("task")
    if not task:
        return Outcome("gold_unparsable", detail="the problem names no reasoning-gym task")
    extracted = extract(response, like=answer)
    if not extracted:
        return Outcome("no_answer", detail="an empty answer")
    known = dict(metadata.get("entry", {}))
    known |= {name: _tuples(known[name]) for name in _BOARDS.get(task, ()) if name in known}
    entry = {"answer": answer, "metadata": known, "question": metadata.get("question", "")}
    options = json.dumps(metadata.get("options", {}), sort_keys=True)
    score = float(_scorer(task, options)(extracted, entry))
    return Outcome("correct" if score >= 1 - 1e-9 else "incorrect", extracted, f"score {score:.4g}")


def extract(response: str, *, like: str = "") -> str:
    """The last box, else the last ``<answer>``, else the last line without "The answer is".

    Args:
        like: the reference answer. When it has several lines, as a board, as many paragraphs as it has take the last
            line's place.
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    tagged = last_tagged(response)
    if tagged is not None:
        return tagged.text
    if "\n" in like.strip():
        paragraphs = _BLANK.split(_FENCE.sub("", response).strip())[-len(_BLANK.split(like.strip())) :]
        return _INTRODUCTION.sub("", "\n\n".join(paragraphs)).strip()
    found = [line.strip() for line in response.splitlines() if line.strip()]
    return _LEAD.sub("", found[-1]).rstrip(".").strip() if found else ""


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    """The task's ``score_answer``; some tasks score by their options, so they come along (as JSON)."""
    from calset.builder.problems import open_gym

    return open_gym(task, json.loads(options) | {"size": 1}).score_answer

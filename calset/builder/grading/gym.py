"""The ``gym`` grader: the reasoning-gym task's own scorer, or calset's check, on the answer that the response states.

No answer and no entry reaches a scorer that evaluates it (scorers.py). Correct means a score of 1. Most tasks give
partial credit below it (an answer buried in a sentence, a board half right); that is incorrect here, and the score is
in the grade's detail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version as package_version
from typing import Any

from calset.builder.grading import Outcome, last_boxed
from calset.builder.grading.extract import last_tagged
from calset.builder.grading.formulas import Unreadable
from calset.builder.grading.gym_checks import UnreadableEntry
from calset.builder.grading.scorers import SCORERS, Scorer, why_refused

RULES = "3"  # raise when a change here can change a verdict

# Compared with the tuples of a parsed answer, which the catalog's JSON keeps as lists.
_BOARDS = {"arc_agi": ("output",), "rearc": ("output",)}
_LEAD = re.compile(r"(?i)^(?:so,?\s+|therefore,?\s+|thus,?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*")
_FENCE = re.compile(r"(?m)^[ \t]*```.*$")
_BLANK = re.compile(r"\n\s*\n")
_INTRODUCTION = re.compile(r"^[^\n]*:[ \t]*\n")  # "Here is the board:"


def version() -> str:
    return f"{RULES}+reasoning-gym-{package_version('reasoning-gym')}"


def grade(answer: str, response: str, metadata: Mapping[str, Any], *, unsafe_scorers: bool = False) -> Outcome:
    """Score the stated answer as the task in ``metadata`` would.

    Args:
        unsafe_scorers: score by reasoning-gym's own code also where nobody has read it; it may run the answer.
    """
    task, options, known = (metadata.get(name) for name in ("task", "options", "entry"))
    if not (task and isinstance(task, str)):
        return Outcome("gold_unparsable", detail="the problem names no reasoning-gym task")
    if not (isinstance(options or {}, Mapping) and isinstance(known or {}, Mapping)):
        return Outcome("gold_unparsable", detail="the problem's options or entry is no object")
    refused = why_refused(task)
    if refused and not unsafe_scorers:
        return Outcome("error", detail=refused)
    extracted = extract(response, like=answer)
    if not extracted:
        return Outcome("no_answer", detail="an empty answer")
    known = dict(known or {})
    known |= {name: _tuples(known[name]) for name in _BOARDS.get(task, ()) if name in known}
    entry = {"answer": answer, "metadata": known, "question": metadata.get("question", "")}
    try:
        score = _score(task, None if refused else SCORERS[task], options or {}, extracted, entry)
    except Unreadable as error:
        return Outcome("pred_unparsable", extracted, f"no answer to {task}: {error}")
    except UnreadableEntry as error:
        return Outcome("gold_unparsable", extracted, f"no entry of {task}: {error}")
    return Outcome("correct" if score >= 1 - 1e-9 else "incorrect", extracted, f"score {score:.4g}")


def _score(task: str, scorer: Scorer | None, options: Mapping[str, Any], text: str, entry: Mapping[str, Any]) -> float:
    """The score of an answer; without a scorer that was read, whatever reasoning-gym makes of it."""
    if scorer is not None:
        options = {name: _option(options[name], name) for name in scorer.options if name in options}

    def library(text: str, entry: Mapping[str, Any]) -> float:
        return float(_scorer(task, json.dumps(options, sort_keys=True))(text, entry))

    return library(text, entry) if scorer is None or scorer.check is None else scorer.check(text, entry, library)


def _option(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1_000:
        raise UnreadableEntry(f"its option {name} is no whole number up to 1,000")
    return value


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
    from calset.io.reasoning_gym import open_gym

    return open_gym(task, json.loads(options) | {"size": 1}).score_answer

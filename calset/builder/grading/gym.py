r"""The ``gym`` grader: the reasoning-gym task's own scorer, or calset's check, on the answer that the response states.

No answer and no entry reaches a scorer that evaluates it (scorers.py). A scorer gets the answer as it is and, if that
is not right, without its mark-up: ``\boxed{\text{True}}`` is True. Correct means a score of 1. Most tasks give partial
credit below it (an answer buried in a sentence, a board half right); that is incorrect here, and the score is in the
grade's detail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version as package_version
from typing import Any

from calset.builder.grading import Outcome
from calset.builder.grading.extract import stated
from calset.builder.grading.formulas import Unreadable
from calset.builder.grading.gym_checks import UnreadableEntry
from calset.builder.grading.markup import LEAD, MATRIX, bare
from calset.builder.grading.scorers import SCORERS, Scorer, why_refused
from calset.errors import first_line

RULES = "4"  # raise when a change here can change a verdict

# Compared with the tuples of a parsed answer, which the catalog's JSON keeps as lists.
_BOARDS = {"arc_agi": ("output",), "rearc": ("output",)}
EMPTY = ("ab", "polynomial_equations", "string_manipulation")  # tasks of which an empty text may be the answer
_FENCED = re.compile(r"(?ms)^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$")
_FENCE = re.compile(r"(?m)^[ \t]*```.*$")
_ROWS = re.compile(r"\n|\\\\|\\begin")  # of a statement of several lines, written as LaTeX, too
_WORD = re.compile("[A-Za-z]{2,}")
_BLANK = re.compile(r"\n\s*\n")
_INTRODUCTION = re.compile(r"^[^\n]*:[ \t*]*\n")  # "Here is the board:"


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
    known = dict(known or {})
    known |= {name: _tuples(known[name]) for name in _BOARDS.get(task, ()) if name in known}
    entry = {"answer": answer, "metadata": known, "question": metadata.get("question", "")}
    extracted = extract(response, like=answer)
    if not extracted and (extracted is None or answer or task not in EMPTY):
        return Outcome("no_answer", detail="an empty answer")
    return _best(task, None if refused else SCORERS[task], options or {}, extracted, entry)


def _best(task: str, scorer: Scorer | None, options: Mapping[str, Any], text: str, entry: Mapping[str, Any]) -> Outcome:
    """The outcome of an answer as it is if that is right, else of the answer without its mark-up.

    An answer on which a scorer raises is unreadable: it counts, and is not graded again and again as an error is.
    """
    found: list[Outcome] = []
    for tried in _forms(text, entry["answer"]):
        try:
            score = _score(task, scorer, options, tried, entry)
        except UnreadableEntry as error:
            return Outcome("gold_unparsable", tried, f"no entry of {task}: {error}")
        except Unreadable as error:
            found.append(Outcome("pred_unparsable", tried, f"no answer to {task}: {error}"))
        except (MemoryError, ImportError, OSError):  # calset's or the machine's
            raise
        except Exception as error:
            detail = f"the scorer of {task} raises on it: {type(error).__name__}: {first_line(error)}"[:300]
            found.append(Outcome("pred_unparsable", tried, detail))
        else:
            found.append(Outcome("correct" if score >= 1 else "incorrect", tried, f"score {score:.4g}"))
        if found[-1].verdict == "correct":
            return found[-1]
    return next((outcome for outcome in reversed(found) if outcome.verdict == "incorrect"), found[-1])


def _forms(text: str, like: str) -> Iterator[str]:
    yield text
    if (without := bare(text, like=like)) != text:
        yield without


def _score(task: str, scorer: Scorer | None, options: Mapping[str, Any], text: str, entry: Mapping[str, Any]) -> float:
    """The score of an answer; without a scorer that was read, whatever reasoning-gym makes of it."""
    if scorer is not None:
        options = {name: _option(options[name], name) for name in scorer.options if name in options}

    def library(text: str, entry: Mapping[str, Any]) -> float:
        own = {**entry, "metadata": dict(entry["metadata"])}  # knight_swap's scorer writes into it
        return float(_scorer(task, json.dumps(options, sort_keys=True))(text, own))

    return library(text, entry) if scorer is None or scorer.check is None else scorer.check(text, entry, library)


def _option(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1_000:
        raise UnreadableEntry(f"its option {name} is no whole number up to 1,000")
    return value


def extract(response: str, *, like: str = "") -> str | None:
    """The answer that a response states, with its mark-up: see ``stated``. Without a statement the last line.

    Args:
        like: the reference answer. When it has several lines, as a board, the last fenced block takes the place of a
            statement of one line, or as many paragraphs as the reference has.

    Returns:
        None when there is nothing; an empty text when an empty answer is stated.
    """
    found, several = stated(response), "\n" in like.strip()
    if found is not None and (not several or _ROWS.search(found.text)):
        text = found.text.strip()
        # A full stop ends the sentence that states an answer; of a sentence that is the answer it is part.
        stopped = like.endswith(".") and f"{text}." in response and not text.rstrip("\"'”’`*$})\\").endswith(".")
        return f"{text}." if stopped else text
    blocks = list(_FENCED.finditer(response))
    if several:
        blocks = sorted([*blocks, *MATRIX.finditer(response)], key=lambda block: block.end())
    if blocks and not _states(response[blocks[-1].end() :], like):
        block = blocks[-1]
        return (block[1] if block.re is _FENCED else block[0]).strip() or None
    text = _FENCE.sub("", response).strip()
    if several:
        known, paragraphs = set(_WORD.findall(like)), _BLANK.split(text)
        if len(paragraphs) > 1 and not any(known.issuperset(_WORD.findall(row)) for row in paragraphs[-1].splitlines()):
            del paragraphs[-1]  # a remark on the board before it
        text = "\n\n".join(paragraphs[-len(_BLANK.split(like.strip())) :])
        return _without_prose(_INTRODUCTION.sub("", text), like) or None
    lines = [line.strip() for line in text.splitlines()]
    lists = (
        [line for line in lines if line[:1] == like[:1] and line[-1:] in ("]", "}")] if like[:1] in ("[", "{") else []
    )
    return (lists or lines or [None])[-1]


def _states(behind: str, like: str) -> bool:
    """Return True if the text behind a block may hold the answer: as many lines as a board has, a list, or a line."""
    lines = behind.strip().splitlines()
    if "\n" in like.strip():
        return len(lines) >= len(like.split("\n"))
    if not like or like[0] in "[{":
        return any(line.lstrip()[:1] in ("[", "{") for line in lines)
    return bool(lines)


def _without_prose(text: str, like: str) -> str:
    """Several lines without those before and behind them that hold a word which is nowhere in the reference answer."""
    text = text.strip()
    if text.count("**") == 2 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    known = set(_WORD.findall(like))
    lines = LEAD.sub("", text).splitlines()
    rows = [i for i, line in enumerate(lines) if known.issuperset(_WORD.findall(line))]
    return "\n".join(lines[rows[0] : rows[-1] + 1]).strip() if rows else text


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    """The task's ``score_answer``; some tasks score by their options, so they come along (as JSON)."""
    from calset.io.reasoning_gym import open_gym

    return open_gym(task, json.loads(options) | {"size": 1}).score_answer

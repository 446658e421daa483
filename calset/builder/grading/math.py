r"""The ``math`` grader: the answer that a response states last, compared with the reference, each read whole.

Both sides are brought to one spelling (``answers.tex``) and taken apart (``answers``) into lists, tuples, intervals,
equations, quantities, times, formulas and words. Formulas are read by latex2sympy, which math-verify rests on, whole or
not at all, and compared exactly (``answers.algebra``). A side that is not read whole is text: it equals the same text,
or the verdict is ``gold_unparsable`` or ``pred_unparsable``.

Known limits: ``10%`` equals ``10`` and ``0.1``; two or more bare letters are a word, so the products ab and ba differ;
an interval (1,2) and a point (1,2) are the same text.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as package_version
from typing import Any

from calset.builder.grading import Outcome, last_boxed
from calset.builder.grading.answers.comparing import n_parts, same
from calset.builder.grading.answers.tex import normal
from calset.builder.grading.answers.values import GoldUnread, PredUnread
from calset.builder.grading.characters import visible
from calset.builder.grading.exact import read_number
from calset.builder.grading.extract import Joined, joined_boxes, stated

RULES = "4"  # raise when a change here can change a verdict
MAX_ANSWER_CHARS = 2_000
GRADE_SECONDS = 8

_BARE_NUMBER = re.compile(r"\$?\s*[-+−]?[\d.,/\s]*\d\s*(?:\\?%)?\s*\$?\.?")
_PREAMBLE = re.compile(r"^\\text\s*\{[^{}]*\b(?:answer|result)\s*(?:is|:|=)\s*:?\s*\}")
_LETTER = re.compile(r"\(?[A-J]\)?|\\text\s*\{\s*\(?[A-J]\)?\s*\}")
# The letter of an option before its text: "\textbf{(C) } 12".
_OPTION = re.compile(r"^\\text\s*\{\s*\(?[A-J]\)\s*\}\s*(?=\S)")
_ABOUT = re.compile(r"^(?:\\approx|≈|\\doteq)\s*")


def version() -> str:
    return f"{RULES}+math-verify-{package_version('math-verify')}"


def grade(answer: str, response: str, metadata: Mapping[str, Any]) -> Outcome:
    """Compare the response's last answer with the reference."""
    extracted = extract(response)
    if extracted is None:
        return Outcome("no_answer", detail="no \\boxed{} and no stated answer")
    if max(len(answer), len(extracted)) > 4 * MAX_ANSWER_CHARS:
        return _too_long(answer, extracted)
    boxed = last_boxed(answer)
    try:
        gold = _spelt(answer if boxed is None else joined_boxes(answer).text or boxed)
        pred = _spelt(extracted)
    except (ValueError, RecursionError) as error:  # a number of more digits than int() takes
        return Outcome("pred_unparsable", extracted, _line(error))
    if not _LETTER.fullmatch(gold):
        pred = _OPTION.sub("", pred)
    if not gold:
        return Outcome("gold_unparsable", extracted, "the reference answer is empty")
    if not pred:
        return Outcome("no_answer", extracted, "the answer is empty")
    if max(len(gold), len(pred)) > MAX_ANSWER_CHARS:
        return _too_long(gold, pred)
    boxes = joined_boxes(response)
    one, two = read_number(gold), read_number(pred)
    if one and two and not one.unit and not two.unit and not boxes.texts:
        return Outcome("correct" if one.value == two.value else "incorrect", extracted)
    return _compared(gold, pred, extracted, boxes)


def _too_long(gold: str, pred: str) -> Outcome:
    """The verdict of texts that are compared as they are."""
    if gold.strip() == pred.strip():
        return Outcome("correct", pred[:MAX_ANSWER_CHARS])
    long = "gold_unparsable" if len(gold) > MAX_ANSWER_CHARS else "pred_unparsable"
    return Outcome(long, pred[:MAX_ANSWER_CHARS], f"longer than {MAX_ANSWER_CHARS} characters")


def extract(response: str) -> str | None:
    """The answer that the response states (``extract.stated``), or a response that is one number."""
    found = stated(response)
    if found is not None:
        return found.text
    if len(response) < 100 and _BARE_NUMBER.fullmatch(visible(response).strip()):
        return response.strip().rstrip(".")
    return None


def _spelt(text: str) -> str:
    return _ABOUT.sub("", _PREAMBLE.sub("", normal(text))).strip().removeprefix("=").strip()


def _compared(gold: str, pred: str, extracted: str, boxes: Joined) -> Outcome:
    """Compare one answer; several boxes that were joined are one where the reference has as many parts, or where words
    join them: "7 or 8" is not 8."""
    try:
        with _cpu_limit(GRADE_SECONDS):
            if boxes.texts:
                parts = tuple(map(_spelt, boxes.texts))
                differ = len(set(parts)) > 1
                if (boxes.in_words and differ) or ((boxes.in_words or differ) and n_parts(gold) == len(parts)):
                    pred, extracted = boxes._replace(texts=parts).text, boxes.text
            return Outcome("correct" if same(gold, pred) else "incorrect", extracted)
    except GoldUnread as unread:
        return Outcome("gold_unparsable", extracted, _line(unread))
    except PredUnread as unread:
        return Outcome("pred_unparsable", extracted, _line(unread))
    except _OutOfTime:
        return Outcome("timeout", extracted, f"the comparison took more than {GRADE_SECONDS} s")
    except (RecursionError, OverflowError) as error:
        return Outcome("pred_unparsable", extracted, _line(error))
    except Exception as error:
        return Outcome("error", extracted, f"{type(error).__name__}: {_line(error)}"[:200])


def _line(error: BaseException) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__)[:200]


class _OutOfTime(BaseException):
    """Not an Exception: sympy catches those."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise ``_OutOfTime`` after that much CPU time; no limit outside the main thread, where no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, ring)
    # Again each second: an exception raised inside a destructor is lost.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

r"""The ``math`` grader: math-verify on the last box of the response, with its traps taken out.

What math-verify 0.9 does by itself, and what is done here instead: it merges several boxes into a set (the last box
alone is graded); it reads a bare ``A`` or ``\text{Monday}`` as nothing and ``Monday`` as a product of letters, equal
to its anagrams (words are compared as words); it takes ``1\,234`` for 235 and ``1 000`` for 0 (thousands separators
are removed); it rounds to six decimals, so that 2^-98 equals 2^-99 and 0.1 equals 0.10000001 (exact rationals and plain
decimals are compared exactly, and no decimal is an irrational reference); it takes the date 2024-01-05 for 2018 (a date
equals the same date alone); it reads neither ``٥`` nor ``⅔``, ``6.02e23``, ``√3`` or a zero-width space (rewritten
before it sees them), and a unit with a power becomes a factor (a number with a unit equals the number, and the number
with the same unit).

Known limits: ``10%`` equals ``10`` (in math-verify, deliberately); two or more bare letters are a word, so the products
ab and ba differ; an interval (1,2) and a point (1,2) are told apart by the reference alone.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from importlib.metadata import version as package_version
from typing import Any

from calset.builder.grading import Outcome, last_boxed
from calset.builder.grading.exact import read_number
from calset.builder.grading.extract import plain_digits, plain_fractions, stated, visible

RULES = "3"  # raise when a change here can change a verdict
MAX_ANSWER_CHARS = 2_000
GRADE_SECONDS = 8

_BARE_NUMBER = re.compile(r"\$?\s*[-+−]?[\d.,/\s]*\d\s*(?:\\?%)?\s*\$?\.?")
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z',;:!?. -]*\)?")
_LETTERS = re.compile(r"[A-Za-z]+")
_DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
_EXPONENT = re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\d.])")
_PERCENT = re.compile(r"(?<=\d)\s*(?:\\(?:text|mathrm)\{\s*(?:percent|per cent|%|\\%)\s*\}|\s*(?:percent|per cent)\b)")
_PREAMBLE = re.compile(r"^\\text\s*\{[^{}]*\b(?:answer|result)\s*(?:is|:|=)\s*:?\s*\}")
# A number, and words behind it that are a unit: "18\text{ cm}^2", "$18 per week", "5 hours".
_WITH_UNIT = re.compile(
    r"(?:\\?\$)?\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+))\s*(?:\\[ ,;]|~)?\s*"
    r"(?P<unit>(?:\\(?:text|mathrm|textrm)\s*\{[^{}]*\}|[A-Za-z]{2,}(?:[ /][A-Za-z]+)*)(?:\s*\^\s*\{?[23]\}?)?)?"
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_THIN = re.compile(r"(?<=\d)\s*(?:\\,|\\!|\\ |\{,\}|[ \u00a0\u202f])\s*(?=\d{3}(?!\d))")


def version() -> str:
    return f"{RULES}+math-verify-{package_version('math-verify')}"


def grade(answer: str, response: str, metadata: Mapping[str, Any]) -> Outcome:
    """Compare the response's last answer with the reference."""
    extracted = extract(response)
    if extracted is None:
        return Outcome("no_answer", detail="no \\boxed{} and no stated answer")
    boxed = last_boxed(answer)
    gold = _normal(answer if boxed is None else boxed)
    pred = _normal(extracted)
    if not gold:
        return Outcome("gold_unparsable", extracted, "the reference answer is empty")
    if not pred:
        return Outcome("no_answer", extracted, "the answer is empty")
    if gold == pred:
        return Outcome("correct", extracted)
    # Two letters too, unless the answer is written as a product: "no" and "on" are equal as products.
    if _is_words(gold) or (_LETTERS.fullmatch(gold) and _LETTERS.fullmatch(_WRAPPED.sub(r"\1", pred).strip())):
        return Outcome("correct" if _same_words(gold, pred) else "incorrect", extracted)
    if max(len(gold), len(pred)) > MAX_ANSWER_CHARS:
        long = "gold_unparsable" if len(gold) > MAX_ANSWER_CHARS else "pred_unparsable"
        return Outcome(long, extracted[:MAX_ANSWER_CHARS], f"longer than {MAX_ANSWER_CHARS} characters")
    if _date(gold) or _date(pred):
        return Outcome("correct" if _date(gold) == _date(pred) else "incorrect", extracted)
    same = _same_numbers(gold, pred)
    if same is not None:
        return Outcome("correct" if same else "incorrect", extracted)
    return _verify(gold, pred, extracted)


def extract(response: str) -> str | None:
    """The answer that the response states (``extract.stated``), or a response that is one number."""
    found = stated(response)
    if found is not None:
        return found.text
    if len(response) < 100 and _BARE_NUMBER.fullmatch(visible(response).strip()):
        return response.strip().rstrip(".")
    return None


def _verify(gold: str, pred: str, extracted: str) -> Outcome:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        with _cpu_limit(GRADE_SECONDS):
            return _compare(gold, pred, extracted)
    except _OutOfTime:
        return Outcome("timeout", extracted, f"math-verify took more than {GRADE_SECONDS} s")
    except Exception as error:
        return Outcome("error", extracted, f"{type(error).__name__}: {error}"[:200])


def _compare(gold: str, pred: str, extracted: str) -> Outcome:
    from math_verify import parse, verify

    parsed = {}
    for side, text in (("gold", gold), ("pred", pred)):
        try:
            # Without its alarms: they count wall time, in which a worker of low priority may have had no turn.
            parsed[side] = parse(rf"\boxed{{{text}}}", parsing_timeout=0, raise_on_error=True)
        except Exception as error:
            parsed[side], detail = [], f"{type(error).__name__}: {error}"
        else:
            detail = "math-verify reads nothing in it"
        # Only a string: math-verify fell back to the text, which is no better than comparing the text.
        if not parsed[side] or all(isinstance(item, str) for item in parsed[side]):
            return Outcome("gold_unparsable" if side == "gold" else "pred_unparsable", extracted, detail[:200])
    equal = verify(parsed["gold"], parsed["pred"], timeout_seconds=None, raise_on_error=True)
    equal = equal or _same_set(parsed["gold"][0], parsed["pred"][0])
    if equal and "%" not in gold + pred and _differ_exactly(parsed["gold"][0], parsed["pred"][0]):
        return Outcome("incorrect", extracted, "equal only after rounding")
    return Outcome("correct" if equal else "incorrect", extracted)


class _OutOfTime(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


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


def _same_set(gold: Any, pred: Any) -> bool:
    """Whether an inequality in one unknown says what an interval says: verify() takes only an interval for that."""
    from sympy import Interval, Union
    from sympy.core.relational import Relational

    if not (isinstance(gold, (Interval, Union)) and isinstance(pred, Relational) and len(pred.free_symbols) == 1):
        return False
    try:
        return bool(pred.as_set() == gold)
    except (NotImplementedError, TypeError, ValueError):
        return False


def _differ_exactly(gold: Any, pred: Any) -> bool:
    """Whether both are exact rationals and not the same, or the reference is irrational and the answer a decimal:
    verify() rounds to six decimals, so 1.41421356 would be the square root of two."""
    from sympy import Basic, Float, Rational

    if not (isinstance(gold, Basic) and isinstance(pred, Basic)):
        return False
    left, right = gold.doit(), pred.doit()
    if isinstance(left, Rational) and isinstance(right, Rational):
        return left != right
    return isinstance(right, (Rational, Float)) and left.is_irrational is True


def _same_numbers(gold: str, pred: str) -> bool | None:
    """Whether two numbers are exactly the same, a unit apart that one side lacks or both have; None for all else."""
    if "," in gold + pred:  # a list, or thousands: math-verify's business
        return None
    one, two = _WITH_UNIT.fullmatch(gold), _WITH_UNIT.fullmatch(pred)
    if one is None or two is None:
        left, right = read_number(gold), read_number(pred)
        return None if not left or not right or left.unit or right.unit else left.value == right.value
    units = {re.sub("[{}]", "", _bare(_WRAPPED.sub(r"\1", unit))) for unit in (one["unit"], two["unit"]) if unit}
    # Other words for one unit (h, hours) are math-verify's business too: it drops them.
    return None if len(units) > 1 else Fraction(one["number"]) == Fraction(two["number"])


def _normal(text: str) -> str:
    """Outer dollar signs, trailing full stops and thousands separators away; a minus is a minus, a digit a digit."""
    text = plain_digits(visible(text)).strip().replace("\u2009", " ")
    text = plain_fractions(text, r"\frac{%s}{%s}")
    text = _PREAMBLE.sub("", text).replace("\\varnothing", "\\emptyset").replace("∅", "\\emptyset")
    text = re.sub("√ ?(\\d+|[a-z])", r"\\sqrt{\1}", text).replace("°", "^\\circ").lstrip("€£¥₹")
    text = _PERCENT.sub(r"\\%", text)
    text = _EXPONENT.sub(r"\1\\times 10^{\2}", text)
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text, flags=re.S).strip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = text.rstrip(".").strip()
    unwrapped = _WRAPPED.fullmatch(text)
    if unwrapped:
        text = unwrapped[1].strip()
    return _THIN.sub("", text)


def _date(text: str) -> tuple[int, ...]:
    """The numbers of a date such as 2024-01-05 or 5/1/2024 in their order; empty when the text is none."""
    return tuple(int(part) for part in re.split("[-/]", text)) if _DATE.fullmatch(text) else ()


def _is_words(text: str) -> bool:
    """Prose, a choice letter or a name: one letter, or a run of three or more, and nothing but letters."""
    return bool(_WORDS.fullmatch(text)) and (len(_bare(text)) == 1 or bool(re.search(r"[A-Za-z]{3}", text)))


def _same_words(gold: str, pred: str) -> bool:
    pred = _bare(_WRAPPED.sub(r"\1", pred))
    return pred == _bare(gold) or (len(_bare(gold)) == 1 and bool(re.match(rf"{_bare(gold)}\s*[.):]", pred)))


def _bare(text: str) -> str:
    return " ".join(text.casefold().strip("() .").split())

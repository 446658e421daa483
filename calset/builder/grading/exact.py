r"""The ``exact`` grader: the same text, or exactly the same number. For answers that no algebra has to compare.

Text is compared after Unicode normalisation (NFC), without case, with runs of space as one, typographic quotes as
straight ones and outer punctuation removed. Two numbers (integers, decimals, fractions, scientific notation, thousands
separators, digits of any script) are compared as rationals: 0.1 is not 0.10000000001, and 1/2 is 0.5. A currency sign
or a unit is dropped from the response only when the reference has none; when the reference has one, the response must
have the same. ``25%`` equals ``0.25`` when the reference is a percentage, and ``3 million`` is 3000000.
``metadata["tolerance"]`` allows a difference: a number (absolute), or a text such as ``"1%"`` (of the reference).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from calset.builder.grading import Outcome
from calset.builder.grading.answers.units import factor_between, qualifies, scale_of, unit_of
from calset.builder.grading.characters import plain_digits, plain_fractions, unwrapped, visible
from calset.builder.grading.extract import boxes, stated

RULES = "2"  # raise when a change here can change a verdict
MAX_NUMBER_CHARS = 1_000  # int() itself refuses more than 4,300 digits
MAX_EXPONENT = 5_000
BARE_CHARS = 40  # a response of one line that is no longer is the answer itself

_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|\\[dt]?frac(\d)(\d)")
_TIMES_TEN = re.compile(r"\s*(?:\\times|\\cdot|×|·|\*)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_MIXED = re.compile(r"([-+]?)(\d{1,20})\s+(\d{1,20})\s*/\s*(\d{1,20})")
_CURRENCY = "$€£¥₹"
_GROUPED = r"\d{1,3}(?:(?P<gap>[, _'\u00a0\u2009\u202f])\d{3})(?:(?P=gap)\d{3})*"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[{_CURRENCY}]?)\s*(?P<sign2>[-+]?)"
    rf"(?P<whole>{_GROUPED}|\d+)?(?P<part>\.\d*)?(?:[eE](?P<exponent>[-+]?\d+))?"
    r"(?:\s*/\s*(?P<below>\d+))?\s*(?P<unit>[%°]|[^\W\d_][^\d]*)?"
)


class Number(NamedTuple):
    """An exact value and what stands with it: a currency sign, a unit."""

    value: Fraction
    unit: str


def version() -> str:
    return RULES


def grade(answer: str, response: str, metadata: Mapping[str, Any]) -> Outcome:
    """Compare the stated answer, or a response of one short line, with the reference."""
    box = next(boxes(answer), None)
    gold = _clean(box.text if box else answer)
    if not gold:
        return Outcome("gold_unparsable", detail="the reference answer is empty")
    number = read_number(gold)
    extracted = _extract(response, gold, number)
    if extracted is None:
        return Outcome("no_answer", detail="states no answer")
    pred = _clean(extracted)
    if not pred:
        return Outcome("no_answer", extracted, "the answer is empty")
    if _text(gold) == _text(pred):
        return Outcome("correct", extracted)
    found = read_number(pred) if number else None
    if number is None or found is None:
        return Outcome("incorrect", extracted)
    return Outcome("correct" if _equal(number, found, metadata.get("tolerance")) else "incorrect", extracted)


def read_number(text: str) -> Number | None:
    """An exact number with its unit; None for what is no single number, or has more digits than one can mean."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    text = plain_fractions(plain_digits(re.sub(r"\s{2,}", " ", text)), " %s/%s")
    text = _FRAC.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text).replace("⁄", "/").strip()
    if (mixed := _MIXED.fullmatch(text)) and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return Number(-value if mixed[1] == "-" else value, "")
    match = _NUMBER.fullmatch(_TIMES_TEN.sub(r"e\1", text))
    if match is None or not (match["whole"] or (match["part"] or "").strip(".")):
        return None
    if match["sign"] and match["sign2"]:
        return None
    exponent = int(match["exponent"] or 0)
    below = int(match["below"] or 1)
    if abs(exponent) > MAX_EXPONENT or below == 0:
        return None
    whole = re.sub(r"\D", "", match["whole"] or "") or "0"
    value = Fraction(f"{whole}{match['part'] or ''}".rstrip(".")) * Fraction(10) ** exponent / below
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    factor, unit = scale_of(match["unit"] or "")
    return Number(sign * value * factor, _text((match["currency"] or "") + unit))


def _equal(gold: Number, pred: Number, tolerance: Any) -> bool:
    allowed = _allowed(gold.value, tolerance)
    if gold.unit == pred.unit or (not gold.unit and _is_unit(pred.unit)) or _one_unit(gold.unit, pred.unit):
        return abs(gold.value - pred.value) <= allowed
    return gold.unit == "%" and not pred.unit and abs(gold.value / 100 - pred.value) <= allowed / 100


def _is_unit(text: str) -> bool:
    """A unit, a currency or what is counted: not ``x``, ``squared``, ``below zero``."""
    unit = unit_of(text)
    if unit.words in (("K",), ("M",), ("B",)) or not text:
        return False
    return unit.name is not None or (not qualifies(unit) and all(len(word) > 2 for word in unit.words))


def _one_unit(one: str, two: str) -> bool:
    """Two names of one unit: ``km`` and ``kilometers``, ``$`` and ``dollars``."""
    return bool(one and two) and factor_between(unit_of(one), unit_of(two)) == 1


def _allowed(gold: Fraction, tolerance: Any) -> Fraction:
    """The difference allowed; none when the metadata asks for none or for something unreadable."""
    if tolerance is None or isinstance(tolerance, bool):
        return Fraction(0)
    text = str(tolerance).strip()
    if not re.fullmatch(r"[\d./+-]{1,40}(?:[eE][+-]?\d{1,3})?\s*%?", text):
        return Fraction(0)
    try:
        share = Fraction(text.rstrip("%").strip())
    except (ValueError, ZeroDivisionError):
        return Fraction(0)
    return abs(gold) * abs(share) / 100 if text.endswith("%") else abs(share)


def _extract(response: str, gold: str, number: Number | None) -> str | None:
    response = visible(response)
    found = stated(response)
    if found is not None:
        return found.text
    line = response.strip()
    if not line or "\n" in line or len(line) > max(BARE_CHARS, 2 * len(gold)):
        return None
    # Prose around a number states nothing: "There were 40 sheep".
    return line if number is None or read_number(_clean(line)) is not None else None


def _clean(text: str) -> str:
    """Without invisible characters, math delimiters, TeX text commands, Markdown stars and a final full stop."""
    text = visible(unicodedata.normalize("NFC", text)).strip()
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text, flags=re.S).strip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = unwrapped(text)
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and "{" not in text[1:-1]:
        text = text[1:-1].strip()
    for tex, plain in ((r"\$", "$"), (r"\%", "%"), (r"\,", " "), (r"\!", ""), ("{,}", ","), (r"\ ", " ")):
        text = text.replace(tex, plain)
    text = re.sub(r"(?<=\S)~", " ", text)
    return text.strip(" \t\r\n*`").rstrip(".").strip()


def _text(text: str) -> str:
    """What two equal texts have in common: no case, one space, straight quotes, no outer punctuation."""
    text = plain_digits(unicodedata.normalize("NFC", text)).translate(str.maketrans("‘’“”´", "''\"\"'"))
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", " ".join(text.casefold().split()))
    # A factorial, a prime and a decimal point belong to what they stand at.
    text = re.sub(r"^[ ,;:!?]+|^\.(?!\d)|[ .,;:?]+$|(?<![\d)])!+$", "", text)
    return re.sub(r"^([\"'])(.*)\1$", r"\2", text)

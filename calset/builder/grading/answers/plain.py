r"""Answers that are compared as they are written: dates, times of day, numbers of another base, words.

Must not know: formulas, lists.
"""

from __future__ import annotations

import re

from calset.builder.grading.answers import algebra
from calset.builder.grading.answers.units import singular
from calset.builder.grading.answers.values import Quantity, Text, Value

_DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:([aApP])\.?\s*[mM]\.?)?(?:\s*o'?clock)?")
_NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
]  # fmt: skip
_BASED = re.compile(
    r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{?\s*(?:\\text\{)?\s*(?:base\s*)?\(?([0-9]{1,2}|[a-z]{3,10})\)?\s*\}?\s*\}?"
)
_PREFIXED = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_BASES = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"hex": "16", "x": "16", "b": "2", "o": "8"}
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z',;:!?. -]*\)?")
_MONTH = (
    r"(?i:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = re.compile(
    rf"(?P<month>{_MONTH}) (?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?: (?P<year>\d{{4}}))?"
    rf"|(?P<day2>\d{{1,2}})(?:st|nd|rd|th)? (?:of )?(?P<month2>{_MONTH})(?: (?P<year2>\d{{4}}))?"
)


def _flat(text: str) -> str:
    return " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())


def date(text: str) -> Value | None:
    """``2024-01-05``, ``5/1/2024``, ``May 12, 2020``, ``12 May 2020``."""
    plain = " ".join(_flat(text).replace(",", " ").split())
    if found := _DAY.fullmatch(plain):
        month, day = (found["month"] or found["month2"])[:3].casefold(), int(found["day"] or found["day2"])
        return Text("date", (month, str(day), found["year"] or found["year2"] or ""))
    if not _DATE.fullmatch(text):
        return None
    return Text("date", tuple(str(int(part)) for part in re.split("[-/]", text)))


def clock(text: str) -> Value | None:
    """``7:30``, ``7:30 p.m.``, ``7 PM``."""
    found = _CLOCK.fullmatch(_flat(text))
    if not found or not (found[2] or found[4]) or int(found[1]) > 24 or int(found[2] or 0) > 59:
        return None
    half = (found[4] or "").lower()
    return Text("time", (str(int(found[1])), found[2] or "00", found[3] or "00", half))


def based(text: str) -> Value | None:
    """``1010_2``, ``(3F)_{16}``, ``0x1F``."""
    plain = re.sub(r"\\text\s*\{\s*([0-9A-Fa-f]*)\s*\}", r"\1", text)
    sign = "-" if plain.startswith("-") else ""
    plain = plain.lstrip("+-").strip()
    prefixed, based = _PREFIXED.fullmatch(plain), _BASED.fullmatch(plain)
    if prefixed:
        digits, base = prefixed[2], _BASES[prefixed[1].lower()]
    elif based:
        digits, base = based[1], _BASES.get(based[2], based[2])
    else:
        return None
    if not base.isdigit():
        return None
    if base == "10" or not 2 <= int(base) <= 36:
        return Quantity(algebra.read(sign + digits), None, True) if digits.isdigit() and base == "10" else None
    if any(int(digit, 16) >= int(base) for digit in digits):
        return None
    return Text("base", (base, sign + (digits.lower().lstrip("0") or "0")))


def words(text: str) -> Value | None:
    """Words alone: ``Monday``, ``no solution``, ``A``, ``B. Paris``."""
    plain = _flat(text)
    bare = plain.strip("() .")
    if "," in plain and all(len(part.split()) in (1, 2) for part in plain.split(",")):
        return None  # names
    if not _WORDS.fullmatch(plain) or not (re.fullmatch("[A-Za-z]{1,2}", bare) or re.search(r"[A-Za-z]{3}", plain)):
        return None
    if "text" not in text and len(plain.split()) == 1 and len(plain) > 3 and not plain.isalpha():
        return None
    if option := re.match(r"\(?([A-Ja-j])\)?[.:)]\s+\S", plain):
        return Text("option", (option[1].casefold(), *re.findall(r"[a-z']+", plain[option.end() - 1 :].casefold())))
    found = re.findall(r"[a-z']+", plain.casefold())
    return Text("words", tuple(word if len(found) == 1 else singular(word) for word in found))


def spelt_number(word: str) -> str | None:
    """The digits of a number up to sixteen that is spelt out."""
    return str(_NUMBERS.index(word)) if word in _NUMBERS else None


def prose(text: str) -> Value | None:
    """Words with numbers among them, a word first: ``Case 2``."""
    plain = _flat(text)
    if not re.fullmatch(r"[A-Za-z]{3,}(?: (?:[A-Za-z]+(?:-[A-Za-z]+)*|-?\d+(?:\.\d+)?(?:st|nd|rd|th)?))+", plain):
        return None
    return Text("words", tuple(plain.casefold().split()))

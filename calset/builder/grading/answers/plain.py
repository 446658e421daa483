r"""Answers that are compared as they are written: dates, times of day, numbers of another base, words.

Must not know: formulas, lists.
"""

from __future__ import annotations

import re

from calset.builder.grading.answers import algebra
from calset.builder.grading.answers.values import Quantity, Text, Value

_DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:\\text\{\s*)?([aApP])?\.?\s*([mM])?\.?\s*\}?")
_BASED = re.compile(
    r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{?\s*(?:\\text\{)?\s*(?:base\s*)?([0-9]{1,2}|two|eight|ten|sixteen|hex)\s*\}?\s*\}?"
)


_PREFIXED = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_BASES = {"two": "2", "eight": "8", "ten": "10", "sixteen": "16", "hex": "16", "x": "16", "b": "2", "o": "8"}
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z',;:!?. -]*\)?")
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"


def date(text: str) -> Value | None:
    if not _DATE.fullmatch(text):
        return None
    return Text(("date", *(str(int(part)) for part in re.split("[-/]", text))), True)


def clock(text: str) -> Value | None:
    found = _CLOCK.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip())
    if not found or int(found[1]) > 24 or int(found[2]) > 59:
        return None
    half = (found[4] or "").lower()
    return Text(("time", str(int(found[1])), found[2], found[3] or "00", half), True)


def based(text: str) -> Value | None:
    plain = re.sub(r"\\text\s*\{\s*([0-9A-Fa-f]*)\s*\}", r"\1", text)
    prefixed, based = _PREFIXED.fullmatch(plain), _BASED.fullmatch(plain)
    if prefixed:
        digits, base = prefixed[2], _BASES[prefixed[1].lower()]
    elif based:
        digits, base = based[1], _BASES.get(based[2], based[2])
    else:
        return None
    if base == "10" or not 2 <= int(base) <= 36:
        return Quantity(algebra.read(digits), None, True) if digits.isdigit() and base == "10" else None
    if any(int(digit, 16) >= int(base) for digit in digits):
        return None
    return Text(("base", base, digits.lower().lstrip("0") or "0"), True)


def words(text: str) -> Value | None:
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    bare = plain.strip("() .")
    if not _WORDS.fullmatch(plain) or not (re.fullmatch("[A-Za-z]{1,2}", bare) or re.search(r"[A-Za-z]{3}", plain)):
        return None
    if "text" not in text and len(plain.split()) == 1 and len(plain) > 3 and not plain.isalpha():
        return None
    return Text(("words", *re.findall(r"[a-z']+", plain.casefold())), True)


def prose(text: str) -> Value | None:
    """Words with numbers among them, a word first: ``May 12``. A month may stand before or behind its day."""
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    if not re.fullmatch(r"[A-Za-z]{3,}(?:[ .-]+(?:[A-Za-z]+|\d+(?:st|nd|rd|th)?))+", plain):
        if not re.fullmatch(rf"\d{{1,2}}(?:st|nd|rd|th)? (?:of )?(?:{_MONTHS})[a-z]*", plain):
            return None
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", plain.casefold()))
    if any(re.fullmatch(_MONTHS.casefold(), word[:3]) for word in words) and len(words) <= 3:
        words = sorted(word[:3] for word in words if word != "of")
    return Text(("words", *words), True)

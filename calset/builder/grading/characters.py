"""Characters of answers in one spelling: digits of any script, typographic minus signs, nothing invisible.

Must not know: what an answer means.
"""

from __future__ import annotations

import re
import unicodedata

_INVISIBLE = re.compile("[\u0000\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """Without NULs, zero-width characters and direction overrides; typographic minus signs are a minus."""
    return re.sub("[\u2212\u2012\u2013\ufe63\uff0d]", "-", _INVISIBLE.sub("", text))


def plain_digits(text: str) -> str:
    """Digits of any script as ASCII digits: ``٥`` and ``５`` are 5, as ``int()`` takes them."""
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)


def plain_fractions(text: str, form: str) -> str:
    """``½`` and its like written out, ``form`` having two ``%s``. Not by NFKC, which makes 31/2 of ``3½``."""
    return re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda match: form % _parts(match[0]), text)


def _parts(character: str) -> tuple[str, str]:
    above, _, below = unicodedata.normalize("NFKC", character).partition("\u2044")
    return above, below


def squeezed(text: str) -> str:
    """Runs of spaces, empty lines, stars, dots and dollar signs cut short: patterns for statements are not linear in
    them."""
    text = re.sub(r"[^\S\n]{2,}", " ", text)
    return re.sub(r"(?:\n ?){3,}", "\n\n", re.sub(r"([*_])\1{2,}|(\.)\.{3,}|(\$)\${2,}", _shortened, text))


def _shortened(run: re.Match[str]) -> str:
    return {"*": "**", "_": "__", ".": "...", "$": "$$"}[run[0][0]]

"""Characters of answers in one spelling: digits of any script, a minus is a minus, nothing invisible, no text commands.

Must not know: what an answer means.
"""

from __future__ import annotations

import re
import unicodedata

_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|sf|rm|tt|normal)?|math(?:rm|bf|it|sf|tt|bb)|boldsymbol|bm|operatorname|underline|boxed)"
    r"\s*\{([^{}]*)\}"
)
_INVISIBLE = re.compile("[\u0000\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """Without NULs, zero-width characters and direction overrides; typographic minus signs are a minus."""
    return re.sub("[\u2212\u2012\u2013\ufe63\uff0d]", "-", _INVISIBLE.sub("", text))


def unwrapped(text: str) -> str:
    r"""Without the commands for text around a text: ``\text{B}`` and ``\textbf{\mathrm{B}}`` are B."""
    for _ in range(3):
        text = _WRAPPED.sub(r"\1", text)
    return text


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
    """Long runs of spaces, empty lines, stars, dots and dollar signs cut short: patterns for statements are not linear
    in them. A short run may be part of an answer."""
    text = re.sub(r"[^\S\n]{20,}", " " * 20, text)
    text = re.sub(r"(?:\n ?){6,}", "\n" * 5, text)
    return re.sub(r"([*_.$])\1{6,}", lambda run: run[1] * 6, text)

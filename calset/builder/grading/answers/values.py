r"""What an answer can be: text, a quantity, a group of parts, a relation, a congruence, a set of real numbers.

Must not know: how a text becomes a value, when two are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from calset.builder.grading.answers.tex import tokens
from calset.builder.grading.answers.units import Unit


class GoldUnread(Exception):
    """The reference is text that the answer's text is not."""


class PredUnread(Exception):
    """The answer is text that the reference's is not."""


@dataclass(frozen=True, slots=True)
class Text:
    """What is compared as text alone; ``whole``: nothing was left unread (a word, a date, a time)."""

    key: tuple[str, ...]
    whole: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A formula and what stands behind it."""

    value: Any  # sympy expression or matrix
    unit: Unit | None
    numeric: bool  # the formula holds no letters


@dataclass(frozen=True, slots=True)
class Group:
    """Parts: a bare list (``opened`` is empty), or what brackets hold."""

    items: tuple[Value, ...]
    opened: str = ""
    closed: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """``left op right``; ``op`` is one of ``= != < <= > >=``. Of a chain a = b = c the first and the last side."""

    left: str
    op: str
    right: str


@dataclass(frozen=True, slots=True)
class Congruence:
    """``left`` is ``right`` modulo ``modulus``."""

    left: tuple[str, ...]
    right: Any
    modulus: Any


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval; None is no end, and a point is an interval whose ends are one."""

    low: Any
    high: Any
    low_open: bool
    high_open: bool


@dataclass(frozen=True, slots=True)
class Pieces:
    """A union of intervals."""

    pieces: tuple[Piece, ...]


Value = Text | Quantity | Group | Relation | Congruence | Pieces


def text_key(text: str) -> tuple[str, ...]:
    found = tokens(text)
    letters = {token for token in found if token.isalpha() and len(token) == 1}
    # Case counts only where a text uses a letter in both: R and r.
    mixed = " " not in text and any(letter.swapcase() in letters for letter in letters)
    return tuple(found if mixed else [token.casefold() if token.isalpha() else token for token in found])


def is_name(text: str) -> bool:
    r"""A letter, a letter with an index or a prime, ``f(x)``, ``|AB|``, words: what an answer may be called."""
    text = text.strip()
    return bool(
        re.fullmatch(r"\\?[A-Za-z]+(?:_\{?[\w,]+\}?)?'*(?:\([A-Za-z,\s\d]*\))?", text)
        or re.fullmatch(
            r"\|?\s*(?:\\(?:overline|vec|overrightarrow|text|angle|hat|bar|triangle)\s*)?\{?[A-Za-z\s]+\}?\s*\|?", text
        )
        or re.fullmatch(r"\\text\s*\{[^{}]*\}(?:_\{?\w+\}?)?", text)
        or re.fullmatch(
            r"(?:[A-Za-z](?:_\{?\w+\}?)?'*|\\frac|\\(?:alpha|beta|theta|pi|lambda|mu|triangle|angle)(?![A-Za-z])|[\s:/{}(),|])+",
            text,
        )
        or re.fullmatch(r"[A-Z]\(\s*[A-Za-z\s,|><=\d]*\)", text)
    )

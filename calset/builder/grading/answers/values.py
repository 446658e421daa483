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
    """What is compared as text alone.

    Args:
        kind: ``words``, ``option`` (a letter and words behind it), ``date``, ``time``, ``base``; ``tokens`` if no
            reader takes the text whole.
        key: the parts that are compared.
        unread: why the text was not read whole; empty where it was.
    """

    kind: str
    key: tuple[str, ...]
    unread: str = ""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A formula and what stands behind it."""

    value: Any  # sympy expression or matrix
    unit: Unit | None
    numeric: bool  # the formula holds no letters


@dataclass(frozen=True, slots=True)
class Group:
    """Parts of an answer.

    Args:
        opened, closed: the brackets around them; empty for a bare list, ``:`` for a ratio, ``label`` for numbered
            parts.
        joined_by_and: "and" joins a bare list.
    """

    items: tuple[Value, ...]
    opened: str = ""
    closed: str = ""
    joined_by_and: bool = False


@dataclass(frozen=True, slots=True)
class Relation:
    """``left op right``; ``op`` is one of ``= != < <= > >=``. Of a chain a = b = c the first and the last side, and
    further names between them."""

    left: str
    op: str
    right: str
    names: tuple[str, ...] = ()


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
    """A union of intervals; ``letter``: what is said to be in it, None where nothing is."""

    pieces: tuple[Piece, ...]
    letter: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    r"""A value for each value of a letter: ``k\pi`` for ``k \in \mathbb{Z}``; ``domain`` may be empty."""

    value: str
    letters: str
    domain: str


Value = Text | Quantity | Group | Relation | Congruence | Pieces | Family


def text_key(text: str) -> tuple[str, ...]:
    """The tokens by which texts are compared: case counts, but not in words of three letters and more."""
    text = re.sub(r"(?<![A-Za-z\\])[A-Za-z][a-z]{2,}(?![A-Za-z])", lambda word: word[0].casefold(), text)
    return tuple(tokens(text))


def is_name(text: str) -> bool:
    r"""A letter, a letter with an index or a prime, ``f(x)``, ``|AB|``, words: what an answer may be called."""
    text = text.strip()
    if re.search(r"\\text\s*\{[^{}]*\b(?:not|no|never|isn't)\b", text):
        return False
    text = re.sub(r"^\\(?:sin|cos|tan)(?![A-Za-z])\s*", "", text)  # "\cos B = 3/5" names what was asked for
    return bool(
        re.fullmatch(r"\\?[A-Za-z]+(?:_\{?[\w,]+\}?)?'*(?:\([A-Za-z,\s\d]*\))?", text)
        or re.fullmatch(
            r"\|?\s*(?:\\(?:overline|vec|overrightarrow|text|angle|hat|bar|triangle)\s*)?\{?[A-Za-z\s]+\}?\s*\|?", text
        )
        or re.fullmatch(r"\\text\s*\{[^{}]*\}(?:_\{?\w+\}?)?", text)
        or re.fullmatch(r"[A-Za-z](?:_\w)?(?:\s*[+-]\s*[A-Za-z](?:_\w)?)+", text)  # "m + n"
        or re.fullmatch(
            r"(?>[A-Za-z](?:_(?:\{\w+\}|\w))?'*|\\frac|\\(?:alpha|beta|theta|pi|lambda|mu|triangle|angle|partial|Delta"
            r"|complement|cap|cup)(?![A-Za-z])|[\s:/{}(),|_])++",
            text,
        )
        or re.fullmatch(r"[A-Z]\(\s*[A-Za-z\s,|><=\d]*\)", text)
    )

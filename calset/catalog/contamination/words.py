"""The words of a question, whatever its case, punctuation, spacing and LaTeX: what texts are compared by.

Why here: two data sets write one question as "Let $f(x) = 2x + 3$." and "let f(x)=2x+3", and n-grams of words must see
one text. Must not know: problems, n-grams, the catalog.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple


class Words(NamedTuple):
    """A question as normalised words, and where each stands in the text: character offsets (start, end)."""

    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


# Commands that only change how a formula looks, and other names for one symbol.
_LOOKS = {
    "left", "right", "big", "Big", "bigg", "Bigg", "displaystyle", "textstyle", "text", "textbf", "textit", "textrm",
    "mathrm", "mathbf", "mathit", "mathsf", "mathbb", "mathcal", "operatorname", "quad", "qquad", "limits", "nolimits",
    "begin", "end", "hspace", "vspace",
}  # fmt: skip
_SYMBOLS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠",
    "neq": "≠", "lt": "<", "gt": ">", "pm": "±", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "%": "%",
    "degree": "circ", "pi": "π", "×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-",
}  # fmt: skip
_OPERATORS = frozenset("+-*/=<>^≤≥≠±")
_PIECE = re.compile(
    r"""
      ^[ \t]*[-*+•][ \t]+                                   # the mark of a list's item: no word
    | \*{2,}                                                # Markdown's bold
    | \\(?P<command>[a-zA-Z]+|.)
    | (?P<number>\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?)
    | (?P<superscript>[⁰¹²³⁴-⁹]+)
    | (?P<letters>(?:(?![⁰¹²³⁴-⁹])[^\W\d_])+(?:['’](?:(?![⁰¹²³⁴-⁹])[^\W\d_])+)*)
    | (?P<symbol>[-+*/=<>^%≤≥≠±×·⋅÷−])
    """,
    re.VERBOSE | re.MULTILINE,
)
_SPACELESS = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])")  # Chinese and Japanese write no spaces
_BETWEEN = r"\\(?:left|right|[bB]igg?)(?![a-zA-Z])|\\[,;:! ]|[()\[\]{}_"
_TIGHT = re.compile(rf"(?:{_BETWEEN}])*")  # f(x), x_{1}, \frac{1}{2}: between the parts of one word
_LOOSE = re.compile(rf"(?:{_BETWEEN} \t])*")  # beside an operator, spaces do not matter either


def normalise(text: str) -> Words:
    """The words of a question, whatever its case, punctuation, spacing and LaTeX.

    A formula is one word however it is spaced ("1 + 2 =" and "1+2="), or a grid of short symbols would fill an n-gram
    meant for eight words of prose. Operators are kept: "3 + 4" is not "3 - 4". Text without a single word is one word.
    """
    words: list[str] = []
    spans: list[tuple[int, int]] = []
    glue = False  # the last piece was an operator, which takes what follows into its word
    apart = False  # the last piece was a character of a script without spaces, a word of its own
    for piece, start, end in _pieces(text):
        operator, before = piece in _OPERATORS, apart
        apart = not piece.isascii() and _SPACELESS.fullmatch(piece) is not None
        if words and not (apart or before):
            gap = _LOOSE if glue or operator or piece == "%" else _TIGHT
            if gap.fullmatch(text, spans[-1][1], start):
                words[-1] += piece
                spans[-1] = (spans[-1][0], end)
                glue = operator
                continue
        words.append(piece)
        spans.append((start, end))
        glue = operator
    if not words:
        bare = text.strip()
        at = text.find(bare)
        return Words((bare.casefold(),), ((at, at + len(bare)),)) if bare else Words((), ())
    return Words(tuple(words), tuple(spans))


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """Numbers, runs of letters, operators and symbols, each (normalised, start, end)."""
    for match in _PIECE.finditer(text):
        kind, start, end = match.lastgroup, match.start(), match.end()
        if kind == "letters":
            yield from _letters(match[0], start, end)
        elif kind == "number":
            yield _plain(match[0].replace(",", "")), start, end
        elif kind == "superscript":
            yield "^", start, start
            yield _plain(match[0]), start, end
        elif kind == "command" and match["command"] not in _LOOKS:
            name = match["command"]
            if name in _SYMBOLS or name.isalpha():
                yield _SYMBOLS.get(name, name.casefold()), start, end
        elif kind == "symbol":
            symbol = _SYMBOLS.get(match[0], match[0])
            if symbol != "-" or _is_minus(text, start, end):
                yield symbol, start, end


def _letters(found: str, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    if found.isascii():
        yield found.replace("'", "").lower(), start, end
    elif _SPACELESS.search(found):
        at = start
        for part in _SPACELESS.split(found):
            if part:
                yield _plain(part), at, at + len(part)
            at += len(part)
    else:
        yield _plain(found.replace("'", "").replace("’", "")), start, end


def _plain(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("\u2044", "/")


def _is_minus(text: str, start: int, end: int) -> bool:
    """Whether a hyphen is a minus: beside a number or a bracket, or between two one-letter names."""
    before = text[max(0, start - 8) : start].rstrip(" \t")
    after = text[end : end + 8].lstrip(" \t")
    if not before or not after:
        return after[:1].isdigit()
    if before[-1].isdigit() or before[-1] in ")]}" or after[0].isdigit() or after[0] in "([{\\":
        return True
    lone_before = before[-1].isalpha() and not before[-2:-1].isalpha()
    lone_after = after[0].isalpha() and not after[1:2].isalpha()
    return lone_before and lone_after

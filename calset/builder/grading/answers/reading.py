r"""The value of an answer's text: taken apart by brackets and separators until each part is one thing.

What none of the readers takes whole is text that is not whole. Must not know: when two values are equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from calset.builder.grading.answers import algebra, quantities
from calset.builder.grading.answers.intervals import FLIPPED, all_but, pieces_of
from calset.builder.grading.answers.labels import LABEL, numbered
from calset.builder.grading.answers.plain import based, clock, date, prose, words
from calset.builder.grading.answers.tex import bracketed, split
from calset.builder.grading.answers.values import (
    Congruence,
    Family,
    Group,
    Piece,
    Pieces,
    Quantity,
    Relation,
    Text,
    Value,
    is_name,
    text_key,
)

_AND_OR = r"\\text\s*\{\s*,?\s*(?:and|or|and/or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\vee(?![A-Za-z])|\\cup(?![A-Za-z])")
_LIST = re.compile(rf"\s*(?:,\s*(?:{_AND_OR})|;\s*(?:{_AND_OR})|[,;]|{_AND_OR}|\\\\)\s*")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_SEMICOLON = re.compile(r"\s*;\s*")
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|<=|>=|!=|[<>=]")
_OPERATORS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!="}


# "k \in \mathbb{Z}", "(n \in \mathbb{N}^*)": says what a letter runs over.
_RANGE = re.compile(
    r"\(?\s*(?:\\text\s*\{\s*(?:where|for(?: all| any| every| some)?|with)\s*\}|\\forall|where"
    r"|for)?\s*\$?[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\\in\s*"
    r"\\mathbb\{[NZQRC]\}\s*(?:[\^_]\s*\{?\s*[*+0\d]\s*\}?)?\s*\)?"
)
# "for all real numbers t", "where k is an integer": words and letters alone.
_FOR_ALL = re.compile(
    r"\s*[,(]?\s*(?:\\text\s*\{\s*)?(?<![A-Za-z])(?:for (?:all|any|every|each|some)|where"
    r"|(?=[a-z] (?:is )?an? (?:\w+ )?integer))[A-Za-z\s{},]*(?:\\text\s*\{[A-Za-z\s,]*\}[A-Za-z\s{},]*)*\)?$"
)
_SAID = {
    "for", "all", "any", "every", "each", "where", "is", "are", "an", "with", "integer", "integers", "real", "number",
    "numbers", "positive", "nonnegative", "natural", "text", "mathbb", "in", "forall", "and", "the",
}  # fmt: skip
_MEMBER = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*\\in\s*(?![A-Za-z\\]*mathbb\{[NZQ]\})")
_APPROXIMATELY = re.compile(r"\s*\\(?:approx|simeq|doteq|thickapprox)(?![A-Za-z])\s*")
_RATIO = re.compile(r"[^:=]+(?::[^:=]+)+")
_CONGRUENCE = re.compile(r"(.+?)\\equiv(.+?)[\s(]*(?:\\[pb]mod|\\text\s*\{\s*mod\s*\}|mod)\s*\{?([^{})]+)\}?\s*\)?")


@lru_cache(maxsize=512)  # parts are read by several readers, and theirs again
def read(text: str) -> Value:
    """The value of a normal text; ``Text`` that is not whole where no reader takes it."""
    text = re.sub(r"(?<!\\)[.,;\s]+$", "", text.strip())
    if not text:
        return Text("tokens", (), "it is empty")
    for reader in _READERS:
        found = reader(text)
        if found is not None:
            return found
    try:
        return quantities.read(text)
    except algebra.Unread as error:
        return Text("tokens", text_key(text), str(error) or "it is read as text")


def _empty_set(text: str) -> Value | None:
    return Pieces(()) if re.fullmatch(r"\\emptyset|\\\{\s*\\\}|\{\s*\}", text) else None


def _labelled(text: str) -> Value | None:
    """``(1) 5 (2) 7``: parts by number, from 1 on, none of them empty."""
    plain = re.sub(r"\\text\s*\{\s*(\(?\s*(?:\d|[a-h]|[iv]+)\s*\))\s*\}", r" \1 ", text)
    labels = list(LABEL.finditer(plain))
    if len(labels) < 2 or plain[: labels[0].start()].strip():
        return None
    if not numbered(labels):
        return None
    ends = [found.start() for found in labels[1:]] + [len(plain)]
    contents = [plain[found.end() : end].strip(" ,;:") for found, end in zip(labels, ends, strict=True)]
    if not all(contents) or any(content[0] in "^+*/=)(" for content in contents):
        return None
    return Group(tuple(map(read, contents)), "label", "label")


def _ranged(text: str) -> Value | None:
    r"""A value and what a letter in it runs over: in words, or as ``k \in \mathbb{Z}``."""
    if (found := _FOR_ALL.search(text)) and text[: found.start()].strip():
        return _family(text[: found.start()], found[0])
    parts = split(text, re.compile(r"\s*[,;]\s*|\\text\s*\{\s*(?=(?:where|for|with)\b)"))
    if len(parts) == 1:
        found = re.fullmatch(rf"(.+?)\s*({_RANGE.pattern})", text)
        apart = found and found[2].lstrip().startswith(("(", r"\text", r"\forall")) and found[1].strip()
        return _family(found[1], found[2]) if found and apart else None
    ranges = [part for part in parts if _RANGE.fullmatch(part.strip())]
    kept = [part for part in parts if part not in ranges]
    return _family(", ".join(kept), ranges[0]) if kept and len(ranges) == 1 else None


def _family(value: str, said: str) -> Family | None:
    """A family, if what is said is about a letter of the value."""
    words = set(re.findall(r"[a-z]+", said.casefold()))
    found = re.search(r"\\mathbb\{([NZQRC])\}\s*([\^_]?\s*\{?\s*[*+\d]?)", said)
    if found:
        domain = found[1] + ("+" if found[2].strip()[-1:] in "*+" and found[2].strip() else "")
        domain = "N+" if domain == "Z+" else domain
    else:
        domain = "R" if "real" in words else "Z" if words & {"integer", "integers"} else ""
        domain = "N+" if domain == "Z" and "positive" in words else domain
        domain = "N" if (domain == "Z" and "nonnegative" in words) or "natural" in words else domain
        domain += "".join(f" {word}" for word in sorted(words - _SAID) if len(word) > 1)
    letters = re.findall(r"(?<![A-Za-z\\{])[a-zA-Z](?![A-Za-z}])", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", said))
    named = "".join(letter for letter in letters if letter != "a" or len(letters) == 1)
    value = value.strip().rstrip(",;( ").strip()
    if not any(re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", value) for letter in named):
        return None
    return Family(value, named, domain)


def _system(text: str) -> Value | None:
    r"""``\begin{cases} x=1 \\ y=2 \end{cases}`` is a list of equations; with conditions behind ``&`` it is text."""
    found = re.fullmatch(
        r"\\begin\s*\{(?:cases|aligned|array\}\{[lcr]*)\}(.*)\\end\s*\{(?:cases|aligned|array)\}", text, re.S
    )
    if not found or "&" in found[1]:
        return None
    lines = [line.strip(" ,;") for line in found[1].split(r"\\") if line.strip(" ,;")]
    return Group(tuple(map(read, lines))) if len(lines) > 1 and all("=" in line for line in lines) else None


def _congruent(text: str) -> Value | None:
    """``n \\equiv 1 \\pmod 3``."""
    found = _CONGRUENCE.fullmatch(text)
    if not found or r"\equiv" in found[2]:
        return None
    try:
        right, modulus = algebra.read(found[2]), algebra.read(found[3])
    except algebra.Unread:
        return None
    if hasattr(right, "shape") or hasattr(modulus, "shape"):
        return None
    return Congruence(text_key(found[1].strip()), right, modulus)


def _several(text: str) -> Value | None:
    """A list, joined by commas, semicolons, "and", "or", lines or ``\\pm``."""
    if compound := quantities.compound(text):
        return compound
    if (union := _union(text)) is not None:
        return union
    if len(signed := _signed(text)) == 2 and not re.search(r"[,;]", text):
        return Group(tuple(map(read, signed)))
    if r"\dots" in text:
        return None
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return None  # one number
    money = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if quantities.MONEY.match(text) else text
    parts = [part.strip() for part in split(money, _SEMICOLON)]
    if len(parts) < 2 or not any(split(part, _LIST)[1:] for part in parts):
        parts = [part.strip() for part in split(money, _LIST)]
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return None
    if any(_RELATION.fullmatch(part) for part in parts):
        return None
    parts = [signed for part in parts for signed in _signed(part)]
    both = re.search(r"(?<![A-Za-z])and(?![A-Za-z])", money)
    return Group(tuple(map(read, parts)), joined_by_and=both is not None)


def _signed(part: str) -> list[str]:
    """``\\pm 2`` as two parts."""
    if len(_PLUS_MINUS.findall(part)) != 1 or _RELATION.search(part):
        return [part]
    return [_PLUS_MINUS.sub(sign, part) for sign in (" +", " -")]


def _bracketed(text: str) -> Value | None:
    """A set, a tuple, an interval: what one pair of brackets encloses."""
    found = bracketed(text)
    if found is None:
        return None
    opened, content, closed = found
    if opened == r"\{" and (built := _set_builder(content)) is not None:
        return built
    if opened == r"\langle" or closed == r"\rangle":
        if (opened, closed) != (r"\langle", r"\rangle"):
            return None
        opened, closed = "(", ")"
    parts = [part.strip() for part in split(content, re.compile(r"\s*[,;]\s*"))]
    if opened == r"\{":
        if not content:
            return None
        return Group(tuple(map(read, parts)), opened, closed)
    if opened == "{":
        return read(content) if content else None
    if len(parts) == 1 and content and (opened, closed) == ("(", ")"):
        return read(content)
    if len(parts) < 2 or not all(parts):
        return None
    if len(parts) > 2 and (opened, closed) not in (("(", ")"), ("[", "]")):
        return None
    if re.search(r"\\dots", content):
        return None
    return Group(tuple(map(read, parts)), opened, closed)


def _set_builder(content: str) -> Value | None:
    """``x | 1 < x < 2``, also with a colon."""
    found = re.fullmatch(r"\s*[A-Za-z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]\s*(.+)", content)
    built = read(found[1]) if found else None
    return Pieces(built.pieces) if isinstance(built, Pieces) else built


def _member(text: str) -> Value | None:
    """``x \\in [1,2]`` is what x is in."""
    found = _MEMBER.match(text)
    if not found or _RELATION.search(text):
        return None
    value = read(text[found.end() :])
    pieces = pieces_of(value)
    return Pieces(pieces.pieces, text_key(text.partition(r"\in")[0].strip())) if pieces else None


def _union(text: str) -> Value | None:
    r"""Intervals and conditions on one letter joined by ``\cup`` or "or"; ``\mathbb{R}`` without points."""
    if text == r"\mathbb{R}":
        return Pieces((Piece(None, None, True, True),))
    without = re.fullmatch(r"\\mathbb\{R\}\s*(?:\\setminus|-)\s*(\\\{.*\\\})", text)
    if without:
        points = read(without[1])
        if isinstance(points, Group) and all(isinstance(item, Quantity) for item in points.items):
            return all_but([item.value for item in points.items if isinstance(item, Quantity)])
        return None
    parts = split(text, _OR)
    if len(parts) < 2:
        return None
    values = [read(part) for part in parts]
    # "(1,2) or (3,4)" are two points.
    if "cup" not in text and all(isinstance(value, Group) for value in values):
        return None
    if all(isinstance(value, (Relation, Quantity)) and getattr(value, "op", "=") == "=" for value in values):
        return None  # several values
    found = [pieces_of(value) for value in values]
    letters = {pieces.letter for pieces in found if pieces is not None} - {None}
    if any(pieces is None for pieces in found) or len(letters) > 1:
        return None
    pieces = tuple(piece for pieces in found if pieces is not None for piece in pieces.pieces)
    return Pieces(pieces, next(iter(letters), None))


def _about(text: str) -> Value | None:
    r"""``\frac13 \approx 0.33`` is a third; ``x \approx 11`` is 11."""
    parts = split(text, _APPROXIMATELY)
    if len(parts) < 2 or not parts[0].strip():
        return None
    return read(" = ".join(parts[:2]) if is_name(parts[0]) else parts[0])


def _related(text: str) -> Value | None:
    """An equation, an inequality, or a chain of them on one letter."""
    text = re.sub(r"^=\s*", "", text)
    sides = split(text, _RELATION)
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    marks = [found[0] for found in _RELATION.finditer(text)]
    if len(marks) != len(sides) - 1:
        return None
    operators = [_OPERATORS.get(mark, mark) for mark in marks]
    sides = [side.strip() for side in sides]
    if any(re.search(r"\\text\s*\{[^{}]*\w{3}|(?<![A-Za-z\\{_])[A-Za-z]{5}", side) for side in sides[1:-1]):
        return Text("tokens", text_key(text), "it holds words")
    if set(operators) == {"="}:
        return Relation(
            sides[0], "=", sides[-1], tuple(side for side in sides[1:-1] if re.fullmatch(r"[A-Za-z]", side))
        )
    if len(sides) == 2:
        return Relation(sides[0], operators[0], sides[1])
    if len(sides) == 3 and {operators[0][0], operators[1][0]} in ({"<"}, {">"}):
        if operators[0][0] == ">":
            sides, operators = sides[::-1], [FLIPPED[o] for o in operators[::-1]]
        try:
            low, high = (None if _infinite(side) else algebra.read(side) for side in (sides[0], sides[2]))
        except algebra.Unread:
            return None
        if is_name(sides[1]):
            return Pieces((Piece(low, high, operators[0] == "<", operators[1] == "<"),), text_key(sides[1]))
    return None


def _infinite(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?\s*\\infty", text.strip()))


def _ratio(text: str) -> Value | None:
    """``1:2:3``; two of them stay a quotient."""
    if not _RATIO.fullmatch(text) or "text" in text or r"\begin" in text:
        return None
    parts = split(text, re.compile(":"))
    if len(parts) < 2:
        return None
    try:
        return Group(tuple(Quantity(algebra.read(part), None, True) for part in parts), ":", ":")
    except algebra.Unread:
        return None


_READERS: tuple[Callable[[str], Value | None], ...] = (
    _empty_set, date, clock, based, words, prose, _labelled, _ranged, _system, _congruent, _about, _member, _several,
    _bracketed, _related, _ratio,
)  # fmt: skip

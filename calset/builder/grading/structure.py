r"""Answers as values: lists, tuples, intervals, equations, quantities, times, formulas, words; and when two are equal.

Why it exists: "no wrong answer is called correct" holds only where both sides were read whole. So an answer is taken
apart here, by brackets and separators, until each part is one thing; what none of the readers takes whole is text, and
equals the same text alone. Must not know: responses, verdicts, which library reads a formula.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from calset.builder.grading import algebra, quantities
from calset.builder.grading.tex import bracketed, normal, split, tokens


class GoldUnread(Exception):
    """The reference is text that the answer's text is not."""


class PredUnread(Exception):
    """The answer is text that the reference's is not."""


# --- values ------------------------------------------------------------------------------------------------------


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
    unit: quantities.Unit | None
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

_AND_OR = r"\\text\s*\{\s*,?\s*(?:and|or|and/or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\vee(?![A-Za-z])|\\cup(?![A-Za-z])")
_LIST = re.compile(rf"\s*(?:,\s*(?:{_AND_OR})|;\s*(?:{_AND_OR})|[,;]|{_AND_OR}|\\\\)\s*")
_SEMICOLON = re.compile(r"\s*;\s*")
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|<=|>=|!=|[<>=]")
_OPERATORS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
# "k \in \mathbb{Z}", "(n \in \mathbb{N}^*)": says what a letter runs over.
_RANGE = re.compile(
    r"\(?\s*(?:\\text\s*\{\s*(?:where|for(?: all| any| every| some)?|with)\s*\}|\\forall|where|for)?\s*\$?[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\\in\s*"
    r"\\mathbb\{[NZQRC]\}\s*(?:[\^_]\s*\{?\s*[*+0\d]\s*\}?)?\s*\)?"
)
# "for all real numbers t", "where k is an integer": words and letters alone.
_FOR_ALL = re.compile(
    r"\s*[,(]?\s*(?:\\text\s*\{\s*)?(?<![A-Za-z])(?:for (?:all|any|every|each|some)|where|(?=[a-z] (?:is )?an? (?:\w+ )?integer))[A-Za-z\s{},]*(?:\\text\s*\{[A-Za-z\s,]*\}[A-Za-z\s{},]*)*\)?$"
)
_MEMBER = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*\\in\s*(?![A-Za-z\\]*mathbb\{[NZQ]\})")
_LABEL = re.compile(
    r"\(\s*(?P<round>\d|[a-h]|i{1,3}|iv|vi{0,3})\s*\)|(?<![\w.])(?P<half>[1-9]|[a-h]|i{1,3}|iv|vi{0,3})\)|(?P<ring>[①-⑨])"
)
_ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6, "vii": 7, "viii": 8}
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:\\text\{\s*)?([aApP])?\.?\s*([mM])?\.?\s*\}?")
_DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
_BASED = re.compile(
    r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{?\s*(?:\\text\{)?\s*(?:base\s*)?([0-9]{1,2}|two|eight|ten|sixteen|hex)\s*\}?\s*\}?"
)
_PREFIXED = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_BASES = {"two": "2", "eight": "8", "ten": "10", "sixteen": "16", "hex": "16", "x": "16", "b": "2", "o": "8"}
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z',;:!?. -]*\)?")
_APPROXIMATELY = re.compile(r"\s*\\(?:approx|simeq|doteq|thickapprox)(?![A-Za-z])\s*")
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_RATIO = re.compile(r"[^:=]+(?::[^:=]+)+")
_CONGRUENCE = re.compile(r"(.+?)\\equiv(.+?)[\s(]*(?:\\[pb]mod|\\text\s*\{\s*mod\s*\}|mod)\s*\{?([^{})]+)\}?\s*\)?")
_UNIT = r"(?:\\text\s*\{[^{}]*\}|\^\\circ\s*(?:[CF](?![A-Za-z])|\\text\s*\{\s*[CF]\s*\})?|\\%|%|(?<![A-Za-z\\])[A-Za-zΩµμ]{2,}(?![A-Za-z(])|(?<=[/*] )[A-Za-z](?![A-Za-z])|(?<=[/*])[A-Za-z](?![A-Za-z]))"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_SUFFIX = re.compile(
    rf"(?P<head>.*?)(?P<unit>(?:(?<=[\s\d}})!.a-zA-Z])|^)(?>(?:[\s/*.,\-]|\\cdot|\\times)*{_UNIT}{_POWER})++)[\s.]*",
    re.S,
)
_MONEY = re.compile(r"-?\s*[$€£¥₹]")
_COMPOUND = re.compile(
    rf"(\d+(?:\.\d+)?|\\frac\{{\d+\}}\{{\d+\}})\s*({_UNIT}|'')\s*(?:,?\s*(?:\\text\s*\{{\s*and\s*\}}|and)|,)?\s*"
)


# --- reading -----------------------------------------------------------------------------------------------------


def read(text: str) -> Value:
    """The value of a normal text; ``Text`` that is not whole where no reader takes it."""
    text = text.strip().rstrip(".,;").strip()
    for reader in _READERS:
        found = reader(text)
        if found is not None:
            return found
    try:
        return _quantity(text)
    except algebra.Unread as error:
        return Text(_key(text), False, str(error))


def _key(text: str) -> tuple[str, ...]:
    found = tokens(text)
    letters = {token for token in found if token.isalpha() and len(token) == 1}
    # Case counts only where a text uses a letter in both: R and r.
    mixed = " " not in text and any(letter.swapcase() in letters for letter in letters)
    return tuple(found if mixed else [token.casefold() if token.isalpha() else token for token in found])


def _date(text: str) -> Value | None:
    if not _DATE.fullmatch(text):
        return None
    return Text(("date", *(str(int(part)) for part in re.split("[-/]", text))), True)


def _clock(text: str) -> Value | None:
    found = _CLOCK.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip())
    if not found or int(found[1]) > 24 or int(found[2]) > 59:
        return None
    half = (found[4] or "").lower()
    return Text(("time", str(int(found[1])), found[2], found[3] or "00", half), True)


def _based(text: str) -> Value | None:
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


def _words(text: str) -> Value | None:
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    bare = plain.strip("() .")
    if not _WORDS.fullmatch(plain) or not (re.fullmatch("[A-Za-z]{1,2}", bare) or re.search(r"[A-Za-z]{3}", plain)):
        return None
    if "text" not in text and len(plain.split()) == 1 and len(plain) > 3 and not plain.isalpha():
        return None
    return Text(("words", *re.findall(r"[a-z']+", plain.casefold())), True)


def _prose(text: str) -> Value | None:
    """Words with numbers among them, a word first: ``May 12``. A month may stand before or behind its day."""
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    if not re.fullmatch(r"[A-Za-z]{3,}(?:[ .-]+(?:[A-Za-z]+|\d+(?:st|nd|rd|th)?))+", plain):
        if not re.fullmatch(rf"\d{{1,2}}(?:st|nd|rd|th)? (?:of )?(?:{_MONTHS})[a-z]*", plain):
            return None
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", plain.casefold()))
    if any(re.fullmatch(_MONTHS.casefold(), word[:3]) for word in words) and len(words) <= 3:
        words = sorted(word[:3] for word in words if word != "of")
    return Text(("words", *words), True)


def _empty(text: str) -> Value | None:
    return Pieces(()) if re.fullmatch(r"\\emptyset|\\\{\s*\\\}|\{\s*\}", text) else None


def _labelled(text: str) -> Value | None:
    """``(1) 5 (2) 7``: parts by number, from 1 on, none of them empty."""
    plain = re.sub(r"\\text\s*\{\s*(\(?\s*(?:\d|[a-h]|[iv]+)\s*\))\s*\}", r" \1 ", text)
    labels = list(_LABEL.finditer(plain))
    if len(labels) < 2 or plain[: labels[0].start()].strip():
        return None
    names = [found["round"] or found["half"] or found["ring"] for found in labels]
    for numbered in (_digits, _letters, _romans, _rings):
        if [numbered(name) for name in names] == list(range(1, len(names) + 1)):
            break
    else:
        return None
    ends = [found.start() for found in labels[1:]] + [len(plain)]
    contents = [plain[found.end() : end].strip(" ,;:") for found, end in zip(labels, ends, strict=True)]
    if not all(contents) or any(content[0] in "^+*/=)(" for content in contents):
        return None
    return Group(tuple(map(read, contents)), "label", "label")


def _digits(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdigit() else None


def _letters(name: str) -> int | None:
    return ord(name) - 96 if len(name) == 1 and name.isalpha() else None


def _romans(name: str) -> int | None:
    return _ROMAN.get(name)


def _rings(name: str) -> int | None:
    return ord(name) - 0x245F if len(name) == 1 and ord(name) > 0x2000 else None


def _ranged(text: str) -> Value | None:
    """Without a remark on what a letter runs over, unless that is all."""
    if (found := _FOR_ALL.search(text)) and found.start():
        return read(text[: found.start()])
    parts = [part for part in split(text, re.compile(r"\s*[,;]\s*|\\text\s*\{\s*(?=(?:where|for|with)\b)"))]
    if len(parts) == 1:
        found = re.fullmatch(rf"(.+?)\s*({_RANGE.pattern})", text)
        return (
            read(found[1])
            if found and found[2].lstrip().startswith(("(", r"\text", r"\forall")) and found[1].strip()
            else None
        )
    kept = [part for part in parts if not _RANGE.fullmatch(part.strip())]
    return read(", ".join(kept)) if kept and len(kept) < len(parts) else None


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
    found = _CONGRUENCE.fullmatch(text)
    if not found or r"\equiv" in found[2]:
        return None
    try:
        right, modulus = algebra.read(found[2]), algebra.read(found[3])
    except algebra.Unread:
        return None
    return Congruence(_key(found[1].strip()), right, modulus)


def _several(text: str) -> Value | None:
    if compound := _compound(text):
        return compound
    if (union := _union(text)) is not None:
        return union
    if text.count(r"\pm") + text.count(r"\mp") == 1 and not _RELATION.search(text) and not re.search(r"[,;]", text):
        return Group(tuple(read(re.sub(r"\\(?:pm|mp)(?![A-Za-z])", s, text)) for s in (" +", " -")))
    if r"\dots" in text:
        return None
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return None  # one number
    money = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if _MONEY.match(text) else text
    parts = [part.strip() for part in split(money, _SEMICOLON)]
    if len(parts) < 2 or not any(split(part, _LIST)[1:] for part in parts):
        parts = [part.strip() for part in split(money, _LIST)]
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return None
    if any(_RELATION.fullmatch(part) for part in parts):
        return None
    return Group(tuple(map(read, parts)))


def _compound(text: str) -> Value | None:
    """``3 hours 20 minutes``, ``5 feet 3 inches``, ``30^\\circ 15'``: one quantity in two units."""
    position, terms = 0, []
    text = re.sub(r"(?<=\^\\circ )\s*(\d+(?:\.\d+)?)\s*'(?!')", r"\1\\text{arcmin}", text)
    text = re.sub(r"(?<=\{arcmin\})\s*(\d+(?:\.\d+)?)\s*''", r"\1\\text{arcsec}", text)
    while found := _COMPOUND.match(text, position):
        unit = quantities.unit_of(found[2])
        if unit.name is None or quantities.PERCENT in unit.name:
            return None
        terms.append((algebra.read(found[1]), unit))
        position = found.end()
    if position != len(text) or len(terms) < 2:
        return None
    smallest = terms[-1][1]
    total: Any = 0
    for value, unit in terms:
        factor = quantities.factor_between(unit, smallest)
        if factor is None:
            return None
        total += algebra.rational(value) * factor.numerator / factor.denominator
    return Quantity(total, smallest, True)


def _bracketed(text: str) -> Value | None:
    found = bracketed(text)
    if found is None:
        return None
    opened, content, closed = found
    if opened == r"\{" and (built := _set_builder(content)) is not None:
        return built
    if opened == r"\langle":
        opened, closed = "(", ")"
    parts = [part.strip() for part in split(content, re.compile(r"\s*[,;]\s*"))]
    if opened == r"\{":
        if not content:
            return None
        return Group(tuple(map(read, parts)), opened, closed)
    if opened == "{":
        return read(content) if content else None
    if len(parts) < 2 or not all(parts):
        return None
    if re.search(r"\\dots", content):
        return None
    return Group(tuple(map(read, parts)), opened, closed)


def _set_builder(content: str) -> Value | None:
    """``x | 1 < x < 2``, also with a colon."""
    found = re.fullmatch(r"\s*[A-Za-z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]\s*(.+)", content)
    return read(found[1]) if found else None


def _member(text: str) -> Value | None:
    """``x \\in [1,2]`` is what x is in."""
    found = _MEMBER.match(text)
    return read(text[found.end() :]) if found and not _RELATION.search(text) else None


def _union(text: str) -> Value | None:
    r"""Intervals and conditions on one letter joined by ``\cup`` or "or"; ``\mathbb{R}`` without points."""
    if text == r"\mathbb{R}":
        return Pieces((Piece(None, None, True, True),))
    without = re.fullmatch(r"\\mathbb\{R\}\s*(?:\\setminus|-)\s*(\\\{.*\\\})", text)
    if without:
        points = read(without[1])
        if isinstance(points, Group) and all(isinstance(item, Quantity) for item in points.items):
            return _all_but([item.value for item in points.items if isinstance(item, Quantity)])
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
    found = [_pieces(value) for value in values]
    if any(pieces is None for pieces in found):
        return None
    return Pieces(tuple(piece for pieces in found if pieces is not None for piece in pieces.pieces))


def _all_but(points: Sequence[Any]) -> Value | None:
    ordered = _in_order([Piece(point, point, False, False) for point in points])
    if ordered is None:
        return None
    ends = [None, *(piece.low for piece in ordered), None]
    return Pieces(tuple(Piece(low, high, True, True) for low, high in zip(ends, ends[1:], strict=False)))


def _about(text: str) -> Value | None:
    r"""``\frac13 \approx 0.33`` is a third; ``x \approx 11`` is 11."""
    parts = split(text, _APPROXIMATELY)
    if len(parts) < 2 or not parts[0].strip():
        return None
    return read(" = ".join(parts[:2]) if _is_name(parts[0]) else parts[0])


def _related(text: str) -> Value | None:
    """An equation, an inequality, or a chain of them on one letter."""
    sides = split(text, _RELATION)
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    marks = [found[0] for found in _RELATION.finditer(text)]
    if len(marks) != len(sides) - 1:
        return None
    operators = [_OPERATORS.get(mark, mark) for mark in marks]
    sides = [side.strip() for side in sides]
    if any(re.search(r"\\text\s*\{[^{}]*\w{3}|(?<![A-Za-z\\{_])[A-Za-z]{5}", side) for side in sides[1:-1]):
        return Text(_key(text), False, "it holds words")
    if set(operators) == {"="}:
        return Relation(sides[0], "=", sides[-1])
    if len(sides) == 2:
        return Relation(sides[0], operators[0], sides[1])
    if len(sides) == 3 and {operators[0][0], operators[1][0]} in ({"<"}, {">"}):
        if operators[0][0] == ">":
            sides, operators = sides[::-1], [_FLIPPED[o] for o in operators[::-1]]
        try:
            low, high = (None if _infinite(side) else algebra.read(side) for side in (sides[0], sides[2]))
        except algebra.Unread:
            return None
        if _is_name(sides[1]):
            return Pieces((Piece(low, high, operators[0] == "<", operators[1] == "<"),))
    return None


def _infinite(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?\s*\\infty", text.strip()))


def _is_name(text: str) -> bool:
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


def _quantity(text: str) -> Value:
    """A formula, with or without a unit.

    Raises:
        Unread: it is none.
    """
    money = _MONEY.match(text)
    if money:
        text = text[: money.end() - 1] + text[money.end() :]
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?=\D|$).*", text):
        text = text.replace(",", "")
    head, behind = _unit_behind(text)
    factor, behind = quantities.scale_of(behind) if behind else (1, "")
    if not head.strip():
        if not behind and factor == 1:
            raise algebra.Unread("nothing is left of it")
        raise algebra.Unread("it holds words alone")
    value = algebra.read(head)
    numeric = not (getattr(value, "free_symbols", None) or hasattr(value, "shape"))
    unit = quantities.unit_of(behind) if behind else None
    if money:
        unit = unit if unit and unit.name else quantities.unit_of(money[0][-1])
    return Quantity(value * factor if factor != 1 else value, unit, numeric)


def _unit_behind(text: str) -> tuple[str, str]:
    """A formula and the unit or words behind it."""
    found = _SUFFIX.fullmatch(text)
    if not found:
        return text, ""
    head, unit = found["head"], found["unit"]
    bare = re.fullmatch(r"\s*([A-Za-z]{2})\s*", unit)
    # "2ab" and "3 xy" are products; "5cm" is not.
    if bare and bare[1] not in quantities.SHORT:
        return text, ""
    if re.fullmatch(r"[A-Za-z]+", unit) and unit not in quantities.SHORT and (not head or not head[-1].isspace()):
        return text, ""
    if re.search(r"[A-Za-z\\^_*/+=-]\s*$", head) and not re.search(r"(?:\\pi|[A-Za-z])\s*$", head):
        return text, ""
    return head, unit


_READERS: tuple[Callable[[str], Value | None], ...] = (
    _empty, _date, _clock, _based, _words, _prose, _labelled, _ranged, _system, _congruent, _about, _member, _several, _bracketed, _related, _ratio,
)  # fmt: skip


# --- comparing ---------------------------------------------------------------------------------------------------


def same(gold: str, pred: str) -> bool:
    """Return True if two normal texts say the same.

    Raises:
        GoldUnread, PredUnread: that side was not read whole, and is not the other's text.
    """
    if _key(gold) == _key(pred):
        return True
    return _equal(read(gold), read(pred))


def n_parts(text: str) -> int:
    """How many parts a normal text has: items of a list, a tuple or a set, else 1."""
    found = read(text)
    return len(found.items) if isinstance(found, Group) and found.opened != ":" else 1


def _equal(gold: Value, pred: Value) -> bool:
    if isinstance(gold, Text) and isinstance(pred, Text) and (gold.key == pred.key or _same_text(gold, pred)):
        return True
    if isinstance(gold, Text) and not gold.whole:
        raise GoldUnread(gold.why or "it is read as text")
    if isinstance(pred, Text) and not pred.whole:
        raise PredUnread(pred.why or "it is read as text")
    gold, pred = _unwrapped(gold, pred)
    gold, pred = _letter_as_value(gold, pred), _letter_as_value(pred, gold)
    match gold, pred:
        case Text(), _:
            return isinstance(pred, Text) and _same_text(gold, pred)
        case _, Text():
            return False
        case Quantity(), Quantity():
            return _same_quantity(gold, pred)
        case Relation(), Relation():
            return _same_relation(gold, pred)
        case Congruence(), Congruence():
            return _same_congruence(gold, pred)
        case Group(), Group() if (gold.opened == ":") == (pred.opened == ":"):
            return _same_group(gold, pred)
        case (Group(opened=":"), Quantity()) | (Quantity(), Group(opened=":")):
            ratio, other = (gold, pred) if isinstance(gold, Group) else (pred, gold)
            return _is_quotient(ratio, other)
    left, right = _pieces(gold), _pieces(pred)
    if left is not None and right is not None:
        return _same_pieces(left, right)
    return False


def _letter_as_value(value: Value, other: Value) -> Value:
    """Some letters alone are a word, and a product of names beside a formula."""
    if isinstance(value, Text) and isinstance(other, Quantity) and value.key[0] == "words" and len(value.key) == 2:
        return _quantity(value.key[1]) if len(value.key[1]) <= 4 and value.key[1].isalpha() else value
    return value


def _same_text(gold: Text, pred: Value) -> bool:
    if not isinstance(pred, Text):
        return False
    if gold.key == pred.key:
        return True
    if gold.key[0] == pred.key[0] == "time":
        return _same_time(gold.key, pred.key)
    # A letter, and the option's text behind it: "A" and "A. Paris".
    return (
        gold.key[0] == pred.key[0] == "words"
        and len(gold.key) == 2
        and len(gold.key[1]) == 1
        and pred.key[1] == gold.key[1]
    )


def _same_time(gold: Sequence[str], pred: Sequence[str]) -> bool:
    """Half a day that only the answer says is no difference; one that only the reference says is."""
    if gold[2:4] != pred[2:4] or gold[1] != pred[1]:
        return gold[2:4] == pred[2:4] and _hours(gold) == _hours(pred) and bool(gold[4]) != bool(pred[4])
    return gold[4] == pred[4] or not gold[4]


def _hours(time: Sequence[str]) -> int:
    return int(time[1]) % 12 + 12 * (time[4] == "p") if time[4] else int(time[1])


def _unwrapped(gold: Value, pred: Value) -> tuple[Value, Value]:
    """Without the name of a value where one side alone has it: ``x = 5`` and 5. What a name stands for is a value;
    ``2x + y = 1`` is not."""
    if isinstance(pred, Relation) and pred.op == "=" and not isinstance(gold, (Relation, Congruence)):
        pred = _read_whole(pred.right, PredUnread)
    elif (
        isinstance(gold, Relation)
        and gold.op == "="
        and not isinstance(pred, (Relation, Congruence))
        and _is_name(gold.left)
    ):
        gold = _read_whole(gold.right, GoldUnread)
    if isinstance(gold, Group) and isinstance(pred, Group) and gold.opened != ":":
        names = [_names(group) for group in (gold, pred)]
        if (names[0] is None) != (names[1] is None):
            return _nameless(gold, names[0]), _nameless(pred, names[1])
        if names[0] and names[1] and _one_name(names[0]) and _one_name(names[1]):
            return _nameless(gold, names[0]), _nameless(pred, names[1])
    return gold, pred


def _read_whole(text: str, error: type[Exception]) -> Value:
    found = read(text)
    if isinstance(found, Text) and not found.whole:
        raise error(found.why)
    return found


def _names(group: Group) -> list[str] | None:
    """The names of a group whose items are all named."""
    items = [item for item in group.items if isinstance(item, Relation) and item.op == "=" and _is_name(item.left)]
    return [item.left for item in items] if len(items) == len(group.items) else None


def _one_name(names: Sequence[str]) -> bool:
    """x, x or x_1, x_2: several values of one thing."""
    return len({re.sub(r"_\{?\w+\}?$", "", name.strip()) for name in names}) == 1


def _nameless(group: Group, names: list[str] | None) -> Group:
    if names is None:
        return group
    items = tuple(read(item.right) if isinstance(item, Relation) else item for item in group.items)
    # Several things have an order; several values of one thing have none.
    return Group(items, "" if _one_name(names) else "(", "" if _one_name(names) else ")")


def _same_quantity(gold: Quantity, pred: Quantity) -> bool:
    if gold.unit is None and pred.unit is None:
        return algebra.equal(gold.value, pred.value)
    if gold.unit is None or pred.unit is None:
        return _same_without_unit(gold, pred)
    try:
        factor = quantities.factor_between(pred.unit, gold.unit)
    except ValueError:
        return False
    if factor is not None:
        if factor.denominator.bit_length() > 120:  # by way of pi
            return False
        return algebra.equal(gold.value * factor.denominator, pred.value * factor.numerator)
    known = gold.unit.name is not None and pred.unit.name is not None
    return not known and quantities.same_words(gold.unit, pred.unit) and algebra.equal(gold.value, pred.value)


def _same_without_unit(gold: Quantity, pred: Quantity) -> bool:
    """A unit that one side lacks is no difference; ``n is odd`` is not ``n``."""
    import sympy

    unit = gold.unit or pred.unit
    assert unit is not None
    with_unit, without = (gold, pred) if gold.unit else (pred, gold)
    if unit.name is None and not with_unit.numeric:
        return False
    if algebra.equal(with_unit.value, without.value):
        return True
    if unit.name == quantities.PERCENT:
        return algebra.equal(with_unit.value, 100 * without.value)
    return unit.name == quantities.DEGREE and algebra.equal(with_unit.value * sympy.pi, 180 * without.value)


def _same_group(gold: Group, pred: Group) -> bool:
    if gold.opened == ":":
        return len(gold.items) == len(pred.items) and _proportional(gold, pred)
    if len(gold.items) != len(pred.items):
        sets = gold.opened == pred.opened == r"\{"
        return (
            sets
            and all(_contains(pred, item) for item in gold.items)
            and all(_contains(gold, item) for item in pred.items)
        )
    if _interval_like(gold) and _interval_like(pred) and (gold.opened, gold.closed) != (pred.opened, pred.closed):
        return False
    ordered = gold.opened in ("(", "[", "label") and (
        pred.opened in ("(", "[", "label", "") or gold.opened == pred.opened
    )
    if (
        gold.opened in ("(", "[")
        and pred.opened == r"\{"
        or gold.opened == "["
        and pred.opened == ""
        and len(gold.items) == 2
    ):
        return False
    if gold.opened == r"\{" and pred.opened in ("(", "["):
        return False
    if gold.opened == "" and pred.opened == "label":
        ordered = True
    if ordered:
        return all(_equal(one, two) for one, two in zip(gold.items, pred.items, strict=True))
    return _same_multiset(gold.items, pred.items)


def _interval_like(group: Group) -> bool:
    return len(group.items) == 2 and group.opened in ("(", "[") and group.closed in (")", "]")


def _contains(group: Group, wanted: Value) -> bool:
    return any(_equal(item, wanted) for item in group.items)


def _same_multiset(gold: Sequence[Value], pred: Sequence[Value]) -> bool:
    left = list(pred)
    for wanted in gold:
        for i, item in enumerate(left):
            if _equal(wanted, item):
                del left[i]
                break
        else:
            return False
    return True


def _proportional(gold: Group, pred: Group) -> bool:
    ratios = [
        algebra.constant_ratio(one.value, two.value)
        for one, two in zip(gold.items, pred.items, strict=True)
        if isinstance(one, Quantity) and isinstance(two, Quantity)
    ]
    return all(ratio is not None and algebra.equal(ratio, ratios[0]) for ratio in ratios)


def _is_quotient(ratio: Group, other: Quantity) -> bool:
    one, two = ratio.items if len(ratio.items) == 2 else (None, None)
    return isinstance(one, Quantity) and isinstance(two, Quantity) and algebra.equal(one.value, other.value * two.value)


def _same_congruence(gold: Congruence, pred: Congruence) -> bool:
    if gold.left != pred.left or not algebra.equal(gold.modulus, pred.modulus):
        return False
    difference, modulus = algebra.rational(gold.right - pred.right), algebra.rational(gold.modulus)
    if difference is None or not modulus:
        return algebra.equal(gold.right, pred.right)
    return bool((difference / modulus).is_integer)


def _same_relation(gold: Relation, pred: Relation) -> bool:
    if _key(gold.left) == _key(pred.left) and gold.op == pred.op:
        return _equal(_read_whole(gold.right, GoldUnread), _read_whole(pred.right, PredUnread))
    if (left := _pieces(gold)) is not None and (right := _pieces(pred)) is not None:
        return _letter(gold) == _letter(pred) and _same_pieces(left, right)
    sides = []
    for relation, error in ((gold, GoldUnread), (pred, PredUnread)):
        try:
            sides.append((algebra.read(relation.left), algebra.read(relation.right)))
        except algebra.Unread as unread:
            raise error(str(unread)) from None
    (a, b), (c, d) = sides
    if any(hasattr(side, "shape") for side in (a, b, c, d)):
        return False
    if not ((a - b).free_symbols or (c - d).free_symbols):
        return gold.op == pred.op == "=" and algebra.equal(a, c) and algebra.equal(b, d)
    ratio = algebra.constant_ratio(a - b, c - d)
    way = None if ratio is None else algebra.sign(ratio)
    if not way and gold.op != "=":
        return False
    if way is None and ratio is None:
        return False
    return gold.op == pred.op if (way or 1) > 0 or gold.op in ("=", "!=") else gold.op == _FLIPPED[pred.op]


def _letter(relation: Relation) -> tuple[str, ...]:
    return _key(relation.left if _is_name(relation.left) else relation.right)


def _pieces(value: Value) -> Pieces | None:
    """A set of real numbers as intervals: an interval, a condition on one letter, a point."""
    match value:
        case Pieces():
            return value
        case Group() if _interval_like(value):
            ends = [item.value for item in value.items if isinstance(item, Quantity)]
            if len(ends) != 2 or any(hasattr(end, "shape") for end in ends):
                return None
            low, high = (None if end.is_infinite else end for end in ends)
            return Pieces((Piece(low, high, value.opened == "(", value.closed == ")"),))
        case Group(opened=r"\{") if all(isinstance(item, Quantity) for item in value.items):
            points = [item.value for item in value.items if isinstance(item, Quantity)]
            return Pieces(tuple(Piece(point, point, False, False) for point in points))
        case Relation() if value.op != "=":
            return _half_line(value)
        case Relation() if _is_name(value.left):
            point = read(value.right)
            return Pieces((Piece(point.value, point.value, False, False),)) if isinstance(point, Quantity) else None
    return None


def _half_line(relation: Relation) -> Pieces | None:
    left, op, right = relation.left, relation.op, relation.right
    if not _is_name(left):
        left, op, right = right, _FLIPPED[op], left
    if not _is_name(left):
        return None
    end = read(right)
    if not isinstance(end, Quantity) or hasattr(end.value, "shape"):
        return None
    if op == "!=":
        found = _all_but([end.value])
        return found if isinstance(found, Pieces) else None
    if op[0] == "<":
        return Pieces((Piece(None, end.value, True, op == "<"),))
    return Pieces((Piece(end.value, None, op == ">", True),))


def _same_pieces(gold: Pieces, pred: Pieces) -> bool:
    if len(gold.pieces) != len(pred.pieces):
        return False
    one, two = (_in_order(pieces.pieces) for pieces in (gold, pred))
    if one is None or two is None:
        one, two = gold.pieces, pred.pieces
    return all(_same_piece(left, right) for left, right in zip(one, two, strict=True))


def _same_piece(gold: Piece, pred: Piece) -> bool:
    for one, two in ((gold.low, pred.low), (gold.high, pred.high)):
        if (one is None) != (two is None) or (one is not None and not algebra.equal(one, two)):
            return False
    return (gold.low is None or gold.low_open == pred.low_open) and (
        gold.high is None or gold.high_open == pred.high_open
    )


def _in_order(pieces: Sequence[Piece]) -> list[Piece] | None:
    """By their lower ends; None where these cannot be put in order."""
    try:
        return sorted(
            pieces, key=lambda piece: (float("-inf") if piece.low is None else float(piece.low), piece.low_open)
        )
    except (TypeError, ValueError, OverflowError):
        return None

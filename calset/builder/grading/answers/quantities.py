r"""Formulas with a unit or words behind them, and when two are equal.

A unit that one side lacks is no difference; two different ones are. Must not know: lists, relations.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from calset.builder.grading.answers import algebra, units
from calset.builder.grading.answers.values import Quantity

_UNIT = (
    r"(?:\\text\s*\{[^{}]*\}|\^\\circ\s*(?:[CF](?![A-Za-z])|\\text\s*\{\s*[CF]\s*\})?|\\%|%"
    r"|(?<![A-Za-z\\])[A-Za-zΩµμ]{2,}(?![A-Za-z(])|(?<=[/*] )[A-Za-z](?![A-Za-z])|(?<=[/*])[A-Za-z](?![A-Za-z]))"
)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_SUFFIX = re.compile(
    rf"(?P<head>.*?)(?P<unit>(?:(?<=[\s\d}})!.a-zA-Z])|^)(?>(?:[\s/*.,\-]|\\cdot|\\times)*{_UNIT}{_POWER})++)[\s.]*",
    re.S,
)


MONEY = re.compile(r"-?\s*[$€£¥₹]")
_COMPOUND = re.compile(
    rf"(\d+(?:\.\d+)?|\\frac\{{\d+\}}\{{\d+\}})\s*({_UNIT}|'')\s*(?:,?\s*(?:\\text\s*\{{\s*and\s*\}}|and))?\s*"
)


def compound(text: str) -> Quantity | None:
    """``3 hours 20 minutes``, ``5 feet 3 inches``, ``30^\\circ 15'``: one quantity in two units."""
    position, terms = 0, []
    text = re.sub(r"(?<=\^\\circ )\s*(\d+(?:\.\d+)?)\s*'(?!')", r"\1\\text{arcmin}", text)
    text = re.sub(r"(?<=\{arcmin\})\s*(\d+(?:\.\d+)?)\s*''", r"\1\\text{arcsec}", text)
    while found := _COMPOUND.match(text, position):
        unit = units.unit_of(found[2])
        if unit.name is None or units.PERCENT in unit.name:
            return None
        number = read_or_none(found[1])
        value = number and algebra.rational(number.value)
        if value is None:
            return None
        terms.append((value, unit))
        position = found.end()
    if position != len(text) or len(terms) < 2:
        return None
    # "30 degrees, 60 degrees" are two angles: each unit of one quantity is smaller than the one before.
    steps = [units.factor_between(one[1], two[1]) for one, two in pairwise(terms)]
    if any(step is None or step <= 1 for step in steps):
        return None
    smallest = terms[-1][1]
    total: Any = 0
    for value, unit in terms:
        factor = units.factor_between(unit, smallest)
        if factor is None:
            return None
        total += value * factor.numerator / factor.denominator
    return Quantity(total, smallest, True)


def read(text: str) -> Quantity:
    """A formula, with or without a unit.

    Raises:
        Unread: it is none.
    """
    money = MONEY.match(text)
    if money:
        text = text[: money.end() - 1] + text[money.end() :]
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?=\D|$).*", text):
        text = text.replace(",", "")
    head, behind = _unit_behind(text)
    factor, behind = units.scale_of(behind) if behind else (1, "")
    if not head.strip():
        if not behind and factor == 1:
            raise algebra.Unread("nothing is left of it")
        raise algebra.Unread("it holds words alone")
    value = algebra.read(head)
    numeric = not (getattr(value, "free_symbols", None) or hasattr(value, "shape"))
    unit = units.unit_of(behind) if behind else None
    if money:
        sign = units.unit_of(money[0][-1])
        same_money = unit and unit.name and units.factor_between(unit, sign) is not None
        unit = unit if same_money else units.Unit(sign.name, (*sign.words, *(unit.words if unit else ())))
    return Quantity(value * factor if factor != 1 else value, unit, numeric)


def read_or_none(text: str) -> Quantity | None:
    """The quantity that a normal text is, or None."""
    try:
        return read(text)
    except algebra.Unread:
        return None


def _unit_behind(text: str) -> tuple[str, str]:
    """A formula and the unit or words behind it."""
    found = _SUFFIX.fullmatch(text)
    if not found:
        return text, ""
    head, unit = found["head"], found["unit"]
    if re.search(r"\d", re.sub(r"\^\s*\{?\s*-?\d\s*\}?", "", unit)):
        return text, ""  # "divisible by 4", "remainder 2"
    bare = re.match(r"(\s*)([A-Za-z]+)(?![A-Za-z])", unit)
    # "2ab", "3xy^2" and "3 xy" are products; "5cm" is not.
    apart = bare and (bare[1] or not head or head[-1].isspace())
    if bare and bare[2] not in units.SHORT and (len(bare[2]) == 2 or not apart):
        return text, ""
    if re.search(r"[A-Za-z\\^_*/+=-]\s*$", head) and not re.search(r"(?:\\pi|[A-Za-z])\s*$", head):
        return text, ""
    return head, unit


def same(gold: Quantity, pred: Quantity) -> bool:
    """Return True if two quantities are one: 1 km and 1000 m, 18 h and 18."""
    if gold.unit is None and pred.unit is None:
        return algebra.equal(gold.value, pred.value)
    if gold.unit is None or pred.unit is None:
        return _same_without_unit(gold, pred)
    factor = units.factor_between(pred.unit, gold.unit)
    if factor is not None:
        if not units.same_words(units.beside(gold.unit), units.beside(pred.unit)):
            return False
        if factor.denominator.bit_length() > 120:  # by way of pi
            return False
        return algebra.equal(gold.value * factor.denominator, pred.value * factor.numerator)
    known = gold.unit.name is not None and pred.unit.name is not None
    return not known and units.same_words(gold.unit, pred.unit) and algebra.equal(gold.value, pred.value)


def _same_without_unit(gold: Quantity, pred: Quantity) -> bool:
    """A unit that one side lacks is no difference; ``n is odd`` is not ``n``."""
    import sympy

    unit = gold.unit or pred.unit
    assert unit is not None
    with_unit, without = (gold, pred) if gold.unit else (pred, gold)
    if (unit.name is None and not with_unit.numeric) or units.qualifies(unit):
        return False
    if pred.unit is not None and unit.words in (("K",), ("M",), ("B",)):
        return False  # thousand, million, billion as often as kelvin and molar
    if algebra.equal(with_unit.value, without.value):
        return True
    if unit.name == units.PERCENT:
        return algebra.equal(with_unit.value, 100 * without.value)
    return unit.name == units.DEGREE and algebra.equal(with_unit.value * sympy.pi, 180 * without.value)

r"""What stands behind a number: a unit, words, a scale such as million, per cent; and when two of them agree.

Units that pint knows are compared as quantities (1 km is 1000 m, 18 h is 18 hours and not 18 m); other words as words.
A unit that one side lacks is no difference; two different ones are. Must not know: TeX beyond ``tex``, verdicts.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

SCALES = {
    "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9,
    "trillion": 10**12, "quadrillion": 10**15, "dozen": 12, "mil": None, "k": None,
}  # fmt: skip
SCALES |= {"万": 10**4, "亿": 10**8, "千": 10**3, "百": 100}
SCALES = {word: factor for word, factor in SCALES.items() if factor}
# What people write, and pint's name for it.
_NAMES = {
    "%": "percent", "percent": "percent", "percentage": "percent", "pct": "percent", "°": "degree", "deg": "degree",
    "degrees": "degree", "°c": "degC", "°f": "degF", "°k": "kelvin", "mph": "mile/hour", "kmph": "km/hour",
    "kph": "km/hour", "kmh": "km/hour", "sec": "second", "secs": "second", "hr": "hour", "hrs": "hour",
    "mins": "minute", "yr": "year", "yrs": "year", "ohms": "ohm", "Ω": "ohm", "cc": "cm**3", "inches": "inch",
    "feet": "foot", "litre": "liter", "litres": "liter", "metre": "meter", "metres": "meter", "liters": "liter",
    "a": "ampere", "c": "coulomb", "lbs": "pound", "sqm": "meter**2", "gm": "gram", "gms": "gram", "kgs": "kg",
    "kilometre": "km", "kilometres": "km", "centimetre": "cm", "centimetres": "cm", "millimetre": "mm",
    "millimetres": "mm",
}  # fmt: skip
_CURRENCIES = {
    "$": "dollar", "dollars": "dollar", "dollar": "dollar", "usd": "dollar", "bucks": "dollar", "€": "euro",
    "euros": "euro", "euro": "euro", "eur": "euro", "£": "pound_sterling", "gbp": "pound_sterling", "¥": "yen",
    "yen": "yen", "yuan": "yuan", "rmb": "yuan", "₹": "rupee", "rs": "rupee", "rupees": "rupee", "rupee": "rupee",
    "cents": "dollar_cent", "cent": "dollar_cent", "¢": "dollar_cent",
}  # fmt: skip
SHORT = {
    "mm", "cm", "dm", "km", "kg", "mg", "ml", "mL", "ft", "in", "yd", "mi", "lb", "lbs", "oz", "hr", "hrs", "min",
    "mins", "sec", "ms", "mph", "kph", "Hz", "kHz", "MHz", "kW", "MW", "kWh", "kJ", "MJ", "eV", "keV", "MeV", "GeV",
    "Pa", "kPa", "nm", "pm", "am", "mol", "cc", "gal", "pt", "qt", "rad", "deg", "sq", "cu", "st", "nd", "rd", "th",
    "kN", "mA", "Mg", "mW", "GW", "TW", "nF", "pF", "mV", "kV", "dB", "AU", "ly", "pc", "bit", "bits", "ha", "kmh",
    "kmph", "yr", "yrs", "gm", "rs", "Rs",
}  # fmt: skip
_COUNTED = {
    "point",
    "count",
    "unit",
    "dot",
    "bag",
    "barn",
    "chain",
    "hand",
    "link",
    "mark",
    "rod",
    "slug",
    "span",
    "stone",
}
_LETTERS = set("msghlLNJWVACKTFHMtΩ")
_LONG_ENOUGH = {"day", "bar", "erg", "mol", "rod", "ton", "rpm"}
_SKIPPED = {"the", "a", "an", "of", "about", "in", "total", "exactly", "approximately", "each", "is", "are"}


class Unit(NamedTuple):
    """Words behind a number: pint's name of the unit, or None, and the words themselves."""

    name: str | None
    words: tuple[str, ...]


PERCENT, DEGREE = "percent", "degree"


@lru_cache(maxsize=512)
def unit_of(text: str) -> Unit:
    """The unit that a text names; the text may hold TeX powers, ``\\cdot`` and ``/``."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    plain = re.sub(r"\^\s*\\circ", "°", plain).replace(r"\cdot", "*").replace(r"\times", "*").replace(r"\%", "%")
    plain = re.sub(r"\^\s*\{\s*(-?\d+)\s*\}|\^\s*(-?\d)", lambda m: f"**{m[1] or m[2]}", plain)
    plain = " ".join(re.sub(r"°\s+(?=[CF]\b)", "°", plain).replace("^", "**").split()).strip(" .,;")
    # mg and Mg, mW and MW: a short word has its case.
    found = (
        word if (len(word) <= 3 and word[1:] != word[1:].casefold()) or len(word) <= 2 else word.casefold()
        for word in re.findall(r"[^\W\d_]+|[°%$€£¥₹¢]", plain)
    )
    words = tuple(map(singular, found))
    words = tuple(word for word in words if word not in _SKIPPED) or words
    return Unit(_pint_name(plain), words)


def scale_of(text: str) -> tuple[int, str]:
    """The factor of the scale words with which a text begins, and the rest of it: ``million dollars``."""
    factor = 1
    while found := re.match(r"\s*(?:\\text\s*\{\s*)?([A-Za-z]+\b|[万亿千百])", text):
        word = found[1].casefold()
        word = word if word in SCALES else word.removesuffix("s")
        if word not in SCALES:
            break
        factor *= SCALES[word]
        inside = "{" in found[0]
        text = (r"\text{" if inside else "") + text[found.end() :]
        text = re.sub(r"^\\text\s*\{\s*(?:of\b)?\s*\}", "", text).strip()
    return factor, text.strip()


# Words that say more than what is counted.
_QUALIFIERS = {
    "or", "and", "more", "less", "fewer", "least", "most", "not", "no", "never", "rejected", "extraneous",
    "invalid", "false", "wrong", "incorrect", "if", "when", "unless", "except", "than", "plus", "minus", "to",
    "times", "approximately", "both", "neither", "either", "above", "below", "under", "over", "up", "odd", "even",
    "squared", "cubed", "factorial", "mod", "modulo", "tens", "score", "gross", "pair", "couple", "zero", "doubled",
    "tripled", "halved", "remainder", "base", "binary", "octal", "decimal", "hexadecimal", "half", "halve",
    "quarter", "third", "bn", "mn", "tn", "mil", "prime", "composite", "missing", "unknown", "maybe",
}  # fmt: skip
_FRACTION = re.compile(r".*(?:[a-z]th|illion)")  # tenths, hundredths, quintillion
# One of two that exclude each other.
_DIRECTIONS = {
    "north", "south", "east", "west", "left", "right", "up", "down", "increase", "decrease", "profit", "loss", "gain",
    "clockwise", "counterclockwise", "anticlockwise", "more", "less", "older", "younger", "win", "lose",
}  # fmt: skip


def qualifies(unit: Unit) -> bool:
    """Return True if words say something of a number that it does not say without them: ``or more``, ``(rejected)``."""
    said = any(word in _SINGULAR_QUALIFIERS or _FRACTION.fullmatch(word) for word in unit.words)
    return unit.name is None and said


def beside(unit: Unit) -> Unit:
    """The words beside a currency: ``$20 profit``."""
    return Unit(None, unit.words[1:] if unit.words[:1] and unit.words[0] in "$€£¥₹" else ())


def same_words(one: Unit, two: Unit) -> bool:
    """Return True if all words of one are among the other's: ``apples`` and ``red apples``."""
    more = set(one.words) ^ set(two.words)
    if any(word in _SINGULAR_QUALIFIERS or word in _DIRECTIONS or _FRACTION.fullmatch(word) for word in more):
        return False
    return set(one.words) <= set(two.words) or set(two.words) <= set(one.words)


def factor_between(one: Unit, two: Unit) -> Fraction | None:
    """How many of ``two`` a ``one`` is; None where they measure different things, are two scales of temperature, or
    pint does not know them."""
    if one.name is None or two.name is None:
        return None
    if one.name == two.name:
        return Fraction(1)
    registry = _registry()
    try:
        left, right = registry.Quantity(Fraction(1), one.name), registry.Quantity(Fraction(1), two.name)
        if left.dimensionless and PERCENT in (one.name, two.name):
            return None
        zero = registry.Quantity(Fraction(0), one.name).to(right.units).magnitude
        return Fraction(left.to(right.units).magnitude) if zero == 0 else None
    except Exception:  # other dimensions; a logarithmic unit: pint takes the logarithm of a Fraction
        return None


def singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


_SINGULAR_QUALIFIERS = set(map(singular, _QUALIFIERS))


def _pint_name(text: str) -> str | None:
    """pint's name of a unit; None where pint has none. Most texts are settled without pint, which takes a second."""
    folded = text.casefold()
    if not text or folded in _CURRENCIES or folded in _NAMES:
        return _CURRENCIES.get(folded) or _NAMES.get(folded)
    if not re.fullmatch(r"[A-Za-zΩµμ°*/()\d\s.\-]{1,80}", text):
        return None
    named = re.sub(r"[A-Za-zΩ°]+", lambda m: _NAMES.get(m[0].casefold() if len(m[0]) > 1 else m[0], m[0]), text)
    named = re.sub(r"\b(?:sq|square)\.?\s+(\w+)", r"\1**2", named, flags=re.I)
    named = re.sub(r"\b(?:cu|cubic)\.?\s+(\w+)", r"\1**3", named, flags=re.I)
    named = re.sub(r"(\w+)\s+squared\b", r"\1**2", named)
    named = re.sub(r"\s+per\s+|\bper\s+", "/", named)
    named = re.sub(r"(?<=[\w)])\s+(?=[A-Za-z])", "*", named)
    if re.search(r"\*\*(?!-?\d(?![\d*]))|[()]|(?<!\*\*)(?<!\*\*-)\d", named):
        return None  # pint works a power out
    if any(not _is_unit(word) for word in re.findall(r"[A-Za-z_µμ]+", named)):
        return None
    registry = _registry()
    try:
        registry.parse_units(named)
        return named
    except Exception:  # pint's parser raises whatever Python's does
        return None


@lru_cache(maxsize=512)
def _is_unit(word: str) -> bool:
    """pint takes "cats" for centi-technical-atmospheres: a short word must be listed, a long one spelt out."""
    if word.removesuffix("s") in _COUNTED:
        return False
    if word[:1] in "µμ":
        return word[1:] in _LETTERS
    if len(word) <= 3 and word.casefold() not in _LONG_ENOUGH:
        return word in SHORT or word in _LETTERS
    try:
        return any(word.startswith(prefix) for prefix, _, _ in _registry().parse_unit_name(word))
    except Exception:
        return False


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint

    exact: Any = Fraction
    registry: Any = pint.UnitRegistry(non_int_type=exact, cache_folder=None)
    for line in ("dollar = [money_dollar]", "dollar_cent = dollar / 100", "euro = [money_euro]", "yen = [money_yen]"):
        registry.define(line)
    for line in ("pound_sterling = [money_pound]", "yuan = [money_yuan]", "rupee = [money_rupee]"):
        registry.define(line)
    return registry

"""Checks of answers to reasoning-gym tasks that have one right value, which the tasks' own scorers do not always tell
from a wrong one.

A check gets the answer, the entry and the task's scorer, as in ``gym_checks``. The check alone gives full credit; the
scorer only says how near a wrong answer is. The first line of a check's docstring is what docs/problems.md says of
its tasks. Must not know: responses, verdicts, which tasks there are.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from calset.builder.grading.formulas import Grammar, Unreadable, parse, value
from calset.builder.grading.gym_checks import Score, UnreadableEntry, rows

MAX_CHARS = 1_000  # of a number
MAX_TEN_POWER = 400
_DECIMALS = Grammar((("+", "-"), ("*", "/")), ("+", "-"), decimals=True)
NEARLY = 0.99  # the most that a wrong answer scores

_GROUPS = r"[0-9]{1,3}(?:(?P<gap>[, _])[0-9]{3})(?:(?P=gap)[0-9]{3})*"
_NUMBER = re.compile(
    rf"(?:[A-Za-z]\s*=\s*)?(?P<sign>[-+]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<whole>{_GROUPS}|[0-9]+)?(?P<part>\.[0-9]*)?"
    r"(?:[eE](?P<power>[-+]?[0-9]{1,4})|\s*(?:[×·*x]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<ten>[-+]?[0-9]{1,4})\s*\}?)?"
    r"(?:\s*/\s*(?P<below>[0-9]+))?\s*(?P<unit>%|°|[A-Za-z][A-Za-z ]*)?"
)
_QUOTIENT = re.compile(
    r"\$? ?(?:([0-9]+)(?: ?/ ?([0-9]+))?|\\[dt]?frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}) ?\$?",
)
# A word that makes another number of the one before it, or another answer.
_NO_UNIT = re.compile(
    "(?:hundred|thousand|million|billion|trillion|dozen|third|quarter|cent)s?|k|mn?|bn?|score|percent(?:age)?|pct|half|"
    "halves|or|and|not|to|minus|plus|times|over|per|less|more|than|about|around|approximately|at|least|most|[eijx]|pi"
)


def number(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a number's exact value with the reference answer's, any other answer whatever its case.

    A number may have thousands separators, a currency sign, and a unit that the question names.
    """
    expected = read_number(str(entry["answer"]))
    if expected is None:
        return any_case(text, entry, score)
    return _full(read_number(text, entry.get("question", "")) == expected, text, entry, score)


def thousandths(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a number with the reference answer, both rounded to three decimal places."""
    # The task rounds its numbers so and then adds them as floats: 947865419.169 has the reference 947865419.1689999.
    expected, found = read_number(entry["answer"]), read_number(text)
    if expected is None:
        raise UnreadableEntry("the reference answer is no number")
    return _full(found is not None and _rounded(found, 3) == _rounded(expected, 3), text, entry, score)


def any_case(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare the text with the reference answer, whatever its case."""
    return _full(_folded(text) == _folded(entry["answer"]), text, entry, score)


def letters(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare the text with the reference answer, whatever its case and without spaces."""
    return _full(_folded(text).replace(" ", "") == _folded(entry["answer"]).replace(" ", ""), text, entry, score)


def words(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare the words between commas with the reference answer's."""
    return _full(_words(text) == _words(entry["answer"]), text, entry, score)


def board(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare the parts between spaces of each line with the reference answer's."""
    return _full(rows(text) == rows(entry["answer"]), text, entry, score)


def array(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a list of numbers and texts, or a list of such lists, with the reference answer."""
    if text.strip() == entry["answer"].strip():
        return 1.0
    expected = _list(entry["answer"])
    if expected is None:
        raise UnreadableEntry("the reference answer is no list")
    return _full(_list(text) == expected, text, entry, score)


def json_value(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a JSON value, or else the text, with the reference answer."""
    values = [_json(part) for part in (text, entry["answer"])]
    right = values[0] == values[1] if None not in values else text.strip() == entry["answer"].strip()
    return _full(right, text, entry, score)


def factors(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read whole numbers and powers with signs of multiplication; compare them with the reference answer's.

    The product itself may be there, too: ``12 = 2 × 2 × 3``.
    """
    expected = _factors(entry["answer"])
    if expected is None:
        raise UnreadableEntry("the reference answer is no product")
    sides = [_factors(side) for side in (_line(text) or "").split("=")]
    if len(sides) > 2 or None in sides:
        raise Unreadable("no product of whole numbers")
    if len(sides) == 2:
        product = [math.prod(expected)]
        sides = [side for side in sides if side != product] or [product]
    found = sides[0] if len(sides) == 1 else None
    if found == expected:
        return 1.0
    return 0.5 if found is not None and math.prod(found) == math.prod(expected) else 0.01


def complex_number(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read a complex number (`-15 + 3i`) and compare it with the exact result."""
    result = entry["metadata"].get("result")
    if not (isinstance(result, Sequence) and len(result) == 2 and all(map(_is_number, result))):
        raise UnreadableEntry("the result is no pair of numbers")
    found = _complex(text)
    if found is None:
        raise Unreadable("no complex number")
    expected = tuple(Fraction(str(part)) for part in result)
    distance = max(abs(float(a - b)) for a, b in zip(found, expected, strict=True))
    return 1.0 if found == expected else min(math.exp(-distance), NEARLY)


def probability(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a number, or one rounded to three digits or more, with the exact probability."""
    reference, rational = read_number(entry["answer"]), entry["metadata"].get("rational")
    exact = reference
    if isinstance(rational, Mapping):
        above, below = rational.get("numerator"), rational.get("denominator")
        if not (isinstance(above, int) and isinstance(below, int) and below):
            raise UnreadableEntry("the rational probability is no pair of whole numbers")
        exact = Fraction(above, below)
    if reference is None or exact is None:
        raise UnreadableEntry("the reference answer is no number")
    sides = re.split(r"=|≈|\\approx", text)
    if not all(read_number(side.strip().removesuffix("%")) is not None for side in sides):
        raise Unreadable("no number")
    return float(all(_is_probability(side.strip(), exact, reference) for side in sides))


def simplified(text: str, entry: Mapping[str, Any], score: Score) -> float:
    r"""Read `a/b` or `\frac{a}{b}`; compare both numbers with those of the simplified fraction."""
    found = _QUOTIENT.fullmatch(_line(text) or "")
    if found is None:
        raise Unreadable("no fraction")
    expected = [entry["metadata"].get(f"simplified_{name}") for name in ("numerator", "denominator")]
    return 1.0 if [int(found[1] or found[3]), int(found[2] or found[4] or 1)] == expected else 0.05


def roots(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read numbers between commas; compare all with the reference answer, to its four decimal places.

    The reference answer is empty where there is no real solution.
    """
    expected = [read_number(part) for part in entry["answer"].split(",") if part.strip()]
    if None in expected:
        raise UnreadableEntry("the reference answer is no list of numbers")
    line = _line(text)
    text = "?" if line is None else line
    if _folded(text).strip("\"'.") in _NO_ROOTS:
        return float(not expected)
    parts = re.sub(r"(?<![\w])[A-Za-z](?:_\{?[0-9]\}?)?\s*=\s*", "", re.sub(r"\s+(?:and|or)\s+", ",", text)).split(",")
    found = [read_number(part) for part in parts]
    if None in found:
        raise Unreadable("no list of numbers")
    pairs = zip(sorted(found), sorted(expected), strict=False)  # type: ignore[type-var]
    right = len(found) == len(expected) and all(_rounds_to(a, b, 4) for a, b in pairs)
    return _full(right, text, entry, score)


_NO_ROOTS = frozenset(
    ("", "none", "no solution", "no solutions", "no real solution", "no real solutions", "no real roots", "∅",
     "there are no real solutions", "empty string", "[]")
)  # fmt: skip


def pooled(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read a matrix of numbers; compare it exactly, averages to two decimal places."""
    expected, found = (_numbers(part) for part in (entry["answer"], text))
    if expected is None:
        raise UnreadableEntry("the reference answer is no matrix of numbers")
    if found is None:
        raise Unreadable("no matrix of numbers")
    exact = _averages(entry["metadata"]) or expected
    if not [len(row) for row in found] == [len(row) for row in expected] == [len(row) for row in exact]:
        return _full(False, text, entry, score)
    lines = zip(rows(text), found, expected, exact, strict=True)
    cells = [cell for line in lines for cell in zip(*line, strict=True)]
    right = all(a in (b, c) or (c != b and _is_rounding(cell, c, 3)) for cell, a, b, c in cells)
    return _full(right, text, entry, score)


def _averages(metadata: Mapping[str, Any]) -> list[list[Fraction]] | None:
    """The exact averages of squares of ``pool_size`` of a matrix; None where no averages are asked for."""
    if metadata.get("pool_type") != "average":
        return None
    matrix, size = metadata.get("matrix"), metadata.get("pool_size")
    if not (isinstance(matrix, list) and all(isinstance(row, list) for row in matrix) and isinstance(size, int)):
        return None
    if not 0 < size <= 100 or sum(map(len, matrix)) > 10_000 or not all(_is_number(x) for row in matrix for x in row):
        return None
    squares = (
        [[x for row in matrix[i : i + size] for x in row[j : j + size]] for j in range(0, len(matrix[i]), size)]
        for i in range(0, len(matrix), size)
    )
    return [[Fraction(sum(map(Fraction, square)), len(square)) for square in row] for row in squares]


def decimal(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a number's exact value with the reference answer's, or ten digits and more with the exact result's."""
    reference, found = read_number(entry["answer"]), read_number(text)
    if reference is None:
        raise UnreadableEntry("the reference answer is no number")
    # The task rounds each step to the digits that it asks for, so its last digit is not always that of the exact value.
    sum_asked = re.search(r"([-+*/(). 0-9]+)=\s*\?\s*$", entry["question"][-500:])
    try:
        exact = value(parse(sum_asked[1], _DECIMALS)) if sum_asked else reference
    except (Unreadable, ZeroDivisionError):
        exact = reference
    return float(found is not None and (found in (reference, exact) or _is_rounding(text, exact, 10)))


def significant(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read a number (`1.23e-4`, `1.23 × 10^-4`) and hand its value to the task's scorer."""
    found = read_number(text)
    if found is None:
        return 0.01
    with localcontext(prec=60):
        return float(score(f"{Decimal(found.numerator) / Decimal(found.denominator):e}", entry))


def duration(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read days and a time of day; compare the seconds with the reference answer's, or with those that have passed."""
    expected, found = (_duration(part) for part in (entry["answer"], text))
    if expected is None:
        raise UnreadableEntry("the reference answer is no duration")
    # Of milliseconds the task loses one where a float is a little below it.
    right = found is not None and found[0] in (expected[0], _elapsed(entry["metadata"])) and found[1] >= expected[1]
    return _full(right, text, entry, score)


def geometry(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read an angle, a length or a pair of coordinates; compare each number, rounded, with the reference answer."""
    expected, found = (_coordinates(part) for part in (entry["answer"], text))
    if expected is None:
        raise UnreadableEntry("the reference answer holds no numbers")
    if found is None:
        raise Unreadable("no number and no pair of numbers")
    places = [len(part) for part in re.findall(r"\.([0-9]+)", entry["answer"])]
    right = len(found) == len(expected) == len(places) and all(
        _rounds_to(a, b, n) for a, b, n in zip(found, expected, places, strict=True)
    )
    return _full(right, text, entry, score)


# --- reading -----------------------------------------------------------------------------------------------------


def _line(text: str) -> str | None:
    """A text with single spaces; None for one that is too long for what is read here."""
    return " ".join(text.split()) if len(text) <= MAX_CHARS else None


def read_number(text: str, question: str = "") -> Fraction | None:
    """The exact value of a text that is one number and nothing else, apart from a unit that the question names."""
    text = _line(text) or ""
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
        text = re.sub("[\u2212\u2012\u2013]", "-", text)
    found = _NUMBER.fullmatch(text)
    if found is None or not (found["whole"] or (found["part"] or "").strip(".")):
        return None
    power, below = int(found["power"] or found["ten"] or 0), int(found["below"] or 1)
    if abs(power) > MAX_TEN_POWER or not below or not _is_unit(found["unit"], question):
        return None
    whole = re.sub(r"\D", "", found["whole"] or "") or "0"
    value = Fraction(f"{whole}{found['part'] or ''}".rstrip(".")) * Fraction(10) ** power / below
    return -value if found["sign"] == "-" else value


def _is_unit(unit: str | None, question: str) -> bool:
    """True if the question names each word of a unit, by its first letters: "12 apples" where it asks for an apple."""
    if unit is None or unit == "°":
        return True
    named = set(re.findall("[a-z]+", question.lower().replace("$", " dollars ")))
    stems = [(word, word.rstrip("s")[:5]) for word in unit.lower().split()]
    return unit != "%" and all(
        stem and not _NO_UNIT.fullmatch(word) and any(other.startswith(stem) for other in named) for word, stem in stems
    )


def _full(right: bool, text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Full credit, or as much as the task's scorer gives, which is less."""
    if right:
        return 1.0
    try:
        partial = float(score(text, entry))
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
        return 0.0
    return min(partial, NEARLY) if partial >= 0 else 0.0  # NaN is neither


def _rounded(value: Fraction, places: int) -> Fraction:
    """Half away from zero."""
    scaled = abs(value) * 10**places
    whole = math.floor(scaled + Fraction(1, 2))
    return Fraction(whole if value >= 0 else -whole, 10**places)


def _rounds_to(value: Any, reference: Any, places: int) -> bool:
    return value == reference or _rounded(value, places) == reference


def _is_probability(text: str, exact: Fraction, reference: Fraction) -> bool:
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    exact, reference = (value * 100 if percent else value for value in (exact, reference))
    found = read_number(text)
    if found in (exact, reference):
        return True
    return _is_rounding(text, exact, 3)


def _is_rounding(text: str, exact: Fraction, n_digits: int) -> bool:
    """Return True if a decimal number is the exact value, rounded to at least so many significant digits."""
    try:
        written = Decimal(text)
        _, digits, exponent = written.as_tuple()
    except ArithmeticError:
        return False
    if not isinstance(exponent, int) or abs(exponent) > MAX_TEN_POWER or len(digits) < n_digits:
        return False
    return _rounded(exact, max(0, -exponent)) == Fraction(written)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _words(text: str) -> list[str]:
    return [word.strip().strip("\"'") for word in text.strip().strip("[]").split(",")]


def _list(text: str) -> Any:
    """A list with its numbers as exact values, whether they are quoted or not; None for what is none."""
    if len(text) > 100_000:
        return None
    for written in (text, text.replace("'", '"')):
        try:
            found = json.loads(written, parse_constant=str, parse_float=str, parse_int=str)
        except (ValueError, RecursionError):
            continue
        return _exact(found) if isinstance(found, list) else None
    return None


def _json(text: str) -> str | None:
    """JSON's own text of a value, in which ``1`` and ``1.0`` are the same and ``true`` is another; None for no JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else value

    try:
        return json.dumps(plain(json.loads(text)), sort_keys=True) if len(text) <= 100_000 else None
    except (ValueError, RecursionError):
        return None


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return [_exact(item) for item in value]
    found = read_number(value) if isinstance(value, str) and re.fullmatch(r"[-+0-9.eE]+", value) else None
    return value if found is None else found


def _factors(text: str) -> list[int] | None:
    found: list[int] = []
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    for part in re.split(r"×|⋅|·|∙|\\times|\\cdot|(?<!\*)\*(?!\*)|[xX]", text):
        match = re.fullmatch(r"\s*\(?\s*([0-9]{1,30})\s*(?:(?:\^|\*\*)\s*[{(]?\s*([0-9]{1,2})\s*[)}]?)?\s*\)?\s*", part)
        if match is None:
            return None
        found += [int(match[1])] * int(match[2] or 1)
    return sorted(found)


def _complex(text: str) -> tuple[Fraction, Fraction] | None:
    text = re.sub("[\u2212\u2012\u2013]", "-", "".join((_line(text) or "").split())).lower().replace("j", "i")
    while len(text) > 1 and text[0] == "(" and text[-1] == ")":
        text = text[1:-1]
    part = r"[0-9]{1,60}(?:\.[0-9]{0,60})?"
    found = re.fullmatch(rf"(?P<re>[-+]?{part}(?!\*?i)(?![0-9.]))?(?:(?P<im>[-+]?(?:{part})?)\*?i)?", text)
    if found is None or not text:
        return None
    imaginary = found["im"]
    if imaginary is None:
        return Fraction(found["re"]), Fraction(0)
    if found["re"] and imaginary[:1] not in ("+", "-"):
        return None
    return Fraction(found["re"] or 0), Fraction(f"{imaginary}1" if imaginary in ("", "+", "-") else imaginary)


def _numbers(text: str) -> list[list[Fraction]] | None:
    found = [[read_number(cell) for cell in row] for row in rows(text)]
    return None if not found or any(None in row for row in found) else found  # type: ignore[return-value]


def _coordinates(text: str) -> list[Fraction] | None:
    text = re.sub(" ?(?:°|degrees?)$", "", _line(text) or "")
    enclosed = re.fullmatch(r"\(([^()]*)\)", text)
    found = [read_number(part) for part in (enclosed[1] if enclosed else text).split(",")]
    return None if None in found else found  # type: ignore[return-value]


def _elapsed(metadata: Mapping[str, Any]) -> Fraction | None:
    """The seconds between the two times of an entry; None where it has none."""
    try:
        start, end = (datetime.fromisoformat(metadata[name]) for name in ("start_time", "end_time"))
        passed = end - start
    except (KeyError, TypeError, ValueError):
        return None
    return Fraction(passed.days * 86_400 + passed.seconds) + Fraction(passed.microseconds, 10**6)


def _duration(text: str) -> tuple[Fraction, int] | None:
    """Seconds, and how many of days, hours and minutes, and seconds are there."""
    found = re.fullmatch(
        r"\s*(?:(?P<days>-?[0-9]{1,9})\s*days?)?(?(days)\s*,?\s*(?:and\s+)?)"
        r"(?:(?P<hours>[0-9]{1,6}):(?P<minutes>[0-5][0-9])(?::(?P<seconds>[0-5][0-9](?:\.[0-9]{1,9})?))?)?\s*",
        text,
    )
    if found is None or not (found["days"] or found["hours"]):
        bare = re.fullmatch(r"\s*([0-9]{1,9})\s*", text)
        return (Fraction(bare[1]) * 86_400, 1) if bare else None
    seconds = Fraction(found["seconds"] or 0) + 60 * int(found["minutes"] or 0) + 3_600 * int(found["hours"] or 0)
    parts = (found["days"], found["hours"], found["seconds"])
    return seconds + 86_400 * int(found["days"] or 0), sum(part is not None for part in parts)

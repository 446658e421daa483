"""Checks of answers to reasoning-gym tasks whose own scorers evaluate an answer, or run as long as it says.

A check gets the answer, the entry and the task's scorer. It computes the score itself, or hands to the scorer what has
passed a grammar. Entries come from catalogs, which a stranger may have written: what a check reads of them passes a
grammar too. The first line of a check's docstring is what docs/problems.md says of its tasks. Must not know: responses,
verdicts, which tasks there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

from calset.builder.grading.formulas import (
    Call,
    Chain,
    Grammar,
    Name,
    Node,
    Number,
    Power,
    Prefixed,
    Unreadable,
    leaves,
    parse,
    value,
)

Score = Callable[[str, Mapping[str, Any]], float]
Check = Callable[[str, Mapping[str, Any], Score], float]

MAX_ITEMS = 10_000  # of a list, moves of a puzzle
MAX_EXPONENT = 1_000
MAX_POWER_BITS = 10_000  # of a power of numbers
_SUMS = (("+", "-"), ("*", "/"))
_ARITHMETIC = Grammar(_SUMS, ("+", "-"))
_SIGNS = str.maketrans("×·⋅÷∶−–", "***//--")
_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_POLYNOMIAL = Grammar(_SUMS, ("+", "-"), power=True, decimals=True, names=_SYMBOL)
_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc")
_HYPERBOLIC = ("sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh", "atanh", "acoth")
_FUNCTIONS = {name: name for name in (*_CIRCULAR, *_HYPERBOLIC, "exp", "log", "sqrt", "Abs")}
_FUNCTIONS |= {"ln": "log", "abs": "Abs"}  # sympy's names for them
_CONSTANTS = ("pi", "E", "I")
_CALCULUS = Grammar(
    _SUMS, ("+", "-"), power=True, decimals=True, names=_SYMBOL, functions=frozenset(_FUNCTIONS), max_chars=1_000
)
_LOGIC = Grammar((("↔",), ("→",), ("∨",), ("∧",)), ("¬",), numbers=False, names=re.compile("[A-Z]"), max_chars=500)
_DIGITS = r"(?:[0-9]{1,60}(?:\.[0-9]{0,60})?|\.[0-9]{1,60})(?:[eE][-+]?0{0,9}[0-9]{1,2})?"
_DECIMAL = re.compile(rf"[-+]?{_DIGITS}")


class UnreadableEntry(ValueError):
    """Part of a problem's entry that is not what the task makes."""


def equal(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare the parts between spaces of each line with the reference answer's, or with those of a valid answer."""
    answers = entry["metadata"].get("valid_answers")
    answers = answers if isinstance(answers, list) else [entry["answer"]]
    return float(rows(text) in [rows(answer) for answer in answers if isinstance(answer, str)])


def rows(text: str) -> list[list[str]]:
    """The parts between spaces of each line that is not empty."""
    return [line.split() for line in text.splitlines() if line.strip()]


def integer(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read a whole number as Python writes it (`0x1f`, `31`) and compare it with the reference answer."""
    with _of_entry():
        expected = _integer(entry["answer"])
    return float(_integer(text) == expected)


def arithmetic(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read whole numbers with `+ - * / ( )`, the given ones and each once; compare the exact value with the target."""
    given = entry["metadata"].get("numbers")
    if not (isinstance(given, list) and len(given) <= 100):
        raise UnreadableEntry("numbers are no list of whole numbers")
    given = [_whole(number, "numbers") for number in given]
    target = _whole(entry["metadata"].get("target", 24), "target")
    text, *results = text.translate(_SIGNS).split("=")
    if len(results) > 1 or any(result.strip() != str(target) for result in results):
        raise Unreadable("an equation of something else than the target")
    formula = parse(text, _ARITHMETIC)
    if sorted(int(leaf.text) for leaf in leaves(formula)) != sorted(given):
        return 0.05
    try:
        return 1.0 if value(formula) == target else 0.05
    except ZeroDivisionError:
        return 0.05


def polynomial(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read numbers and symbols with `+ - * / ** ( )`; compare the terms with the reference answer's."""
    with _of_entry():
        expected = _algebra(parse(entry["answer"], _POLYNOMIAL), ())
    return float(_algebra(parse(text, _POLYNOMIAL), ()) == expected)


def integral(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Read numbers, symbols and functions with `+ - * / ** ( )`; compare the derivative with the integrand."""
    import sympy

    variable, integrand = entry["metadata"].get("variable"), entry["metadata"].get("integrand")
    if not (isinstance(variable, str) and _SYMBOL.fullmatch(variable) and variable not in (*_CONSTANTS, *_FUNCTIONS)):
        raise UnreadableEntry("the variable is no symbol")
    with _of_entry():
        expected = _algebra(parse(integrand, _CALCULUS), _CONSTANTS)
    found = _algebra(parse(text, _CALCULUS), _CONSTANTS)
    try:
        return float(sympy.simplify(sympy.diff(found, sympy.Symbol(variable)) - expected) == 0)
    except Exception:  # sympy's own, of every kind
        return 0.0


def sorted_numbers(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Compare a list of numbers, with quotes or without, with the reference answer, each exactly."""
    with _of_entry():
        expected = [Fraction(item) for item in _numbers(entry["answer"])]
    return float([Fraction(item) for item in _numbers(text)] == expected)


def proposition(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand a formula of the given variables with `¬ ∧ ∨ → ↔ ( )` to the task's scorer."""
    variables, premises = entry["metadata"].get("variables"), entry["metadata"].get("premises")
    if not (isinstance(variables, list) and len(variables) <= 10 and all(isinstance(name, str) for name in variables)):
        raise UnreadableEntry("the variables are no list of at most 10 names")
    if not (isinstance(premises, list) and len(premises) <= 100):
        raise UnreadableEntry("the premises are no list of at most 100 formulas")
    with _of_entry():
        for premise in premises:
            _formula_of(premise, variables, replace(_LOGIC, max_chars=4_000))
    _formula_of(text, variables, _LOGIC)
    return score(text, entry)


def cube_moves(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand at most 10,000 moves, of which `U3` is three, to the task's scorer."""
    if not 2 <= _whole(entry["metadata"].get("cube_size"), "cube_size") <= 7:
        raise UnreadableEntry("cube_size is not between 2 and 7")
    with _of_entry():
        _count_moves(entry["metadata"].get("scramble_moves"))
    text = re.sub("[’′`´]", "'", text)
    if not all(re.fullmatch(r"[A-Za-z]w?'?[0-9]*", move) for move in text.split()):
        raise Unreadable("no moves like U, U' and U3")
    _count_moves(text)
    return score(text, entry)


def car_moves(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand moves of at most 99 steps (`A+2`), and nothing else, to the task's scorer."""
    if not re.fullmatch(r"(?:[A-Z][+-][0-9]{1,2}[\s,;]*)+", text.strip()):
        raise Unreadable("no moves like A+2, of at most 99 steps")
    return score(text, entry)


def pusher_moves(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand the letters L, R, U and D, and nothing else, to the task's scorer."""
    moves = re.sub(r"[\s,→-]|->", "", text).upper()
    if not re.fullmatch("[LRUD]+", moves) or len(moves) > MAX_ITEMS:
        raise Unreadable("no moves of L, R, U and D")
    return score(moves, entry)


def button_presses(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand the names of buttons alone to the task's scorer if the buttons' numbers have at most 6 digits."""
    buttons = entry["metadata"].get("buttons")
    if not (isinstance(buttons, list) and all(isinstance(button, dict) for button in buttons)):
        raise UnreadableEntry("the buttons are no list of objects")
    for number in (entry["metadata"].get("initial_value"), *(button.get("value") for button in buttons)):
        _whole(number, "a value")
    if not re.fullmatch("[A-Ca-c]+", re.sub(r"->|[\s,→-]", "", text)) or len(text) > MAX_ITEMS:
        raise Unreadable("no buttons of A, B and C")
    return score(text, entry)


def roles(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand names and roles, joined by `is`, `a`, `an` and `and` alone, to the task's scorer."""
    reference = re.findall(r"[^\W\d_]+", str(entry["answer"]).lower())
    terms = entry["metadata"].get("knight_knave_terms")
    terms = [str(term).lower() for term in terms.values()] if isinstance(terms, Mapping) else []
    known = {*reference, *re.findall(r"[^\W\d_]+", " ".join(terms)), "is", "a", "an", "and", "so", "therefore"}
    if set(re.findall(r"\w+", text.lower())) - known:
        raise Unreadable("more than who is what")
    return score(re.sub(r"[*_`]", "", text), entry)


def cells(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand rows of whole numbers, and nothing else, to the task's scorer."""
    if not re.fullmatch(r"[0-9\s]+", text) or len(text) > MAX_ITEMS:
        raise Unreadable("no rows of whole numbers")
    return score(text, entry)


def marks(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand rows of 0 and 1, and nothing else, to the task's scorer."""
    if not re.fullmatch(r"[01\s]+", text) or len(text) > MAX_ITEMS:
        raise Unreadable("no rows of 0 and 1")
    return score(text, entry)


def partitions(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand a JSON list of lists of texts to the task's scorer."""
    found = _json(text)
    if not (isinstance(found, list) and all(isinstance(part, list) for part in found)):
        raise Unreadable("no JSON list of lists")
    if not all(isinstance(piece, str) for part in found for piece in part):
        raise Unreadable("a list that holds more than texts")
    return score(text, entry)


def disk_moves(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand lines like `Move disk 1 from Peg 1 to Peg 3` to the task's scorer if disks and pegs are at most 1,000."""
    for name in ("num_disks", "num_pegs"):
        if not 0 < _whole(entry["metadata"].get(name), name) <= 1_000:
            raise UnreadableEntry(f"{name} is not between 1 and 1,000")
    lines = [re.sub(r"^\s*(?:[0-9]{1,6}[.):]|[-*•])\s+", "", line).strip(" .,;") for line in text.splitlines()]
    if not all(re.fullmatch(r"Move disk [0-9]{1,4} from Peg [0-9]{1,4} to Peg [0-9]{1,4}|", line) for line in lines):
        raise Unreadable("no lines like 'Move disk 1 from Peg 1 to Peg 3'")
    return score("\n".join(lines), entry)


def box_moves(text: str, entry: Mapping[str, Any], score: Score) -> float:
    """Hand a JSON list of objects, whose values are texts of at most 200 characters, to the task's scorer."""
    steps = _json(text)
    if not (isinstance(steps, list) and all(isinstance(step, dict) for step in steps)):
        raise Unreadable("no JSON list of objects")
    if not all(isinstance(move, str) and len(move) <= 200 for step in steps for move in step.values()):
        raise Unreadable("a move that is no text of at most 200 characters")
    return score(text, entry)


# --- grammars ----------------------------------------------------------------------------------------------------


@contextmanager
def _of_entry() -> Iterator[None]:
    """What cannot be read is the entry's fault."""
    try:
        yield
    except (Unreadable, TypeError, AttributeError) as error:
        raise UnreadableEntry(str(error)) from error


def _whole(number: Any, name: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 10**6:
        raise UnreadableEntry(f"{name}: no whole number of at most 6 digits")
    return number


def _integer(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise Unreadable("no whole number") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("no JSON") from None


def _numbers(text: str) -> list[str]:
    """The numbers of a list as texts."""
    found = _json(text.replace("'", '"'))
    if not isinstance(found, list) or len(found) > MAX_ITEMS:
        raise Unreadable("no list of numbers")
    items = [item if isinstance(item, str) else json.dumps(item) for item in found if not isinstance(item, bool)]
    if len(items) < len(found) or not all(_DECIMAL.fullmatch(item.strip()) for item in items):
        raise Unreadable("a list that holds more than numbers of at most 60 digits")
    return items


def _count_moves(text: str) -> None:
    n = 0
    for move in text.split():
        found = re.fullmatch(r"[^\d]*(\d*)", move)
        if found is not None:
            n += int(found[1] or 1) if len(found[1]) <= 4 else MAX_ITEMS + 1
    if n > MAX_ITEMS:
        raise Unreadable(f"more than {MAX_ITEMS:,} moves")


def _formula_of(text: str, variables: list[str], grammar: Grammar) -> None:
    for leaf in leaves(parse(text, grammar)):
        if leaf.text not in variables:
            raise Unreadable(f"{leaf.text!r} is no variable of the problem")


def _algebra(node: Node, constants: tuple[str, ...]) -> Any:
    """The sympy expression of a formula, made of sympy's own classes: no text reaches a parser of sympy's.

    Raises:
        Unreadable: a power beyond the bounds.
    """
    import sympy

    def made(node: Node) -> Any:
        match node:
            case Number():
                return sympy.Integer(int(node.text)) if node.whole else sympy.Float(node.text)
            case Name():
                return getattr(sympy, node.text) if node.text in constants else sympy.Symbol(node.text)
            case Call():
                return getattr(sympy, _FUNCTIONS[node.function])(made(node.argument))
            case Prefixed():
                return made(node.operand) * (-1) ** node.signs.count("-")
            case Power():
                base, exponent = made(node.base), made(node.exponent)
                _bound_power(base, exponent)
                return base**exponent
            case Chain() if node.rest[0][0] in "+-":
                return sympy.Add(made(node.first), *(made(x) if sign == "+" else -made(x) for sign, x in node.rest))
            case Chain():
                result = made(node.first)
                for sign, operand in node.rest:
                    result = result * made(operand) if sign == "*" else result / made(operand)
                return result

    return made(node)


def _bound_power(base: Any, exponent: Any) -> None:
    """Refuse a power whose digits would fill the memory: 9**9**9."""
    import sympy

    if any(number is sympy.nan or abs(number) > MAX_EXPONENT for number in exponent.atoms(sympy.Number)):
        raise Unreadable(f"an exponent beyond {MAX_EXPONENT:,}")
    if base.is_Rational and exponent.is_Rational:
        bits = max(base.p.bit_length(), base.q.bit_length())
        if bits * abs(exponent) > MAX_POWER_BITS:
            raise Unreadable("a power of too many digits")

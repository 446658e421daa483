"""Formulas parsed, never evaluated: what a model wrote where an answer is arithmetic, algebra or logic.

Why it exists: the libraries that read such answers hand the text to Python. This parser knows the given symbols alone
and gives a tree within bounds, from which a check computes what it wants. Must not know: tasks, verdicts, sympy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 10_000
MAX_DEPTH = 100  # parentheses and signs within one another, a pair of parentheses as two
CALL_DEPTH = 9  # a function within a function counts as so many levels: sympy takes seconds for some dozens
MAX_DIGITS = 200  # of a number
MAX_TEN_POWER = 99  # of a number like 1e99

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z][A-Za-z0-9_]{0,30})|(?P<sign>\*\*|[-+*/()¬∧∨→↔]))"
)


class Unreadable(ValueError):
    """A text that is not of a grammar, or is beyond the grammar's bounds; the message says why, after "it is"."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """Signs and words of a kind of formula.

    Args:
        levels: operators between two operands, those that bind least first.
        prefixes: operators before an operand; they bind more than the levels and less than a power.
        power: whether ``**`` is there.
        decimals: whether numbers may have a point or an exponent.
        names: what a symbol looks like; there are none when None.
        functions: names that take one argument in parentheses.
    """

    levels: tuple[tuple[str, ...], ...]
    prefixes: tuple[str, ...] = ()
    power: bool = False
    numbers: bool = True
    decimals: bool = False
    names: re.Pattern[str] | None = None
    functions: frozenset[str] = frozenset()
    max_chars: int = MAX_CHARS


class Number(NamedTuple):
    """A number without a sign; ``whole`` when it is written without a point and an exponent."""

    text: str
    whole: bool


class Name(NamedTuple):
    text: str


class Call(NamedTuple):
    function: str
    argument: Node


class Prefixed(NamedTuple):
    signs: tuple[str, ...]
    operand: Node


class Power(NamedTuple):
    base: Node
    exponent: Node


class Chain(NamedTuple):
    """Operands of one level, from left to right: a tree of them would be as deep as the text is long."""

    first: Node
    rest: tuple[tuple[str, Node], ...]


Node = Number | Name | Call | Prefixed | Power | Chain


def parse(text: str, grammar: Grammar) -> Node:
    """Parse a text to the tree of the formula that it is.

    Raises:
        Unreadable: the text is no formula of the grammar, or beyond the bounds; says which.
    """
    if len(text) > grammar.max_chars:
        raise Unreadable(f"a formula of more than {grammar.max_chars:,} characters")
    return _Parser(grammar, _tokens(text)).whole()


def leaves(node: Node) -> Iterator[Number | Name]:
    """The numbers and symbols of a formula, from left to right."""
    match node:
        case Number() | Name():
            yield node
        case Call():
            yield from leaves(node.argument)
        case Prefixed():
            yield from leaves(node.operand)
        case Power():
            yield from leaves(node.base)
            yield from leaves(node.exponent)
        case Chain():
            yield from leaves(node.first)
            for _, operand in node.rest:
                yield from leaves(operand)


def value(node: Node) -> Fraction:
    """The exact value of arithmetic with ``+ - * /``.

    Raises:
        ZeroDivisionError: it divides by zero.
        Unreadable: it holds more than that.
    """
    match node:
        case Number():
            return Fraction(node.text)
        case Prefixed():
            return value(node.operand) * (-1) ** node.signs.count("-")
        case Chain():
            result = value(node.first)
            for sign, operand in node.rest:
                if sign == "+":
                    result += value(operand)
                elif sign == "-":
                    result -= value(operand)
                elif sign == "*":
                    result *= value(operand)
                else:
                    result /= value(operand)
            return result
        case _:
            raise Unreadable("more than arithmetic")


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each word; the last one is ("end", "")."""
    found, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unreadable(f"{text[at:end].lstrip()[:20]!r} is no part of a formula")
        found.append((str(match.lastgroup), match[str(match.lastgroup)]))
        at = match.end()
    return [*found, ("end", "")]


class _Parser:
    """One text on its way to a tree, by recursive descent."""

    def __init__(self, grammar: Grammar, tokens: list[tuple[str, str]]) -> None:
        self._grammar, self._tokens, self._at, self._depth = grammar, tokens, 0, 0

    def whole(self) -> Node:
        node = self._level(0)
        if self._tokens[self._at][0] != "end":
            raise self._error()
        return node

    def _error(self) -> Unreadable:
        word = self._tokens[self._at][1]
        return Unreadable(f"a formula cannot go on with {word[:20]!r}" if word else "a formula without an end")

    def _sign(self, signs: tuple[str, ...]) -> str | None:
        """The next token if it is one of these signs, which is then read."""
        kind, text = self._tokens[self._at]
        if kind != "sign" or text not in signs:
            return None
        self._at += 1
        return text

    def _level(self, level: int) -> Node:
        if level == len(self._grammar.levels):
            return self._prefixed()
        first, rest = self._level(level + 1), []
        while sign := self._sign(self._grammar.levels[level]):
            rest.append((sign, self._level(level + 1)))
        return Chain(first, tuple(rest)) if rest else first

    def _prefixed(self) -> Node:
        signs = []
        while sign := self._sign(self._grammar.prefixes):
            signs.append(sign)
        self._deeper(1 + len(signs))
        operand = self._power()
        self._depth -= 1 + len(signs)
        return Prefixed(tuple(signs), operand) if signs else operand

    def _power(self) -> Node:
        base = self._atom()
        return Power(base, self._prefixed()) if self._grammar.power and self._sign(("**",)) else base

    def _atom(self) -> Node:
        kind, text = self._tokens[self._at]
        if kind == "number" and self._grammar.numbers:
            self._at += 1
            return self._number(text)
        if kind == "name":
            return self._name(text)
        if self._sign(("(",)):
            return self._closed()
        raise self._error()

    def _number(self, text: str) -> Number:
        digits, _, power = text.lower().partition("e")
        if len(digits) > MAX_DIGITS or len(power) > 4 or abs(int(power or 0)) > MAX_TEN_POWER:
            raise Unreadable(f"a number of more than {MAX_DIGITS} digits or beyond 1e{MAX_TEN_POWER}")
        whole = digits.isdigit() and not power
        if not (whole or self._grammar.decimals):
            raise Unreadable(f"{text!r} is no whole number")
        if whole and len(digits) > 1 and digits[0] == "0" and digits.strip("0"):
            raise Unreadable(f"{text!r} begins with a zero")  # two numbers for some readers
        return Number(text, whole)

    def _name(self, text: str) -> Node:
        self._at += 1
        if text in self._grammar.functions:
            if not self._sign(("(",)):
                raise self._error()
            self._deeper(CALL_DEPTH)
            call = Call(text, self._closed())
            self._depth -= CALL_DEPTH
            return call
        if self._grammar.names is None or not self._grammar.names.fullmatch(text):
            raise Unreadable(f"{text!r} is no symbol of it")
        return Name(text)

    def _closed(self) -> Node:
        """What follows an opening parenthesis, and the closing one."""
        self._deeper(1)
        node = self._level(0)
        self._depth -= 1
        if not self._sign((")",)):
            raise self._error()
        return node

    def _deeper(self, by: int) -> None:
        self._depth += by
        if self._depth > MAX_DEPTH:
            raise Unreadable(f"a formula of more than {MAX_DEPTH} levels")

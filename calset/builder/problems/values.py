"""Values of foreign rows as text: by a path, whatever they are nested in, numbers as they are written.

Why apart: problems and imported traces read the same columns, and a reference answer must be the same in both. Must not
know: which column is which.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

MAX_EXPONENT = 100  # beyond, a number keeps its exponent: nobody reads 300 zeros


class Unreadable(ValueError):
    """A value that is no text; the message names what it is: "a list of 2"."""


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value, or the one that a dotted path leads to; None where the path ends early.

    A path goes through objects, lists (``final_answer.0``, ``messages.-1.content``) and JSON text.
    """
    return walk(row, column)[0]


def walk(row: Mapping[str, Any], column: str) -> tuple[Any, list[Mapping[str, Any]]]:
    """Return the value as ``look_up`` does, and the objects that the path went through, the row first."""
    if column in row:
        return row[column], [row]
    value: Any = row
    passed: list[Mapping[str, Any]] = []
    for part in column.split("."):
        value = structure(value)
        if isinstance(value, Mapping):
            passed.append(value)
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and re.fullmatch(r"-?[0-9]{1,9}", part):
            at = int(part)
            value = value[at] if -len(value) <= at < len(value) else None
        else:
            return None, passed
    return value, passed


def structure(value: Any) -> Any:
    """Return the list or object that a JSON text holds; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def text_of(value: Any) -> str | None:
    """Return a value as text, numbers as they are written; None where there is nothing (null, NaN, blanks).

    Raises:
        Unreadable: the value is no text and no number.
    """
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        value = written(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unreadable(f"a {type(value).__name__}")
    if not value.strip():
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unreadable("half a surrogate pair") from error
    return value


def reference_of(value: Any) -> str | None:
    """Return a reference answer as text: ``text_of``, but a list of one answer is that answer.

    Raises:
        Unreadable: several answers, or no text.
    """
    while isinstance(value, (list, tuple)):
        there = [item for item in value if item is not None and not (isinstance(item, float) and math.isnan(item))]
        if any(item != there[0] for item in there):
            raise Unreadable(f"a list of {len(there)}")
        value = there[0] if there else None
    text = text_of(value)
    # What str() and CSV writers make of a missing number; no question has this answer.
    return None if text is not None and text.strip().lower() == "nan" else text


def written(number: float | Decimal) -> str | None:
    """Return a number in decimal digits, without an exponent; None for NaN.

    ``math`` graders read ``1e-05`` as 1*e - 5.
    """
    if isinstance(number, int):
        return str(number)
    if not math.isfinite(number):
        return None if math.isnan(number) else str(number)
    exact = number if isinstance(number, Decimal) else Decimal(repr(float(number)))
    return f"{exact:f}" if abs(exact.adjusted()) <= MAX_EXPONENT else str(number)

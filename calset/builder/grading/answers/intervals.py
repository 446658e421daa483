r"""Sets of real numbers as unions of intervals: read off conditions on one letter, compared end by end.

Must not know: text beyond the ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calset.builder.grading.answers import algebra, quantities
from calset.builder.grading.answers.values import Group, Piece, Pieces, Quantity, Relation, Value, is_name

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def all_but(points: Sequence[Any]) -> Value | None:
    ordered = in_order([Piece(point, point, False, False) for point in points])
    if ordered is None:
        return None
    ends = [None, *(piece.low for piece in ordered), None]
    return Pieces(tuple(Piece(low, high, True, True) for low, high in zip(ends, ends[1:], strict=False)))


def pieces_of(value: Value) -> Pieces | None:
    """A set of real numbers as intervals: an interval, a condition on one letter, a point."""
    match value:
        case Pieces():
            return value
        case Group() if interval_like(value):
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
        case Relation() if is_name(value.left):
            point = quantities.read_or_none(value.right)
            return Pieces((Piece(point.value, point.value, False, False),)) if isinstance(point, Quantity) else None
    return None


def _half_line(relation: Relation) -> Pieces | None:
    left, op, right = relation.left, relation.op, relation.right
    if not is_name(left):
        left, op, right = right, FLIPPED[op], left
    if not is_name(left):
        return None
    end = quantities.read_or_none(right)
    if not isinstance(end, Quantity) or hasattr(end.value, "shape"):
        return None
    if op == "!=":
        found = all_but([end.value])
        return found if isinstance(found, Pieces) else None
    if op[0] == "<":
        return Pieces((Piece(None, end.value, True, op == "<"),))
    return Pieces((Piece(end.value, None, op == ">", True),))


def interval_like(group: Group) -> bool:
    return len(group.items) == 2 and group.opened in ("(", "[") and group.closed in (")", "]")


def same_pieces(gold: Pieces, pred: Pieces) -> bool:
    if len(gold.pieces) != len(pred.pieces):
        return False
    one, two = (in_order(pieces.pieces) for pieces in (gold, pred))
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


def in_order(pieces: Sequence[Piece]) -> list[Piece] | None:
    """By their lower ends; None where these cannot be put in order."""
    try:
        return sorted(
            pieces, key=lambda piece: (float("-inf") if piece.low is None else float(piece.low), piece.low_open)
        )
    except (TypeError, ValueError, OverflowError):
        return None

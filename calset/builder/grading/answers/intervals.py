r"""Sets of real numbers as unions of intervals: read off conditions on one letter, compared end by end.

Must not know: text beyond the ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from calset.builder.grading.answers import algebra, quantities
from calset.builder.grading.answers.values import Group, Piece, Pieces, Quantity, Relation, Value, is_name, text_key

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def all_but(points: Sequence[Any]) -> Pieces | None:
    """The real numbers without some; None where these cannot be put in order."""
    ordered = in_order([Piece(point, point, False, False) for point in points])
    if ordered is None:
        return None
    ends = [None, *(piece.low for piece in ordered), None]
    return Pieces(tuple(Piece(low, high, True, True) for low, high in pairwise(ends)))


def pieces_of(value: Value) -> Pieces | None:
    """A set of real numbers as intervals: an interval, a condition on one letter, a point."""
    match value:
        case Pieces():
            return value
        case Group() if interval_like(value):
            ends = [item.value for item in value.items if isinstance(item, Quantity)]
            if len(ends) != 2 or any(hasattr(end, "shape") for end in ends):
                return None
            if any(end.is_infinite and algebra.sign(end) != way for end, way in zip(ends, (-1, 1), strict=True)):
                return None
            low, high = (None if end.is_infinite else end for end in ends)
            return Pieces((Piece(low, high, value.opened == "(", value.closed == ")"),))
        case Group(opened=r"\{") if all(isinstance(item, Quantity) for item in value.items):
            points = [item.value for item in value.items if isinstance(item, Quantity)]
            return Pieces(tuple(Piece(point, point, False, False) for point in points))
        case Relation() if value.op != "=":
            return _half_line(value)
        case Group(opened="") if len(value.items) == 2 and all(isinstance(item, Relation) for item in value.items):
            return _two_half_lines(
                [_half_line(item) for item in value.items if isinstance(item, Relation)], both=value.joined_by_and
            )
        case Relation() if is_name(value.left):
            point = quantities.read_or_none(value.right)
            return Pieces((Piece(point.value, point.value, False, False),)) if isinstance(point, Quantity) else None
    return None


def _two_half_lines(found: list[Pieces | None], *, both: bool) -> Pieces | None:
    """``x < 0, x > 3`` is either, ``x > 0, x < 3`` is both."""
    one, two = found
    if one is None or two is None or one.letter != two.letter:
        return None
    ends = {(piece.low is None, piece.high is None): piece for piece in (*one.pieces, *two.pieces)}
    left, right = ends.get((True, False)), ends.get((False, True))
    if left is None or right is None or len(one.pieces) + len(two.pieces) != 2:
        return None
    between = algebra.sign(right.low - left.high)
    if between is None:
        return None
    if both and between >= 0:
        return None
    if between > 0 or (between == 0 and left.high_open and right.low_open):
        return Pieces((left, right), one.letter)
    return Pieces((Piece(right.low, left.high, right.low_open, left.high_open),), one.letter)


def _half_line(relation: Relation) -> Pieces | None:
    left, op, right = relation.left, relation.op, relation.right
    if not is_name(left):
        left, op, right = right, FLIPPED[op], left
    if not is_name(left):
        return None
    end = quantities.read_or_none(right)
    if not isinstance(end, Quantity) or hasattr(end.value, "shape") or end.value.is_infinite:
        return None
    letter = text_key(left.strip("| "))
    if left.startswith("|") and left.endswith("|") and op[0] in "<>":
        if algebra.sign(end.value) != 1:
            return None
        opened = len(op) == 1
        if op[0] == "<":
            return Pieces((Piece(-end.value, end.value, opened, opened),), letter)
        return Pieces((Piece(None, -end.value, True, opened), Piece(end.value, None, opened, True)), letter)
    if op == "!=":
        found = all_but([end.value])
        return found and Pieces(found.pieces, letter)
    if op[0] == "<":
        return Pieces((Piece(None, end.value, True, op == "<"),), letter)
    return Pieces((Piece(end.value, None, op == ">", True),), letter)


def interval_like(group: Group) -> bool:
    return len(group.items) == 2 and group.opened in ("(", "[") and group.closed in (")", "]")


def same_pieces(gold: Pieces, pred: Pieces) -> bool:
    if len(gold.pieces) != len(pred.pieces) or (gold.letter and pred.letter and gold.letter != pred.letter):
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

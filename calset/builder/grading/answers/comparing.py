r"""When two answers say the same.

A side that was not read whole equals the same text alone. Must not know: how a text is read.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from calset.builder.grading.answers import algebra, quantities
from calset.builder.grading.answers.intervals import FLIPPED, interval_like, pieces_of, same_pieces
from calset.builder.grading.answers.plain import spelt_number
from calset.builder.grading.answers.reading import read
from calset.builder.grading.answers.values import (
    Congruence,
    Family,
    GoldUnread,
    Group,
    Pieces,
    PredUnread,
    Quantity,
    Relation,
    Text,
    Value,
    is_name,
    text_key,
)


def same(gold: str, pred: str) -> bool:
    """Return True if two normal texts say the same.

    Raises:
        GoldUnread, PredUnread: that side was not read whole, and is not the other's text.
    """
    if text_key(gold) == text_key(pred):
        return True
    left, right = read(gold), read(pred)
    if _equal(left, right):
        return True
    for value, error in ((left, GoldUnread), (right, PredUnread)):
        if why := _unread(value):
            raise error(why)
    return False


def _unread(value: Value) -> str:
    """Why a value was not read whole; empty where it was."""
    match value:
        case Text():
            return value.unread
        case Group():
            return next((why for item in value.items if (why := _unread(item))), "")
        case Family():
            return _unread(read(value.value))
        case Relation():
            sides = [read(side) for side in (value.left, value.right) if not is_name(side)]
            return next((why for side in sides if (why := _unread(side))), "")
    return ""


def n_parts(text: str) -> int:
    """How many parts a normal text has: items of a list, a tuple or a set, else 1."""
    found = read(text)
    return len(found.items) if isinstance(found, Group) and found.opened != ":" else 1


def _equal(gold: Value, pred: Value) -> bool:
    if isinstance(gold, Family) or isinstance(pred, Family):
        return _same_family(gold, pred)
    if isinstance(gold, Text) and isinstance(pred, Text) and _same_text(gold, pred):
        return True
    if isinstance(gold, Text) and gold.unread:
        raise GoldUnread(gold.unread)
    if isinstance(pred, Text) and pred.unread:
        raise PredUnread(pred.unread)
    gold, pred = _unwrapped(gold, pred)
    gold, pred = _letter_as_value(gold, pred), _letter_as_value(pred, gold)
    match gold, pred:
        case Text(), Text():
            return _same_text(gold, pred)
        case (Text(), _) | (_, Text()):
            return False
        case Quantity(), Quantity():
            return quantities.same(gold, pred)
        case Relation(), Relation():
            return _same_relation(gold, pred)
        case Congruence(), Congruence():
            return _same_congruence(gold, pred)
        case Group(), Group() if (gold.opened == ":") == (pred.opened == ":"):
            return _same_group(gold, pred)
        case (Group(opened="("), Quantity()) | (Quantity(), Group(opened="(")):
            return _is_vector(gold, pred) or _is_vector(pred, gold)
        case Group(opened=":"), Quantity():
            return _is_quotient(gold, pred)
        case Quantity(), Group(opened=":"):
            return _is_quotient(pred, gold)
    left, right = pieces_of(gold), pieces_of(pred)
    if left is not None and right is not None:
        return same_pieces(left, right)
    return False


def _same_family(gold: Value, pred: Value) -> bool:
    """The name of the letter is no difference; what it runs over is, where both say it."""
    if isinstance(gold, Family) != isinstance(pred, Family):
        family, other = (gold, pred) if isinstance(gold, Family) else (pred, gold)
        assert isinstance(family, Family)
        both = (other, read(family.value))
        conditions = any(isinstance(value, Pieces) or getattr(value, "op", "=") != "=" for value in both)
        if family.domain not in ("", "R", "C") and conditions:
            return False  # whole numbers of an interval
    if isinstance(gold, Family) and isinstance(pred, Family):
        domains = {gold.domain, pred.domain} - {""}
        if gold.domain != pred.domain and " " in gold.domain + pred.domain:
            return False
        if len(domains) > 1 and domains != {"N", "N+"}:  # 0 is a natural number for some
            return False
        if len(gold.letters) == len(pred.letters) == 1 and not _has_letter(pred.value, gold.letters):
            renamed = re.sub(rf"(?<![A-Za-z\\]){pred.letters}(?![A-Za-z])", gold.letters, pred.value)
            pred = Family(renamed, gold.letters, pred.domain)
    left = _read_whole(gold.value, GoldUnread) if isinstance(gold, Family) else gold
    right = _read_whole(pred.value, PredUnread) if isinstance(pred, Family) else pred
    return _equal(left, right)


def _has_letter(text: str, letter: str) -> bool:
    return re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", text) is not None


def _is_vector(group: Value, matrix: Value) -> bool:
    """Return True if a matrix of one row or column has the parts of a tuple."""
    if not isinstance(group, Group) or not isinstance(matrix, Quantity) or not hasattr(matrix.value, "shape"):
        return False
    values = [item.value for item in group.items if isinstance(item, Quantity)]
    shaped = 1 in matrix.value.shape and len(values) == len(group.items) == max(matrix.value.shape)
    return shaped and all(map(algebra.equal, values, matrix.value.flat()))


def _letter_as_value(value: Value, other: Value) -> Value:
    """Some letters alone are a word, and a product of names beside a formula."""
    if isinstance(value, Text) and isinstance(other, Quantity) and value.kind == "words" and len(value.key) == 1:
        word = spelt_number(value.key[0]) or value.key[0]
        if word.isdigit() or (len(word) <= 4 and word.isalpha()):
            return quantities.read_or_none(word) or value
    return value


def _same_text(gold: Text, pred: Text) -> bool:
    if (gold.kind, pred.kind) == ("words", "option"):
        return gold.key == pred.key[:1]  # a letter, and the option's text behind it: "A" and "A. Paris"
    if gold.kind == pred.kind == "time":
        return _same_time(gold.key, pred.key)
    return gold.key == pred.key


def _same_time(gold: Sequence[str], pred: Sequence[str]) -> bool:
    """Half a day that only the answer says is no difference; one that only the reference says is."""
    (hour, *minutes, half), (other_hour, *other_minutes, other_half) = gold, pred
    if minutes != other_minutes:
        return False
    if bool(half) == bool(other_half):
        return (hour, half) == (other_hour, other_half)
    return _hour(hour, half) == _hour(other_hour, other_half) or (not half and hour == other_hour)


def _hour(hour: str, half: str) -> int:
    return int(hour) % 12 + 12 * (half == "p") if half else int(hour)


def _unwrapped(gold: Value, pred: Value) -> tuple[Value, Value]:
    """Without the name of a value where one side alone has it: ``x = 5`` and 5. What a name stands for is a value;
    ``2x + y = 1`` is not."""
    if isinstance(pred, Relation) and pred.op == "=" and not isinstance(gold, (Relation, Congruence)):
        if is_name(pred.left) or _is_true(pred):
            pred = _read_whole(pred.right, PredUnread)
    elif (
        isinstance(gold, Relation)
        and gold.op == "="
        and not isinstance(pred, (Relation, Congruence))
        and is_name(gold.left)
    ):
        gold = _read_whole(gold.right, GoldUnread)
    if isinstance(gold, Group) and isinstance(pred, Group) and gold.opened != ":":
        names = [_names(group) for group in (gold, pred)]
        if (names[0] is None) != (names[1] is None):
            point = "(" in (gold.opened, pred.opened)
            return _nameless(gold, names[0], point=point), _nameless(pred, names[1], point=point)
        if names[0] and names[1] and _one_name(names[0]) and _one_name(names[1]):
            indexed = sorted(names[0]) == sorted(names[1]) and len(set(names[0])) > 1
            if indexed and names[0][0].strip()[0] not in "xz":  # the roots of an equation have no order
                return gold, pred
            return _nameless(gold, names[0]), _nameless(pred, names[1])
    return gold, pred


def _read_whole(text: str, error: type[Exception]) -> Value:
    found = read(text)
    if isinstance(found, Text) and found.unread:
        raise error(found.unread)
    return found


def _is_true(relation: Relation) -> bool:
    """``2 + 3 = 5``: a computation and its value."""
    left, right = (quantities.read_or_none(side) for side in (relation.left, relation.right))
    return bool(left and right and left.numeric and right.numeric and algebra.equal(left.value, right.value))


def _names(group: Group) -> list[str] | None:
    """The names of a group whose items are all named."""
    items = [item for item in group.items if isinstance(item, Relation) and item.op == "=" and is_name(item.left)]
    return [item.left for item in items] if len(items) == len(group.items) else None


def _one_name(names: Sequence[str]) -> bool:
    """x, x or x_1, x_2: several values of one thing."""
    return len({re.sub(r"_\{?\w+\}?$", "", name.strip()) for name in names}) == 1


def _nameless(group: Group, names: list[str] | None, *, point: bool = False) -> Group:
    """The values of a group, in the order of the alphabet beside a point: (x, y), whatever was written first."""
    if names is None:
        return group
    named = list(zip(names, group.items, strict=True))
    letters = sorted(name.strip() for name in names)
    if point and "".join(letters) in string.ascii_letters:
        named.sort(key=lambda pair: pair[0].strip())
    items = tuple(read(item.right) if isinstance(item, Relation) else item for _, item in named)
    # Several things have an order; several values of one thing have none.
    return Group(items, "" if _one_name(names) else "(", "" if _one_name(names) else ")")


def _same_group(gold: Group, pred: Group) -> bool:
    if len(gold.items) != len(pred.items):
        return gold.opened == pred.opened == r"\{" and _contains_all(gold, pred) and _contains_all(pred, gold)
    if gold.opened == ":":
        return _proportional(gold, pred)
    if not _comparable(gold, pred):
        return False
    if _has_order(gold) or (not gold.opened and _has_order(pred)):
        return all(_equal(one, two) for one, two in zip(gold.items, pred.items, strict=True))
    return _same_multiset(gold.items, pred.items)


def _has_order(group: Group) -> bool:
    return group.opened in ("(", "[", "label")


def _comparable(gold: Group, pred: Group) -> bool:
    """Return False where brackets alone make the difference: an interval's, a set's beside a tuple's."""
    two = len(gold.items) == 2
    if interval_like(gold) and interval_like(pred):
        return (gold.opened, gold.closed) == (pred.opened, pred.closed)
    if {gold.opened, pred.opened} in ({"(", r"\{"}, {"[", r"\{"}):
        return False
    return bool(pred.opened) or not (two and gold.opened in ("(", "[") and (gold.opened, gold.closed) != ("(", ")"))


def _contains_all(group: Group, wanted: Group) -> bool:
    return all(any(_equal(item, part) for item in group.items) for part in wanted.items)


def _fits(gold: Value, pred: Value) -> bool:
    """Return True if two parts are equal; which of them was not read whole is for the whole to say."""
    try:
        return _equal(gold, pred)
    except (GoldUnread, PredUnread):
        return False


def _same_multiset(gold: Sequence[Value], pred: Sequence[Value]) -> bool:
    fits = [[i for i, item in enumerate(pred) if _fits(wanted, item)] for wanted in gold]
    taken: dict[int, int] = {}

    def place(wanted: int, tried: set[int]) -> bool:
        """Kuhn's algorithm: 10% fits 10 and 0.1, so the first fit need not be the right one."""
        for i in fits[wanted]:
            if i not in tried:
                tried.add(i)
                if i not in taken or place(taken[i], tried):
                    taken[i] = wanted
                    return True
        return False

    return all(place(wanted, set()) for wanted in range(len(gold)))


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
    if (renamed := _renamed(gold, pred)) is not None:
        pred = renamed
    if gold.names or pred.names:
        names = [{side.left.strip(), *side.names} for side in (gold, pred)]
        if names[0] != names[1]:
            return False
    if text_key(gold.left) == text_key(pred.left) and gold.op == pred.op:
        return _equal(_read_whole(gold.right, GoldUnread), _read_whole(pred.right, PredUnread))
    if (left := pieces_of(gold)) is not None and (right := pieces_of(pred)) is not None:
        return _letter(gold) == _letter(pred) and same_pieces(left, right)
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
    return gold.op == pred.op if (way or 1) > 0 or gold.op in ("=", "!=") else gold.op == FLIPPED[pred.op]


def _renamed(gold: Relation, pred: Relation) -> Relation | None:
    """``f(y) = y + 1`` beside ``f(x) = x + 1``: the same function."""
    one, two = (re.fullmatch(r"(\w+)\s*\(\s*([A-Za-z])\s*\)", relation.left) for relation in (gold, pred))
    if not one or not two or one[1] != two[1] or one[2] == two[2] or gold.op != pred.op:
        return None
    if _has_letter(pred.right, one[2]):
        return None
    return Relation(gold.left, pred.op, re.sub(rf"(?<![A-Za-z\\]){two[2]}(?![A-Za-z])", one[2], pred.right))


def _letter(relation: Relation) -> tuple[str, ...]:
    return text_key(relation.left if is_name(relation.left) else relation.right)

r"""Numbers of an answer's parts: ``(1)``, ``(a)``, ``ii)``, ``②``.

Must not know: what the parts hold.
"""

from __future__ import annotations

import re

LABEL = re.compile(
    r"\(\s*(?P<round>\d|[a-h]|i{1,3}|iv|vi{0,3})\s*\)|(?<![\w.])(?P<half>[1-9]|[a-h]|i{1,3}|iv|vi{0,3})\)"
    r"|(?P<ring>[①-⑨])"
)
_ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6, "vii": 7, "viii": 8}


def numbered(labels: list[re.Match[str]]) -> bool:
    """Return True if labels count from 1 on, all in one way."""
    names = [found["round"] or found["half"] or found["ring"] for found in labels]
    counted = list(range(1, len(names) + 1))
    return any([number(name) for name in names] == counted for number in (_digit, _letter, _roman, _ring))


def _digit(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdigit() else None


def _letter(name: str) -> int | None:
    return ord(name) - 96 if len(name) == 1 and name.isalpha() else None


def _roman(name: str) -> int | None:
    return _ROMAN.get(name)


def _ring(name: str) -> int | None:
    return ord(name) - 0x245F if len(name) == 1 and ord(name) > 0x2000 else None

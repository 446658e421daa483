"""Foreign text in a Markdown page: one line that cannot become any part of the page's structure.

Why one place: names, warnings, recipes and licences in a card come from manifests and repositories of others. Markdown
takes no entity for a sign of structure, so whatever could begin, end or link something is written as one; signs that
mean nothing where they stand (a dot in a number, a hyphen in a word) stay as they are, or no card could be read as it
is. Must not know: cards.
"""

from __future__ import annotations

import re
from typing import Any

LONGEST = 1000  # characters of one text
_SAFE = re.compile(
    r"""
    [\w\ ,;?%'"()/]                      # letters, digits, and signs that begin nothing (an underscore: see below)
    | (?<!^)[=!]                         # not first, where a line of '=' could stand
    | (?<=\w)[-](?=\w)
    | (?<=\w):(?=\ )
    | (?<![wW])(?<=\w)\.(?=\d)           # not after "www", which some renderers link without a scheme
    """,
    re.VERBOSE,
)
_UNDERSCORE = re.compile(r"(?<=[^\W_])_(?=[^\W_])")  # in a word; others are emphasis


def line(value: Any) -> str:
    """Escape a text as one line of Markdown: no heading, list, cell, emphasis, tag, picture or link comes of it."""
    text = " ".join(str(value)[: 4 * LONGEST].split())
    text = "".join(sign for sign in text if sign.isprintable()) or "(none)"
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}…"
    numbered = re.match(r"[0-9]+\)", text)  # as a list's item is
    kept = [
        bool((_UNDERSCORE if sign == "_" else _SAFE).match(text, at)) or ord(sign) > 127 for at, sign in enumerate(text)
    ]
    if numbered:
        kept[numbered.end() - 1] = False
    return "".join(sign if keep else f"&#{ord(sign)};" for sign, keep in zip(text, kept, strict=True))


def code(value: Any) -> str:
    """Reduce a name to what can stand in backticks or as one word of a command; ``-`` where nothing is left."""
    return re.sub(r"[^A-Za-z0-9._/@:+-]", "", str(value)).lstrip("-") or "-"

"""A near miss gets the word that was meant: ``, did you mean 'difficulty'?``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to put after an unknown word: a suggestion, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""

r"""Where a response states its answer: a box, an ``<answer>``, "#### 7", "The answer is 7".

Why it exists: every grader needs it and none of it is about what the answer means. Must not know: graders, verdicts,
the catalog.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple


class Stated(NamedTuple):
    """One statement of an answer: its text, and where in the response it stands."""

    text: str
    at: int


_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|(?:\s+([A-Za-z])|\s*([0-9]))(?![0-9A-Za-z]))")
_HASHES = re.compile(r"(?m)^[ \t]*####[ \t]*(\S[^\n]*)$")
# The answer is only looked at, not taken: one line may state another ("The answer is 8. No, the answer is 7.").
_STATED = re.compile(r"(?i)\banswer\**\s*(?:is|:|=)\s*:?\s*\**\s*(?=(?P<answer>[^\n]{1,2000}))")
_INVISIBLE = re.compile("[\u0000\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def boxes(text: str) -> Iterator[Stated]:
    r"""The complete ``\boxed{...}`` and ``\fbox{...}``, last first, braces balanced; also ``\boxed 7``.

    Escaped braces do not count. A box that never closes is skipped: its content is not known.
    """
    opened = list(_BOX.finditer(text))
    ends = _closing_braces(text) if opened else {}
    for found in reversed(opened):
        bare = found[1] or found[2]
        end = ends.get(found.end() - 1)
        if bare or end is not None:
            yield Stated(bare or text[found.end() : end], found.start())


def last_boxed(text: str) -> str | None:
    """The content of the last complete box; None when there is none."""
    return next((box.text for box in boxes(text)), None)


def last_tagged(text: str) -> Stated | None:
    """What stands in the last complete ``<answer>...</answer>``. By search from the end: a regex over thousands of tags
    that never close is quadratic."""
    end = text.rfind("</answer>")
    at = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return Stated(text[at + len("<answer>") : end].strip(), at) if at >= 0 else None


def stated(response: str) -> Stated | None:
    r"""The last box; without one the last ``<answer>``; then the last of "#### 7" and "answer is 7"; else None."""
    box = next(boxes(response), None)
    if box is not None:
        return Stated(box.text.strip(), box.at)
    tagged = last_tagged(response)
    if tagged is not None:
        return tagged
    said = [(found.start(), found[1]) for found in (*_HASHES.finditer(response), *_STATED.finditer(response))]
    if not said:
        return None
    at, text = max(said)
    return Stated(re.sub(r"[\s.*]+$", "", text).strip(), at)


def visible(text: str) -> str:
    """Without NULs, zero-width characters and direction overrides; typographic minus signs are a minus."""
    return re.sub("[\u2212\u2012\u2013\ufe63\uff0d]", "-", _INVISIBLE.sub("", text))


def plain_digits(text: str) -> str:
    """Digits of any script as ASCII digits: ``٥`` and ``５`` are 5, as ``int()`` takes them."""
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)


def plain_fractions(text: str, form: str) -> str:
    """``½`` and its like written out, ``form`` having two ``%s``. Not by NFKC, which makes 31/2 of ``3½``."""
    return re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda match: form % _parts(match[0]), text)


def _parts(character: str) -> tuple[str, str]:
    above, _, below = unicodedata.normalize("NFKC", character).partition("\u2044")
    return above, below


def _closing_braces(text: str) -> dict[int, int]:
    """Opening brace -> its closing one, in one pass: thousands of boxes that never close must not cost a scan each."""
    waiting: list[int] = []
    ends: dict[int, int] = {}
    for found in re.finditer(r"\\.|[{}]", text, re.S):
        if found[0] == "{":
            waiting.append(found.start())
        elif found[0] == "}" and waiting:
            ends[waiting.pop()] = found.start()
    return ends

r"""Where a response states its answer: a box, an ``<answer>``, "#### 7", "The answer is 7", "Hence, 7 is the answer".

Why it exists: every grader needs it and none of it is about what the answer means. Must not know: graders, verdicts,
the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from calset.builder.grading.characters import squeezed


class Stated(NamedTuple):
    """One statement of an answer: its text, and where in the response it stands."""

    text: str
    at: int


class Joined(NamedTuple):
    """Boxes that stand together.

    Args:
        texts: of the boxes; none where there is one box.
        in_words: "and", "or" or commas join them all.
        labels: what stands before each, ``(1)`` or ``(a)``; none where one has none.
    """

    texts: tuple[str, ...] = ()
    in_words: bool = False
    labels: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One answer of all boxes."""
        if self.labels and len(set(self.labels)) == len(self.labels):
            between = ", " if self.labels[0].endswith("=") else " "
            return between.join(f"{label} {text}" for label, text in zip(self.labels, self.texts, strict=True))
        return ", ".join(self.texts)


MAX_JOINT_CHARS = 60  # between two boxes that stand together
_BOX = re.compile(
    r"\\(?:boxed|fbox|framebox(?:\s*\[[^\]\n]{0,20}\]){0,2})(?:\s*\{|(?:\s+([A-Za-z])|\s*([0-9]))(?![0-9A-Za-z]))"
)
# What joins boxes that together are one answer. "No, ", "wait" and a full stop do not.
_JOINT = re.compile(
    r"[\s$,;&}]*(?:\\[\])(\[]|\\(?:quad|qquad|text\s*\{\s*(?:and|or|,)\s*\}|[,;: ])|and|or|,|;|\$|\s|\\\\"
    r"|(?:\\text\s*\{\s*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w\}?)?\s*=|\(\s*(?:[1-9a-h]|[iv]{1,4})\s*\)))*[\s$]*"
)
_LABELLED = re.compile(r"(\(\s*(?:[1-9a-h]|[iv]{1,4})\s*\)|(?<![\w\\])[A-Za-z](?:_\{?\w\}?)?\s*=)[\s$]*$")
_IN_WORDS = re.compile(r"\b(?:and|or)\b|,")
_HASHES = re.compile(r"(?m)^[ \t]*####[ \t]*(\S[^\n]*)$")
_WORD = r"(?:(?:final|correct|right)\s+)?answers?|ответ|respuesta|réponse|antwort|resposta|risposta"
_WORD_CJK = r"答案|答え|正解|정답|答(?=\s*[:：])"
_IS = r"(?:is|are|was|should\s+be|would\s+be|must\s+be|will\s+be|equals|为|是|=|:|：)"
# The answer is only looked at, not taken: one line may state another ("The answer is 8. No, the answer is 7.").
_STATED = re.compile(
    rf"(?i)(?:(?<![\w-])(?<!this )(?<!that )(?<!an )(?<!each )(?<!any )(?<!no )(?:{_WORD})"
    rf"|{_WORD_CJK})(?:\s+to\s+(?:the|this|your)\s+"
    rf"(?:question|problem))?[*_ \t]{{0,4}}{_IS}\s*[:：]?[*_ \t]*(?=(?P<answer>[^\n]{{1,8000}}|\n))"
)
_HEADING = re.compile(rf"(?im)^[ \t#*_]*(?:the\s+)?(?:{_WORD}|最终答案|{_WORD_CJK})[ \t*_]*[:：]?[ \t*_]*$")
_REVERSED = re.compile(
    r"(?:^|[\n.!?,:]\s+(?:and\s+|but\s+)?|\b(?:hence|so|thus|therefore|then)\b,?\s+)\**(?P<answer>\$[^$\n]{1,200}\$"
    r"|\\\([^\n]{1,200}?\\\)"
    r"|[^\s,.!?:]\S{0,60}(?:\s[A-Za-z]{1,12})?)\**\s+is\s+(?:therefore\s+|thus\s+)?(?:the|our|my)\s+(?:final\s+"
    r"|correct\s+)?answer\b",
    re.I,
)
_NO_ANSWER = re.compile(r"(?i)(?:this|that|it|which|what|here|below|above|there|he|she|question|answer|problem)\b")
# A remark about an answer that was stated before.
_REMARK = re.compile(
    r"(?i)(?:(?:therefore|thus|also|indeed|both|clearly|now|only|always|very|quite|not|already)"
    r"\s+)*(?:exact|correct|unique|"
    r"approximate|reasonable|verified|confirmed|consistent|rounded|simplified|(?:positive|negative)(?!\s*[\d$\\])|expressed|given"
    r"|in\s+the\s+form|"
    r"an?\s+(?:integer|number|fraction|decimal)|obtained|supported|valid|right|wrong|incorrect|independent|plausible"
    r"|as\s+(?:required|expected)|"
    r"required|within|in\s+[a-z]+[.\s]*$|close|easy|simple|clear|checked|shown|boxed|below|above|as\s+follows)\b"
)
_DENIED = re.compile(r"(?i)(?:definitely |certainly |probably )?not\b")
_ENCLOSED = re.compile(
    r"(?s)(?:\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)|\$([^$\n]{1,1000})\$"
    r"|\*\*([^*\n]{1,500})\*\*|`([^`\n]{1,500})`)"
)
# "Wait, I made a mistake": what stood before is not the answer.
_TAKEN_BACK = re.compile(
    r"(?i)\b(?:wait|actually|correction|my mistake|made (?:a|an) (?:mistake|error)|oops|sorry|scratch that)\b"
)
# "No, that is wrong": what stands right before is not the answer either.
_WITHDRAWN = re.compile(
    r"[\s$.)\]\\]*(?:no|wait|hmm|actually|oops)\b[^.!\n]{0,40}?\b(?:that|this|it)(?:\s+is|\s+was|'s)\s+(?:wrong|incorrect"
    r"|not right|a mistake)\b",
    re.I,
)
# "\boxed{7} is wrong", "the answer is not \boxed{7}".
_REFUSED = re.compile(
    r"[\s$*]*(?:\\[\])])?[\s$*]*(?:is|are|was|would be|seems?)\s+(?:not|wrong|incorrect|false|impossible)\b", re.I
)
_REFUSED_BEFORE = re.compile(r"\b(?:not|isn't|cannot be)\s*(?:\\[(\[])?[\s$*]*$", re.I)
_FENCE = re.compile(r"```[\w+-]*\n((?:(?!```).){1,8000}?)\n?[ \t]*```", re.S)
_BEHIND = re.compile(
    r"(?i)(?!\W{0,4}(?:or|and)\b)[\s.,;:!*_]*(?:$|(?<=[.,;!:*_])\s|\s*(?:\((?!\s*mod)|(?:because|since|as|which)\b))"
)
_SENTENCE = re.compile(
    r"(?<=[^\s.])[.!]\s+(?!(?:Or|And)\b)(?=[A-Z(*_]|\\text)|,?\s+(?=(?:because|since|as\s+(?:we|required|shown))\b)"
)


def boxes(text: str) -> Iterator[Stated]:
    r"""The complete ``\boxed{...}``, ``\fbox{...}`` and ``\framebox{...}``, last first; also ``\boxed 7``.

    Braces are balanced, and escaped ones do not count. A box that never closes is skipped: its content is not known.
    """
    for box, _ in _boxes(text):
        yield box


def last_boxed(text: str) -> str | None:
    """The content of the last complete box; None when there is none."""
    return next((box.text for box in boxes(text)), None)


def last_standing_box(text: str) -> Stated | None:
    r"""The last box that the text does not take back or deny: not that of "\boxed{7} is wrong"."""
    kept = (Stated(box.text.strip(), box.at) for box, end in _boxes(text) if not _denied(text, box.at, end))
    return next(kept, None)


def joined_boxes(text: str) -> Joined:
    r"""The contents of the boxes that end with the last one and are joined by nothing but commas, "and" or "or"; empty
    where that is one box: ``\boxed{2}`` and ``\boxed{5}``."""
    run: list[str] = []
    labels: list[str] = []
    begins, in_words = None, True
    for box, end in _boxes(text):
        if begins is not None:
            if begins - end > MAX_JOINT_CHARS or not _JOINT.fullmatch(text, end, begins):
                break
            in_words = in_words and bool(_IN_WORDS.search(text, end, begins))
        run.append(box.text.strip())
        if label := _LABELLED.search(text, max(0, box.at - 16), box.at):
            labels.append(label[1])
        begins = box.at
        if len(run) > 20:
            break
    if len(run) < 2:
        return Joined()
    return Joined(tuple(run[::-1]), in_words, tuple(labels[::-1]) if len(labels) == len(run) else ())


def last_tagged(text: str) -> Stated | None:
    """What stands in the last complete ``<answer>...</answer>``. By search from the end: a regex over thousands of tags
    that never close is quadratic."""
    folded = text.lower() if text.isascii() else re.sub("(?i)</?answer>", lambda m: m[0].lower(), text)
    end = folded.rfind("</answer>")
    at = folded.rfind("<answer>", 0, end) if end >= 0 else -1
    return Stated(text[at + len("<answer>") : end].strip(), at) if at >= 0 else None


def stated(response: str) -> Stated | None:
    r"""The last box; without one the last ``<answer>``; then the last of the other statements; else None.

    These are "#### 7", "The answer is 7", a heading "Answer" with a formula, a code block or a line below it, "Hence, 7
    is the answer", and a response that is one code block. A remark on an answer ("The answer is exact.") or a denial
    ("The answer is not 7") states none beside another. A box or a tag that is taken back ("Wait, the answer is 8")
    loses to what is stated after it.
    """
    placed = last_standing_box(response) or last_tagged(response)
    if placed is not None:
        taken_back = _TAKEN_BACK.search(response, placed.at)
        return (stated_in_words(response, taken_back.end()) if taken_back else None) or placed
    alone = _FENCE.fullmatch(response.strip())
    return stated_in_words(response) or (Stated(alone[1].strip(), 0) if alone else None)


def stated_in_words(response: str, start: int = 0) -> Stated | None:
    """The last statement that is no box and no tag, from a position on."""
    response = squeezed(response[start:])
    places = [(match.start(), _hashed, match) for match in _HASHES.finditer(response)]
    places += [(match.start(), _headed, match) for match in _HEADING.finditer(response)]
    places += [(match.start(), _said, match) for match in _STATED.finditer(response)]
    places += [(match.start(), _named, match) for match in _REVERSED.finditer(response)]
    remark = None
    for at, read, match in sorted(places, key=lambda place: place[0], reverse=True):
        text = read(match)
        if not text:
            continue
        if not _is_remark(text):
            denied_later = remark and _DENIED.sub("", remark.text).strip() == text  # "... No, the answer is not 3."
            return remark if denied_later else Stated(text, at)
        remark = remark or Stated(text, at)
    return remark


def _hashed(match: re.Match[str]) -> str:
    return _trimmed(match[1])


def _headed(match: re.Match[str]) -> str:
    return _block(match.string[match.end() :].lstrip("\n \t"))


def _said(match: re.Match[str]) -> str:
    text = match["answer"].strip().removeprefix("}").strip()
    if text.startswith("```"):
        return _block(match.string[match.start("answer") :])
    if not text.strip("*_:： "):
        return _block(match.string[match.end() :].lstrip("\n \t*_"))
    return _first(text)


def _named(match: re.Match[str]) -> str:
    asked = match.string[match.end() : match.end() + 3].lstrip().startswith("?")
    return "" if asked or _NO_ANSWER.match(match["answer"]) else _trimmed(match["answer"])


def _is_remark(text: str) -> bool:
    return bool(_REMARK.match(text) or _DENIED.match(text))


def _denied(text: str, at: int, end: int) -> bool:
    """Return True if the text says of the statement between two places that it is not the answer."""
    refused = _REFUSED.match(text, end) or _WITHDRAWN.match(text, end)
    return bool(refused or _REFUSED_BEFORE.search(text, max(0, at - 20), at))


def _block(text: str) -> str:
    """What stands below a heading: a code block, a display formula, else a line."""
    if fenced := _FENCE.match(text):
        return fenced[1].strip("\n")
    if (found := _ENCLOSED.match(text)) and (found[1] or found[2]):
        return (found[1] or found[2]).strip()
    return _first(text.partition("\n")[0])


def _first(text: str) -> str:
    """A statement without what the line says after it."""
    if (found := _ENCLOSED.match(text)) and _BEHIND.match(text, found.end()):
        return next(part for part in found.groups() if part is not None).strip()
    return _trimmed(_SENTENCE.split(text, maxsplit=1)[0])


def _trimmed(text: str) -> str:
    return text.rstrip(" \t\r\n.*。").strip()


def _boxes(text: str) -> Iterator[tuple[Stated, int]]:
    """Complete boxes, last first, with where each ends."""
    opened = list(_BOX.finditer(text))
    ends = _closing_braces(text) if opened else {}
    for found in reversed(opened):
        bare = found[1] or found[2]
        end = ends.get(found.end() - 1)
        if bare:
            yield Stated(bare, found.start()), found.end()
        elif end is not None:
            yield Stated(text[found.end() : end], found.start()), end + 1


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

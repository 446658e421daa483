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
    rf"(?:question|problem))?[*_\s]{{0,4}}{_IS}\s*[:：]?[*_ \t]*(?=(?P<answer>[^\n]{{1,2000}}|\n))"
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
# "\boxed{7} is wrong", "the answer is not \boxed{7}".
_REFUSED = re.compile(
    r"[\s$*]*(?:\\[\])])?[\s$*]*(?:is|are|was|would be|seems?)\s+(?:not|wrong|incorrect|false|impossible)\b", re.I
)
_REFUSED_BEFORE = re.compile(r"\b(?:not|isn't|cannot be)\s*(?:\\[(\[])?[\s$*]*$", re.I)
_FENCED = re.compile(r"\s*```\w*\n([^`\n]{1,200})\n```\s*")
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

    These are "#### 7", "The answer is 7", a heading "Answer" with the answer below it, "Hence, 7 is the answer". A
    remark on an answer ("The answer is exact.") or a denial ("the answer is not 7") states none.
    """
    box = next((Stated(box.text, box.at) for box, end in _boxes(response) if not denied(response, box.at, end)), None)
    if box is not None:
        corrected = _TAKEN_BACK.search(response, box.at)
        later = stated_in_words(response, corrected.end()) if corrected else None
        return later or Stated(box.text.strip(), box.at)
    tagged = last_tagged(response)
    if tagged is not None:
        corrected = _TAKEN_BACK.search(response, tagged.at)
        return (stated_in_words(response, corrected.end()) if corrected else None) or tagged
    fenced = _FENCED.fullmatch(response)
    return stated_in_words(response) or (Stated(fenced[1].strip(), fenced.start(1)) if fenced else None)


def stated_in_words(response: str, start: int = 0) -> Stated | None:
    """The last statement that is no box and no tag, from a position on."""
    response = squeezed(response[start:])
    found = [Stated(_trimmed(match[1]), match.start()) for match in _HASHES.finditer(response)]
    said = list(_labelled(response))
    found.extend(statement for statement in said if not _is_remark(statement.text))
    for match in _REVERSED.finditer(response):
        asked = response[match.end() : match.end() + 3].lstrip().startswith("?")
        if not asked and not _NO_ANSWER.match(match["answer"]):
            found.append(Stated(_trimmed(match["answer"]), match.start()))
    last = max(found or said, key=lambda statement: statement.at, default=None)
    for statement in said:  # "The answer is 3. No, the answer is not 3."
        no = _DENIED.match(statement.text)
        if last and no and statement.at > last.at and statement.text[no.end() :].strip() == last.text:
            return statement
    return last


def _is_remark(text: str) -> bool:
    return bool(_REMARK.match(text) or _DENIED.match(text))


def denied(text: str, at: int, end: int) -> bool:
    """Return True if the text says of the statement between two places that it is not the answer."""
    return bool(_REFUSED.match(text, end) or _REFUSED_BEFORE.search(text, max(0, at - 20), at))


def _labelled(response: str) -> Iterator[Stated]:
    headings = {match.start(): match.end() for match in _HEADING.finditer(response)}
    for start, end in headings.items():
        if block := _block(response[end:].lstrip("\n \t")):
            yield Stated(block, start)
    for match in _STATED.finditer(response):
        text = match["answer"].strip()
        text = text[1:].strip() if text.startswith("}") else text
        if not text.strip("*_:： "):
            text = _block(response[match.end() :].lstrip("\n \t*_"))
        if text:
            yield Stated(_first(text), match.start())


def _block(text: str) -> str:
    """What stands below a heading: a display formula, else a line."""
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

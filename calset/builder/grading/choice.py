r"""The ``choice`` grader: a multiple-choice question whose answer is a letter A to J.

The letter is read from a box (``\boxed{\text{B}}``, ``\boxed{(B) 12}``), from a statement ("The answer is (B) 12",
"**Answer:** B", "B is correct", "it must be B"), or from a last line that is nothing but the choice ("B.", "**B**").
With ``choices`` in the problem's metadata (a list, or a mapping letter -> text) an option's text in these places counts
as its letter. A letter in prose ("A train ...", "Vitamin C ...", "I think") is no answer. Of several statements the
last counts: that is where a model that changed its mind stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from calset.builder.grading import Outcome
from calset.builder.grading.characters import squeezed, unwrapped, visible
from calset.builder.grading.extract import Stated, boxes, joined_boxes, last_standing_box, last_tagged

RULES = "2"  # raise when a change here can change a verdict
LETTERS = "ABCDEFGHIJ"

# Only looked at, not taken: one line may hold several statements, and the last counts.
_LABEL = re.compile(
    r"(?i)(?:\b(?:answer|option|choice)s?|答案|故选|应选|选择|答え|ответ|respuesta|réponse|antwort|resposta|risposta)"
    r"[*_\"']*\s*(?:(?:is|was|would be|should be|must be|has to be|will be|=)(?![A-Za-z])|为|是|:|：|(?<=[选择]))"
    r"\s*[:：]?[\s*_]*"
    r"(?:(?:therefore|thus|clearly|then|definitely|most likely|probably|the|letter|option|choice|answer)\s*:?\s+)*"
    r"(?=(?P<said>[^\n]{1,300}))"
)
_VERB = re.compile(
    r"\b(?:(?i:choose|chose|pick|select|go with|going with|settle on|opt for|actually,?|rather,?)\s+"
    r"(?:(?i:the|option|answer|choice|letter)\s+)*|(?i:must be|has to be|should be|it is|it's)\s+"
    r"(?:(?i:option|answer|choice|letter)\s+)*)(?=(?P<said>\(?\**[A-J]\b[^\n]{0,300}))"
)
_REVERSED = re.compile(
    r"(?:^|[\s(*\"“])(?P<said>[A-J])[)*.\"”]*\s+(?:is|must be|has to be|should be)\s+"
    r"(?:therefore\s+|thus\s+|clearly\s+)?(?:(?:the|our|my)\s+)?(?:(?:final|only)\s+)?(?:correct|right|best|answer)\b(?!\s+(?:about|that|in|to))",
    re.M,
)
_DENIED = re.compile(r"(?i)\W*(?:not|isn't|cannot|can't|never|neither)\b")
# "A or B is correct", "do not choose B", "if B is correct".
_HEDGED = re.compile(
    r"(?i)\b(?:or|and|nor|if|whether|unless|nobody says|no one says|not true that|(?:not|never|n't|cannot)\s+\w+)"
    r"[\s(*]*$"
)
_DENIED_BEHIND = re.compile(
    r"(?i)[(\[]?[A-J][)\]]?\s*[:.,–—-]?\s*(?:(?:is|as|seems|looks)\s+)?(?:incorrect|wrong|false|not|impossible)\b"
)
# What may follow a letter that is an answer: an end, a mark, or the reason for it. "A train" and "I think" are prose.
_ALONE = re.compile(
    r"(?:\(\s*(?P<round>[A-Ja-j])\s*\)|\[(?P<square>[A-Ja-j])\]|(?P<plain>[A-Ja-j]))"
    r"(?:\s*$|\s*[.,;:)\]!。，．\"'”}]+(?:\s|$|[^\x00-\x7f])|\s+(?:[–—-]\s|because|since|as|for|which|with"
    r"|and not)(?:\b|(?<=\s)))"
)
_ROUND = re.compile(r"\(\s*([A-Ja-j])\s*\)")
_SEVERAL = re.compile(r"\(?[A-Ja-j]\)?(?:\s*(?:,|;|/|&|and|or)\s*\(?[A-Ja-j]\)?)+")
_LETTER = re.compile(r"(?:(?i:option|choice|answer)\s*:?\s*)?[(\[]?\s*([A-Ja-j])\s*[)\].:．。]*")


_PLAIN = str.maketrans({"（": "(", "）": ")", "．": ".", "：": ":"})


def version() -> str:
    return RULES


def grade(answer: str, response: str, metadata: Mapping[str, Any]) -> Outcome:
    """Compare the letter that the response states last with the reference's.

    Args:
        answer: the letter (``B``, ``(B)``, ``B) London``), or an option's text where ``choices`` holds it.
        metadata: ``choices``: a list of texts in order of the letters, or a mapping letter -> text.
    """
    options = _options(metadata.get("choices"))
    gold = _gold(answer, options)
    if gold is None:
        return Outcome("gold_unparsable", detail=f"the reference answer is no letter A to {_last(options)}")
    said = _last_statement(squeezed(visible(response)), options)
    if said is None:
        return Outcome("no_answer", detail="states no choice")
    text = said.text.strip()
    if not text:
        return Outcome("no_answer", detail="an empty answer")
    letter = _read(text, options)
    if letter is None:
        several = _SEVERAL.fullmatch(_plain(text))
        return Outcome("incorrect" if several else "pred_unparsable", text[:200], "not one letter")
    return Outcome("correct" if letter == gold else "incorrect", letter)


def _options(choices: Any) -> dict[str, str]:
    """Letter -> normalised text; empty when the metadata holds no options that can be read."""
    if isinstance(choices, Mapping):
        pairs = [(str(letter).strip().upper(), text) for letter, text in choices.items()]
    elif isinstance(choices, (list, tuple)):
        pairs = list(zip(LETTERS, choices, strict=False))
    else:
        return {}
    return {letter: _comparable(str(text)) for letter, text in pairs if letter in LETTERS and len(letter) == 1}


def _last(options: Mapping[str, str]) -> str:
    return max(options, default=LETTERS[-1])


def _gold(answer: str, options: Mapping[str, str]) -> str | None:
    box = next(boxes(answer), None)
    letter = _read(box.text if box else visible(answer), options)
    return letter if letter is None or not options or letter in options else None


def _last_statement(response: str, options: Mapping[str, str]) -> Stated | None:
    """The last statement that is a choice; else the box or the tag that is none, so that the verdict can say so.

    A letter that is denied ("E is not the answer") is no statement. A box with a formula loses to a letter anywhere.
    """
    box = last_standing_box(response)
    placed = [] if box is None else [box]
    joined = joined_boxes(response)
    if joined.in_words and len({_read(text, options) for text in joined.texts}) > 1:
        return Stated(joined.text, len(response))  # "\boxed{A} and \boxed{B}" is no one letter
    if (tagged := last_tagged(response)) is not None:
        placed.append(tagged)
    found = [box for box in placed if _read(box.text, options) is not None or _SEVERAL.fullmatch(_plain(box.text))]
    for pattern in (_LABEL, _VERB, _REVERSED):
        for match in pattern.finditer(response):
            if _HEDGED.search(response, max(0, match.start() - 30), match.start("said")):
                continue
            if _DENIED.match(match["said"]) or _DENIED_BEHIND.match(_plain(match["said"])):
                continue
            if several := _SEVERAL.match(_plain(match["said"])):
                found.append(Stated(several[0], match.start()))
            elif (letter := _read_start(match["said"], options)) is not None:
                found.append(Stated(letter, match.start()))
    lines = [line for line in response.splitlines() if line.strip()]
    last = _plain(lines[-1]) if lines else ""
    may_count = lines and not _DENIED_BEHIND.match(last) and (not found or len(last) < 4)
    if may_count and _read_line(lines[-1], options, alone=len(lines) == 1):
        found.append(Stated(lines[-1], response.rfind(lines[-1])))
    return max(found or placed, key=lambda statement: statement.at, default=None)


def _read(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of what is certainly meant as an answer: "B", "(b)", "B. London", an option's text."""
    text = _plain(text)
    if whole := _LETTER.fullmatch(text):
        return whole[1].upper()
    if (letter := _by_text(text, options)) is not None:
        return letter
    text = re.sub(r"(?i)^(?:option|choice|answer)\s*:?\s+(?=[(\[]?[A-J]\b)", "", text)
    if _SEVERAL.fullmatch(text):
        return None
    labelled = re.match(r"\(\s*([A-Ja-j])\s*\)|([A-J])\s*(?:[).:](?=\s|\\)|\s[–—-]\s)", text)
    if labelled is None:
        return None
    letter = (labelled[1] or labelled[2]).upper()
    other = _by_text(text[labelled.end() :], options)
    return letter if other in (None, letter) else None  # the letter of one option and the text of another


def _read_start(text: str, options: Mapping[str, str]) -> str | None:
    """The letter with which a statement begins, or the option whose text it is."""
    text = _plain(text)
    if (found := _ROUND.match(text)) is not None:
        return found[1].upper()
    if (found := _ALONE.match(text)) is not None and not _SEVERAL.match(text):
        letter = found["square"] or found["plain"]
        # "a" before a comma or a reason is an article more often than a choice.
        return letter.upper() if letter.isupper() or _LETTER.fullmatch(text) else None
    return _by_text(text, options) or _by_text(re.split(r"[.;\n]\s", text)[0], options)


def _read_line(line: str, options: Mapping[str, str], *, alone: bool) -> str | None:
    """The letter of a line that is nothing but a choice; one that goes on counts as "(B) ..." or "B) ..."."""
    text = _plain(line)
    if (whole := _LETTER.fullmatch(text)) and (whole[1].isupper() or alone):
        return whole[1].upper()
    if (letter := _by_text(text, options)) is not None:
        return letter
    labelled = re.match(r"\(\s*([A-J])\s*\)\s|([A-J])(?:\)\s|\s[–—-]\s" + (r"|[.:]\s)" if alone else ")"), text)
    return (labelled[1] or labelled[2]) if labelled else None


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option with this text, with or without its letter in front."""
    if not options:
        return None
    wanted = _comparable(text)
    same = [letter for letter, option in options.items() if option and option == wanted]
    if len(same) == 1:
        return same[0]
    labelled = re.match(r"\(?([a-j])\s*[).:]+\s*(.+)", wanted)
    if labelled and options.get(labelled[1].upper()) == labelled[2]:
        return labelled[1].upper()
    return None


def _plain(text: str) -> str:
    """Without TeX text commands, dollar signs, Markdown stars and outer space."""
    text = re.sub(r"\s{2,}", " ", text)
    text = re.sub(r"^\s*\{(.*)\}\s*$", r"\1", unwrapped(text), flags=re.S)
    text = re.sub(r"\\[()\[\]]", "", text.replace("**", "").replace("$", "")).translate(_PLAIN)
    return text.replace("`", "").strip(" \t\r\n*_\"“”'")


def _comparable(text: str) -> str:
    return " ".join(_plain(text).casefold().split()).rstrip(".")

"""Options of multiple-choice questions as the ``choice`` grader reads them, whatever a file makes of them.

Must not know: the grader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from calset.builder.problems.values import structure

LETTERS = "ABCDEFGHIJ"


class Choices(NamedTuple):
    """Options of a question: ``options`` as metadata holds them, and the file's label of each."""

    options: list[str] | dict[str, str]
    labels: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        return list(self.options.values()) if isinstance(self.options, dict) else self.options

    def letter(self, answer: str) -> str:
        """Return the letter of the option that an answer names by a label of another kind (ARC's ``1`` to ``4``)."""
        named = answer.strip()
        if isinstance(self.options, list) and named not in LETTERS and named in self.labels:
            return LETTERS[self.labels.index(named)]
        return answer


def read_choices(value: Any) -> Choices | None:
    """Return the options that a value holds; None where it holds none, or more than there are letters.

    Known are a list of texts, an object letter -> text, ``{"text": [...], "label": [...]}`` (ARC, CommonsenseQA) and a
    list of ``{"text": ..., "label": ...}``.
    """
    value = structure(value)
    if isinstance(value, Mapping) and isinstance(value.get("text"), (list, tuple)):
        texts = list(value["text"])
        labels = list(value.get("label") or LETTERS[: len(texts)])
    elif isinstance(value, Mapping):
        labels, texts = list(value), list(value.values())
    elif isinstance(value, (list, tuple)) and all(isinstance(option, Mapping) for option in value):
        texts = [option.get("text") for option in value]
        labels = [option.get("label", letter) for option, letter in zip(value, LETTERS, strict=False)]
    elif isinstance(value, (list, tuple)):
        texts, labels = list(value), list(LETTERS[: len(value)])
    else:
        return None
    if not 0 < len(texts) == len(labels) or len(texts) > len(LETTERS):
        return None
    if not all(isinstance(text, (str, int, float)) for text in texts):
        return None
    options = [str(text) for text in texts]
    named = tuple(str(label).strip() for label in labels)
    if named != tuple(LETTERS[: len(named)]) and all(len(n) == 1 and n.upper() in LETTERS for n in named):
        return Choices(dict(zip(named, options, strict=True)), named)
    return Choices(options, named)

"""Which problems an evaluation set holds too: n-gram overlap of words, with the evidence.

A calibration problem that is also an evaluation question makes the evaluation worthless, and questions travel between
data sets reworded, cut and reformatted. What published tools do, and what is taken from each:

* GPT-3 (arXiv 2005.14165, appendix C) and lm-evaluation-harness (docs/decontamination.md): any shared n-gram of words
  with n between 8 and 13, case and punctuation ignored; the harness takes 13.
* open-r1 (scripts/decontaminate.py, after s1, arXiv 2501.19393): any shared 8-gram, which also throws out whatever
  shares a phrase such as "where m and n are relatively prime positive integers".
* NeMo Curator (TaskDecontamination): a gram found more than ``max_matches`` = 10 times is too common to count.

The rule here: a problem is contaminated by an evaluation question when both are equal after normalising, or when they
share one gram of the largest n (13), or when the grams of a smaller n (8) that they share are at least ``min_share`` of
the shorter question's grams. Words of a template do not count: those of an 8-gram that stands in more than
max(``TEMPLATE_FLOOR``, ``template_share`` x questions) different questions of the evaluation source ("State the final
answer to the following arithmetic problem"). Questions of fewer than n words are compared whole.

Why here: a build leaves such problems out, and so does a selection. Must not know: how a source is opened, models,
engines, the catalog but for its records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

from calset.catalog.contamination.words import Words, normalise
from calset.catalog.records import Contamination, Problem, Source, utc_now
from calset.errors import InputError

NGRAMS = (8, 13)
MIN_SHARE = 0.5
TEMPLATE_SHARE = 0.005
TEMPLATE_FLOOR = 2  # a small source (AIME has 30 questions) repeats a phrase by chance before 0.5 % means anything


@dataclass(frozen=True, slots=True)
class OverlapRule:
    """When a problem counts as contaminated; see the head of this module."""

    n: tuple[int, ...] = NGRAMS  # words a gram, ascending
    min_share: float = MIN_SHARE  # of the shorter question's grams, for all but the largest n
    template_share: float = TEMPLATE_SHARE  # of a source's questions; a gram in more of them is its template

    def __post_init__(self) -> None:
        if not self.n or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in self.n):
            raise InputError(f"n-grams take whole numbers from 2 up, not {self.n!r}")
        object.__setattr__(self, "n", tuple(sorted(set(self.n))))
        if not 0 < self.min_share <= 1:
            raise InputError(f"min_share must be above 0 and at most 1, not {self.min_share}")
        if not 0 <= self.template_share <= 1:
            raise InputError(f"template_share must be from 0 to 1, not {self.template_share}")

    def template_limit(self, n_questions: int) -> int:
        """In how many of a source's different questions a gram may stand before it is template."""
        return max(TEMPLATE_FLOOR, int(self.template_share * n_questions))


class _Grams(NamedTuple):
    """The n-grams of a question as 64-bit hashes (Python's own: for this process only), one a position."""

    words: Words
    hashes: dict[int, list[int]]  # n -> hash of the gram at each position

    @classmethod
    def of(cls, text: str, sizes: Sequence[int]) -> _Grams:
        words = normalise(text)
        listed = words.words
        return cls(words, {n: [hash(listed[i : i + n]) for i in range(len(listed) - n + 1)] for n in sizes})

    def distinctive(self, templates: Collection[int], k: int) -> dict[int, set[int]]:
        """n -> the different grams without a word that any template gram (of k words) covers."""
        hits = [i for i, found in enumerate(self.hashes[k]) if found in templates] if templates else []
        if not hits:
            return {n: set(found) for n, found in self.hashes.items()}
        covered = {i + j for i in hits for j in range(k)}
        return {n: set(_outside(found, n, covered)) for n, found in self.hashes.items()}


def _outside(hashes: Sequence[int], n: int, covered: Collection[int]) -> Iterator[int]:
    """The grams that hold no covered word."""
    last = -1  # the latest covered word at or before the gram's end
    for end in range(n - 1):
        last = end if end in covered else last
    for start, found in enumerate(hashes):
        end = start + n - 1
        last = end if end in covered else last
        if last < start:
            yield found


class _Index:
    """For one n: which rows hold a gram, as two arrays sorted by the gram's hash.

    12 bytes a gram: 15,000 questions of 60 words take 10 MB an n, where a dict of lists takes some 200.
    """

    def __init__(self, grams: Iterable[tuple[int, int]]) -> None:
        pairs = np.fromiter(grams, dtype=np.dtype([("gram", np.int64), ("row", np.int32)]))
        pairs.sort(order=("gram", "row"))
        self._grams, self._rows = pairs["gram"].copy(), pairs["row"].copy()

    def rows(self, grams: Collection[int]) -> Counter[int]:
        """Row -> how many of the given (different) grams it holds."""
        wanted = np.fromiter(grams, dtype=np.int64, count=len(grams))
        first = np.searchsorted(self._grams, wanted, side="left")
        last = np.searchsorted(self._grams, wanted, side="right")
        found: Counter[int] = Counter()
        for i in np.flatnonzero(first < last):
            found.update(self._rows[first[i] : last[i]].tolist())
        return found


class _Match(NamedTuple):
    """An evaluation question that contaminates a problem, and n -> (grams shared, of how many)."""

    row: int
    counted: dict[int, tuple[int, int]]


class _Evaluation:
    """One evaluation source, ready to be compared with: its templates, and an index of its other grams.

    Words are not kept: the few questions that overlap are normalised again.
    """

    def __init__(self, source: Source, problems: Iterable[Problem], rule: OverlapRule) -> None:
        self.source, self._rule = source, rule
        self.rows: list[tuple[str, str]] = []  # source row, question
        self._whole: dict[int, list[int]] = {}  # hash of all words -> rows
        counts: Counter[int] = Counter()
        listed: list[_Grams] = []
        for problem in problems:
            grams = _Grams.of(problem.question, rule.n)
            if grams.words.words:
                same = self._whole.setdefault(hash(grams.words.words), [])
                if not same:  # a question that the source holds twice makes no template of itself
                    counts.update(set(grams.hashes[rule.n[0]]))
                same.append(len(listed))
                listed.append(grams)
                self.rows.append((problem.source_row, problem.question))
        limit = rule.template_limit(len(self._whole))
        self._templates = frozenset(gram for gram, count in counts.items() if count > limit)
        kept = [grams.distinctive(self._templates, rule.n[0]) for grams in listed]
        self._sizes = {n: [len(set(grams.hashes[n])) for grams in listed] for n in rule.n}
        self._indices = {n: _Index((h, row) for row, grams in enumerate(kept) for h in grams[n]) for n in rule.n}

    def matches(self, problem: _Grams) -> Iterator[_Match]:
        """The evaluation questions that contaminate a problem, in the order of the source."""
        words = problem.words.words
        equal = {row for row in self._whole.get(hash(words), ()) if self.words(row) == words}
        grams = problem.distinctive(self._templates, self._rule.n[0])
        shared = {n: self._indices[n].rows(found) for n, found in grams.items()}
        sizes = {n: len(set(found)) for n, found in problem.hashes.items()}
        caught = set(equal)
        for n, counts in shared.items():
            enough = self._rule.min_share if n < self._rule.n[-1] else 0.0
            caught.update(row for row, k in counts.items() if k >= enough * min(sizes[n], self._sizes[n][row]))
        for row in sorted(caught):
            if row in equal:
                yield _Match(row, {n: (k, k) for n, k in sizes.items() if k} or {len(words): (1, 1)})
            else:
                found = {n: (shared[n][row], min(sizes[n], self._sizes[n][row])) for n in grams if shared[n][row]}
                yield _Match(row, found)

    def words(self, row: int) -> tuple[str, ...]:
        return normalise(self.rows[row][1]).words


class Decontaminator:
    """Checks problems against evaluation sources.

    Args:
        evaluations: sources and their problems, as ``load_problems`` gives them; their order does not matter, a source
            given twice counts once.
        n: words a gram; one shared distinctive gram of the largest is enough.
        min_share: how many of the shorter question's grams of a smaller n must be shared, as a share in (0, 1].
        template_share: words in a gram (of the smallest n) that more than this share of a source's different questions
            hold are template and do not count.

    Raises:
        InputError: a rule that makes no sense, or no evaluation question.
    """

    def __init__(
        self,
        evaluations: Iterable[tuple[Source, Iterable[Problem]]],
        n: Sequence[int] = NGRAMS,
        *,
        min_share: float = MIN_SHARE,
        template_share: float = TEMPLATE_SHARE,
    ) -> None:
        self.rule = OverlapRule(tuple(n), min_share, template_share)
        self._evaluations: dict[str, _Evaluation] = {}
        for source, problems in evaluations:
            if source.source_id not in self._evaluations:
                self._evaluations[source.source_id] = _Evaluation(source, problems, self.rule)
        if not len(self):
            raise InputError("no evaluation questions to compare with; name a source that holds some")

    def __len__(self) -> int:
        """How many evaluation questions there are."""
        return sum(len(evaluation.rows) for evaluation in self._evaluations.values())

    @property
    def sources(self) -> list[Source]:
        """The evaluation sources."""
        return [evaluation.source for evaluation in self._evaluations.values()]

    def facts(self) -> dict[str, Any]:
        """The rule and the sources at their revisions, JSON-able: what makes two checks the same check."""
        kept = ("name", "kind", "revision", "source_id")  # not the spec, which may be a path of this machine
        listed = [
            {**{key: getattr(e.source, key) for key in kept}, "questions": len(e.rows)}
            for e in self._evaluations.values()
        ]
        rule = {"n": list(self.rule.n), "min_share": self.rule.min_share, "template_share": self.rule.template_share}
        return {"sources": sorted(listed, key=lambda s: (s["name"], s["source_id"])), "rule": rule}

    def check(self, problem: Problem) -> list[Contamination]:
        """The evidence against a problem: one record an (evaluation question, n), none when it is clean.

        ``n_shared`` leaves templates out, but of equal questions all grams count. ``share`` is of all different grams
        of the question that has fewer. An equal question of fewer than the smallest n words is one gram.
        """
        grams = _Grams.of(problem.question, self.rule.n)
        if not grams.words.words:
            return []
        now, found = utc_now(), []
        for evaluation in self._evaluations.values():
            for match in evaluation.matches(grams):
                run = _longest_run(problem.question, grams.words, evaluation.words(match.row))
                found += [
                    Contamination(
                        problem_id=problem.problem_id,
                        evaluation_source=evaluation.source.name,
                        evaluation_revision=evaluation.source.revision,
                        evaluation_row=evaluation.rows[match.row][0],
                        n=n,
                        n_shared=n_shared,
                        share=n_shared / of,
                        evidence=run,
                        found_at=now,
                    )
                    for n, (n_shared, of) in match.counted.items()
                ]
        return sorted(found, key=lambda c: (c.evaluation_source, c.evaluation_revision, c.evaluation_row, c.n))


def _longest_run(text: str, mine: Words, theirs: Sequence[str]) -> str:
    """The longest run of words that both questions hold, as the problem writes it."""
    match = SequenceMatcher(None, mine.words, theirs, autojunk=False).find_longest_match()
    if not match.size:
        return ""
    return text[mine.spans[match.a][0] : mine.spans[match.a + match.size - 1][1]]


def clean(problems: Iterable[Problem], decontaminator: Decontaminator) -> Iterator[tuple[Problem, list[Contamination]]]:
    """Each problem with the evidence against it, in order; clean ones have none. Holds one problem at a time."""
    for problem in problems:
        yield problem, decontaminator.check(problem)

"""The rows that calset's parts hand each other: problems, runs, traces, grades, subsets.

Why here: the builder writes them, the catalog keeps them, selection and pruning read them. They are plain values and
know neither DuckDB nor any engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

Verdict = Literal[
    "correct", "incorrect", "no_answer", "truncated", "gold_unparsable", "pred_unparsable", "timeout", "error",
    "ungraded",
]  # fmt: skip
VERDICTS: tuple[str, ...] = get_args(Verdict)
# Verdicts that say something about the model; the rest (a broken reference, a grader's own failure) leave no mark on
# the pass rate.
JUDGED: tuple[str, ...] = ("correct", "incorrect", "no_answer", "truncated", "pred_unparsable")
RunKind = Literal["build", "evaluate"]
# Finish reasons of a completion that is not whole, and of one that the engine gave up on.
UNFINISHED: tuple[str, ...] = ("length", "repetition")
BROKEN: tuple[str, ...] = ("abort", "error")


def utc_now() -> datetime:
    """Now, in UTC, without a timezone object (DuckDB TIMESTAMP)."""
    return datetime.now(UTC).replace(tzinfo=None)


@dataclass(frozen=True, slots=True)
class Source:
    """Where problems come from, at a pinned revision."""

    source_id: str
    name: str  # short name that people filter by: "gym:chain_sum", "questions.jsonl", "demo"
    spec: str  # as typed: "gym:chain_sum?max_terms=4&size=50&seed=1"
    kind: str  # "gym" | "file" | "demo" | "hub"
    revision: str  # package version, file hash or commit
    grader: str
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a reference answer."""

    problem_id: str
    source_id: str
    source: str
    source_row: str  # the row's key in its source
    question: str
    answer: str
    grader: str
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what the grader needs (gym entry), solution, domain

    @property
    def reference_solution(self) -> str:
        """The worked solution where the source has one, else the reference answer."""
        return str(self.metadata.get("solution") or self.answer)


@dataclass(frozen=True, slots=True)
class Run:
    """One build: everything that made its traces what they are."""

    run_id: str
    kind: RunKind
    generation_key: str
    model: str
    model_revision: str
    tokenizer_hash: str
    chat_template_hash: str
    system_prompt: str | None
    sampling: Mapping[str, Any]
    max_tokens: int
    seed: int
    engine: str
    engine_version: str
    reasoning_format: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    command: str
    model_path: str | None = None  # where a local model's folder was; recipes that need its tokenizer look there
    started_at: datetime = field(default_factory=utc_now)
    sampling_from: Mapping[str, str] | None = None  # where each value of ``sampling`` came from
    template_options: Mapping[str, Any] | None = None  # what the chat template was rendered with
    engine_options: Mapping[str, Any] | None = None  # the engine's own, as given


@dataclass(frozen=True, slots=True)
class Trace:
    """One sampled response. ``prompt_ids`` and ``completion_ids`` are the engine's own ids, never re-encoded.

    ``reasoning_start`` and ``reasoning_end`` are offsets into ``completion_ids``: the tokens between the marks; both -1
    when the model did not think. ``answer_start`` is where the answer begins, or -1 when thinking never ended.
    """

    trace_id: str
    problem_id: str
    run_id: str
    generation_key: str
    sample_index: int
    request_seed: int
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    text: str  # the whole completion, decoded for reading and searching
    response: str  # what follows the thinking: the only text that graders see
    finish_reason: str  # the engine's own string: stop, length, abort, error, repetition
    max_tokens: int
    reasoning_start: int = -1
    reasoning_end: int = -1
    answer_start: int = 0
    attempt: int = 0
    seconds: float = 0.0
    created_at: datetime = field(default_factory=utc_now)

    @property
    def n_tokens(self) -> int:
        return len(self.completion_ids)

    @property
    def n_reasoning_tokens(self) -> int:
        return max(0, self.reasoning_end - self.reasoning_start)


@dataclass(frozen=True, slots=True)
class Grade:
    """One grader's verdict on one trace; the newest counts."""

    trace_id: str
    attempt: int
    grader: str
    grader_version: str
    verdict: Verdict
    extracted: str | None = None  # the model's answer as the grader read it
    detail: str | None = None  # why, in a line
    seconds: float = 0.0
    graded_at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The newest attempt at one sample, as a build that continues must know it."""

    trace_id: str
    attempt: int
    finish_reason: str
    max_tokens: int
    n_prompt_tokens: int
    n_tokens: int
    verdict: str | None

    @property
    def broken(self) -> bool:
        """Whether the engine gave up on it."""
        return self.finish_reason in BROKEN


@dataclass(frozen=True, slots=True)
class AttemptCount:
    """How many newest attempts are alike in what decides whether they are run again."""

    n: int
    cut: bool  # by the token limit
    as_long: bool  # the limit was no smaller than the one asked about
    broken: bool
    max_tokens: int  # the largest limit among them


@dataclass(frozen=True, slots=True)
class Decision:
    """What an adaptive build decided of a problem, after ``k`` judged samples of at most ``samples``."""

    run_id: str
    generation_key: str
    problem_id: str
    action: str  # "continue", "stop", "complete"
    reason: str  # in a line, for people
    k: int
    n_correct: int
    samples: int
    probability: float | None  # that all ``samples`` would put the problem inside the recipe's band
    confidence: float
    recipe: str
    decided_at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True, slots=True)
class Contamination:
    """Why a problem was left out: n-grams of words that it shares with a problem of an evaluation source."""

    problem_id: str
    evaluation_source: str
    evaluation_revision: str
    evaluation_row: str
    n: int  # words a gram
    n_shared: int  # grams shared
    share: float  # of the shorter question's grams
    evidence: str  # the longest shared run of words
    found_at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge model said of a trace; it stands beside the rule's verdict, never in its place."""

    trace_id: str
    attempt: int
    judge: str  # the judge's model
    judge_revision: str
    prompt_hash: str  # sha256 of the prompt template and answer schema
    engine: str
    engine_version: str
    verdict: Verdict
    extracted: str | None
    raw: str  # the judge's own words, whole
    detail: str | None = None
    seconds: float = 0.0
    judged_at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True, slots=True)
class Sample:
    """One calibration sample of a subset: prompt and completion in ``input_ids``, ``n_prompt_tokens`` of it prompt."""

    sample_id: str
    input_ids: Sequence[int]
    n_prompt_tokens: int
    kind: Literal["trace", "prompt", "gold", "text"] = "trace"
    trace_id: str | None = None
    problem_id: str | None = None


@dataclass(frozen=True, slots=True)
class Subset:
    """An immutable, versioned, content-hashed, ordered list of calibration samples."""

    name: str
    version: int
    content_hash: str
    recipe: Mapping[str, Any]  # the resolved recipe: filter, bands, budget, order
    seed: int
    model: str
    model_revision: str
    tokenizer_hash: str
    samples: Sequence[Sample]
    pool: Mapping[str, Any] = field(default_factory=dict)  # how many candidates passed each filter
    warnings: Sequence[str] = ()
    created_at: datetime = field(default_factory=utc_now)
    # Of a subset that was not selected here: "runs", "sources" and "licences" of its manifest, "hub" (repo, commit,
    # tag, manifest). It says nothing of what the subset is, so equal subsets may differ in it.
    origin: Mapping[str, Any] | None = field(default=None, compare=False)
    # Of a subset that was read from an exported folder or from the Hub: its Parquet files, whose rows hold texts too.
    data_files: tuple[Path, ...] = field(default=(), compare=False, repr=False)

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def n_samples(self) -> int:
        return len(self.samples)

    @property
    def n_tokens(self) -> int:
        return sum(len(s.input_ids) for s in self.samples)

    def facts(self) -> dict[str, Any]:
        """What it is, for a manifest or the record of a pruning. ``n_tokens``: of prompts and completions."""
        return {
            "name": self.name,
            "version": self.version,
            "content_hash": self.content_hash,
            "recipe": dict(self.recipe),
            "seed": self.seed,
            "model": self.model,
            "model_revision": self.model_revision,
            "tokenizer_hash": self.tokenizer_hash,
            "n_samples": self.n_samples,
            "n_tokens": self.n_tokens,
        }


@dataclass(frozen=True, slots=True)
class Publication:
    """A subset as it stands on the Hub."""

    name: str
    version: int
    content_hash: str
    repo: str
    revision: str  # the commit
    tag: str
    published_at: datetime = field(default_factory=utc_now)

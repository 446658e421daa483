"""Settings of a build, checked when they are made and passed as one object to the plan, the schedule and the pipeline.

Must not know: the catalog's file, a model's files, an engine at work.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, get_args

from calset.builder.engines import Engine, Sampling, check_options, resolve_engine
from calset.builder.schedule.adaptive import Target
from calset.catalog.records import RunKind
from calset.catalog.subsets.recipes import Recipe
from calset.errors import InputError

RETRIES = ("truncated", "error")
MAX_SAMPLES = 1_000_000  # beyond, it is a typing error


class GenerationOptions(TypedDict, total=False):
    """Keyword parameters that ``build`` and ``evaluate`` share."""

    engine: str | Engine
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    max_tokens: int | None
    seed: int
    system_prompt: str | None
    template_options: Mapping[str, Any] | None
    limit: int | None
    question: str | None
    answer: str | None
    grader: str | None
    concurrency: int | None
    engine_options: Mapping[str, Any] | None
    unsafe_scorers: bool
    skip_bad: bool


class BuildOptions(GenerationOptions, total=False):
    """Keyword parameters of ``build`` that become ``BuildSettings``."""

    samples: int
    target: str | Path | Recipe | None
    need: int | None
    need_tokens: int | None
    confidence: float | None
    decontaminate: str | Sequence[str]
    kind: RunKind
    graded: bool
    device: str | None
    graders: int
    commit_every_seconds: float | None
    commit_size: int
    retry: Collection[str]


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Settings of a build; ``build`` documents each.

    Attributes:
        aim: the target and what is needed of it; None for a build of a fixed number of samples.

    Raises:
        InputError: a value out of range or a combination that makes no sense; the message names the parameter.
    """

    model: str | Path
    problems: str | Sequence[str]
    _: KW_ONLY
    samples: int = 4
    target: str | Path | Recipe | None = None
    need: int | None = None
    need_tokens: int | None = None
    confidence: float | None = None
    engine: str | Engine = "auto"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    seed: int = 0
    system_prompt: str | None = None
    template_options: Mapping[str, Any] | None = None
    limit: int | None = None
    decontaminate: str | Sequence[str] = ()
    kind: RunKind = "build"
    graded: bool = True
    question: str | None = None
    answer: str | None = None
    grader: str | None = None
    device: str | None = None
    concurrency: int | None = None
    graders: int = 2
    commit_every_seconds: float | None = None
    commit_size: int = 512
    retry: Collection[str] = ()
    engine_options: Mapping[str, Any] | None = None
    unsafe_scorers: bool = False
    skip_bad: bool = False
    aim: Target | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "aim", self._aim())
        if not self.specs:
            raise InputError("no problems given")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise InputError(f"samples must be at least 1 and at most {MAX_SAMPLES:,}, not {self.samples}")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number of at most 63 bits, not {self.seed}")
        if unknown := sorted(set(self.retry) - set(RETRIES)):
            raise InputError(f"retry takes {' and '.join(RETRIES)}, not {unknown[0]!r}")
        if self.kind not in get_args(RunKind):
            raise InputError(f"kind must be one of {', '.join(get_args(RunKind))}, not {self.kind!r}")
        for name in ("max_tokens", "limit", "graders", "commit_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        pause = self.commit_every_seconds
        if pause is not None and not 0 <= pause < math.inf:
            raise InputError(f"commit_every_seconds must be at least 0 and finite, not {pause}")
        if self.aim is not None:
            self.aim.rule(self.samples)
        self.sampling(Sampling())
        self._check_engine()

    def _aim(self) -> Target | None:
        given = {"need": self.need, "need_tokens": self.need_tokens, "confidence": self.confidence}
        if self.target is None:
            if unused := [name for name, value in given.items() if value is not None]:
                raise InputError(f"{unused[0]} is for an adaptive build: pass a target recipe with it")
            return None
        if not self.graded:
            raise InputError("an adaptive build decides by verdicts: it cannot run ungraded")
        return Target.of(self.target, need=self.need, need_tokens=self.need_tokens, confidence=self.confidence)

    def _check_engine(self) -> None:
        """Refuse an unknown engine and unknown options; vLLM need not be here, since a plan does without."""
        if isinstance(self.engine, str):
            assumed = "vllm" if self.engine in ("auto", "vllm") else resolve_engine(self.engine)
            check_options(assumed, self.all_engine_options)

    def require_engine(self) -> None:
        """Refuse an engine that is not installed, and options that the one chosen by ``auto`` does not take.

        Raises:
            InputError: naming the engine or the option.
        """
        if isinstance(self.engine, str):
            check_options(resolve_engine(self.engine), self.all_engine_options)

    @property
    def specs(self) -> tuple[str, ...]:
        """The problem sources, one or several."""
        return (self.problems,) if isinstance(self.problems, str) else tuple(self.problems)

    @property
    def all_engine_options(self) -> dict[str, Any]:
        """``engine_options`` with ``concurrency``, which an engine option of that name replaces."""
        return {"concurrency": self.concurrency} | dict(self.engine_options or {})

    def sampling(self, defaults: Sampling) -> Sampling:
        """The model's own sampling, overridden by what is set here.

        Raises:
            InputError: a value out of range.
        """
        given = {each.name: getattr(self, each.name) for each in fields(Sampling)}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})

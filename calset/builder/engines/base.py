"""The engine protocol: prompt token ids in, completion token ids out, each as soon as it is done.

Must not know: problems, grading or the catalog.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from calset.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a trace is drawn from; the part of the sampling that enters the generation key.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 5:
            raise InputError(f"temperature must lie between 0 and 5, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or positive, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must lie between 0 and 1, not {self.min_p}")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty must be positive, not {self.repetition_penalty}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Request:
    """One unit of work. ``key`` comes back on the completion; ``max_tokens`` counts completion tokens."""

    key: str
    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returned for a request: its own token ids (the stop token included when it sampled one)."""

    key: str
    token_ids: tuple[int, ...]
    finish_reason: str
    seconds: float


@runtime_checkable
class Engine(Protocol):
    """A running inference engine on one model folder or Hub id."""

    name: str
    version: str
    max_model_len: int

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish, in any order, pulling requests lazily.

        Raises:
            EngineError: the engine died; completions already yielded stand.
        """
        ...

    def load_weights(self, model: Path) -> None:
        """Put the weights of another checkpoint of the same architecture and tokenizer into the running engine.

        Raises:
            EngineError: the checkpoint does not fit the engine.
        """
        ...

    def close(self) -> None:
        """Free the device; may be called twice."""
        ...

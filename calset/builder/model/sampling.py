"""Sampling parameters that decide what a trace is drawn from, and that enter the generation key.

Must not know: engines, model folders.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

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
        if not 0 <= self.temperature <= 2:  # vLLM's own bounds
            raise InputError(f"temperature must lie between 0 and 2, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or positive, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must lie between 0 and 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be positive and finite, not {self.repetition_penalty}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

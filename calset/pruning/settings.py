"""Settings of a pruning, checked when they are made and passed as one object to the plan and the work.

Must not know: a model's files, the calibration samples, how a block is pruned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from calset.errors import InputError
from calset.pruning.blockwise.hidden_states import Where
from calset.pruning.calibration import Tokens
from calset.pruning.methods import registry
from calset.pruning.methods.masks import BLOCK_SIZE, Group, Pattern, Selection

Propagate = Literal["pruned", "dense"]
DAMPING = 0.01  # of the mean diagonal
# Settings that change no result; the model and the calibration samples are known by their hashes.
WITHOUT_EFFECT = ("model", "out", "device", "hidden", "force")
# Settings of zeros within matrices; a method that drops whole experts or blocks has none.
OF_MATRICES = ("pattern", "group", "allocation", "damping", "block_size", "include", "exclude", "allow_partial")


class PruneOptions(TypedDict, total=False):
    """Keyword parameters of ``prune`` that become ``PruneSettings``."""

    method: str
    sparsity: float | None
    pattern: str | None
    tokens: Tokens
    propagate: Propagate
    group: Group | None
    allocation: str | Path
    damping: float
    block_size: int
    device: str | None
    batch_tokens: int | None
    max_length: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    allow_partial: bool
    hidden: Where | None
    force: bool


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """Settings of a pruning; ``prune`` documents each.

    Raises:
        InputError: a value out of range or a combination that makes no sense; the message names the parameter.
    """

    model: str | Path
    out: str | Path
    _: KW_ONLY
    method: str = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    tokens: Tokens = "all"
    propagate: Propagate = "pruned"
    group: Group | None = None
    allocation: str | Path = "uniform"
    damping: float = DAMPING
    block_size: int = BLOCK_SIZE
    device: str | None = None
    batch_tokens: int | None = None
    max_length: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    allow_partial: bool = False
    hidden: Where | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("propagate", Propagate), ("tokens", Tokens), ("hidden", Where)):
            value = getattr(self, name)
            if value not in get_args(choices) and (name, value) != ("hidden", None):
                raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")
        if not 0 < self.damping <= 1e4:
            raise InputError(f"damping is a positive share of the mean diagonal, such as 0.01, not {self.damping}")
        for name in ("batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be positive, not {value}")
        if self.is_structured:
            self._check_structured()
            return
        selection = self.selection
        if self.rule != "uniform" and selection.sparsity is None:
            raise InputError(
                f"a pattern is one share of zeros everywhere: --allocation {self.rule} takes --sparsity instead"
            )
        compiled([*self.include, *self.exclude])

    def _check_structured(self) -> None:
        if self.method not in registry.STRUCTURED:
            base = self.method.removesuffix(registry.REFINEMENT)
            raise InputError(
                f"{base} drops {registry.STRUCTURED[base]}: it has no mask that {registry.REFINEMENT} could refine"
            )
        what = registry.STRUCTURED[self.method]
        defaults = {each.name: each.default for each in fields(self)}
        for name in OF_MATRICES:
            value = getattr(self, name)
            if (tuple(value) if name in ("include", "exclude") else value) != defaults[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} is about zeros within matrices, and {self.method} drops whole {what}: "
                    f"leave it"
                )
        if self.sparsity is None:
            raise InputError(f"{self.method} takes --sparsity, the share of the {what} that go")
        if not 0 < self.sparsity < 1:
            raise InputError(f"sparsity must be between 0 and 1, not {self.sparsity}")

    @property
    def is_structured(self) -> bool:
        """True for a method that drops whole experts or blocks."""
        return self.method.removesuffix(registry.REFINEMENT) in registry.STRUCTURED

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)

    @property
    def rule(self) -> str:
        """The allocation: a rule's name, or the path of a file of ratios."""
        return str(self.allocation)

    @property
    def is_measured(self) -> bool:
        """True for an allocation that is measured on the model before the first block is pruned."""
        return self.rule == "owl"

    @property
    def selection(self) -> Selection:
        """How much of a matrix goes, and within which groups weights compete.

        Raises:
            InputError: no such method or pattern, neither or both of sparsity and pattern, or a value out of range.
        """
        method = registry.find(self.method)
        pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        return Selection(self.sparsity, pattern, self.group or method.group, self.block_size)

    @property
    def uses_data(self) -> bool:
        """True unless neither the method nor the allocation reads calibration samples."""
        return self.is_structured or bool(registry.find(self.method).needs) or self.is_measured

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, by name."""
        names = [each.name for each in fields(self) if each.name not in WITHOUT_EFFECT]
        return {name: getattr(self, name) for name in names}


def compiled(patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Compile regular expressions.

    Raises:
        InputError: one that is none.
    """
    found = []
    for text in patterns:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise InputError(f"{text!r} is no regular expression: {error}") from error
    return tuple(found)

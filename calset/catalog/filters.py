"""Filters: what people ask of traces without SQL, as one condition over the view ``trace`` with parameters.

Why one object: the command line, ``Catalog.traces`` and whatever else narrows traces must mean the same by
"difficulty 0.3..0.8". Values never become SQL text. Must not know: connections, output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from calset.catalog.records import VERDICTS, RunKind
from calset.errors import InputError, did_you_mean

Band = tuple[float | None, float | None]

# The columns of the view trace, in its order; a test compares them with the view.
COLUMNS = (
    "trace_id", "problem_id", "run_id", "kind", "model", "model_revision", "source", "sample_index", "attempt",
    "difficulty", "pass_rate", "k", "verdict", "correct", "n_prompt_tokens", "n_tokens", "n_reasoning_tokens",
    "finish_reason", "finished", "question", "answer", "extracted", "grader", "detail", "text", "response",
    "max_tokens", "seconds", "generation_key", "created_at",
)  # fmt: skip
# All but the texts of a trace, which are most of a catalog's bytes.
NARROW = tuple(name for name in COLUMNS if name not in ("text", "response"))
_BANDS = {"difficulty": "difficulty", "tokens": "n_tokens", "k": "k"}


class FilterOptions(TypedDict, total=False):
    """The fields of ``Filter`` as keyword parameters."""

    difficulty: Band | None
    correct: bool | None
    verdict: str | Sequence[str] | None
    tokens: Band | None
    model: str | None
    source: str | None
    k: Band | None
    finished: bool | None
    kind: RunKind | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which traces; what is None filters nothing. Bands include both ends, and an end that is None is open.

    Args:
        difficulty: band of 1 - pass rate, within [0, 1]; unjudged problems have none and meet no band.
        correct: judged correct (True) or judged and not correct (False).
        verdict: one verdict or several.
        tokens: band of completion tokens.
        model: ``MODEL``, ``MODEL@REVISION`` or the model's folder.
        source: a source's short name.
        k: band of judged traces of the problem.
        finished: finish reason "stop" (True) or any other (False).
        kind: "build" (calibration traces), "evaluate", or None for both.

    Raises:
        InputError: a value that makes no sense; the message names it.
    """

    difficulty: Band | None = None
    correct: bool | None = None
    verdict: str | Sequence[str] | None = None
    tokens: Band | None = None
    model: str | None = None
    source: str | None = None
    k: Band | None = None
    finished: bool | None = None
    kind: RunKind | None = "build"

    def __post_init__(self) -> None:
        for name in _BANDS:
            _check_band(name, getattr(self, name), 1.0 if name == "difficulty" else None)
        for name in ("correct", "finished"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        verdicts = (self.verdict,) if isinstance(self.verdict, str) else self.verdict
        for verdict in verdicts or ():
            if verdict not in VERDICTS:
                near = did_you_mean(str(verdict), VERDICTS)
                raise InputError(f"there is no verdict {verdict!r}{near}; there are {', '.join(VERDICTS)}")
        object.__setattr__(self, "verdict", None if verdicts is None else tuple(verdicts))
        if self.kind is not None and self.kind not in get_args(RunKind):
            raise InputError(f"kind must be one of {', '.join(get_args(RunKind))} or None, not {self.kind!r}")

    def condition(self) -> tuple[str, list[Any]]:
        """A SQL condition over the view ``trace`` and the values of its ``?``, in order; ``true`` for no filter."""
        parts: list[tuple[str, list[Any]]] = []
        for name, column in _BANDS.items():
            low, high = getattr(self, name) or (None, None)
            parts += [(f"{column} >= ?", [low])] * (low is not None) + [(f"{column} <= ?", [high])] * (high is not None)
        for column in ("correct", "finished"):
            if getattr(self, column) is not None:
                parts.append((f"{column} = ?", [getattr(self, column)]))
        if self.verdict is not None:
            parts.append(("verdict IN (SELECT unnest(?::VARCHAR[]))", [list(self.verdict)]))
        if self.model is not None:
            parts.append(_of_model(self.model))
        for column in ("source", "kind"):
            if getattr(self, column) is not None:
                parts.append((f"{column} = ?", [getattr(self, column)]))
        return " AND ".join(sql for sql, _ in parts) or "true", [value for _, values in parts for value in values]

    def select(self, columns: Sequence[str] | None = None, limit: int | None = None) -> tuple[str, list[Any]]:
        """The SELECT over the view ``trace`` and its parameters; rows by problem and sample, so always in one order.

        Args:
            columns: of ``COLUMNS``; ``NARROW`` when None.
            limit: only the first rows.

        Raises:
            InputError: no such column, or a limit below 1.
        """
        listed = ", ".join(f'"{name}"' for name in check_columns(columns))
        condition, params = self.condition()
        sql = f"SELECT {listed} FROM trace WHERE {condition} ORDER BY problem_id, sample_index, trace_id"
        if limit is None:
            return sql, params
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError(f"limit must be a whole number from 1 up, not {limit!r}")
        return f"{sql} LIMIT ?", [*params, limit]


def check_columns(columns: Sequence[str] | None) -> Sequence[str]:
    """The columns asked for; ``NARROW`` for None, all for ``*``.

    Raises:
        InputError: none, or one that the view has not.
    """
    if columns is None:
        return NARROW
    if list(columns) == ["*"]:
        return COLUMNS
    for name in columns:
        if name not in COLUMNS:
            near = did_you_mean(name, COLUMNS)
            raise InputError(f"the view trace has no column {name!r}{near}; there are {', '.join(COLUMNS)}")
    if not columns or len(set(columns)) < len(columns):
        raise InputError("name at least one column, and each only once")
    return columns


def parse_band(text: str, what: str, kind: Literal["number", "whole"] = "number") -> Band:
    """``0.3..0.8``, ``0.3..``, ``..0.8`` or a single ``8`` as a band.

    Raises:
        InputError: anything else; ``what`` names the option.
    """
    read = float if kind == "number" else int
    low, _, high = text.partition("..") if ".." in text else (text, "", text)
    try:
        ends = tuple(read(end) if end.strip() else None for end in (low, high))
    except ValueError:
        ends = (None, None)
    if ends == (None, None) or not re.fullmatch(r"[0-9.eE+\-\s_]+", text):
        number = "two numbers" if kind == "number" else "two whole numbers"
        raise InputError(f"{what} takes LO..HI, {number} of which one may be missing, not {text!r}")
    return ends  # type: ignore[return-value]


def _check_band(name: str, band: Band | None, highest: float | None) -> None:
    if band is None:
        return
    limit = "" if highest is None else f" <= {highest:g}"
    wanted = InputError(f"{name} must be two numbers, 0 <= low <= high{limit}, either may be None; not {band!r}")
    if not isinstance(band, tuple | list) or len(band) != 2:
        raise wanted
    ends = [end for end in band if end is not None]
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise wanted
    if not all(0 <= end <= (2**62 if highest is None else highest) for end in ends) or ends != sorted(ends):
        raise wanted


def _of_model(model: str) -> tuple[str, list[Any]]:
    names = ["model = ?", "model || '@' || model_revision = ?"]
    folder = os.path.expanduser(model)
    # os.path says False, where Path.is_dir raises, of a text that can be no path.
    if not os.path.isdir(folder):
        return f"({' OR '.join(names)})", [model, model]
    names.append("run_id IN (SELECT run_id FROM runs WHERE model_path = ?)")
    return f"({' OR '.join(names)})", [model, model, os.path.realpath(folder)]

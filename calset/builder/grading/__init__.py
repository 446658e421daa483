"""Graders by name, and the call of one.

A grader is a module with ``version() -> str`` and ``grade(answer, response, metadata) -> Outcome``. It runs in a
killable worker process (pool.py), so it may be slow, hang or crash. A package brings its own by an entry point in the
group ``calset.graders``: ``name = "package.module"``.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

from calset.builder.grading.extract import last_boxed
from calset.builder.grading.verdict import Outcome, verdict_without_grading
from calset.catalog.records import VERDICTS
from calset.errors import InputError, first_line

__all__ = [
    "GRADERS",
    "Outcome",
    "check_grader",
    "grade_response",
    "grader_module",
    "grader_version",
    "graders",
    "last_boxed",
    "verdict_without_grading",
]

GRADERS: dict[str, str] = {
    "choice": "calset.builder.grading.choice",
    "exact": "calset.builder.grading.exact",
    "gym": "calset.builder.grading.gym",
    "math": "calset.builder.grading.math",
}
ENTRY_POINTS = "calset.graders"
# Longer responses are cut to their end, where the answer is: parsers are not linear.
MAX_RESPONSE_CHARS = 50_000


def graders() -> dict[str, str]:
    """Grader -> module: calset's own, and those that installed packages bring. Imports none of them."""
    found = {name: modules[0][0] for name, modules in _brought(tuple(sys.path)).items() if len(modules) == 1}
    return dict(sorted((found | GRADERS).items()))


@lru_cache(maxsize=4)
def _brought(path: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Name -> (module, distribution) of the entry points on this ``sys.path``; two of a name are one too many."""
    from importlib.metadata import entry_points

    found: dict[str, list[tuple[str, str]]] = {}
    for point in sorted(entry_points(group=ENTRY_POINTS)):
        found.setdefault(point.name, []).append((point.module, point.dist.name if point.dist else "a package"))
    return found


def check_grader(name: str) -> str:
    """The name itself.

    Raises:
        InputError: no such grader, and the ones there are; or several packages claim the name.
    """
    grader_module(name)
    return name


def grader_module(name: str) -> str:
    """The module of a grader.

    Raises:
        InputError: see ``check_grader``.
    """
    brought = _brought(tuple(sys.path)).get(name, [])
    owners = ["calset"] * (name in GRADERS) + [owner for _, owner in brought]
    if len(owners) > 1:
        raise InputError(
            f"the grader {name!r} is claimed by {' and '.join(owners)}: verdicts must not depend on which is found "
            f"first; uninstall {owners[-1]} or have its grader renamed"
        )
    if not owners:
        known = graders()
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(list(known)[:-1])} or {list(known)[-1]}"
        raise InputError(f"unknown grader {name!r}; {hint}")
    return GRADERS[name] if name in GRADERS else brought[0][0]


def grader_version(name: str) -> str:
    """The version that a grade records: the grader's own and its library's. calset's own import no grading library.

    Raises:
        InputError: no such grader, or a package's grader that cannot be imported or is none.
    """
    return _version(grader_module(name), name)


@lru_cache(maxsize=64)  # a build asks for each trace, and a library's version is read from disk
def _version(module: str, name: str) -> str:
    return str(_load(name).version())


def _load(name: str) -> Any:
    path = grader_module(name)
    try:
        module = import_module(path)
    except Exception as error:
        raise InputError(f"the grader {name!r} cannot be imported from {path}: {first_line(error)}") from error
    for part in ("version", "grade"):
        if not callable(getattr(module, part, None)):
            raise InputError(f"the grader {name!r} is no grader: {path} has no function {part}()")
    return module


def grade_response(
    grader: str, answer: str, response: str, metadata: Mapping[str, Any], *, unsafe_scorers: bool = False
) -> Outcome:
    """Grade in this process and thread, without a deadline; builds go through ``GradingPool``.

    Args:
        unsafe_scorers: the ``gym`` grader's; never read from the metadata, which a stranger may have written.
    """
    options = {"unsafe_scorers": True} if unsafe_scorers and grader == "gym" else {}
    found = _load(grader).grade(answer, response[-MAX_RESPONSE_CHARS:], metadata, **options)
    verdict, extracted, detail = (*found, None, None)[:3]
    if verdict not in VERDICTS or verdict == "ungraded":
        return Outcome("error", detail=f"the grader {grader} returned the verdict {verdict!r}"[:200])
    return Outcome(verdict, _text(extracted), _text(detail))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:MAX_RESPONSE_CHARS]

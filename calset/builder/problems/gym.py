"""Problems of reasoning-gym tasks, made as they are asked for, and the bundled demo's, which are such tasks too.

Must not know: models, engines or the catalog.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

from calset import bundled, ids
from calset.builder.problems.source import ProblemSource
from calset.catalog.records import Problem, Source
from calset.errors import InputError
from calset.io.reasoning_gym import GYM_DEFAULTS, HASH_SEED, GymDraw, draw_gym


def open_task(spec: str) -> ProblemSource:
    """The problems of ``gym:TASK?option=value&size=N&seed=S``.

    Raises:
        InputError: an unknown task or option, or a value that the task refuses.
    """
    task, _, query = spec.removeprefix("gym:").partition("?")
    pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=False)
    if query and len(pairs) != query.count("&") + 1:
        raise InputError(f"cannot read the options of {spec!r}; write gym:{task}?option=value&option=value")
    options = {name: _value(text) for name, text in pairs}
    name = f"gym:{task}"
    draw = draw_gym(task, options)
    revision = f"{gym_version()}, hash seed {HASH_SEED}"
    source = Source(
        source_id=ids.digest("source", name, options, revision),
        name=name,
        spec=spec,
        kind="gym",
        revision=revision,
        grader="gym",
        licence="Apache-2.0",
    )
    return ProblemSource(source, draw.size, lambda: _task_problems(source, draw))


def gym_tasks(sources: Iterable[Source]) -> set[str]:
    """The reasoning-gym tasks of the sources that the gym grader grades."""
    tasks: set[str] = set()
    for source in sources:
        if source.grader == "gym" and source.kind == "gym":
            tasks.add(source.name.removeprefix("gym:"))
        elif source.grader == "gym" and source.kind == "demo":
            part = "evaluate" if source.spec == "demo:evaluate" else "build"
            tasks |= {spec["task"] for spec in json.loads(bundled.PROBLEMS.read_text(encoding="utf-8"))[part]}
    return tasks


def gym_version() -> str:
    from importlib.metadata import version

    return f"reasoning-gym {version('reasoning-gym')}"


def _task_problems(source: Source, draw: GymDraw) -> Iterator[Problem]:
    """A task draws problem i of seed s from Random(s + i), so overlapping draws share problems: the id is of question
    and answer alone. The task's scorer judges later, from the entry's metadata and the task's options. Some tasks have
    many answers and state none: it is empty here."""
    kept = {name: value for name, value in draw.options.items() if name not in GYM_DEFAULTS}
    seed = draw.options.get("seed", GYM_DEFAULTS["seed"])
    for i, entry in enumerate(draw.entries()):
        text, answer = entry["question"], entry["answer"] or ""
        yield Problem(
            problem_id=ids.problem_id(source.name, text, answer if entry["answer"] is not None else "None"),
            source_id=source.source_id,
            source=source.name,
            source_row=f"{draw.task}:{seed}+{i}",
            question=text,
            answer=answer,
            grader="gym",
            metadata={"task": draw.task, "options": kept, "entry": entry["metadata"]},
        )


def _value(text: str) -> Any:
    """``4`` -> 4, ``true`` -> True, ``[1,2]`` -> [1, 2], anything else itself."""
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return text


def _finite(text: str) -> float:
    """A source's id is a hash of its options as JSON, which knows neither NaN nor infinity (``1e999`` is one too)."""
    value = float(text)
    if not math.isfinite(value):
        raise InputError(f"a task's option must be a finite number, not {text}")
    return value


# --- the demo --------------------------------------------------------------------------------------------------


def open_demo(part: str) -> ProblemSource:
    """The demo's problems: ``build``, the calibration set, or ``evaluate``, held out.

    Those of the calibration set whose question is held out too are left out of it.
    """
    sets = json.loads(bundled.PROBLEMS.read_text(encoding="utf-8"))
    source = Source(
        source_id=ids.digest("source", "demo", part, sets[part], gym_version()),
        name="demo",
        spec="demo" if part == "build" else "demo:evaluate",
        kind="demo",
        revision=ids.files_hash([bundled.PROBLEMS]),
        grader="gym",
        licence="Apache-2.0",
    )
    problems = _demo_problems(source, sets[part])
    if part == "build":
        held_out = {problem.question for problem in _demo_problems(source, sets["evaluate"])}
        problems = [problem for problem in problems if problem.question not in held_out]
    return ProblemSource(source, len(problems), lambda: problems)


def _demo_problems(source: Source, specs: list[dict[str, Any]]) -> list[Problem]:
    return [problem for spec in specs for problem in _task_problems(source, draw_gym(spec["task"], spec["options"]))]

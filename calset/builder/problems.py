"""Problems from files, reasoning-gym tasks and the bundled demo, as one list of rows behind a one-line spec.

Must not know: models, engines or the catalog.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from calset import demo, ids
from calset.catalog.records import Problem, Source
from calset.errors import InputError, first_line

FILE_TYPES = (".jsonl", ".parquet", ".csv")
ACCEPTED = "a .jsonl, .parquet or .csv file, gym:TASK?option=value&size=N&seed=S, demo, or demo:evaluate"
GYM_DEFAULTS = {"seed": 0, "size": 500}


def load_problems(
    spec: str,
    *,
    question: str | None = None,
    answer: str | None = None,
    grader: str | None = None,
    limit: int | None = None,
) -> tuple[Source, list[Problem]]:
    """The source that a spec names and its problems, equal ones (same question and answer) once.

    Args:
        spec: a ``.jsonl``, ``.parquet`` or ``.csv`` path, ``gym:TASK?option=value&size=N&seed=S``, ``demo`` (the
            calibration set) or ``demo:evaluate`` (held out).
        question: a file's column with the question; ``question`` when None.
        answer: a file's column with the reference answer; ``answer`` when None.
        grader: overrides the source's own (``math`` for files, ``gym`` for reasoning-gym).
        limit: only the first that many problems.

    Raises:
        InputError: an unknown spec, task, option or column, or a file that cannot be read; says what would do.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if grader is not None:
        from calset.builder.grading import check_grader

        check_grader(grader)
    kind, _, rest = spec.partition(":")
    if spec in ("demo", "demo:build", "demo:evaluate"):
        source, problems = _demo("evaluate" if rest == "evaluate" else "build")
    elif kind == "gym":
        source, problems = _gym(spec)
    elif Path(spec).suffix.lower() in FILE_TYPES:
        source, problems = _file(Path(spec), question or "question", answer or "answer")
    else:
        raise InputError(f"unknown problems {spec!r}; pass {ACCEPTED}")
    if grader is not None:
        source = replace(source, grader=grader)
        problems = (replace(problem, grader=grader) for problem in problems)
    kept = list(islice(_unique(problems), limit))
    if kept and kept[0].grader == "gym" and "task" not in kept[0].metadata:
        raise InputError(f"the gym grader needs problems of a gym: source, and {spec} is none; use --grader math")
    return source, kept


class ProblemSource:
    """A placeholder with the streamed interface, until the real one lands."""

    def __init__(self, spec, **options):
        self.source, self._problems = load_problems(spec, **options)

    def __iter__(self):
        return iter(self._problems)


def open_problems(spec, *, revision=None, **options):
    return ProblemSource(spec, **options)


def _unique(problems: Iterable[Problem]) -> Iterator[Problem]:
    seen: set[str] = set()
    for problem in problems:
        if problem.problem_id not in seen:
            seen.add(problem.problem_id)
            yield problem


# --- reasoning-gym ---------------------------------------------------------------------------------------------


def _gym(spec: str) -> tuple[Source, Iterator[Problem]]:
    task, _, query = spec.removeprefix("gym:").partition("?")
    pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=False)
    if query and len(pairs) != query.count("&") + 1:
        raise InputError(f"cannot read the options of {spec!r}; write gym:{task}?option=value&option=value")
    options = {name: _value(text) for name, text in pairs}
    name = f"gym:{task}"
    dataset = open_gym(task, options)
    source = Source(
        source_id=ids.digest("source", name, options, gym_version()),
        name=name,
        spec=spec,
        kind="gym",
        revision=gym_version(),
        grader="gym",
        licence="Apache-2.0",
    )
    return source, _gym_problems(source, task, options, dataset)


def open_gym(task: str, options: dict[str, Any]) -> Any:
    """A reasoning-gym dataset, seeded with 0 unless the options say otherwise.

    Raises:
        InputError: an unknown task or option, or a value that the task refuses.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    tasks = sorted(t for t in DATASETS if t != "composite")
    if task not in tasks:
        close = difflib.get_close_matches(task, tasks, n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(tasks)}"
        raise InputError(f"reasoning-gym has no task {task!r}; {hint}")
    known = sorted(f.name for f in fields(DATASETS[task][1]))
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"reasoning-gym's {task} has no option {unknown[0]!r}; it has {', '.join(known)}")
    size = options.get("size", GYM_DEFAULTS["size"])
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"size must be a positive whole number, not {size!r}")
    seed = options.get("seed", GYM_DEFAULTS["seed"])
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, not {seed!r}")
    try:
        return create_dataset(task, **({k: v for k, v in GYM_DEFAULTS.items() if k in known} | options))
    except Exception as error:
        given = "&".join(f"{k}={v}" for k, v in options.items())
        raise InputError(
            f"reasoning-gym's {task} refuses {given!r} ({first_line(error)}); its options: {', '.join(known)}"
        ) from error


def gym_version() -> str:
    from importlib.metadata import version

    return f"reasoning-gym {version('reasoning-gym')}"


def _gym_problems(source: Source, task: str, options: dict[str, Any], dataset: Any) -> Iterator[Problem]:
    """A task draws problem i of seed s from Random(s + i), so overlapping draws share problems: the id is of question
    and answer alone. The task's scorer judges later, from the entry's metadata and the task's options."""
    kept = {name: value for name, value in options.items() if name not in GYM_DEFAULTS}
    seed = options.get("seed", GYM_DEFAULTS["seed"])
    for i in range(len(dataset)):
        entry = dataset[i]
        text, answer = str(entry["question"]), str(entry["answer"])
        yield Problem(
            problem_id=ids.problem_id(source.name, text, answer),
            source_id=source.source_id,
            source=source.name,
            source_row=f"{task}:{seed}+{i}",
            question=text,
            answer=answer,
            grader="gym",
            metadata={"task": task, "options": kept, "entry": _plain(entry.get("metadata", {}))},
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


def _plain(value: Any) -> Any:
    """JSON-able, as the catalog stores it: tuples become lists, keys and unknown objects text."""
    try:
        return json.loads(json.dumps(value, default=_unknown))
    except RecursionError as error:
        raise InputError("a problem's metadata is nested too deeply to be kept; flatten it") from error


def _unknown(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else str(value)


# --- the demo --------------------------------------------------------------------------------------------------


def _demo(part: str) -> tuple[Source, list[Problem]]:
    """The demo's problems. Those of the calibration set whose question is held out too are left out of it."""
    sets = json.loads(demo.PROBLEMS.read_text(encoding="utf-8"))
    source = Source(
        source_id=ids.digest("source", "demo", part, sets[part], gym_version()),
        name="demo",
        spec="demo" if part == "build" else "demo:evaluate",
        kind="demo",
        revision=ids.files_hash([demo.PROBLEMS]),
        grader="gym",
        licence="Apache-2.0",
    )
    problems = _demo_problems(source, sets[part])
    if part == "build":
        held_out = {problem.question for problem in _demo_problems(source, sets["evaluate"])}
        problems = [problem for problem in problems if problem.question not in held_out]
    return source, problems


def _demo_problems(source: Source, specs: list[dict[str, Any]]) -> list[Problem]:
    return [
        problem
        for spec in specs
        for problem in _gym_problems(source, spec["task"], spec["options"], open_gym(spec["task"], spec["options"]))
    ]


# --- files -----------------------------------------------------------------------------------------------------


def _file(path: Path, question: str, answer: str) -> tuple[Source, Iterator[Problem]]:
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise InputError(f"no file {path}; pass {ACCEPTED}")
    revision = ids.files_hash([path])
    source = Source(
        source_id=ids.digest("source", path.name, revision, question, answer),
        name=path.name,
        spec=str(path),
        kind="file",
        revision=revision,
        grader="math",
    )
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix.lower()]
    try:
        rows = list(read(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {first_line(error)}") from error
    if not rows:
        raise InputError(f"{path} holds no problems")
    return source, _file_problems(source, path, rows, question, answer)


def _file_problems(
    source: Source, path: Path, rows: list[tuple[int, dict[str, Any]]], question: str, answer: str
) -> Iterator[Problem]:
    for number, row in rows:
        text = _text(path, number, row, question)
        gold = _text(path, number, row, answer)
        yield Problem(
            problem_id=ids.problem_id(source.name, text, gold),
            source_id=source.source_id,
            source=source.name,
            source_row=str(number),
            question=text,
            answer=gold,
            grader="math",
            metadata=_plain({k: v for k, v in row.items() if k not in (question, answer) and v is not None}),
        )


def _text(path: Path, number: int, row: dict[str, Any], column: str) -> str:
    """A row's text in a column; numbers as they are written."""
    if column not in row:
        have = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{path}:{number} has no column {column!r}; its columns: {have} (choose with --question, --answer)"
        )
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        what = "nothing" if value is None or isinstance(value, str) else f"a {type(value).__name__}"
        raise InputError(f"{path}:{number} holds {what} in column {column!r}; each problem needs text there")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path}:{number} holds half a surrogate pair in column {column!r}; repair the text"
        ) from error
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number} is not JSON: {first_line(error)}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number} is not a JSON object but a {type(row).__name__}")
            yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="_rest")
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num} is not CSV: {first_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import duckdb

    connection = duckdb.connect()
    try:
        found = connection.execute("SELECT * FROM read_parquet(?)", [str(path)])
        columns = [column[0] for column in found.description or []]
        rows = found.fetchall()
    except duckdb.Error as error:
        raise InputError(f"cannot read {path} as Parquet: {first_line(error)}") from error
    finally:
        connection.close()
    for number, row in enumerate(rows, 1):
        yield number, dict(zip(columns, row, strict=True))

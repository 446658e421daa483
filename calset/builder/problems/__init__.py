"""Problems from any source behind a one-line spec: files, folders, presets, Hub datasets, reasoning-gym, the demo.

Everything is streamed: a source of 220,000 problems is read as it is asked for, as often as it is asked for.
Must not know: models, engines or the catalog.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from calset import ids
from calset.builder.problems.columns import Columns, Place, read_problems
from calset.builder.problems.gym import gym_tasks, gym_version, open_demo, open_task
from calset.builder.problems.presets import PRESETS, Preset
from calset.builder.problems.source import BadRow, BadRows, ProblemSource, bad_rows_of
from calset.catalog.records import Problem, Source
from calset.errors import BuildWarning, InputError
from calset.io.hub import DEFAULT, PREFIX, HubDataset, open_dataset
from calset.io.reasoning_gym import open_gym
from calset.io.rows import ROW_TYPES, count_rows, file_type, list_files
from calset.io.specs import parse, parse_options

__all__ = [
    "PRESETS",
    "BadRow",
    "Preset",
    "ProblemSource",
    "bad_rows_of",
    "gym_tasks",
    "gym_version",
    "left_out",
    "load_problems",
    "open_gym",
    "open_problems",
]

ACCEPTED = (
    "a .jsonl, .json, .parquet or .csv file (also .gz, .zst) or a folder of them, a preset (calset problems lists "
    "them), hf:ORG/NAME?split=S, gym:TASK?option=value&size=N&seed=S, demo, or demo:evaluate"
)
FILE_OPTIONS = ("question", "answer", "grader")
HUB_OPTIONS = ("config", "split", *FILE_OPTIONS)


def open_problems(
    spec: str,
    *,
    question: str | None = None,
    answer: str | None = None,
    grader: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
) -> ProblemSource:
    """The problems that a spec names, to be iterated over; little or nothing of them is read yet.

    Args:
        spec: a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` path (also with ``.gz``, ``.zst``) or a folder of such
            files; a preset (``gsm8k``, ``gsm8k?split=test``); ``hf:org/name@revision?config=&split=&question=&answer=
            &grader=``, all but the name optional; ``gym:TASK?option=value&size=N&seed=S``; ``demo`` (the calibration
            set) or ``demo:evaluate`` (held out).
        question: the column with the question, of sources that do not say it themselves; ``question`` when None.
        answer: the column with the reference answer, likewise; ``answer`` when None.
        grader: overrides the source's own.
        limit: only the first that many problems.
        revision: of a Hub dataset, the commit to take whatever its branch points to by now: an earlier build's
            ``Source.revision``. Other sources have no other revision than the one they are at, and ignore it.
        skip_bad: leave out rows that hold no problem, instead of refusing the source; ``ProblemSource.bad`` counts them
            while the source is read.

    Raises:
        InputError: an unknown spec, task, option, dataset, config or split, or a file that cannot be read; says what
            would do. What is wrong with a row is found when iteration gets there.
        CalsetError: the Hub cannot be reached, and the cache has not got what is needed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if grader is not None:
        from calset.builder.grading import check_grader

        check_grader(grader)
    found = _open(spec, question, answer, revision, BadRows() if skip_bad else None)
    if grader is not None:
        found = found.graded_by(grader)
    return found if limit is None else found.first(limit)


def load_problems(
    spec: str,
    *,
    question: str | None = None,
    answer: str | None = None,
    grader: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
) -> tuple[Source, list[Problem]]:
    """The source that a spec names and its problems in memory, equal ones (same question and answer) once.

    Args and Raises: as ``open_problems``; rows that are no problems are found here, too.

    Warns:
        BuildWarning: rows were left out (``skip_bad``).
    """
    found = open_problems(
        spec, question=question, answer=answer, grader=grader, limit=limit, revision=revision, skip_bad=skip_bad
    )
    problems = list(found)
    if text := left_out(found):
        warnings.warn(text, BuildWarning, stacklevel=2)
    return found.source, problems


def left_out(source: ProblemSource) -> str | None:
    """Return what there is to say of the rows that reading a source has left out."""
    if not source.bad.first:
        return None
    first = source.bad.first[0]
    return f"{len(source.bad)} rows of {source.source.spec} hold no problem and are left out: {first.where} {first.why}"


def _open(
    spec: str, question: str | None, answer: str | None, revision: str | None, bad: BadRows | None
) -> ProblemSource:
    if spec in ("demo", "demo:build", "demo:evaluate"):
        return open_demo("evaluate" if spec == "demo:evaluate" else "build")
    if spec.startswith("gym:"):
        return open_task(spec)
    if spec.startswith(PREFIX):
        return _open_hub(spec, question, answer, revision, bad)
    if _is_there(spec):
        return _open_files(spec, Path(spec), {}, question, answer, bad)
    name, _, _ = spec.partition("?")
    if name.partition("@")[0] in PRESETS:
        return _open_preset(spec, revision, bad)
    if file_type(name) in ROW_TYPES or (name and os.path.isdir(name)):
        return _open_files(spec, Path(name), parse_options(spec, FILE_OPTIONS)[1], question, answer, bad)
    close = difflib.get_close_matches(name, PRESETS, n=3)
    hint = f"did you mean {' or '.join(close)}? else " if close else ""
    raise InputError(f"unknown problems {spec!r}; {hint}pass {ACCEPTED}")


def _is_there(spec: str) -> bool:
    """A file or folder of exactly this name, '?' and all. One that a preset is named like needs a './' before it."""
    return (os.path.isdir(spec) and spec not in PRESETS) or (file_type(spec) in ROW_TYPES and os.path.isfile(spec))


def _grader(options: Mapping[str, str]) -> str:
    if "grader" in options:
        from calset.builder.grading import check_grader

        return check_grader(options["grader"])
    return "math"


# --- files and folders ------------------------------------------------------------------------------------------


def _open_files(
    spec: str,
    path: Path,
    options: Mapping[str, str],
    question: str | None,
    answer: str | None,
    bad: BadRows | None,
) -> ProblemSource:
    columns = Columns(options.get("question") or question or "question", options.get("answer") or answer or "answer")
    try:
        files = list_files(path, ROW_TYPES)
    except InputError as error:
        raise InputError(f"{error}; pass {ACCEPTED}") from None
    folder = None if files == [path] else path
    name = path.name or path.resolve().name
    stamps = _stamps(files)
    revision = ids.files_hash(files, folder)
    source = Source(
        source_id=ids.digest("source", name, revision, columns.question, columns.answer),
        name=name,
        spec=spec,
        kind="file",
        revision=revision,
        grader=_grader(options),
    )

    def read() -> Iterator[Problem]:
        if _stamps(files) != stamps:
            raise InputError(f"{path} has changed since it was opened; run the command again")
        keys = (f"{file.relative_to(folder).as_posix()}:" if folder else "" for file in files)
        return read_problems(
            source, (Place(file, str(file), key) for file, key in zip(files, keys, strict=True)), columns, bad
        )

    counts = [count_rows(file) for file in files]
    size = None if None in counts else sum(filter(None, counts))
    return ProblemSource(source, size, read, bad=BadRows() if bad is None else bad)


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Sizes and times of files: a second reading must give what the first one did."""
    try:
        return [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error


# --- the Hub ----------------------------------------------------------------------------------------------------


def _open_preset(spec: str, revision: str | None, bad: BadRows | None) -> ProblemSource:
    name, asked, options = parse(spec, ("config", "split"))
    preset = PRESETS[name]
    dataset = open_dataset(
        preset.repo,
        revision=revision or asked,
        # "default" is also what a dataset's only config is called that its card gives another name.
        config=options.get("config", None if preset.config == DEFAULT else preset.config),
        split=options.get("split", preset.split),
        types=ROW_TYPES,
    )
    other = [value for option, value in options.items() if value != getattr(preset, option)]
    source = Source(
        source_id=ids.digest("source", name, preset.repo, dataset.revision, dataset.config, dataset.split),
        name=":".join([name, *other]),
        spec=spec,
        kind="hub",
        revision=dataset.revision,
        grader=preset.grader,
        licence=preset.licence or dataset.licence,
    )
    return _hub_source(source, dataset, preset.columns, bad)


def _open_hub(
    spec: str, question: str | None, answer: str | None, revision: str | None, bad: BadRows | None
) -> ProblemSource:
    repo, asked, options = parse(spec.removeprefix(PREFIX), HUB_OPTIONS)
    grader = _grader(options)  # before anything is downloaded
    dataset = open_dataset(
        repo,
        revision=revision or asked,
        config=options.get("config"),
        split=options.get("split"),
        types=ROW_TYPES,
    )
    columns = Columns(
        options.get("question") or question or "question", options.get("answer") or answer or "answer", short=True
    )
    source = Source(
        source_id=ids.digest("source", dataset.name, dataset.revision, columns.question, columns.answer),
        name=dataset.name,
        spec=spec,
        kind="hub",
        revision=dataset.revision,
        grader=grader,
        licence=dataset.licence,
    )
    return _hub_source(source, dataset, columns, bad)


def _hub_source(source: Source, dataset: HubDataset, columns: Columns, bad: BadRows | None) -> ProblemSource:
    def places() -> Iterator[Place]:
        """Each file is downloaded when reading gets to it: a preview of many files needs one."""
        for file in dataset.files:
            yield Place(dataset.fetch(file), f"{dataset.repo}/{file}", f"{file}:")

    return ProblemSource(
        source,
        dataset.n_rows,
        lambda: read_problems(source, places(), columns, bad),
        bad=BadRows() if bad is None else bad,
    )

"""Tasks of the reasoning-gym library by name and options, for their problems and their scorers.

Problems are drawn in a process with a fixed hash seed. Several tasks iterate over sets, whose order is that of the
hashes of their strings, which Python seeds anew in each process: drawn here, the same seed gave other problems on each
run. codeio also runs programs that draw from numpy and multiply matrices, so the child has one BLAS thread, and those
generators are seeded, too. One child process, shared by all sources, draws. Must not know: problems, graders.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from calset.errors import CalsetError, InputError, first_line
from calset.io import child

GYM_DEFAULTS = {"seed": 0, "size": 500}
HASH_SEED = 0  # of the process that draws; another one draws other problems
# Entries that one answer of the child holds at most; it holds fewer where they take long, since a preview needs few.
AT_A_TIME, SECONDS_AT_A_TIME = 256, 0.1


def open_gym(task: str, options: dict[str, Any]) -> Any:
    """A reasoning-gym dataset, seeded with 0 unless the options say otherwise. For its scorer: see ``draw_gym``.

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
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
        raise InputError(f"size must be a positive whole number, below 2^31, not {size!r}")
    seed = options.get("seed", GYM_DEFAULTS["seed"])
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, not {seed!r}")
    try:
        return create_dataset(task, **({k: v for k, v in GYM_DEFAULTS.items() if k in known} | options))
    except Exception as error:
        raise InputError(
            f"reasoning-gym's {task} refuses {_given(options)!r} ({first_line(error)}); its options: {', '.join(known)}"
        ) from error


@dataclass(frozen=True)
class GymDraw:
    """The entries that a task draws for some options: the same ones in any process and in any order of reading.

    Args:
        size: how many there are.
    """

    task: str
    options: dict[str, Any]
    size: int

    def entries(self) -> Iterator[dict[str, Any]]:
        """``question``, ``answer`` (text, or None where the task states none) and ``metadata`` as JSON keeps them.

        Raises:
            InputError: the task fails to make an entry.
            CalsetError: the process that draws ended.
        """
        at = 0
        while at < self.size:
            found = _ask({"task": self.task, "options": self.options, "start": at})["entries"]
            yield from found
            at += len(found)


def draw_gym(task: str, options: dict[str, Any]) -> GymDraw:
    """Prepare to draw a task's entries.

    Raises:
        InputError: see ``open_gym``.
        CalsetError: no process can be started that draws.
    """
    return GymDraw(task, options, _ask({"task": task, "options": options})["size"])


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    global _child
    with _lock:
        why = ""
        for _ in range(2):  # a child may have been killed from outside, which is not the task's fault at once
            _child = _child or _Child()
            try:
                reply = _child.ask(request)
            except BaseException as error:  # Ctrl-C too: what the child has yet to say would be taken for other entries
                _child.end()
                _child = None
                if not isinstance(error, _Ended):
                    raise
                why = str(error)
            else:
                if "error" in reply:
                    raise InputError(reply["error"])
                return reply
    raise CalsetError(
        f"the process that draws the problems of {request['task']} ended twice ({why}); free some memory, or ask for "
        "smaller problems"
    )


class _Ended(Exception):
    """The child process ended without a reply."""


class _Child:
    """One process that draws; used by one thread at a time."""

    def __init__(self) -> None:
        try:
            # A group of its own, or Ctrl-C at a terminal would end it, too.
            process = subprocess.Popen(
                child.command("calset.io.reasoning_gym", "work()"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child.environment(PYTHONHASHSEED=str(HASH_SEED)),
                process_group=0,
            )
        except OSError as error:
            raise CalsetError(f"the process that draws problems does not start: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self.end = weakref.finalize(self, _end, process, os.getpid())

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a line, receive one.

        Raises:
            _Ended: the process ended.
        """
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
            line = self._stdout.readline()
        except OSError as error:
            raise _Ended(first_line(error)) from error
        if not line.endswith(b"\n"):
            raise _Ended(f"exit code {self._process.wait()}")
        return json.loads(line)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process whose child it is
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


_lock = threading.Lock()
_child: _Child | None = None


def _forget() -> None:
    """In a fork: the child and its pipes are the parent's, and a thread that is not here may hold the lock."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


# --- in the process that draws -----------------------------------------------------------------------------------


def work() -> None:
    """The child's main loop: JSON lines from stdin until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Replies have a pipe of their own: whatever a task prints goes nowhere.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin.buffer:
        try:
            reply = _answer(json.loads(line))
        except InputError as error:
            reply = {"error": str(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The size of a draw, or with ``start`` some of its entries from that one on."""
    task, options = request["task"], request["options"]
    dataset = _dataset(task, options)
    if "start" not in request:
        return {"size": len(dataset)}
    entries: list[dict[str, Any]] = []
    until = time.monotonic() + SECONDS_AT_A_TIME
    for i in range(request["start"], min(request["start"] + AT_A_TIME, len(dataset))):
        if entries and time.monotonic() > until:
            break
        try:
            _seed_global(options.get("seed", GYM_DEFAULTS["seed"]) + i)
            entries.append(_entry(dataset[i]))
        except Exception as error:
            if entries:  # which are good; the next request meets the error
                break
            raise InputError(
                f"reasoning-gym's {task} makes no problem {i} of {_given(options)!r} ({first_line(error)}); take "
                "another seed or other options"
            ) from error
    return {"entries": entries}


_datasets: dict[str, tuple[dict[str, Any], Any]] = {}


def _dataset(task: str, options: dict[str, Any]) -> Any:
    """The task's dataset. One is kept for each task: codeio keeps its rows with the class, where another draw's options
    would replace them."""
    if task not in _datasets or _datasets[task][0] != options:
        _datasets.pop(task, None)
        _datasets[task] = options, open_gym(task, options)
    return _datasets[task][1]


def _seed_global(seed: int) -> None:
    """Seed the generators that programs of codeio use without asking: else an entry would depend on those before it."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    answer = entry["answer"]
    return {
        "question": str(entry["question"]),
        "answer": None if answer is None else str(answer),
        "metadata": json.loads(json.dumps(entry.get("metadata", {}), default=_unknown)),
    }


def _unknown(value: Any) -> Any:
    """What the catalog's JSON keeps of an object that JSON does not know."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _given(options: dict[str, Any]) -> str:
    return "&".join(f"{name}={value}" for name, value in options.items())

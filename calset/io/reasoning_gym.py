"""Tasks of the reasoning-gym library by name and options, for their problems and their scorers.

Must not know: problems, graders.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from calset.errors import InputError, first_line

GYM_DEFAULTS = {"seed": 0, "size": 500}


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
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
        raise InputError(f"size must be a positive whole number, below 2^31, not {size!r}")
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

"""Graders that packages bring, installed as pip leaves them.

calset's deadline is tested with a grader that sleeps: nothing here makes sympy or math-verify run for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SLEEPER = """
import time

from calset.builder.grading import Outcome

def version():
    return "1"

def grade(answer, response, metadata):
    time.sleep(float(response))
    return Outcome("correct", response)
"""


def install(folder: Path, distribution: str, entry_points: Mapping[str, str], **modules: str) -> None:
    """Write a distribution with graders by name, each a module, and the code of its modules."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {module}\n" for name, module in entry_points.items())
    (info / "entry_points.txt").write_text(f"[calset.graders]\n{lines}")
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)


def bring(folder: Path, name: str, code: str) -> None:
    """Write a distribution with one grader, whose module has its name."""
    install(folder, name, {name: name}, **{name: code})

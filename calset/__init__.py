"""calset: build, keep, publish and use calibration sets for pruning large reasoning models.

The public API, in the order of the work::

    catalog = calset.Catalog("traces.duckdb")
    calset.build("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "questions.jsonl", samples=8, catalog=catalog)
    subset = calset.select(catalog, "math-ssgr", "ssgr", tokens=1_000_000)
    calset.publish(subset, "me/calibration", catalog=catalog)
    calset.prune("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "math-ssgr", "pruned", sparsity=0.5, catalog=catalog)
    calset.verify("pruned")
    calset.evaluate("pruned", "held_out.jsonl", catalog=catalog)

Names are imported on first use, so that ``import calset`` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CalsetError": "calset.errors",
    "Catalog": "calset.catalog.catalog",
    "InputError": "calset.errors",
    "Progress": "calset.io.progress",
    "Subset": "calset.catalog.records",
    "against_sources": "calset.builder.decontamination",
    "build": "calset.builder.generate",
    "compact": "calset.catalog.compact",
    "decontaminate": "calset.builder.decontamination",
    "diff": "calset.catalog.references",
    "doctor": "calset.diagnosis",
    "dry_run": "calset.builder.generate",
    "evaluate": "calset.pruning.evaluate",
    "export": "calset.catalog.references",
    "grade": "calset.builder.regrade",
    "judge": "calset.builder.judge",
    "import_traces": "calset.builder.importing",
    "load_problems": "calset.builder.problems",
    "merge": "calset.catalog.merge",
    "open_problems": "calset.builder.problems",
    "plan_pruning": "calset.pruning.prune",
    "prune": "calset.pruning.prune",
    "publish": "calset.catalog.hub",
    "pull": "calset.catalog.hub",
    "report": "calset.catalog.report",
    "resolve": "calset.catalog.references",
    "search": "calset.catalog.hub",
    "select": "calset.catalog.selection",
    "stats": "calset.catalog.stats",
    "verify": "calset.pruning.verify",
}

__all__ = [
    "CalsetError",
    "Catalog",
    "InputError",
    "Progress",
    "Subset",
    "__version__",
    "against_sources",
    "build",
    "compact",
    "decontaminate",
    "diff",
    "doctor",
    "dry_run",
    "evaluate",
    "export",
    "grade",
    "import_traces",
    "judge",
    "load_problems",
    "merge",
    "open_problems",
    "plan_pruning",
    "prune",
    "publish",
    "pull",
    "report",
    "resolve",
    "search",
    "select",
    "stats",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calset' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from calset.builder.decontamination import against_sources, decontaminate
    from calset.builder.generate import build, dry_run
    from calset.builder.importing import import_traces
    from calset.builder.judge import judge
    from calset.builder.problems import load_problems, open_problems
    from calset.builder.regrade import grade
    from calset.catalog.catalog import Catalog
    from calset.catalog.compact import compact
    from calset.catalog.hub import publish, pull, search
    from calset.catalog.merge import merge
    from calset.catalog.records import Subset
    from calset.catalog.references import diff, export, resolve
    from calset.catalog.report import report
    from calset.catalog.selection import select
    from calset.catalog.stats import stats
    from calset.diagnosis import doctor
    from calset.errors import CalsetError, InputError
    from calset.io.progress import Progress
    from calset.pruning.evaluate import evaluate
    from calset.pruning.prune import plan_pruning, prune
    from calset.pruning.verify import verify

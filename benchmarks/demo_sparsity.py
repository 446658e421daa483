"""Where does the bundled model suffer? The measurement behind the demo's sparsity.

Builds and selects once, then prunes at several sparsities with each method and calibration and evaluates. Evaluation
seeds may be several; nothing is picked by its result.

    python benchmarks/demo_sparsity.py --sparsities 0.4 0.5 0.6 0.7 --seeds 0
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from calset.builder.engines import open_engine
from calset.builder.model.info import inspect
from calset.bundled import MODEL
from calset.catalog.catalog import Catalog
from calset.demo import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--out", type=Path, help="keep the catalog and the models there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.out or Path(temporary), args.sparsities, args.seeds, args.engine)


def measure(folder: Path, sparsities: list[float], seeds: list[int], engine_name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = run.DemoSettings()
    engine = open_engine(engine_name, inspect(MODEL), max_model_len=run.MODEL_LENGTH)
    print("seed sparsity method calibration accuracy se length non_termination loops", flush=True)
    try:
        for seed in seeds:
            catalog = Catalog(folder / f"seed-{seed}.duckdb")
            run.build_traces(catalog, engine, seed, settings)
            subsets = run.select_subsets(catalog, seed, settings)
            show(seed, 0, "dense", "-", run.evaluate_model(MODEL, "dense", catalog, engine, seed, settings))
            for sparsity in sparsities:
                at = replace(settings, sparsity=sparsity)
                for method in settings.methods:
                    for recipe, subset in subsets.items():
                        out = folder / f"{seed}-{sparsity}-{method}-{recipe}"
                        pruned = run.prune_model(out, subset, method, catalog, at)
                        result = run.evaluate_model(pruned, out.name, catalog, engine, seed, at)
                        show(seed, sparsity, method, recipe, result)
    finally:
        engine.close()


def show(seed, sparsity, method, recipe, e) -> None:
    print(
        f"{seed} {sparsity} {method} {recipe} {e.accuracy:.3f} {e.accuracy_se:.3f} {e.mean_tokens:.0f} "
        f"{e.non_termination:.3f} {e.loop_rate:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

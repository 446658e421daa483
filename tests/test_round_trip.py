"""The whole way of a token id: served, kept, selected, published, pulled elsewhere, pruned with; each step a process of
its own with caches of its own, and the same bytes at every stop."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import warm
from conftest import HAS_VLLM
from local_hub import TOKEN, LocalHub

from calset import bundled
from calset.catalog.catalog import Catalog
from calset.catalog.subsets.versions import load

REPO = "me/round-trip"

# An engine that writes down what it was asked and what it answered, before calset sees it.
BUILD = """
import json, sys
import calset
from calset import bundled
from calset.builder.engines import open_engine
from calset.builder.model.info import inspect

class Witness:
    def __init__(self, engine, path):
        self.__dict__.update(engine=engine, path=path)
    def __getattr__(self, name):
        return getattr(self.engine, name)
    def stream(self, requests, sampling):
        asked = {}
        def seen():
            for request in requests:
                asked[request.key] = list(request.prompt_ids)
                yield request
        with open(self.path, "w") as out:
            for completion in self.engine.stream(seen(), sampling):
                out.write(json.dumps([asked[completion.key], list(completion.token_ids)]) + "\\n")
                yield completion

if __name__ == "__main__":
    name, catalog, served = sys.argv[1:]
    engine = open_engine(name, inspect(bundled.MODEL), max_model_len=1024, concurrency=16)
    calset.build(str(bundled.MODEL), "demo", samples=2, limit=6, max_tokens=200, engine=Witness(engine, served),
                 catalog=catalog, seed=5)
    engine.close()
"""

# What a stranger does with other tools: the card's own snippet for datasets, and polars on the file.
READ = """
import json, sys
exec(sys.argv[1])
by_datasets = [list(row["input_ids"]) for row in rows]
messages = [row["messages"][-1]["role"] for row in rows]
import polars as pl
by_polars = pl.read_parquet(sys.argv[2])["input_ids"].to_list()
print(json.dumps([by_datasets, by_polars, messages]))
"""


def run(hub: LocalHub, home: Path, *command: str | Path) -> str:
    """A command in a process of its own that finds this Hub, with its cache at ``home``; returns what it printed."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "CALSET_"))}
    env |= hub.settings(home, token=TOKEN) | {"HF_DATASETS_CACHE": str(home / "datasets")}
    home.mkdir(parents=True, exist_ok=True)
    done = warm.warm().run(*command, cwd=home, env=env)
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


def calset(hub: LocalHub, home: Path, *arguments: str | Path) -> Any:
    """A command of calset with --json, as JSON."""
    return json.loads(run(hub, home, "calset", *arguments, "--json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "transformers",
        pytest.param(
            "vllm", marks=[pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")]
        ),
    ],
)
def test_token_ids_are_the_same_from_the_engine_to_the_pruning(engine: str, tmp_path: Path) -> None:
    with LocalHub() as hub:
        builder, elsewhere, third = tmp_path / "builder", tmp_path / "elsewhere", tmp_path / "third"
        builder.mkdir()
        catalog, served = builder / "c.duckdb", builder / "served.jsonl"
        run(hub, builder, "python", "-c", BUILD, engine, catalog, served)
        selected = calset(hub, builder, "select", "all", "--recipe", "random", "--catalog", catalog)
        report = calset(hub, builder, "publish", "all@1", REPO, "--catalog", catalog)
        assert report["new"]

        # Served, in the catalog, on the Hub.
        spoken = {(tuple(prompt), tuple(ids)) for prompt, ids in map(json.loads, served.open())}
        subset = load(Catalog(catalog), "all@1")
        token_ids = [list(sample.input_ids) for sample in subset.samples]
        for sample in subset.samples:
            n, ids = sample.n_prompt_tokens, tuple(sample.input_ids)
            assert (ids[:n], ids[n:]) in spoken
        there = hub.repos["dataset", REPO]
        tree = there.commits[report["commit"]]
        assert there.tags == {"all-v1": report["commit"]}
        (parquet,) = (path for path in tree if path.endswith(".parquet"))
        assert pq.read_table(io.BytesIO(tree[parquet]))["input_ids"].to_pylist() == token_ids

        # Pulled elsewhere, into another catalog.
        pulled = calset(hub, elsewhere, "pull", f"hub:{REPO}/all", "-o", "out", "--catalog", "other.duckdb")
        assert pulled["content_hash"] == selected["content_hash"]
        kept = load(Catalog(elsewhere / "other.duckdb"), "all@1")
        assert [list(sample.input_ids) for sample in kept.samples] == token_ids
        out = elsewhere / "out" / "data" / "train.parquet"
        assert pq.read_table(out)["input_ids"].to_pylist() == token_ids

        # Pruned with: where it was made, from the pulled catalog, and straight from the Hub.
        options = ("--method", "sparsegpt", "--sparsity", "0.5")
        ways = {
            "made": (builder, "all@1", "--catalog", catalog),
            "pulled": (elsewhere, "all@1", "--catalog", "other.duckdb"),
            "hub": (third, f"hub:{REPO}/all@1", "--catalog", "none.duckdb"),
        }
        weights, records = {}, {}
        for way, (home, reference, *rest) in ways.items():
            folder = tmp_path / f"pruned-{way}"
            calset(hub, home, "prune", bundled.MODEL, "--calibration", reference, *rest, *options, "-o", folder)
            weights[way] = (folder / "model.safetensors").read_bytes()
            records[way] = json.loads((folder / "pruning.json").read_text())
            if way == "hub":
                assert f"`{report['commit']}`" in (folder / "README.md").read_text()
        assert len(set(weights.values())) == 1

        # pruning.json leads back to the commit, the recipe and the run.
        (made_by,) = Catalog(catalog).runs()
        manifest = json.loads(tree["manifests/all.json"])
        for way in ways:
            calibration = records[way]["calibration"]
            assert calibration["content_hash"] == selected["content_hash"]
            assert calibration["recipe"] == manifest["recipe"] == selected["recipe"]
            if way != "made":
                assert calibration["origin"]["hub"] == {
                    "repo": REPO, "commit": report["commit"], "tag": "all-v1", "manifest": "manifests/all.json",
                }  # fmt: skip
            (origin,) = calibration["origin"]["runs"]
            assert (origin["run_id"], origin["seed"], origin["engine"]) == (made_by.run_id, 5, engine)
            assert origin == manifest["runs"][0]
            assert [source["name"] for source in calibration["origin"]["sources"]] == ["demo"]

        # And other tools read it: the snippet that the card shows.
        snippet = re.search(r"```python\n(from datasets.*?)```", tree["README.md"].decode(), re.S)
        assert snippet is not None
        read = json.loads(run(hub, third, "python", "-c", READ, snippet[1], out))
        assert read == [token_ids, token_ids, ["assistant"] * len(token_ids)]

"""Per-token weights: from a column of the subset's file into the statistics, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from factories import fill
from safetensors.torch import load_file
from small_models import make_samples, make_subset

from calset.catalog.references import export
from calset.catalog.subsets import versions
from calset.catalog.subsets.folder import DATA, read_directory
from calset.cli import cli
from calset.errors import InputError
from calset.pruning.calibration import find_token_weights, read
from calset.pruning.prune import plan_pruning, prune

SUBSET = make_subset()


@pytest.fixture
def folder(tmp_path) -> Path:
    return export(tmp_path / "no-catalog.duckdb", SUBSET, tmp_path / "subset")


def add_column(folder: Path, weights: dict[str, list[float]]) -> Path:
    path = folder / DATA
    table = pl.read_parquet(path)
    column = pl.Series("token_weights", [weights.get(i) for i in table["sample_id"]], dtype=pl.List(pl.Float64))
    table.with_columns(column).write_parquet(path)
    return path


def up_projection(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]


def test_the_column_reaches_the_pruning_and_leaves_the_subset_what_it_was(tmp_path, llama, folder):
    completion = {s.sample_id: [0.0] * 5 + [1.0] * (len(s.input_ids) - 5) for s in SUBSET.samples}
    add_column(folder, completion)
    assert read_directory(folder).content_hash == SUBSET.content_hash
    args = ["prune", str(llama), "--calibration", str(folder), "--method", "wanda", "--sparsity", "0.5"]
    catalog = ["--catalog", str(tmp_path / "no-catalog.duckdb")]
    for out, more in (("weighted", []), ("completion", ["--tokens", "completion"])):
        done = CliRunner().invoke(cli, [*args, *more, *catalog, "-o", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
    prune(llama, SUBSET, tmp_path / "plain", method="wanda", sparsity=0.5)
    # Weight 0 on the prompt is the same as not counting it.
    assert torch.equal(up_projection(tmp_path / "weighted"), up_projection(tmp_path / "completion"))
    assert not torch.equal(up_projection(tmp_path / "weighted"), up_projection(tmp_path / "plain"))
    records = [json.loads((tmp_path / o / "pruning.json").read_text()) for o in ("weighted", "plain")]
    hashes = [r["calibration"]["token_weights"] for r in records]
    assert len(hashes[0]) == 64
    assert hashes[1] is None


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "magnitude+dsnot"])
def test_weights_of_one_change_nothing_and_of_a_half_only_the_scale(tmp_path, llama, method):
    options = {"method": method, "sparsity": 0.5}
    prune(llama, SUBSET, tmp_path / "none", **options)
    for weight in (1.0, 0.5):
        weights = {s.sample_id: [weight] * len(s.input_ids) for s in SUBSET.samples}
        prune(llama, SUBSET, tmp_path / str(weight), token_weights=weights, **options)
        a, b = up_projection(tmp_path / "none"), up_projection(tmp_path / str(weight))
        assert torch.equal(a == 0, b == 0)
        assert torch.allclose(a, b, atol=1e-4)


def test_a_sample_of_weight_two_counts_like_two_samples(tmp_path, llama):
    from dataclasses import replace

    samples = make_samples()
    twice = make_subset([*samples, replace(samples[1], sample_id="again")])
    prune(llama, twice, tmp_path / "twice", sparsity=0.5)
    weights = {samples[1].sample_id: [2.0] * len(samples[1].input_ids)}
    prune(llama, make_subset(samples), tmp_path / "weighted", sparsity=0.5, token_weights=weights)
    a, b = up_projection(tmp_path / "twice"), up_projection(tmp_path / "weighted")
    assert torch.equal(a == 0, b == 0)
    assert torch.allclose(a, b, atol=1e-4)


def test_a_file_of_its_own_is_taken_instead_and_unnamed_samples_weigh_one(tmp_path, folder):
    path = tmp_path / "weights.parquet"
    pl.DataFrame({"sample_id": ["s1"], "token_weights": [[0.25] * 40]}).write_parquet(path)
    assert find_token_weights(folder) is None
    found = find_token_weights(None, path)
    assert found == {"s1": [0.25] * 40}
    (batch,) = read(SUBSET, token_weights=found).batches()
    assert sorted(set(batch.weights[batch.counted].tolist())) == [0.25, 1.0]
    assert int((batch.weights[batch.counted] == 0.25).sum()) == 40


def test_a_folder_here_does_not_weigh_the_catalogs_subset_of_its_name(tmp_path, llama, folder, monkeypatch):
    add_column(folder, {"s1": [0.0] * 40})
    monkeypatch.chdir(folder.parent)
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 5)]])
    args = ["prune", str(llama), "--method", "wanda", "--sparsity", "0.5", "--catalog", str(catalog.path)]

    def hash_in_record(out: str) -> str | None:
        done = CliRunner().invoke(cli, [*args, "--calibration", folder.name, "-o", out])
        assert done.exit_code == 0, done.output
        return json.loads(Path(out, "pruning.json").read_text())["calibration"]["token_weights"]

    assert hash_in_record("of-the-folder") is not None
    versions.keep(catalog, replace(SUBSET, name=folder.name))
    assert hash_in_record("of-the-catalog") is None


def test_the_api_reads_the_folders_weights_or_a_file_of_its_own_or_those_it_is_given(tmp_path, llama, folder):
    add_column(folder, {"s1": [0.0] * 40})
    path = tmp_path / "weights.parquet"
    pl.DataFrame({"sample_id": ["s1"], "token_weights": [[0.25] * 40]}).write_parquet(path)

    def hash_of(name: str, calibration: object, **options: object) -> str | None:
        report = prune(llama, calibration, tmp_path / name, method="wanda", sparsity=0.5, **options)
        plan_pruning(llama, calibration, tmp_path / f"{name}-again", method="wanda", sparsity=0.5, **options)
        return report.calibration["token_weights"]

    of_folder = hash_of("folder", folder)
    assert of_folder == hash_of("given", read_directory(folder), token_weights={"s1": [0.0] * 40})
    of_file = hash_of("file", str(folder), token_weights=path)
    assert of_file == hash_of("quarter", SUBSET, token_weights={"s1": [0.25] * 40})
    assert hash_of("none", read_directory(folder)) is None
    assert None not in (of_folder, of_file)
    assert of_folder != of_file


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nobody": [1.0]}, "does not have"),
        ({"s0": [1.0]}, "12 tokens, but 1 token weights"),
        ({"s0": [1.0] * 11 + [-1.0]}, "negative or not finite"),
        ({"s0": [1.0] * 11 + [float("nan")]}, "negative or not finite"),
        ({s.sample_id: [0.0] * len(s.input_ids) for s in SUBSET.samples}, "weighs 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        read(SUBSET, token_weights=weights)


def test_a_file_without_weights_is_refused_when_it_was_asked_for(tmp_path, folder):
    with pytest.raises(InputError, match="no columns"):
        find_token_weights(None, folder / DATA)
    (tmp_path / "broken").write_text("no parquet")
    with pytest.raises(InputError, match="cannot read"):
        find_token_weights(None, tmp_path / "broken")
    pl.DataFrame({"sample_id": ["s1"], "token_weights": ["heavy"]}).write_parquet(tmp_path / "text.parquet")
    with pytest.raises(InputError, match="cannot read"):
        find_token_weights(None, tmp_path / "text.parquet")

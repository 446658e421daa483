"""Held-out loss, dense against pruned: what it is, what it refuses, and what it holds in memory."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from factories import fill
from processes import peak_bytes
from small_models import make_samples, make_subset, save_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from calset.catalog.catalog import Catalog
from calset.catalog.records import Sample, Subset
from calset.catalog.references import export
from calset.catalog.select import select
from calset.catalog.subsets import versions
from calset.cli import cli
from calset.errors import InputError, PruningError, VerificationError
from calset.pruning import held_out_loss
from calset.pruning.blockwise.walk import Walk
from calset.pruning.held_out_loss import losses, standard_error
from calset.pruning.model import checkpoint
from calset.pruning.prune import prune
from calset.pruning.verify import verify

CPU = torch.device("cpu")


def made(lengths: tuple[int, ...], *, start: str, seed: int, **changes) -> Subset:
    """A subset of random ids, each sample of a problem of its own."""
    samples = make_samples(lengths, seed=seed)
    named = [
        Sample(f"{start}-{i}", s.input_ids, s.n_prompt_tokens, problem_id=f"{start}-problem-{i}")
        for i, s in enumerate(samples)
    ]
    return make_subset(named, name=start, **changes)


CALIBRATION = made((12, 40, 7, 25, 33, 40, 18, 29), start="calibration", seed=0)
HELD_OUT = made((30, 9, 17, 40, 23), start="held-out", seed=5)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, llama) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "llama"
    prune(llama, CALIBRATION, out, method="wanda", sparsity=0.5)
    return out


@pytest.fixture
def copy_of_pruned(tmp_path, pruned) -> Path:
    return shutil.copytree(pruned, tmp_path / "copy")


def plain_loss(folder: Path, samples: list[Sample]) -> tuple[list[float], list[int]]:
    """Summed cross-entropy and number of the completion tokens of each sample: one at a time, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    sums, counts = [], []
    for sample in samples:
        ids = torch.tensor([list(sample.input_ids)])
        first = max(sample.n_prompt_tokens, 1)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
        sums.append(float(cross_entropy(logits, ids[0, first:], reduction="sum")))
        counts.append(ids.shape[1] - first)
    return sums, counts


# --- what it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
        ("Gemma3Text", {"final_logit_softcapping": 5.0}),  # what follows the output layer counts too
        ("GptOss", {}),
        ("DeepseekV3", {}),
    ],
)
def test_the_losses_are_those_of_the_models_run_whole_on_one_sample_at_a_time(tmp_path, kind, changes):
    dense, out = save_model(tmp_path / "dense", kind, **changes), tmp_path / "out"
    prune(dense, CALIBRATION, out, method="wanda", sparsity=0.5)
    found = verify(out, held_out=HELD_OUT).held_out
    (dense_sums, counts), (pruned_sums, _) = (plain_loss(f, HELD_OUT.samples) for f in (dense, out))
    n = sum(counts)
    assert (found.n_samples, found.n_tokens) == (5, n)
    assert n == sum(len(s.input_ids) - 5 for s in HELD_OUT.samples)
    assert found.dense_loss == pytest.approx(sum(dense_sums) / n, rel=1e-5)
    assert found.pruned_loss == pytest.approx(sum(pruned_sums) / n, rel=1e-5)
    assert found.difference == pytest.approx((sum(pruned_sums) - sum(dense_sums)) / n, abs=1e-4)
    assert found.dense_loss != found.pruned_loss
    assert found.pruned_perplexity == pytest.approx(math.exp(found.pruned_loss))
    assert found.perplexity_ratio == pytest.approx(found.pruned_perplexity / found.dense_perplexity)
    changes_of = [b - a for a, b in zip(dense_sums, pruned_sums, strict=True)]
    assert found.difference_se == pytest.approx(standard_error(changes_of, counts), rel=1e-2)
    assert found.is_apart is True


def test_neither_padding_nor_the_cut_of_logits_changes_a_loss(llama, monkeypatch):
    source = checkpoint.open_folder(llama)
    samples = held_out_loss.read_held_out(HELD_OUT, source, source)
    counts, alone = losses(source, samples, CPU, batch_tokens=1)
    _, together = losses(source, samples, CPU, batch_tokens=10_000)
    monkeypatch.setattr(held_out_loss, "LOGIT_BYTES", 1)  # a column of logits at a time
    _, cut = losses(source, samples, CPU, batch_tokens=10_000)
    assert sorted(counts) == sorted(len(s.input_ids) - 5 for s in HELD_OUT.samples)
    for other in (together, cut):
        assert other == pytest.approx(alone, rel=1e-6)


def test_a_sample_without_a_prompt_is_predicted_from_its_second_token_on(llama):
    source = checkpoint.open_folder(llama)
    windows = make_subset([Sample("w", list(range(3, 23)), 0, "text"), Sample("one", [7], 0, "text")])
    counts, sums = losses(source, held_out_loss.read_held_out(windows, source, source), CPU)
    want, _ = plain_loss(llama, [windows.samples[0]])
    assert counts == [19]
    assert sums == pytest.approx(want, rel=1e-5)


def test_max_length_cuts_samples_and_says_so(pruned, llama):
    found = verify(pruned, held_out=HELD_OUT, max_length=12).held_out
    cut = [Sample(s.sample_id, s.input_ids[:12], s.n_prompt_tokens) for s in HELD_OUT.samples]
    sums, counts = plain_loss(llama, cut)
    assert found.n_tokens == sum(counts)
    assert found.dense_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert "4 of 5 samples were cut to their first 12 tokens" in found.warnings
    assert any("Warning: 4 of 5" in line for line in found.lines())


def test_samples_cut_to_nothing_that_could_be_predicted_are_refused(pruned):
    samples = [Sample(s.sample_id, s.input_ids, 0) for s in HELD_OUT.samples]
    with pytest.raises(InputError, match=r"has a completion token to predict.*--max-length"):
        verify(pruned, held_out=make_subset(samples), max_length=1)


def test_too_little_memory_is_a_line(pruned, monkeypatch):
    def advance(*args, **kwargs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Walk, "advance", advance)
    with pytest.raises(PruningError, match=r"^out of memory: lower --batch-tokens"):
        verify(pruned)


def test_the_standard_error_is_that_of_means_over_samples():
    rng = random.Random(0)
    sums = [rng.gauss(3, 1) for _ in range(40)]
    equal = standard_error(sums, [10] * 40)
    assert equal == pytest.approx(statistics.stdev(s / 10 for s in sums) / math.sqrt(40))
    assert standard_error(sums[:1], [10]) is None
    assert standard_error([2.0 * n for n in (3, 9, 4)], [3, 9, 4]) == pytest.approx(0, abs=1e-12)
    # Of samples of any length: what the ratio scatters by when samples are drawn again.
    draws = []
    for _ in range(4000):
        counts = [rng.randrange(5, 50) for _ in range(40)]
        drawn = [n * 0.3 + rng.gauss(0, 1) * n**0.5 for n in counts]
        draws.append((sum(drawn) / sum(counts), standard_error(drawn, counts)))
    spread = statistics.stdev(ratio for ratio, _ in draws)
    assert statistics.mean(se for _, se in draws) == pytest.approx(spread, rel=0.05)


def test_a_report_says_it_in_words_and_in_json(pruned):
    report = verify(pruned, held_out=HELD_OUT)
    assert any("held-out loss on held-out@1 (94 completion tokens of 5 samples)" in line for line in report.lines())
    told = json.loads(json.dumps(report.as_dict()))["held_out"]
    assert told["difference"] == pytest.approx(told["pruned_loss"] - told["dense_loss"])
    assert verify(pruned).held_out is None


# --- what it refuses --------------------------------------------------------------------------------------------


def edit_calibration(folder: Path, change) -> None:
    record = json.loads((folder / "pruning.json").read_text())
    change(record["calibration"])
    (folder / "pruning.json").write_text(json.dumps(record))


def mixed(extra: Sample) -> Subset:
    return make_subset([*HELD_OUT.samples, extra], name="mixed")


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (CALIBRATION, r"calibration@1 is what calibrated this pruning"),
        (mixed(Sample("new", [5, 6, 7, 8], 2, problem_id="calibration-problem-3")), "mixed@1 shares 1 problems with"),
        (mixed(Sample("calibration-3", [5, 6, 7, 8], 2)), "mixed@1 shares 1 samples with calibration@1"),
        (made((20,), start="other", seed=1, tokenizer_hash="another"), "made with another tokenizer"),
        (make_subset([Sample("p", [5, 6, 7], 3, "prompt")]), "no sample of .* has a completion token"),
        (make_subset([Sample("long", [5] * 200, 3)]), "longer than the 128 positions"),
        (make_subset([Sample("odd", [5, 600, 7], 1)]), "token id 600, outside the model's vocabulary"),
    ],
)
def test_samples_that_are_not_held_out_or_do_not_fit_are_refused_in_a_line(pruned, monkeypatch, held_out, message):
    monkeypatch.setattr(held_out_loss, "walked", lambda *a: pytest.fail("a model was run"))
    with pytest.raises(InputError, match=message) as caught:
        verify(pruned, held_out=held_out)
    assert "\n" not in str(caught.value)


def test_a_dense_model_that_is_gone_is_one_line_and_can_be_named(tmp_path, llama):
    dense = shutil.copytree(llama, tmp_path / "dense")
    prune(dense, CALIBRATION, tmp_path / "out", method="magnitude", sparsity=0.5)
    shutil.rmtree(dense)
    with pytest.raises(InputError, match=r"held-out loss needs the dense model.*is not at .*dense \(--base\)"):
        verify(tmp_path / "out", held_out=HELD_OUT)
    assert verify(tmp_path / "out", held_out=HELD_OUT, base=llama).held_out.n_tokens == 94


def test_a_pruning_without_data_saw_nothing_of_the_samples(tmp_path, llama):
    prune(llama, CALIBRATION, tmp_path / "out", method="magnitude", sparsity=0.5)
    assert verify(tmp_path / "out", held_out=CALIBRATION).held_out.is_apart is True


def test_losses_that_are_not_finite_are_an_error(tmp_path, llama):
    folder = shutil.copytree(llama, tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = checkpoint.open_folder(folder)
    with pytest.raises(VerificationError, match="losses that are not finite"):
        losses(source, held_out_loss.read_held_out(HELD_OUT, source, source), CPU)


def test_what_an_older_record_does_not_list_is_looked_up_or_said_to_be_unknown(tmp_path, copy_of_pruned):
    edit_calibration(copy_of_pruned, lambda told: (told.pop("sample_ids"), told.pop("problem_ids")))
    catalog = Catalog(tmp_path / "c.duckdb")
    found = verify(copy_of_pruned, held_out=HELD_OUT, catalog=catalog).held_out
    assert found.is_apart is None
    assert any("could not be checked" in line for line in found.lines())
    fill(catalog.path, [[("correct", 5)]])
    versions.keep(catalog, CALIBRATION)
    assert verify(copy_of_pruned, held_out=HELD_OUT, catalog=catalog).held_out.is_apart is True
    shared = mixed(Sample("new", [5, 6, 7, 8], 2, problem_id="calibration-problem-3"))
    with pytest.raises(InputError, match="shares 1 problems"):
        verify(copy_of_pruned, held_out=shared, catalog=catalog)
    edit_calibration(copy_of_pruned, lambda told: told.update(sample_ids=3, problem_ids=[]))
    with pytest.raises(InputError, match="corrupt"):
        verify(copy_of_pruned, held_out=HELD_OUT)


def test_progress_follows_both_models_through_blocks_and_batches(pruned):
    events = []
    verify(pruned, held_out=HELD_OUT, batch_tokens=40, progress=events.append)
    n_batches = len({e.done for e in events if e.phase == "dense losses"}) - 1
    assert n_batches > 1
    told = [(e.phase, e.done, e.total) for e in events]
    assert told[[phase for phase, *_ in told].index("dense model") :] == [
        *(("dense model", i, 2) for i in range(3)),
        *(("dense losses", i, n_batches) for i in range(n_batches + 1)),
        *(("pruned model", i, 2) for i in range(3)),
        *(("pruned losses", i, n_batches) for i in range(n_batches + 1)),
        ("done", 1, 1),
    ]


# --- the commands -----------------------------------------------------------------------------------------------


def test_verify_shows_progress_beside_its_result_or_none(tmp_path, pruned):
    export(Catalog(tmp_path / "none.duckdb"), HELD_OUT, tmp_path / "held-out")

    def run(*arguments: str):
        done = CliRunner().invoke(cli, ["verify", str(pruned), "--held-out", f"{tmp_path}/held-out", *arguments])
        assert done.exit_code == 0, done.output
        return done

    shown = run()
    assert shown.stderr.splitlines()[0] == "verified: 0/14, phase matrices"
    assert shown.stderr.splitlines()[-1] == "verified: 1/1, phase done"
    as_json = run("--json", "--progress", "json")
    assert json.loads(as_json.stdout)["held_out"]["n_samples"] == 5
    events = [json.loads(line) for line in as_json.stderr.splitlines()]
    assert [e["final"] for e in events] == [False] * (len(events) - 1) + [True]
    assert {e["event"] for e in events} == {"verified"}
    assert {e["phase"] for e in events} >= {"matrices", "logits", "untouched tensors", "dense losses", "pruned model"}
    silent = run("--progress", "none")
    assert silent.stderr == ""
    assert silent.stdout == shown.stdout


def test_the_commands_select_another_split_and_compare_on_it(tmp_path, llama):
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 20), ("correct", 30)]] * 8)
    select(catalog, "mine", "random", samples=4)

    def calset(*arguments: str | Path):
        return CliRunner().invoke(cli, [*map(str, arguments), "--catalog", str(catalog.path)])

    done = calset("select", "other", "--recipe", "random", "--held-out-from", "mine@1")
    assert done.exit_code == 0, done.output
    mine, other = (versions.load(catalog, name) for name in ("mine", "other"))
    assert other.n_samples == 8 - 4
    assert {s.problem_id for s in other.samples}.isdisjoint(s.problem_id for s in mine.samples)
    # The factories' token ids are of no tokenizer: exported under the bundled one's name.
    for subset in (mine, other):
        low = [Sample(s.sample_id, [i % 100 for i in s.input_ids], 3, problem_id=s.problem_id) for s in subset.samples]
        export(catalog, make_subset(low, name=subset.name), tmp_path / subset.name)
    done = calset("prune", llama, "--calibration", f"{tmp_path}/mine", "--method", "wanda", "--sparsity", "0.5",
                  "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    done = calset("verify", tmp_path / "out", "--held-out", f"{tmp_path}/other", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["held_out"]["is_apart"] is True
    done = calset("verify", tmp_path / "out", "--held-out", f"{tmp_path}/mine")
    assert isinstance(done.exception, InputError)
    done = calset("verify", tmp_path / "out", "--max-length", "9")
    assert "max_length= is for held_out=" in str(done.exception)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verifying_holds_a_block_at_a_time(tmp_path):
    setup = "from test_heldout import HELD_OUT\nfrom calset.pruning.verify import verify"
    small = save_model(tmp_path / "small")
    prune(small, CALIBRATION, tmp_path / "warm", method="magnitude", sparsity=0.5)
    peaks, sizes = {}, {}
    for n in (2, 8):
        model = save_model(tmp_path / f"wide-{n}", hidden_size=768, intermediate_size=2048, num_hidden_layers=n)
        sizes[n] = (model / "model.safetensors").stat().st_size
        prune(model, CALIBRATION, tmp_path / f"out-{n}", method="magnitude", sparsity=0.5, include=["v_proj"])
        warm, work = (f"verify({str(tmp_path / name)!r}, held_out=HELD_OUT)" for name in ("warm", f"out-{n}"))
        peaks[n] = peak_bytes(setup, warm, work)
    print("bytes at the peak", peaks, "in the files", sizes)
    assert peaks[8] - peaks[2] < 0.1 * (sizes[8] - sizes[2])
    assert peaks[8] < 0.5 * sizes[8]

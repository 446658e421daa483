"""Pruning in several processes equals pruning in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ENVIRONMENT, ranks
from safetensors.torch import load_file
from small_models import make_subset, save_model

from calset.errors import InputError
from calset.pruning.blockwise.distributed import Team, own_gpu
from calset.pruning.prune import prune
from calset.pruning.verify import verify

CODE = """
import torch; torch.set_num_threads(1)
from small_models import make_subset
from calset.pruning.prune import prune
from calset.pruning.blockwise.workfolder import WorkFolder
{before}
options = dict(method={method!r}, sparsity=0.5, hidden={hidden!r}, batch_tokens=64, device="cpu")
prune({model!r}, make_subset(), {out!r}, allocation={allocation!r}, **options)
"""
DIE = """
import os, signal
own = WorkFolder.finish_block
def finish(w, t, r):
    own(w, t, r)
    if len(w.blocks) == 1: os.kill(os.getpid(), signal.SIGKILL)
WorkFolder.finish_block = finish
"""


def code(
    model: Path, out: Path, method: str, *, before: str = "", hidden: str | None = None, allocation: str = "uniform"
) -> str:
    return CODE.format(
        model=str(model), out=str(out), before=before, hidden=hidden, method=method, allocation=allocation
    )


def torchrun(script: Path) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, check=False, env=environment).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "hidden", "allocation"),
    [
        ("Llama", "sparsegpt", None, "uniform"),
        ("GptOss", "wanda", None, "owl"),
        ("Qwen3Moe", "sparsegpt", "disk", "owl"),
    ],
)
def test_two_processes_give_what_one_gives(tmp_path, kind, method, hidden, allocation):
    model = save_model(tmp_path / "dense", kind)
    options = {"method": method, "sparsity": 0.5, "batch_tokens": 64, "device": "cpu", "allocation": allocation}
    one = prune(model, make_subset(), tmp_path / "one", **options)
    assert ranks(code(model, tmp_path / "two", method, hidden=hidden, allocation=allocation)) == [0, 0]
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= 1e-5, name
    record = json.loads((tmp_path / "two/pruning.json").read_text())
    assert [m["n_tokens"] for m in record["matrices"]] == [m.n_tokens for m in one.matrices]
    assert [m["asked"] for m in record["matrices"]] == [m.asked for m in one.matrices]
    assert verify(tmp_path / "two").n_matrices == len(one.matrices)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "one", "two"]


@pytest.mark.slow
def test_two_processes_that_are_killed_continue_to_the_same_bytes(tmp_path):
    model = save_model(tmp_path / "dense", "Qwen3Moe", num_hidden_layers=3)
    assert ranks(code(model, tmp_path / "whole", "sparsegpt", allocation="owl")) == [0, 0]
    assert -signal.SIGKILL in ranks(code(model, tmp_path / "out", "sparsegpt", before=DIE, allocation="owl"))
    assert not (tmp_path / "out").exists()
    assert ranks(code(model, tmp_path / "out", "sparsegpt", allocation="owl")) == [0, 0]
    whole, out = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert whole == out
    assert json.loads((tmp_path / "out/pruning.json").read_text())["resumed_at"] == [1]


def test_solves_are_shared_out_evenly_and_alike_everywhere():
    costs = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    owners = Team(1, 2).owners(costs)
    assert owners == Team(0, 2).owners(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert loads == [5.0, 5.0]


def test_every_batch_is_somebodys_and_too_few_are_refused():
    parts = [Team(rank, 3).part(list(range(7))) for rank in range(3)]
    assert sorted(x for part in parts for x in part) == list(range(7))
    with pytest.raises(InputError, match="lower --batch-tokens"):
        Team(0, 3).part([1, 2])


@pytest.mark.parametrize(
    ("asked", "n_gpus", "local_rank", "own"),
    [
        ("cuda", 4, "2", "cuda:2"),
        ("cuda", 1, "2", "cuda:0"),  # the launcher shows each process its own
        ("cuda:0", 1, "2", "cuda:0"),
        ("cpu", 4, "2", "cpu"),
        ("cuda", 2, "2", r"there are 2 GPUs .* lower --nproc-per-node"),
        ("cuda:1", 4, "2", r"4 processes cannot share cuda:1: leave the number out"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, asked, n_gpus, local_rank, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert own_gpu(torch.device(asked)) == torch.device(asked)  # alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    if " " in own:
        with pytest.raises(InputError, match=own):
            own_gpu(torch.device(asked))
    else:
        assert own_gpu(torch.device(asked)) == torch.device(own)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path):
    before = """
from calset.errors import PruningError
import os
from calset.pruning.blockwise.walk import Walk
statistics = Walk.statistics
def fail(walk, index, *args, **options):
    if index == 1 and os.environ["RANK"] == "1": raise PruningError("this one cannot")
    return statistics(walk, index, *args, **options)
Walk.statistics = fail
"""
    model = save_model(tmp_path / "dense")
    script = tmp_path / "run.py"
    script.write_text(code(model, tmp_path / "out", "wanda", before=before))
    assert torchrun(script) != 0
    assert not (tmp_path / "out").exists()
    script.write_text(code(model, tmp_path / "out", "wanda"))
    assert torchrun(script) == 0
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert list(record["resumed_at"]) == [1]

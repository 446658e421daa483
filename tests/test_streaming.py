"""Pruning what is larger than memory: one block at a time, killed and continued, planned before it begins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pairs import pairwise
from processes import ENVIRONMENT, die, killed, peak_bytes
from safetensors.torch import load_file, save_file
from small_models import make_samples, make_subset, save_model
from warm import Running, warm

from calset.errors import CalsetError, InputError, PruningError, Stopped
from calset.pruning.blockwise import workfolder
from calset.pruning.blockwise.hidden_states import HiddenStates
from calset.pruning.blockwise.workfolder import WorkFolder, folder_of
from calset.pruning.estimate import Estimate
from calset.pruning.model import checkpoint, memory
from calset.pruning.model.layout import Layout
from calset.pruning.model.memory import free_in_groups, free_memory
from calset.pruning.model.tensorfiles import TensorFiles, read_headers, write_tensor
from calset.pruning.prune import plan_pruning, prune
from calset.pruning.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

SUBSET = make_subset()


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense", "Qwen3Moe", num_hidden_layers=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --- killed and continued ---------------------------------------------------------------------------------------


def kill_before_bytes(block: int) -> None:
    own = WorkFolder.finish_block
    WorkFolder.finish_block = lambda w, t, r: die() if len(w.blocks) == block else own(w, t, r)


def kill_between_bytes(block: int) -> None:
    own, seen = workfolder.write_tensor, [0]

    def write(stored, value) -> None:
        own(stored, value)
        seen[0] += 1
        if seen[0] == 3:
            die()

    own_finish = WorkFolder.finish_block

    def finish(w, tensors, record) -> None:
        if len(w.blocks) == block:
            workfolder.write_tensor = write
        own_finish(w, tensors, record)

    WorkFolder.finish_block = finish


def kill_before_the_line(block: int) -> None:
    own = WorkFolder.note
    WorkFolder.note = lambda w, r: die() if len(w.blocks) == block else own(w, r)


def kill_after_the_line(block: int) -> None:
    own = WorkFolder.finish_block

    def finish(w, tensors, record) -> None:
        own(w, tensors, record)
        if len(w.blocks) == block + 1:
            die()

    WorkFolder.finish_block = finish


MOMENTS = (kill_before_bytes, kill_between_bytes, kill_before_the_line, kill_after_the_line)


@pytest.fixture(scope="module")
def uninterrupted(request, tmp_path_factory) -> Callable[..., Path]:
    """What one run without an interruption makes of a model."""

    @cache
    def made(kind: str, **options) -> Path:
        out = tmp_path_factory.mktemp("whole") / "whole"
        prune(request.getfixturevalue(kind), SUBSET, out, **options)
        return out

    return made


@pytest.mark.parametrize(
    ("moment", "kind", "propagate"),
    pairwise(
        MOMENTS,
        ("llama", "dense"),
        ("pruned", "dense"),
        fast=[(kill_between_bytes, "llama", "pruned"), (kill_after_the_line, "llama", "dense")],
    ),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_killed_at_every_block_and_continued_it_ends_with_the_same_bytes(
    tmp_path, request, uninterrupted, moment, kind, propagate
):
    dense, out = request.getfixturevalue(kind), tmp_path / "out"
    options = {"sparsity": 0.5, "propagate": propagate, "device": "cpu"}
    whole = uninterrupted(kind, **options)
    for block in range(3):

        def run(block: int = block) -> None:
            moment(block)
            prune(dense, SUBSET, out, **options)

        killed(run)
        assert not out.exists()
    report = prune(dense, SUBSET, out, **options)
    assert bytes_of(out) == bytes_of(whole)
    assert report.resumed_at[-1] == (3 if moment is kill_after_the_line else 2)
    expected, parts = (json.loads((f / "pruning.json").read_text())["matrices"] for f in (whole, out))
    assert expected == parts
    assert verify(out).n_matrices == len(parts)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_while_the_files_are_copied_or_put_in_place_it_ends_the_same(tmp_path, llama, monkeypatch):
    dense = llama
    options = {"method": "magnitude", "sparsity": 0.5, "device": "cpu"}
    prune(dense, SUBSET, tmp_path / "whole", **options)
    out = tmp_path / "out"
    for name in ("shutil.copyfile", "flush", "checkpoint.write_companions"):
        monkeypatch.setattr(f"calset.pruning.blockwise.workfolder.{name}", die)
        killed(lambda: prune(dense, SUBSET, out, **options))
        monkeypatch.undo()
    prune(dense, SUBSET, out, **options)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    names = [sorted(p.name for p in f.iterdir()) for f in (out, tmp_path / "whole")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_process_killed_from_outside_continues_to_the_same_bytes(tmp_path, tiny_model):
    code = (
        "from small_models import make_samples, make_subset\n"
        "from calset.pruning.prune import prune\n"
        "import torch; torch.set_num_threads(1)\n"
        "prune({model!r}, make_subset(make_samples([200 + 13 * (i % 9) for i in range(24)])), {out!r}, sparsity=0.5)\n"
    )

    def start(out: Path) -> Running:
        text = code.format(model=str(tiny_model), out=str(out))
        return warm().start("python", "-c", text, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, streams=[0, 1, 2])

    assert start(tmp_path / "whole").wait() == 0
    out = tmp_path / "out"
    progress = folder_of(out) / workfolder.PROGRESS
    for n_lines in (2, 4):  # the settings and one block, then three
        running = start(out)
        while not (progress.is_file() and len(progress.read_bytes().splitlines()) >= n_lines):
            assert Path(f"/proc/{running.pid}").exists()
            time.sleep(0.005)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        assert not out.exists()
    assert start(out).wait() == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def interrupt_after(monkeypatch, n_blocks: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    own = WorkFolder.finish_block

    def finish(w, tensors, record) -> None:
        own(w, tensors, record)
        if len(w.blocks) == n_blocks:
            raise error("no space left")

    monkeypatch.setattr(WorkFolder, "finish_block", finish)


def test_ctrl_c_keeps_what_is_done_and_says_how_to_continue(tmp_path, llama, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Stopped, match="2 blocks done; the same command continues"):
        prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5)
    monkeypatch.undo()
    assert prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5).resumed_at == (2,)


def test_an_interrupted_run_of_another_version_is_one_clear_line(tmp_path, llama, monkeypatch):
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5)
    monkeypatch.undo()
    progress = folder_of(tmp_path / "out") / workfolder.PROGRESS
    progress.write_text(progress.read_text().replace('"n_pruned"', '"n_gone"'))
    with pytest.raises(PruningError, match=r"another version of calset began .*: remove .* to begin anew"):
        prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5)


@pytest.mark.parametrize("method", ["wanda", "depth"])
def test_what_an_interrupted_run_holds_needs_no_room_again(tmp_path, llama, monkeypatch, method):
    needed = plan_pruning(llama, SUBSET, tmp_path / "out", method=method, sparsity=0.5).disk_bytes
    stop_in = "finish_block" if method == "wanda" else "fill"
    own = getattr(WorkFolder, stop_in)

    def stop(work, *args) -> None:
        own(work, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, stop_in, stop)
    with pytest.raises(Stopped):
        prune(llama, SUBSET, tmp_path / "out", method=method, sparsity=0.5)
    monkeypatch.undo()
    monkeypatch.setattr(workfolder, "MARGIN", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=needed // 2))
    assert prune(llama, SUBSET, tmp_path / "out", method=method, sparsity=0.5).resumed_at


def test_a_disk_that_fills_keeps_the_finished_blocks(tmp_path, llama, monkeypatch):
    interrupt_after(monkeypatch, 1, OSError)
    with pytest.raises(OSError, match="no space"):
        prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5)
    monkeypatch.undo()
    assert prune(llama, SUBSET, tmp_path / "out", method="wanda", sparsity=0.5).resumed_at == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.6}, "had sparsity 0.5, not 0.6"),
        ({"damping": 0.1}, "had damping 0.01, not 0.1"),
        ({"exclude": ["down"]}, "had exclude"),
        ({"calibration": make_subset(make_samples((30,)))}, "had calibration"),
    ],
)
def test_other_settings_do_not_continue_an_interrupted_run(tmp_path, llama, monkeypatch, change, message):
    asked = {"calibration": SUBSET, "sparsity": 0.5, "out": tmp_path / "out"}
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        prune(llama, **asked)
    monkeypatch.undo()
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message):
        prune(llama, **{**asked, **change})
    monkeypatch.undo()
    assert prune(llama, **asked, hidden="disk").resumed_at == (1,)  # what changes no result may change


def test_another_number_of_threads_does_not_continue_an_interrupted_run(tmp_path, llama, monkeypatch):
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        prune(llama, SUBSET, tmp_path / "out", sparsity=0.5)
    monkeypatch.undo()
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="had threads 1, not 2"):
        prune(llama, SUBSET, tmp_path / "out", sparsity=0.5)
    torch.set_num_threads(1)
    assert prune(llama, SUBSET, tmp_path / "out", sparsity=0.5).resumed_at == (1,)


def test_a_changed_model_does_not_continue_an_interrupted_run(tmp_path, llama, monkeypatch):
    folder = shutil.copytree(llama, tmp_path / "llama")
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        prune(folder, SUBSET, tmp_path / "out", sparsity=0.5)
    monkeypatch.undo()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="had model revision"):
        prune(folder, SUBSET, tmp_path / "out", sparsity=0.5)


def test_a_pruning_that_fails_for_good_leaves_nothing(tmp_path, llama, monkeypatch):
    interrupt_after(monkeypatch, 1, PruningError)
    with pytest.raises(PruningError):
        prune(llama, SUBSET, tmp_path / "out", sparsity=0.5)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_prune_into_one_place(tmp_path, llama):
    out = tmp_path / "out"
    with (
        workfolder.opened(out, llama, {"a": 1}),
        pytest.raises(InputError, match="another process is pruning into"),
        workfolder.opened(out, llama, {"a": 1}),
    ):
        pass


# --- where things are kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_where_hidden_states_are_kept_changes_no_byte(tmp_path, dense, propagate):
    for where in ("device", "host", "disk"):
        prune(dense, SUBSET, tmp_path / where, sparsity=0.5, hidden=where, propagate=propagate, batch_tokens=64)
    assert bytes_of(tmp_path / "device") == bytes_of(tmp_path / "host") == bytes_of(tmp_path / "disk")
    assert not any("hidden" in p.name for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("where", ["device", "disk"])
def test_hidden_states_come_back_as_they_were_and_a_block_may_write_on_them(tmp_path, where):
    states = HiddenStates(2, torch.device("cpu"), where, tmp_path)
    assert states.get(0) is None
    for dtype in (torch.float32, torch.bfloat16):
        value = (torch.randn(2, 3).to(dtype), None)
        states.put(1, (value[0].clone(), None))
        got = states.get(1)
        assert torch.equal(got[0], value[0])
        assert got[0].dtype == dtype
        assert got[1] is None
        got[0].zero_()
        assert torch.equal(states.get(1)[0], value[0])
    states.clear()
    assert not list(tmp_path.iterdir())


def test_a_tensor_is_replaced_in_its_file_and_nothing_else(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "c": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"by": "me"})
    before = (tmp_path / "model.safetensors").read_bytes()
    stored = read_headers(tmp_path)
    write_tensor(stored["b"], torch.full((5,), 2.0))
    after = (tmp_path / "model.safetensors").read_bytes()
    assert before[: stored["b"].start] == after[: stored["b"].start]
    assert before[stored["b"].stop :] == after[stored["b"].stop :]
    with TensorFiles(tmp_path) as files:
        assert torch.equal(files.read("b"), torch.full((5,), 2.0, dtype=torch.bfloat16))
        assert torch.equal(files.read("a"), tensors["a"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks_and_stays_within_the_plan(tmp_path):
    setup = (
        "from small_models import make_samples, make_subset\n"
        "from calset.pruning.prune import prune\n"
        "subset = make_subset(make_samples((100, 120) * 8))"
    )
    small = save_model(tmp_path / "small")
    peaks, plans, sizes = {}, {}, {}
    for n in (2, 8):
        model = save_model(tmp_path / f"wide-{n}", hidden_size=768, intermediate_size=2048, num_hidden_layers=n)
        sizes[n] = (model / "model.safetensors").stat().st_size
        warm, out = str(tmp_path / f"warm-{n}"), str(tmp_path / f"out-{n}")
        # One matrix a block: what is held is measured, not the solves' time.
        asked = f"{out!r}, sparsity=0.5, batch_tokens=1024, include=['v_proj']"
        peaks[n] = peak_bytes(
            setup, f"prune({str(small)!r}, subset, {warm!r}, sparsity=0.5)", f"prune({str(model)!r}, subset, {asked})"
        )
        samples = make_subset(make_samples((100, 120) * 8))
        plans[n] = plan_pruning(
            model, samples, tmp_path / "no", sparsity=0.5, batch_tokens=1024, include=["v_proj"]
        ).host_bytes
    assert sizes[8] - sizes[2] > 150e6
    print("bytes at the peak", peaks, "planned", plans, "in the files", sizes)
    assert peaks[8] - peaks[2] < 0.1 * (sizes[8] - sizes[2])
    assert peaks[8] < plans[8] < 4 * peaks[8]


# --- the plan ---------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_done_and_loads_and_writes_nothing(tmp_path, dense, monkeypatch):
    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    plan = plan_pruning(dense, SUBSET, tmp_path / "out", sparsity=0.5, batch_tokens=64)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    events = []
    report = prune(dense, SUBSET, tmp_path / "out", sparsity=0.5, batch_tokens=64, progress=events.append)
    assert plan.n_matrices == len(report.matrices)
    assert plan.n_weights == sum(m.shape[0] * m.shape[1] for m in report.matrices)
    assert plan.n_blocks == events[-1].total
    assert plan.n_counted_tokens == report.n_counted_tokens
    assert plan.problems() == []
    assert dict(plan.rows())["hidden states"] == "on device"


def test_operations_and_memory_of_a_plan_follow_the_shapes(tmp_path, dense):
    def plan(**options) -> Estimate:
        return plan_pruning(dense, SUBSET, tmp_path / "out", **{"sparsity": 0.5, **options})

    one = plan()
    # 3 layers: q, k, v, o and per expert gate_up, down (2 of 4 a token), run twice, two operations a multiply-add.
    a_token = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 2 * (48 * 32 + 32 * 24))
    assert one.forward_flops == 2 * 2 * a_token * one.n_positions
    assert plan(propagate="dense").forward_flops == one.forward_flops / 2
    assert plan(batch_tokens=1).n_positions == SUBSET.n_tokens
    assert plan(method="wanda").solve_flops < one.solve_flops
    assert plan(method="wanda").device_bytes < one.device_bytes
    nothing = plan(method="magnitude")
    assert (nothing.n_positions, nothing.forward_flops, nothing.statistics_flops) == (0, 0, 0)
    disk = plan(hidden="disk")
    assert disk.disk_bytes - one.disk_bytes == one.device_bytes - disk.device_bytes == one.n_positions * 32 * 4


@pytest.mark.parametrize("what", ["device", "disk"])
def test_what_cannot_fit_is_refused_before_weights_load_unless_forced(tmp_path, llama, monkeypatch, what):
    from calset.pruning import estimate

    monkeypatch.setattr(Layout, "load", lambda *a: pytest.fail("weights were loaded"))
    if what == "disk":
        monkeypatch.setattr(workfolder.shutil, "disk_usage", lambda p: SimpleNamespace(free=10**6))
        with pytest.raises(CalsetError, match="make room"):
            prune(llama, SUBSET, tmp_path / "out", sparsity=0.5)
        return
    monkeypatch.setattr(estimate, "free_memory", lambda device: 10_000)
    with pytest.raises(CalsetError, match=r"cpu would need about .* has 10 kB free.*--force tries anyway"):
        prune(llama, SUBSET, tmp_path / "out", sparsity=0.5)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "free_memory", lambda device: 10_000)
    assert prune(llama, SUBSET, tmp_path / "out", sparsity=0.5, force=True).matrices


def test_hidden_states_move_to_the_disk_when_the_host_has_no_room(tmp_path, dense, monkeypatch):
    from calset.pruning import estimate

    plan = plan_pruning(dense, SUBSET, tmp_path / "out", sparsity=0.5)
    without = plan.device_bytes - plan.device_parts["hidden states"]
    monkeypatch.setattr(estimate, "free_memory", lambda device: without + 10)
    tight = plan_pruning(dense, SUBSET, tmp_path / "out", sparsity=0.5)
    assert (tight.hidden, tight.problems()) == ("disk", [])
    assert replace(tight, disk_free=0).problems() != []


@pytest.mark.parametrize(("kind", "bytes_a_pair"), [("Llama", 1), ("GptOss", 1 + 4 * (2 * 4 + 4))])
def test_eager_attentions_scores_count(tmp_path, kind, bytes_a_pair):
    folder = save_model(tmp_path / "dense", kind)
    assert (checkpoint.open_source(folder).skeleton().config._attn_implementation == "eager") == (kind == "GptOss")

    def activations(length: int) -> int:
        samples = make_subset(make_samples((length,)))
        return plan_pruning(folder, samples, tmp_path / "out", sparsity=0.5).device_parts["activations"]

    # What grows with the square of the length: a mask, and eager's scores of 4 heads, their softmax in float32 and as
    # it is read.
    assert activations(100) - 2 * activations(50) == (100**2 - 2 * 50**2) * bytes_a_pair


def test_processes_that_share_a_host_share_its_memory_and_the_hidden_states(tmp_path, dense, monkeypatch):
    options = {"sparsity": 0.5, "batch_tokens": 64}
    alone = plan_pruning(dense, SUBSET, tmp_path / "out", **options)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    four = plan_pruning(dense, SUBSET, tmp_path / "out", **options)
    assert four.host_free == pytest.approx(alone.host_free / 4, rel=0.2)
    assert four.device_parts["hidden states"] == alone.device_parts["hidden states"] / 4


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_control_groups_limit_is_the_memory_there_is(tmp_path):
    two = write(
        tmp_path / "v2",
        {
            "proc/self/cgroup": "0::/batch/job\n",
            "sys/fs/cgroup/batch/job/memory.max": "max\n",
            "sys/fs/cgroup/batch/job/memory.current": "900\n",
            "sys/fs/cgroup/batch/memory.max": "1000\n",
            "sys/fs/cgroup/batch/memory.current": "900\n",
            "sys/fs/cgroup/batch/memory.stat": "anon 500\ninactive_file 300\n",
        },
    )
    assert free_in_groups(two) == [1000 - 900 + 300]
    one = write(
        tmp_path / "v1",
        {
            # The host's path, of which a container sees only the mount.
            "proc/self/cgroup": "7:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 250\n",
        },
    )
    assert free_in_groups(one) == [5000 - 4000 + 250]
    assert free_in_groups(tmp_path / "another system") == []


def test_free_memory_is_the_least_of_the_machines_and_the_groups(monkeypatch):
    machine = free_memory(None)
    assert machine > 0
    monkeypatch.setattr(memory, "free_in_groups", lambda: [machine * 10, 1 << 20])
    assert free_memory(None) == 1 << 20
    monkeypatch.setattr(memory, "free_in_groups", lambda: [-5])  # over its limit already
    assert free_memory(None) == 0

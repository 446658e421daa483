"""Both real engines on the bundled model: what they return, how they sample, how they stop, how weights are swapped."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.build import build
from calset.builder.engines import Completion, Engine, Request, Sampling, cpu_sharing, open_engine, resolve_engine
from calset.builder.engines.vllm import VllmEngine
from calset.builder.model.info import ModelInfo, inspect
from calset.errors import EngineError, InputError

GREEDY = Sampling(temperature=0.0)
QUESTIONS = ["12 + 34 =", "5 * 7 =", "State the final answer: 901 - 17 + 4 =", "1", "Hello there"]


@pytest.fixture(scope="module")
def info(tiny_model: Path) -> ModelInfo:
    return inspect(tiny_model)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(f"{request.param}_engine")


def requests_for(info: ModelInfo, n: int, max_tokens: int = 24, seed: int = 0) -> list[Request]:
    prompts = [info.prompt_ids(question) for question in QUESTIONS]
    return [Request(f"r{i}", prompts[i % len(prompts)], seed + i, max_tokens) for i in range(n)]


def run(engine: Engine, requests: list[Request], sampling: Sampling) -> dict[str, Completion]:
    found = list(engine.stream(requests, sampling))
    assert len(found) == len({c.key for c in found}) == len(requests)
    return {completion.key: completion for completion in found}


def test_every_request_comes_back_once_within_its_budget(engine: Engine, info: ModelInfo):
    requests = [Request(f"r{i}", info.prompt_ids(QUESTIONS[i % 5]), i, 1 + i % 40) for i in range(60)]
    found = run(engine, requests, info.sampling)
    for request in requests:
        completion = found[request.key]
        assert 1 <= len(completion.token_ids) <= request.max_tokens
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == request.max_tokens
            assert completion.token_ids[-1] not in info.eos_token_ids
        else:
            assert completion.finish_reason == "stop"
            assert completion.token_ids[-1] in info.eos_token_ids  # the stop token is included
        assert not set(completion.token_ids[:-1]) & set(info.eos_token_ids)
        assert completion.seconds > 0


def test_a_stop_token_ends_the_completion_and_is_part_of_it(engine: Engine, info: ModelInfo):
    """Hot enough that the end token turns up, whatever the model has learned."""
    found = run(engine, requests_for(info, 16, max_tokens=250), Sampling(temperature=1.5)).values()
    stopped = [c for c in found if c.finish_reason == "stop"]
    assert stopped
    assert all(c.token_ids[-1] in info.eos_token_ids for c in stopped)


def test_a_seed_gives_its_own_reproducible_stream(engine: Engine, info: ModelInfo):
    prompt = info.prompt_ids(QUESTIONS[0])
    requests = [Request(f"r{i}", prompt, i // 2, 16) for i in range(16)]
    found = run(engine, requests, Sampling(temperature=1.5))
    pairs = [(found[f"r{i}"].token_ids, found[f"r{i + 1}"].token_ids) for i in range(0, 16, 2)]
    assert sum(a == b for a, b in pairs) >= 7  # batch shapes may round a logit apart
    assert len({a for a, _ in pairs}) == 8


def test_greedy_tokens_are_the_models_own_best(engine: Engine, info: ModelInfo, tiny_model: Path):
    check_greedy(run(engine, requests_for(info, 5), GREEDY), info, tiny_model)


def check_greedy(found: dict[str, Completion], info: ModelInfo, folder: Path) -> None:
    """Each greedy token's logit, under a plain forward in float32, is within rounding of the largest."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request in requests_for(info, len(found)):
        served = list(found[request.key].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *served]])).logits[0, len(request.prompt_ids) - 1 : -1]
        behind = logits.max(1).values - logits[range(len(served)), served]
        assert behind.max() < 0.3


def test_requests_are_pulled_lazily(engine: Engine, info: ModelInfo):
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for request in requests_for(info, 1000, max_tokens=2):
            pulled += 1
            yield request

    stream = engine.stream(source(), info.sampling)
    next(stream)
    assert pulled < 500
    engine.cancel()
    rest = sum(1 for _ in stream)
    assert rest < 900


def test_cancel_ends_the_stream_and_the_next_one_works(engine: Engine, info: ModelInfo):
    stream = engine.stream(requests_for(info, 2000, max_tokens=400), Sampling(temperature=1.0))
    next(stream)  # a stream that has not begun cannot be cancelled
    threading.Timer(0.2, engine.cancel).start()
    assert len(list(stream)) < 1999
    assert len(run(engine, requests_for(info, 5), info.sampling)) == 5


def test_swapped_weights_answer_as_their_own(engine: Engine, info: ModelInfo, tiny_model: Path, altered_model: Path):
    before = run(engine, requests_for(info, 5), GREEDY)
    altered = inspect(altered_model)
    engine.load_weights(altered_model, altered.revision)
    assert engine.loaded == altered.revision
    try:
        swapped = run(engine, requests_for(info, 5), GREEDY)
    finally:
        engine.load_weights(tiny_model, info.revision)
    after = run(engine, requests_for(info, 5), GREEDY)
    ids = [{key: c.token_ids for key, c in found.items()} for found in (before, swapped, after)]
    assert ids[0] == ids[2]
    assert ids[0] != ids[1]
    check_greedy(swapped, info, altered_model)


def test_weights_of_another_shape_are_refused_and_the_old_ones_stay(
    engine: Engine, info: ModelInfo, altered_model: Path, tmp_path: Path
):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "misfit"
    shutil.copytree(altered_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(7, 7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = run(engine, requests_for(info, 3), GREEDY)
    with pytest.raises(EngineError, match=r"lm_head\.weight is \(7, 7\) there"):
        engine.load_weights(folder, "x")
    after = run(engine, requests_for(info, 3), GREEDY)
    assert [before[k].token_ids for k in before] == [after[k].token_ids for k in before]
    assert engine.loaded == info.revision


@pytest.mark.vllm
def test_beside_vllm_on_these_cores_what_comes_is_left_for_a_moment(vllm_engine, info, monkeypatch):
    waits: set[float] = set()
    monkeypatch.setattr(cpu_sharing, "sleep", waits.add)
    assert len(run(vllm_engine, requests_for(info, 1), GREEDY)) == 1
    assert waits == ({cpu_sharing.STEP_SECONDS, cpu_sharing.LINGER_SECONDS} if vllm_engine.shares_cores else set())


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_swap_equals_a_fresh_vllm_and_a_dead_one_says_how_to_go_on(vllm_engine, info, tiny_model, altered_model):
    """A second start: a fresh engine on the other checkpoint, then killed."""
    altered = inspect(altered_model)
    vllm_engine.load_weights(altered_model, altered.revision)
    swapped = run(vllm_engine, requests_for(info, 5), GREEDY)
    vllm_engine.load_weights(tiny_model, info.revision)
    older = set(multiprocessing.active_children())
    fresh = open_engine("vllm", altered, max_model_len=2048, concurrency=32)
    try:
        started = run(fresh, requests_for(info, 5), GREEDY)
        assert {k: c.token_ids for k, c in swapped.items()} == {k: c.token_ids for k, c in started.items()}
        stream = fresh.stream(requests_for(info, 2000, max_tokens=900), Sampling(temperature=0.5))
        (core,) = set(multiprocessing.active_children()) - older
        core.kill()
        with pytest.raises(EngineError, match="run the same command again to continue"):
            for _ in stream:
                pass
    finally:
        fresh.close()
        fresh.close()
    assert set(multiprocessing.active_children()) <= older


def test_what_a_request_samples_does_not_depend_on_its_neighbours(tiny_model: Path, info: ModelInfo):
    """In float32, where the rounding of another batch shape cannot change a token."""
    requests = requests_for(info, 12, max_tokens=20)
    found = []
    for concurrency in (1, 3, 12):
        engine = open_engine(
            "transformers", info, max_model_len=512, device="cpu", dtype="float32", concurrency=concurrency
        )
        completions = run(engine, requests, Sampling(temperature=1.0, top_p=0.9, top_k=50))
        found.append({key: c.token_ids for key, c in completions.items()})
        engine.close()
    assert found[0] == found[1] == found[2]


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 2),
    top_p=st.floats(0.05, 1),
    top_k=st.integers(0, 12),
    min_p=st.floats(0, 0.9),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_sampling_only_chooses_what_the_filters_leave(seed, temperature, top_p, top_k, min_p, draw):
    import torch

    from calset.builder.engines.transformers import sample

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    chosen = int(sample(logits.clone(), sampling, torch.tensor([[draw]], dtype=torch.float64)))
    p = torch.softmax(logits[0].double() / temperature, 0)
    rank = int((p > p[chosen]).sum())
    assert top_k == 0 or rank < top_k
    assert p[chosen] >= min_p * p.max() - 1e-12
    left = p * (p >= min_p * p.max())
    if top_k:
        left = left * (left >= left.sort(descending=True).values[top_k - 1])
    before = left[p > p[chosen]].sum() / left.sum()
    assert before < top_p + 1e-9


def test_sampling_follows_the_distribution():
    import torch

    from calset.builder.engines.transformers import sample

    n = 100_000
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(n, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = sample(logits.expand(n, -1).clone(), Sampling(temperature=0.7), draws)
    share = torch.bincount(chosen, minlength=10) / n
    assert (share - torch.softmax(logits[0] / 0.7, 0)).abs().max() < 0.01


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}],
)
def test_sampling_out_of_range_is_refused(values: dict):
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)


def test_unknown_and_missing_engines_say_what_to_do(monkeypatch: pytest.MonkeyPatch, info: ModelInfo):
    with pytest.raises(
        InputError, match="unknown engine 'sglang'; choose auto, vllm, transformers or a server's address"
    ):
        resolve_engine("sglang")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_engine("auto") == "transformers"
    with pytest.raises(InputError, match=r"pip install 'calset\[vllm\]'"):
        open_engine("vllm", info)
    with pytest.raises(InputError, match="at most 2048 tokens"):
        open_engine("transformers", info, max_model_len=5000)


def test_a_vllm_that_cannot_be_imported_says_why_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, info: ModelInfo
):
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "vllm").mkdir()
    broken = tmp_path / "vllm" / "__init__.py"
    monkeypatch.syspath_prepend(tmp_path)
    for raised, says in (
        ("ImportError('libcudart.so.12: cannot open')", "libcudart.*install the vLLM that fits"),
        ("RuntimeError('operator torchvision::nms does not exist')", "pip uninstall -y torchvision torchaudio"),
    ):
        broken.write_text(f"raise {raised}  # {'x' * len(says)}\n")
        importlib.invalidate_caches()
        with pytest.raises(InputError, match=says) as error:
            open_engine("vllm", info)
        assert "\n" not in str(error.value)
    report = build(
        tiny_model, "gym:chain_sum?size=1", samples=1, catalog=tmp_path / "c.duckdb", max_tokens=4, device="cpu"
    )
    assert report.engine == "transformers"
    assert any("vLLM is installed but cannot be imported" in warning for warning in report.warnings)


def test_what_a_reaper_watches_ends_with_its_parent_and_not_with_a_dismissal():
    script = (
        "import subprocess, sys, time\n"
        "from calset.builder.engines.vllm import _Reaper\n"
        "reaper = _Reaper()\n"
        "for _ in range(2):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    reaper.watch([child.pid])\n"
        "    print(child.pid, flush=True)\n"
        "if sys.argv[1] == 'dismiss':\n"
        "    reaper.dismiss()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    for action, survive in (("dismiss", True), ("die", False)):
        parent = subprocess.Popen([sys.executable, "-c", script, action], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + (0.5 if survive else 20)
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [alive(child) for child in children] == [survive] * 2
        for child in filter(alive, children):
            os.kill(child, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_vllm_stream_cancelled_before_its_first_step_ends(info: ModelInfo):
    """Without vLLM itself: the loop and the feeder are the engine's own."""
    engine = object.__new__(VllmEngine)
    engine._loop, engine._llm, engine._in_flight, engine._feeder = asyncio.new_event_loop(), object(), 2, None
    feed = engine._feed

    def cancelled_at_once(*arguments):
        def cancel() -> None:
            for task in asyncio.all_tasks():
                task.cancel()

        asyncio.get_running_loop().call_soon(cancel)  # runs before the task that is made of this
        return feed(*arguments)

    engine._feed = cancelled_at_once
    thread = engine._thread = threading.Thread(target=engine._loop.run_forever, daemon=True)
    thread.start()
    found: list[Completion] = []
    stream = threading.Thread(target=lambda: found.extend(engine.stream(requests_for(info, 3), GREEDY)), daemon=True)
    stream.start()
    stream.join(timeout=20)
    assert not stream.is_alive()
    assert not found
    engine._loop.call_soon_threadsafe(engine._loop.stop)
    thread.join(timeout=20)
    engine._loop.close()


# --- model/info --------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_its_content_not_by_its_path(tiny_model: Path, tmp_path: Path, info: ModelInfo):
    shutil.copytree(tiny_model, tmp_path / "copy")
    copy = inspect(tmp_path / "copy")
    assert (copy.revision, copy.tokenizer_hash, copy.chat_template_hash) == (
        info.revision,
        info.tokenizer_hash,
        info.chat_template_hash,
    )
    assert (info.model, copy.model) == ("tiny-lrm", "copy")
    assert info.max_model_len == 2048
    assert info.eos_token_ids == (2,)
    assert info.sampling.temperature == 0.8


def test_other_weights_are_another_revision(info: ModelInfo, altered_model: Path):
    assert inspect(altered_model).revision != info.revision


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        (
            "chat_template.jinja",
            "has no chat template; pass an instruction-tuned model, or put its chat_template.jinja",
        ),
        ("config.json", "has no config.json"),
        ("model.safetensors", r"holds no \*\.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_line(tiny_model: Path, tmp_path: Path, remove: str, says: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / remove).unlink()
    with pytest.raises(InputError, match=says) as error:
        inspect(folder)
    assert "\n" not in str(error.value)


def test_a_folder_with_an_at_in_its_name_is_a_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(tiny_model, tmp_path / "org" / "lrm@v1")
    monkeypatch.chdir(tmp_path)
    for model in (tmp_path / "org" / "lrm@v1", "org/lrm@v1"):
        info = inspect(model)
        assert (info.model, info.is_local, info.revision) == ("lrm@v1", True, inspect(tiny_model).revision)
        assert Path(info.location) == Path(model)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"top_k": [5]}, r"top_k must be a number, not \[5\]"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a number, not inf"),
        ({"top_p": 3}, r"top_p must lie in \(0, 1\]"),
    ],
)
def test_a_bad_generation_config_is_named(tiny_model: Path, tmp_path: Path, values: dict, says: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"generation_config\.json: {says}"):
        inspect(folder)


def test_a_transformers_that_cannot_be_imported_is_one_line(tiny_model: Path, tmp_path: Path):
    (tmp_path / "transformers.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    script = f"from calset.builder.model.info import inspect\ninspect({str(tiny_model)!r})\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    says = "transformers is installed but cannot be imported: operator torchvision::nms does not exist; pip uninstall"
    assert f"calset.errors.InputError: {says}" in done.stderr


def test_a_broken_config_or_a_missing_folder_is_refused_in_one_line(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is corrupt"):
        inspect(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(InputError, match="cannot read"):
        inspect(folder)
    for missing in (tmp_path / "none", "./none", "none"):
        with pytest.raises(InputError, match="no model folder"):
            inspect(missing)
    with pytest.raises(InputError, match="no folder nobody/nothing, and the Hub did not"):
        inspect("nobody/nothing")

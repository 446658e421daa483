"""Real parts that several test files share. vLLM takes most of a minute to start, so it starts once for
all tests of a process."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from local_hub import Client, LocalHub
from xdist.scheduler import LoadFileScheduling

# Before torch, tokenizers or vLLM are imported by any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and OpenMP's threads spin while they wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from calset import bundled
from calset.builder.engines.base import Completion, Request
from calset.builder.model.sampling import Sampling

HAS_VLLM = importlib.util.find_spec("vllm") is not None

# HYPOTHESIS_PROFILE chooses. The default draws the same examples in every run, so that a red run is the change's fault;
# the nightly suite looks for new ones. A busy machine is slow and breaks no law.
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=100, derandomize=True, **CALM)
settings.register_profile("nightly", max_examples=1000, **CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def fewer(n: int) -> settings:
    """One in ``n`` of the profile's examples, for a law whose examples take long."""
    return settings(max_examples=settings().max_examples // n)


class Apart(LoadFileScheduling):
    """xdist's distribution by file, but one process runs all tests with "vllm" in their names.

    Two vLLM engines on two cores would wait for each other, and one process starts the shared engine once. By name,
    since a scheduler sees no markers; ``--dist loadgroup`` of pytest-xdist 3.8 does nothing under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "vllm" if _is_apart(nodeid) else super()._split_scope(nodeid)


def _is_apart(nodeid: str) -> bool:
    return "vllm" in nodeid.partition("::")[2]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return Apart(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what uses vLLM: it takes longest."""
    for item in items:
        if item.get_closest_marker("vllm") and not _is_apart(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} is marked vllm: its name must say so, for xdist to keep it apart")
    items.sort(key=lambda item: not _is_apart(item.nodeid))


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The bundled reasoning model."""
    return bundled.MODEL


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The bundled model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def altered_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with noise on its matrices: same shapes and tokenizer, other answers."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "altered"
    shutil.copytree(bundled.MODEL, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            weights[name] = tensor + (0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, to be read only."""
    from small_models import save_model

    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Forked children must not meet the parent's thread pool, and sums must not depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vllm_engine(tiny_model: Path) -> Iterator[object]:
    """A real vLLM on the bundled model; whoever loads other weights puts them back."""
    if not HAS_VLLM:
        pytest.skip("vLLM is not installed")
    from calset.builder.engines import open_engine
    from calset.builder.model.info import inspect

    engine = open_engine("vllm", inspect(tiny_model), max_model_len=2048, concurrency=32)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_engine(tiny_model: Path) -> Iterator[object]:
    """The transformers engine on the bundled model."""
    from calset.builder.engines import open_engine
    from calset.builder.model.info import inspect

    engine = open_engine("transformers", inspect(tiny_model), max_model_len=1024, device="cpu", concurrency=16)
    yield engine
    engine.close()


@dataclass
class ScriptedEngine:
    """An engine double that answers at once, and fails after ``fail_after`` completions when asked."""

    loaded: str
    token_ids: tuple[int, ...] = (31, 2)
    finish_reason: str = "stop"
    fail_after: int | None = None
    name: str = "scripted"
    version: str = "1"
    max_model_len: int = 1024
    requests: list[Request] = field(default_factory=list)
    swaps: list[str] = field(default_factory=list)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        from calset.errors import EngineError

        for n, request in enumerate(requests):
            if n == self.fail_after:
                raise EngineError("the engine died; run the same command again to continue")
            self.requests.append(request)
            yield Completion(request.key, self.token_ids, self.finish_reason, 0.01)

    def cancel(self) -> None:
        pass

    def load_weights(self, model: Path, revision: str) -> None:
        self.swaps.append(revision)
        self.loaded = revision

    def close(self) -> None:
        pass


@pytest.fixture
def scripted_engine() -> type[ScriptedEngine]:
    return ScriptedEngine


# --- a Hub of one's own; all tests share these clients ------------------


@pytest.fixture(scope="session")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_faults_are_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "hub" in request.fixturenames:
        running = request.getfixturevalue("hub")
        running.faults.clear()
        running.before_commit = None


@pytest.fixture(scope="session")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process of somebody who may write."""
    with hub.writer(tmp_path_factory.mktemp("owner")) as process:
        yield process


@pytest.fixture(scope="session")
def stranger(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client that has not logged in."""
    with hub.client(tmp_path_factory.mktemp("stranger")) as process:
        yield process

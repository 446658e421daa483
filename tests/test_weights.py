"""A model folder's small files lead nobody to weights outside the folder, whichever part of calset reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from calset.builder.engines import Engine, open_engine
from calset.builder.model.info import inspect
from calset.errors import InputError
from calset.io.weights import INDEX, SINGLE, check_weights, weight_files
from calset.pruning.model.checkpoint import open_source
from calset.pruning.model.tensorfiles import TensorFiles

PART = "model-00001-of-00001.safetensors"
OUTSIDE = ["../elsewhere/part.safetensors", "sub/part.safetensors", "..", ".", "", "..\\part.safetensors", "part", 5]


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """The bundled model as one shard with an index."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_model, folder)
    (folder / SINGLE).rename(folder / PART)
    index(folder, PART)
    return folder


def index(folder: Path, name: Any) -> None:
    """Have the folder's index say that all its tensors are in one file."""
    weights = folder / PART if (folder / PART).exists() else folder / SINGLE
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_beside_it_and_nothing_else(sharded: Path, name: Any) -> None:
    (sharded.parent / "elsewhere").mkdir()
    (sharded / "sub").mkdir()
    for place in ("elsewhere", "sharded/sub"):
        shutil.copy(sharded / PART, sharded.parent / place / "part.safetensors")
    index(sharded, name)
    for look in (inspect, open_source, TensorFiles, weight_files):
        with pytest.raises(InputError, match="does not name safetensors files beside it") as caught:
            look(sharded)
        assert "\n" not in str(caught.value)


def test_a_running_engine_is_given_no_weights_from_outside(sharded: Path, transformers_engine: Engine) -> None:
    loaded = transformers_engine.loaded
    (sharded.parent / "part.safetensors").touch()
    index(sharded, "../part.safetensors")
    with pytest.raises(InputError, match="does not name safetensors files beside it"):
        transformers_engine.load_weights(sharded, "r")
    assert transformers_engine.loaded == loaded


def test_a_plain_index_and_links_in_the_folder_are_followed(sharded: Path) -> None:
    """As the Hub's cache has them: its snapshots are links to blobs."""
    (sharded / PART).rename(sharded.parent / "blob")
    (sharded / PART).symlink_to("../blob")
    assert weight_files(sharded) == [sharded / PART]
    open_engine("transformers", inspect(sharded), max_model_len=64, device="cpu").close()


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"weight_map": 1}', '{"weight_map": {}}', "\x00"])
def test_an_index_that_is_none_is_one_line(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match="is corrupt") as caught:
        inspect(sharded)
    assert "\n" not in str(caught.value)


def test_a_config_or_an_adapter_that_names_other_weights_is_refused(sharded: Path) -> None:
    check_weights(sharded)
    change(sharded / "config.json", transformers_weights="other.safetensors.index.json")
    with pytest.raises(InputError, match=r"config\.json names weights of its own"):
        inspect(sharded)
    change(sharded / "config.json", transformers_weights=None)
    (sharded / "adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere"}')
    with pytest.raises(InputError, match="an adapter of another model: merge it"):
        inspect(sharded)


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"text_config": {"experts_implementation": "somebody/kernel"}},
        {"attn_implementation": {"": "sdpa", "text_config": "somebody/kernel"}},
    ],
)
def test_a_config_that_names_a_repository_of_kernels_is_refused(
    tiny_model: Path, tmp_path: Path, entry: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    change(folder / "config.json", attn_implementation="sdpa")
    inspect(folder)
    change(folder / "config.json", **entry)
    for look in (inspect, open_source):
        with pytest.raises(InputError, match="repository of kernels"):
            look(folder)

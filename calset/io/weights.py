"""The weight files of a model folder: which ones a library would load, and that they lie in the folder.

Why apart: transformers joins the names of an index to the folder as they are, so an index can name any file that the
user may read; and a config may name a repository of compiled kernels, which transformers 5 downloads and runs. A file
in the folder may be a link to elsewhere, as in the Hub's cache, whose snapshots are links, and in folders that users
put together: only names are refused. Must not know: tensors, models, engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from calset.errors import InputError, first_line
from calset.io.jsonable import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads; other ones beside them hold the same weights in other layouts.

    Raises:
        InputError: there are none, or the index is corrupt.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    return [folder / name for name in _shards(folder / INDEX)]


def check_weights(folder: Path) -> None:
    """Refuse a folder whose small files lead a library to weights or code that are not the folder's own.

    The weights need not be there: of a Hub model only the small files may have been fetched.

    Raises:
        InputError: an index that names something else than files beside it, an adapter (transformers would load the
            model that it names), or a config that names other weight files or a repository of kernels.
    """
    if (folder / INDEX).is_file():
        _shards(folder / INDEX)
    if (adapter := folder / "adapter_config.json").is_file():
        raise InputError(f"{adapter} makes this an adapter of another model: merge it into that model's weights first")
    config = folder / "config.json"
    read = read_object(config) if config.is_file() else {}
    if read.get("transformers_weights") not in (None, SINGLE, INDEX):
        raise InputError(f"{config} names weights of its own (transformers_weights): rename them to {SINGLE}")
    if (named := next(_kernels(read), None)) is not None:
        raise InputError(
            f"{config} names a repository of kernels ({named}), whose code would be run: take that entry out"
        )


def _kernels(config: Any) -> Iterator[str]:
    """Yield the names of entries, also in the configs of a model's parts, whose value is a repository of kernels."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        for name, value in part.items() if isinstance(part, dict) else ():
            chosen = value.values() if isinstance(value, dict) else [value]
            if name.endswith("_implementation") and any(isinstance(one, str) and "/" in one for one in chosen):
                yield name
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is corrupt: {first_line(error)}") from error
    if not names or not all(map(_is_shard, names)):
        raise InputError(f"{index} is corrupt: it does not name safetensors files beside it")
    return names


def _is_shard(name: Any) -> bool:
    plain = isinstance(name, str) and PurePosixPath(name).name == name == PureWindowsPath(name).name
    return plain and name.endswith(".safetensors") and "\0" not in name

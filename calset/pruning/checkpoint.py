"""Model folders: what can be known of one before its weights load, and a pruned one written whole or not at all.

A pruned model is an ordinary Hugging Face checkpoint with dense zeros: vLLM and compressed-tensors dropped their sparse
formats. It must not know how a model was pruned, only the record that goes beside it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset import ids
from calset.errors import CalsetError, InputError, PruningError, first_line

if TYPE_CHECKING:
    import torch

RECORD = "pruning.json"
INDEX = "model.safetensors.index.json"
SCHEMA_VERSION = 1
# Copied as they are: configuration, tokenizer, templates, licences. Never code, never other weights.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*")
NOT_COPIED = ("*.index.json", RECORD, "*.safetensors", "*.bin")
MARGIN = 64 << 20  # bytes of free disk beyond the weights
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name -> torch's


@dataclass(frozen=True, slots=True)
class Source:
    """A model to prune: its folder and what its small files say. Weights were read only to hash the revision."""

    name: str
    revision: str
    folder: Path
    config: Any
    tokenizer_hash: str | None  # None: it has no usable tokenizer

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def skeleton(self) -> Any:
        """The model on the meta device: its structure without its weights.

        Raises:
            InputError: transformers has no causal language model for this config.
        """
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except Exception as error:
            raise InputError(
                f"{self.name} is no causal language model that transformers knows: {first_line(error)}"
            ) from error

    def matrix_dtypes(self, names: Set[str]) -> dict[str, torch.dtype]:
        """The dtypes in which the files store these matrices, whatever the config says.

        Raises:
            InputError: unreadable files, a dtype that is no plain float, or names that transformers changes on loading
                in a checkpoint of several dtypes (which ``save`` could not keep apart).
        """
        import torch

        try:
            stored = stored_dtypes(self.folder)
        except Exception as error:
            raise InputError(f"cannot load the weights of {self.name}: {first_line(error)}") from error
        if names <= stored.keys():
            found = {name: stored[name] for name in names}
        else:
            kinds = set(stored.values())
            if len(kinds) > 1:
                raise InputError(
                    f"{self.name} stores {', '.join(sorted(kinds))} under names that transformers changes: calset "
                    f"cannot keep each tensor's dtype; convert the checkpoint to one dtype first"
                )
            found = dict.fromkeys(names, *kinds)
        for name, dtype in found.items():
            if dtype not in DTYPES:
                raise InputError(
                    f"{name} of {self.name} is stored as {dtype}: prune a checkpoint of {', '.join(DTYPES)}"
                )
        return {name: getattr(torch, DTYPES[dtype]) for name, dtype in found.items()}

    def load(self, dtype: torch.dtype | str = "auto") -> Any:
        """The model, see ``load_model``."""
        return load_model(self.folder, self.name, dtype)


def open_source(model: str | Path) -> Source:
    """Look at a model folder (or Hub id) before anything expensive.

    Raises:
        InputError: no such model, no config, or a quantised checkpoint.
    """
    from transformers import AutoTokenizer

    # The builder and the pruner must give one model one name and revision.
    from calset.builder.model_info import locate, read_config, recorded_name

    folder, revision, is_local = locate(model, None)
    if not is_local:
        folder = _download(str(model), revision)
    config = read_config(model, folder)
    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise InputError(f"{model} is quantised: prune the unquantised checkpoint, then quantise the result")
    try:
        tokenizer_hash = ids.vocabulary_hash(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception:
        tokenizer_hash = None
    return Source(recorded_name(model, folder, is_local), revision, folder, config, tokenizer_hash)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads; other ones beside them hold the same weights in other layouts.

    Raises:
        InputError: there are none, or the index is corrupt.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder} holds neither model.safetensors nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is corrupt: {first_line(error)}") from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{index} is corrupt: it does not name files beside it")
    return [folder / name for name in names]


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Tensor name -> safetensors dtype ("BF16"), from the files' headers."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
    return found


def load_model(folder: Path, name: str, dtype: torch.dtype | str = "auto") -> Any:
    """A folder's model on the CPU, from safetensors only; called ``name`` in messages.

    Args:
        dtype: "auto" is the config's, which need not be that of the files.

    Raises:
        InputError: the weights cannot be read, or some are missing or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _no_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise  # no fault of the files
    except Exception as error:
        raise InputError(f"cannot load the weights of {name}: {first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would go on with random ones.
        raise InputError(f"the checkpoint of {name} lacks {len(missing)} tensors, such as {missing[0]}")
    return model.eval()


def _download(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*COPIED, "*.safetensors", "README.md"]))
    except Exception as error:
        raise InputError(f"the Hub did not give {model}: {first_line(error)}") from error


def check_out(out: Path, source: Source) -> None:
    """Refuse an output folder that holds something, and a disk that cannot hold the model.

    Raises:
        InputError: ``out`` is not a new or empty folder.
        CalsetError: too little free disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and holds something: name a new folder with -o")
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written to: name another folder with -o")
    need, free = source.n_bytes + MARGIN, shutil.disk_usage(parent).free
    if free < need:
        raise CalsetError(f"{out} needs {need / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: make room there")


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def save(model: Any, source: Source, out: Path, record: Mapping[str, Any], section: str) -> None:
    """Write the checkpoint, its record and its card into a temporary sibling, then rename it to ``out``.

    Args:
        model: holds the pruned matrices; every other tensor comes from the source's files as it is there.
        record: goes into ``pruning.json``; its ``matrices`` name the pruned ones, ``biases`` those that were changed or
            added, and ``switches`` what config.json must say for the added ones.
        section: Markdown about the pruning, put before the base model's card.

    Raises:
        PruningError: it could not be written (a full disk); nothing is left behind.
    """
    try:
        with _sibling(out) as folder:
            matrices, biases = {m["name"] for m in record["matrices"]}, set(record.get("biases", ()))
            _write_weights(model, source.folder, folder, matrices, biases)
            # The source's own config, generation config, tokenizer and templates: what loads the base loads this.
            _copy_small_files(source.folder, folder)
            _turn_on(folder / "config.json", record.get("switches", {}))
            (folder / "README.md").write_text(_card(source.folder, section), encoding="utf-8")
            text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")
            _flush(folder)
            folder.rename(out)
    except OSError as error:
        raise PruningError(
            f"could not write {out}: {error.strerror or first_line(error)}; nothing was left there"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # safetensors, for one, reports a full disk as its own error
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise PruningError(f"could not write {out}: {first_line(error)}; nothing was left there") from error


def _turn_on(config: Path, switches: Mapping[str, bool]) -> None:
    """Change the config only where added biases need it: what else it says stays, byte for byte where nothing is."""
    if switches:
        content = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**content, **switches}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(model: Any, source: Path, folder: Path, pruned: set[str], biases: set[str]) -> None:
    if pruned <= stored_dtypes(source).keys():
        _stream_weights(model, source, folder, pruned, biases)
        return
    # transformers renamed the tensors on loading: only it knows the way back.
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is not None:
        # It validates what it saves, and published ones fail (temperature without do_sample); ours is a copy anyway.
        model.generation_config = GenerationConfig()
    with _no_bars():
        model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            path.unlink()


def _stream_weights(model: Any, source: Path, folder: Path, pruned: set[str], biases: set[str]) -> None:
    """The source's files one by one, with the pruned matrices in the places and dtypes of the dense ones.

    A bias that the dense model does not have goes beside its matrix, in its dtype.

    Why not ``save_pretrained``: it writes what transformers made of the files (the config's dtype, no spare tensors).
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    changed = {name: parameter for name, parameter in model.named_parameters() if name in pruned | biases}
    files, added = weight_files(source), {}
    stored = stored_dtypes(source).keys()
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {**(file.metadata() or {}), "format": "pt"}
        for name in tensors.keys() & changed.keys():
            tensors[name] = changed[name].detach().to("cpu", tensors[name].dtype).contiguous()
        for name in sorted(biases - stored):
            matrix = f"{name.removesuffix('.bias')}.weight"
            if matrix in tensors:
                tensors[name] = changed[name].detach().to("cpu", tensors[matrix].dtype).contiguous()
                added[name] = path.name
        save_file(tensors, folder / path.name, metadata=metadata)
    if files[0].name != "model.safetensors":
        shutil.copyfile(source / INDEX, folder / INDEX)
        if added:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            index["weight_map"].update(added)
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _sibling(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, gone afterwards unless renamed; what killed runs left for ``out`` is swept first."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{out.name}.calset-*"):
        owner = re.fullmatch(r"\d+", left.name.rpartition("-")[2])
        if owner and not _is_running(int(owner[0])):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f".{out.name}.calset-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws progress bars of its own; calset's caller decides what is shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _flush(folder: Path) -> None:
    """Delayed allocation can report a full disk only here, and a rename must not precede its files' bytes."""
    mode = (folder / RECORD).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes for the owner only, whatever the umask
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _copy_small_files(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        wanted = any(fnmatch.fnmatch(path.name, p) for p in COPIED)
        if path.is_file() and wanted and not any(fnmatch.fnmatch(path.name, p) for p in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _card(source: Path, section: str) -> str:
    """The base card with the pruning's section before its text: a reader must not take the dense figures for these."""
    path = source / "README.md"
    base = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = re.match(r"---\n.*?\n---\n", base, re.DOTALL)
    front = head[0] if head else ""
    rest = base[len(front) :].strip()
    return f"{front}{section.strip()}\n" + (f"\n# Card of the dense model\n\n{rest}\n" if rest else "")


def read_record(folder: Path) -> dict[str, Any]:
    """The ``pruning.json`` of a pruned checkpoint.

    Raises:
        InputError: missing, corrupt, or of a newer calset.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"{folder} has no {RECORD}: it is no checkpoint that calset pruned")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is corrupt: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} is corrupt: it is no JSON object")
    version, matrices = record.get("schema_version"), record.get("matrices")
    if not isinstance(version, int) or isinstance(version, bool):
        raise InputError(f"{path} is corrupt: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise InputError(f"{path} has schema {version}, newer than this calset's {SCHEMA_VERSION}: upgrade calset")
    if not isinstance(matrices, list) or not matrices or not all(map(_is_matrix, matrices)):
        raise InputError(f"{path} is corrupt: it does not list the pruned matrices")
    if not all(isinstance(name, str) for name in record.get("biases") or ()):
        raise InputError(f"{path} is corrupt: its biases are no list of names")
    for key in ("base", "calibration"):
        if not isinstance(record.get(key, {}), dict):
            raise InputError(f"{path} is corrupt: {key} is {json.dumps(record[key])[:40]}, not an object")
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_matrix(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    shape = entry.get("shape")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(_is_count(side) and side > 0 for side in shape)
    return is_shape and _is_count(entry.get("n_zeros")) and _is_count(entry.get("n_pruned"))

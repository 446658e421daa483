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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calset import ids
from calset.errors import CalsetError, InputError, PruningError

RECORD = "pruning.json"
SCHEMA_VERSION = 1
# Copied as they are: configuration, tokenizer, templates, licences. Never code, never other weights.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*")
NOT_COPIED = ("*.index.json", RECORD, "*.safetensors", "*.bin")
MARGIN = 64 << 20  # bytes of free disk beyond the weights


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
                f"{self.name} is no causal language model that transformers knows: {_line(error)}"
            ) from error

    def load(self) -> Any:
        """The model, see ``load_model``."""
        return load_model(self.folder, self.name)


def open_source(model: str | Path) -> Source:
    """Look at a model folder (or Hub id) before anything expensive.

    Raises:
        InputError: no such model, no config, or a quantised checkpoint.
    """
    from transformers import AutoConfig, AutoTokenizer

    # The builder and the pruner must give one model one name and revision.
    from calset.builder.model_info import locate, recorded_name

    folder, revision, is_local = locate(model, None)
    if not is_local:
        folder = _download(str(model), revision)
    if not (folder / "config.json").is_file():
        raise InputError(f"{model} has no config.json; pass the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot read {folder / 'config.json'}: {_line(error)}") from error
    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise InputError(f"{model} is quantised: prune the unquantised checkpoint, then quantise the result")
    try:
        tokenizer_hash = ids.vocabulary_hash(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception:
        tokenizer_hash = None
    return Source(recorded_name(model, folder, is_local), revision, folder, config, tokenizer_hash)


def load_model(folder: Path, name: str) -> Any:
    """A folder's model on the CPU, in its own dtype, from safetensors only; called ``name`` in messages.

    Raises:
        InputError: the weights cannot be read, or some are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _no_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        raise InputError(f"cannot load the weights of {name}: {_line(error)}") from error
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
        raise InputError(f"the Hub did not give {model}: {_line(error)}") from error


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
        record: goes into ``pruning.json``.
        section: Markdown about the pruning, put before the base model's card.

    Raises:
        PruningError: it could not be written (a full disk); nothing is left behind.
    """
    try:
        with _sibling(out) as folder:
            with _no_bars():
                model.save_pretrained(folder)
            # The source's own config, generation config, tokenizer and templates: what loads the base loads this.
            for path in folder.iterdir():
                if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
                    path.unlink()
            _copy_small_files(source.folder, folder)
            (folder / "README.md").write_text(_card(source.folder, section), encoding="utf-8")
            text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")
            _flush(folder)
            folder.rename(out)
    except OSError as error:
        raise PruningError(
            f"could not write {out}: {error.strerror or _line(error)}; nothing was left there"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # safetensors reports a full disk as its own error
            raise
        raise PruningError(f"could not write {out}: {_line(error)}; nothing was left there") from error


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
        version, matrices = record["schema_version"], record["matrices"]
        complete = all({"name", "shape", "n_zeros"} <= set(m) for m in matrices) and bool(matrices)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is corrupt: {_line(error)}") from error
    if not isinstance(version, int) or not complete:
        raise InputError(f"{path} is corrupt: it does not list the pruned matrices")
    if version > SCHEMA_VERSION:
        raise InputError(f"{path} has schema {version}, newer than this calset's {SCHEMA_VERSION}: upgrade calset")
    return record


def _line(error: BaseException) -> str:
    """The first line of an error's message, for a one-line report."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Model folders: what can be known of one before its weights load, and what stands beside a pruned one's weights.

A pruned model is an ordinary Hugging Face checkpoint with dense zeros: vLLM and compressed-tensors dropped their sparse
formats. It must not know how a model was pruned, only the record that goes beside it.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset import ids
from calset.errors import InputError, first_line
from calset.io.hub import check_token, progress_bar
from calset.io.jsonable import jsonable
from calset.pruning.model.layout import parameters_on_meta, quiet

if TYPE_CHECKING:
    import torch

# Copied as they are: configuration, tokenizer, templates, licences. Never code, never other weights.
RECORD = "pruning.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*")
NOT_COPIED = ("*.index.json", RECORD, "*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class Source:
    """A model to prune: its folder and what its small files say. Weights were read only to hash the revision."""

    name: str
    revision: str
    folder: Path
    config: Any
    tokenizer_hash: str | None  # None: it has no usable tokenizer

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def skeleton(self, dtype: torch.dtype | None = None) -> Any:
        """The model without its weights: parameters on the meta device, buffers (rotary frequencies) as they are.

        Raises:
            InputError: transformers has no causal language model for this config.
        """
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with parameters_on_meta(), quiet():
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=dtype or torch.float32, trust_remote_code=False
                )
        except Exception as error:
            raise InputError(
                f"{self.name} is no causal language model that transformers knows: {first_line(error)}"
            ) from error
        return model.eval()


def open_source(model: str | Path) -> Source:
    """Look at a model folder (or Hub id, also ``org/name@REVISION``) before anything expensive.

    Raises:
        InputError: no such model, no config, or a quantised checkpoint.
    """
    # The builder and the pruner must give one model one name and revision.
    from calset.io.models import locate, recorded_name

    folder, revision, is_local = locate(model, None)
    recorded = recorded_name(model, folder, is_local)
    if not is_local:
        folder = _download(recorded, revision)
    return open_folder(folder, name=str(model), recorded=recorded, revision=revision)


def open_folder(folder: Path, *, name: str | None = None, recorded: str | None = None, revision: str = "") -> Source:
    """A model folder, without the hash over its weights that ``open_source`` takes.

    Args:
        name: what the user called it, for messages; default: the folder.
        recorded: what records call it; default: the folder's name.

    Raises:
        InputError: no config, or a quantised checkpoint.
    """
    from transformers import AutoTokenizer

    from calset.io.models import read_config

    config = read_config(name or folder, folder)
    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise InputError(f"{name or folder} is quantised: prune the unquantised checkpoint, then quantise the result")
    try:
        tokenizer_hash = ids.vocabulary_hash(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception:
        tokenizer_hash = None
    return Source(recorded or folder.name, revision, folder, config, tokenizer_hash)


def _download(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    files = [*COPIED, "*.safetensors", "README.md"]
    check_token()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, tqdm_class=progress_bar()))
    except Exception as error:
        raise InputError(f"the Hub did not give {model}: {first_line(error)}") from error


def write_companions(
    source: Path, folder: Path, record: Mapping[str, Any], section: str, switches: Mapping[str, Any]
) -> None:
    """What stands beside the weights: the source's small files, the record and the card.

    The source's own config, generation config, tokenizer and templates: what loads the base loads this.

    Args:
        record: goes into ``pruning.json``; its ``matrices`` name the pruned ones.
        section: Markdown about the pruning, put before the base model's card.
        switches: what config.json is to say differently; without any it stays, byte for byte.
    """
    _copy_small_files(source, folder)
    if switches:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**config, **switches}, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(source, section), encoding="utf-8")
    text = json.dumps(jsonable(record), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


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

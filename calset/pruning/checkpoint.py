"""Model folders: what can be known of one before its weights load, and what stands beside a pruned one's weights.

A pruned model is an ordinary Hugging Face checkpoint with dense zeros: vLLM and compressed-tensors dropped their sparse
formats. It must not know how a model was pruned, only the record that goes beside it.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset import ids
from calset.errors import InputError, first_line
from calset.hubfiles import check_token, progress_bar
from calset.jsonable import read_object
from calset.pruning.layout import parameters_on_meta, quiet

if TYPE_CHECKING:
    import torch

RECORD = "pruning.json"
SCHEMA_VERSION = 2
STRUCTURED_SCHEMA_VERSION = 3  # of records that list what was dropped, not pruned matrices
# Copied as they are: configuration, tokenizer, templates, licences. Never code, never other weights.
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
    from calset.builder.model_info import locate, recorded_name

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

    from calset.builder.model_info import read_config

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
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
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


def read_record(folder: Path) -> dict[str, Any]:
    """The ``pruning.json`` of a pruned checkpoint.

    Raises:
        InputError: missing, corrupt, or of a newer calset.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"{folder} has no {RECORD}: it is no checkpoint that calset pruned")
    record = read_object(path)
    version, matrices = record.get("schema_version"), record.get("matrices")
    if not isinstance(version, int) or isinstance(version, bool):
        raise InputError(f"{path} is corrupt: it has no schema_version")
    if version > (newest := max(SCHEMA_VERSION, STRUCTURED_SCHEMA_VERSION)):
        raise InputError(f"{path} has schema {version}, newer than this calset's {newest}: upgrade calset")
    for key in ("base", "calibration"):
        if not isinstance(record.get(key, {}), dict):
            raise InputError(f"{path} is corrupt: {key} is {json.dumps(record[key])[:40]}, not an object")
    for key in ("sample_ids", "problem_ids"):
        listed = record.get("calibration", {}).get(key, [])
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise InputError(f"{path} is corrupt: the calibration's {key} are no list of names")
    if "structure" in record:
        _check_structured(record, path)
        return record
    if not isinstance(matrices, list) or not matrices or not all(map(_is_matrix, matrices)):
        raise InputError(f"{path} is corrupt: it does not list the pruned matrices")
    left = record.get("left_dense", [])
    if not isinstance(left, list) or not all(isinstance(name, str) for name in left):
        raise InputError(f"{path} is corrupt: left_dense is no list of names")
    return record


def _check_structured(record: Mapping[str, Any], path: Path) -> None:
    stacks, sparsity = record.get("stacks"), record.get("sparsity")
    if record["structure"] not in ("experts", "blocks") or not isinstance(stacks, list) or not stacks:
        raise InputError(f"{path} is corrupt: it does not list what stays")
    if not all(map(_is_stack, stacks)) or (record["structure"] == "blocks" and len(stacks) > 1):
        raise InputError(f"{path} is corrupt: its stacks do not say which of how many stay")
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 < sparsity < 1:
        raise InputError(f"{path} is corrupt: its sparsity is {json.dumps(sparsity)[:40]}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_matrix(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    shape = entry.get("shape")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(_is_count(side) and side > 0 for side in shape)
    expert, rows = entry.get("expert"), entry.get("rows")
    is_placed = (expert is None or _is_count(expert)) and (rows is None or _is_range(rows))
    counts = _is_count(entry.get("n_zeros")) and _is_count(entry.get("n_pruned"))
    return is_shape and is_placed and isinstance(entry.get("transposed", False), bool) and counts


def _is_range(rows: Any) -> bool:
    return isinstance(rows, list) and len(rows) == 2 and all(map(_is_count, rows)) and rows[0] < rows[1]


def _is_stack(entry: Any) -> bool:
    """Whether an entry can be a ``structured_report.Stack``."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    scores, n_tokens, kept, kinds = (entry.get(key) for key in ("scores", "n_tokens", "kept", "kinds"))
    if not isinstance(scores, list) or not isinstance(n_tokens, list) or not isinstance(kept, list):
        return False
    if len(scores) != len(n_tokens) or not all(map(_is_count, [*n_tokens, *kept])) or not all(map(_is_score, scores)):
        return False
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != len(scores)):
        return False
    return bool(kept) and kept == sorted(set(kept)) and kept[-1] < len(scores)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

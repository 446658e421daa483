"""Model folders and Hub models by name: where their small files are, which revision they have, what they are called.

Why here: the builder and the pruner must give one model one name and one revision. Must not know: tokenizers, engines,
decoder blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calset import bundled, ids
from calset.errors import InputError, first_line
from calset.io.hub import check_token, progress_bar
from calset.io.weights import check_weights

# All but the weights, which the engine fetches itself.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]


HUB_PATIENCE_SECONDS = 10.0  # for what a build can do without


# What decides which tokens a folder's model gives: its revision is their hash.
REVISION_FILES = ("config.json", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "*.model", "added_tokens.json")


def read_config(model: str | Path, folder: Path) -> Any:
    """transformers' config of the model in ``folder``; ``model`` is what the user called it.

    Raises:
        InputError: no config.json, or none that transformers can read without the model's own code.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{model} has no config.json; pass the folder of a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from error


def folder_revision(folder: Path) -> str:
    """Hash of a folder's config, weights and tokenizer; the same content anywhere has the same one."""
    paths = {path for pattern in REVISION_FILES for path in folder.glob(pattern) if path.is_file()}
    return ids.files_hash(sorted(paths))


def hub_name(model: str | Path) -> tuple[str, str | None]:
    """``org/name`` and the revision of ``org/name@REVISION``, None without one."""
    name, _, revision = str(model).partition("@")
    return name, revision or None


def default_commit(name: str) -> str | None:
    """The commit of a Hub model's default branch; None when the Hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, timeout=HUB_PATIENCE_SECONDS).sha
    except Exception:
        return None


def locate(model: str | Path, revision: str | None) -> tuple[Path, str, bool]:
    """Return the folder with the small files, the revision, and whether it is a local folder.

    Args:
        revision: a branch, tag or commit of a Hub model that names none; None for its default branch.

    Raises:
        InputError: no such folder, Hub model or revision, no safetensors, or see ``check_weights``.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{model} holds no *.safetensors weights; calset reads no other format")
        check_weights(folder)
        return folder, folder_revision(folder), True
    name, asked = hub_name(model)
    no_id = name.startswith((".", "~")) or name.count("/") != 1 or str(model).endswith("@")
    if isinstance(model, Path) or folder.is_absolute() or no_id:
        raise InputError(
            f"no model folder {model}; pass a folder or a Hub id such as Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@REVISION"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    revision = asked or revision
    check_token()
    try:
        snapshot = Path(
            snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, tqdm_class=progress_bar())
        )
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}; name a branch, a tag or a commit") from error
    except Exception as error:
        what = f"{name} at revision {revision}" if revision else "a model of that name"
        raise InputError(f"there is no folder {model}, and the Hub did not give {what}: {first_line(error)}") from error
    check_weights(snapshot)
    return snapshot, snapshot.name, False


def recorded_name(model: str | Path, folder: Path, is_local: bool) -> str:
    """A folder goes by its own name, not by its path: the revision tells same-named ones apart on any machine."""
    if not is_local:
        return hub_name(model)[0]
    resolved = folder.resolve()
    return "tiny-lrm" if resolved == bundled.MODEL.resolve() else resolved.name

"""Datasets on the Hugging Face Hub: a revision resolved once to a commit, and a split's data files at that commit.

Why not ``datasets.load_dataset``: offline it silently returns another cached revision than the one asked for
(huggingface/datasets #7928), and it converts whole datasets where a preview needs one file. Here everything is
addressed by commit, comes from the cache where it is there, and each file is downloaded when reading reaches it.
The progress bar is that of models' downloads too.

Must not know: what the files' columns mean.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calset.errors import CalsetError, InputError, first_line
from calset.io.files import size
from calset.io.retry import Backoff, retried
from calset.io.rows import file_type

T = TypeVar("T")
Layout = dict[str, dict[str, tuple[str, ...]]]  # config -> split -> the files' paths in the repository

PREFIX = "hf:"
BACKOFF = Backoff(first=1.0, longest=32.0)
ATTEMPTS = 4
CARD_BYTES = 4 << 20  # of a README.md; the longest, with thousands of configs, have 1 MB
DEFAULT = "default"
# The names that datasets takes for a split, and what may stand around them in a path.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:^|/)data/([^/]+)-\d{5}-of-\d{5,}[^/]*$")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """One split of a dataset at one commit."""

    repo: str
    revision: str  # the commit's sha
    config: str
    split: str
    files: tuple[str, ...]
    licence: str | None  # as the dataset's card says
    n_rows: int | None  # as the dataset's card says

    @property
    def name(self) -> str:
        """``org/name:config:split``, without the config where it is the only one's ``default``."""
        return ":".join([self.repo, *([self.config] if self.config != DEFAULT else []), self.split])

    def fetch(self, file: str) -> Path:
        """A file's place in the cache, downloaded if it is not there.

        Raises:
            InputError: no access.
            CalsetError: it is not in the cache and the Hub cannot be reached.
        """
        with hub_errors(self.repo, self.revision, file):
            return fetch(self.repo, self.revision, file)


def open_dataset(
    repo: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    split: str | None = None,
    types: Collection[str],
) -> HubDataset:
    """Find a split's files. Only the list of files and the card are downloaded.

    Args:
        repo: ``org/name``.
        revision: a branch, tag or commit; the default branch when None. A commit asks the Hub nothing that the cache
            knows.
        config, split: needed where the dataset has several and none of them is the usual one.
        types: the types of file (``.parquet``) that the caller can read.

    Raises:
        InputError: no such dataset, revision, config or split (names what there is), or no access.
        CalsetError: what is needed is not in the cache and the Hub cannot be reached.
    """
    if not re.fullmatch(r"[^/]+/[^/]+", repo):
        raise InputError(f"{repo!r} is no dataset's name; write hf:ORG/NAME")
    with hub_errors(repo, revision, None):
        commit = patiently(lambda: _commit(repo, revision), connecting=True)
        card, files = patiently(lambda: _card_and_files(repo, commit))
    # Scripts and pictures are no split; where nothing else is there, they are at least named in the error.
    data = [file for file in files if file_type(file) in types] or files
    layout = lay_out(card, data, config)
    chosen = _pick(repo, "config", config, list(layout), _default_config(card))
    splits = layout[chosen]
    part = _pick(repo, "split", split, list(splits), "train")
    readable = tuple(file for file in splits[part] if file_type(file) in types)
    if not readable:
        there = ", ".join(sorted({file_type(file) or file for file in splits[part]})) or "nothing"
        raise InputError(
            f"{repo} keeps its split {part} in files of the type {there}, not in one that calset reads "
            f"({', '.join(types)}); @refs/convert/parquet may have it"
        )
    return HubDataset(repo, commit, chosen, part, readable, licence_of(card), _n_rows(card, chosen, part))


def _commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    return HfApi().resolve_revision(repo, repo_type="dataset", revision=revision).resolved


def _card_and_files(repo: str, commit: str) -> tuple[dict[str, Any], list[str]]:
    """The card's metadata and the names of all files, both from the cache once they have been there."""
    from huggingface_hub import get_cached_repo_tree, metadata_load, snapshot_download

    # .gitattributes: a pattern that no file meets is a warning.
    patterns = ["README.md", ".gitattributes"]
    require_card_size(repo, sizes(repo, commit, patterns[:1]).get("README.md", 0))
    folder = snapshot_download(
        repo, repo_type="dataset", revision=commit, allow_patterns=patterns, tqdm_class=progress_bar(shown=False)
    )
    names = [file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=commit)]
    try:
        card = metadata_load(Path(folder) / "README.md") if "README.md" in names else None
    except Exception:  # a card that is not YAML says nothing; the files' names still may
        card = None
    return card or {}, sorted(names)


def progress_bar(*, shown: bool | None = None) -> Any:
    """The library's progress bar, or a silent one: it draws bars into files and pipes too.

    Args:
        shown: default: where the standard error is a terminal.
    """
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return None if (sys.stderr.isatty() if shown is None else shown) else Silent


def tags_of(repo: str) -> dict[str, str]:
    """A dataset's tags: name -> commit."""
    from huggingface_hub import HfApi

    refs = patiently(lambda: HfApi().list_repo_refs(repo, repo_type="dataset"), connecting=True)
    return {tag.name: tag.target_commit for tag in refs.tags}


def sizes(repo: str, commit: str, paths: Sequence[str]) -> dict[str, int]:
    """Bytes of those of a dataset's files that are not in the cache, as the Hub lists them; {} when offline."""
    from huggingface_hub import HfApi, RepoFile, constants, try_to_load_from_cache

    def is_cached(path: str) -> bool:
        return isinstance(try_to_load_from_cache(repo, path, repo_type="dataset", revision=commit), str)

    missing = [path for path in paths if not is_cached(path)]
    if not missing or constants.HF_HUB_OFFLINE:
        return {}
    listed = patiently(
        lambda: HfApi().get_paths_info(repo, missing, revision=commit, repo_type="dataset"), connecting=True
    )
    return {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}


def require_card_size(repo: str, n_bytes: int | None) -> None:
    """Refuse a card that is too long to be parsed.

    Raises:
        InputError: it has more than ``CARD_BYTES``.
    """
    if n_bytes is not None and n_bytes > CARD_BYTES:
        raise InputError(
            f"README.md of {repo} has {size(n_bytes)}, and calset reads cards of up to {size(CARD_BYTES)}: shorten it, "
            "or take another repository"
        )


def fetch(repo: str, commit: str, path: str, *, again: bool = False) -> Path:
    """A dataset's file at a commit, from the cache if it is there; ``again`` downloads it anew."""
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(
            repo, path, repo_type="dataset", revision=commit, force_download=again, tqdm_class=progress_bar()
        )

    return Path(patiently(download))


# --- which files are a config's split: pure ---------------------------------------------------------------------


def lay_out(card: Mapping[str, Any], files: Sequence[str], config: str | None = None) -> Layout:
    """A dataset's files by config and split, as ``datasets`` takes them: by the card's ``configs``, else by names.

    Args:
        card: the card's metadata.
        files: the paths of all files, sorted.
        config: a folder or file of this name is a config too where the card lists none.
    """
    aside = ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes")
    there = [file for file in files if Path(file).name not in aside]
    data = [file for file in there if not _hidden(file)]
    entries = [entry for entry in _list(card.get("configs")) if isinstance(entry, Mapping)]
    if entries:
        return {str(entry.get("config_name") or DEFAULT): _of_entry(entry, there) for entry in entries}
    if config not in (None, DEFAULT):
        own = [file for file in data if file.startswith(f"{config}/") or Path(file).name.split(".")[0] == config]
        if own:
            return {str(config): _by_convention(own, f"{config}/")}
    return {DEFAULT: _by_convention(data)}


def _of_entry(entry: Mapping[str, Any], files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    folder = str(entry.get("data_dir") or "").strip("/")
    prefix = f"{folder}/" if folder else ""
    patterns = entry.get("data_files")
    if not patterns:
        inside = [file for file in files if file.startswith(prefix) and not _hidden(file.removeprefix(prefix))]
        return _by_convention(inside, prefix)
    if isinstance(patterns, Mapping):
        named = list(patterns.items())
    elif all(isinstance(item, Mapping) for item in _list(patterns)):
        named = [(item.get("split", "train"), item.get("path", ())) for item in _list(patterns)]
    else:
        named = [("train", patterns)]
    found = {str(split): _matching([prefix + str(p) for p in _list(paths)], files) for split, paths in named}
    return {split: paths for split, paths in found.items() if paths}


def _matching(patterns: Sequence[str], files: Sequence[str]) -> tuple[str, ...]:
    from fsspec.utils import glob_translate

    asked = [pattern.removeprefix("./") for pattern in patterns]
    tests = [(re.compile(glob_translate(pattern)), _hidden(pattern)) for pattern in asked]
    return tuple(file for file in files if any(t.match(file) and (named or not _hidden(file)) for t, named in tests))


def _hidden(path: str) -> bool:
    """What ``datasets`` takes for no data unless a pattern names it: ``.cache/``, ``__pycache__/``."""
    *folders, name = path.split("/")
    return name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)


def _by_convention(files: Sequence[str], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """``data/SPLIT-00000-of-00001.parquet``, else a split's name in the files' names, else in their folders'."""
    sharded = _grouped(files, lambda file: (m := _SHARD.search(file)) and m[1])
    by_name = sharded or _grouped(files, lambda file: _split_in(Path(file).stem))
    by_folder = by_name or _grouped(files, lambda file: _split_in(str(Path(file.removeprefix(prefix)).parent)))
    return by_folder or ({"train": tuple(files)} if files else {})


def _grouped(files: Sequence[str], split_of: Callable[[str], str | None]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for file in files:
        if split := split_of(file):
            found.setdefault(split, []).append(file)
    return {split: tuple(paths) for split, paths in found.items()}


def _split_in(text: str) -> str | None:
    words = re.split(r"[-._ /\d]+", text.lower())
    return next((split for split, names in SPLITS.items() if any(name in words for name in names)), None)


def _default_config(card: Mapping[str, Any]) -> str:
    entries = [entry for entry in _list(card.get("configs")) if isinstance(entry, Mapping)]
    marked = [str(entry.get("config_name")) for entry in entries if entry.get("default") is True]
    return marked[0] if marked else DEFAULT


def _pick(repo: str, what: str, given: str | None, there: Sequence[str], usual: str) -> str:
    if given in there:
        return str(given)
    listed = ", ".join(there) or "none"
    if given is not None:
        raise InputError(f"{repo} has no {what} {given!r}; it has {listed}")
    if len(there) == 1 or usual in there:
        return usual if usual in there else there[0]
    if not there:
        raise InputError(f"{repo} has no data files")
    raise InputError(f"{repo} has several {what}s: {listed}; add {what}=NAME to the options after '?'")


def licence_of(card: Mapping[str, Any]) -> str | None:
    return ", ".join(str(item) for item in _list(card.get("license"))) or None


def _n_rows(card: Mapping[str, Any], config: str, split: str) -> int | None:
    for info in _list(card.get("dataset_info")):
        if isinstance(info, Mapping) and str(info.get("config_name") or DEFAULT) == config:
            for part in _list(info.get("splits")):
                if (
                    isinstance(part, Mapping)
                    and part.get("name") == split
                    and isinstance(part.get("num_examples"), int)
                ):
                    return part["num_examples"]
    return None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


# --- what can go wrong on the way -------------------------------------------------------------------------------


def patiently(ask: Callable[[], T], *, connecting: bool = False) -> T:
    """Ask again, a few times, when the Hub is overloaded or fails.

    Args:
        connecting: also when it cannot be reached. Downloads try that for half a minute themselves.
    """
    return retried(ask, BACKOFF, lambda error: is_transient(error, connecting), attempts=ATTEMPTS)


def is_transient(error: BaseException | None, connecting: bool) -> bool:
    """Overload, a server's failure or a broken download; what the library made of it keeps that as its cause."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if error is None or constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    if isinstance(error, http_error()):
        return connecting
    return "Consistency check failed" in str(error) or is_transient(error.__cause__, connecting)


def http_error() -> type[Exception]:
    """What all errors of the library's HTTP client derive from: httpx's before its version 2, httpx2's since."""
    from huggingface_hub import errors

    return vars(errors)["HTTPError"]


def check_token() -> None:
    """Refuse a token that no HTTP header can carry: the HTTP client would end in a traceback of its own.

    The error quotes nothing of the token, and neither does its cause.

    Raises:
        InputError: the token is no visible ASCII, or its file cannot be read.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return  # no token is sent
    try:
        token = get_token()
    except (PermissionError, IsADirectoryError, UnicodeError) as error:
        reason = "is no UTF-8 text" if isinstance(error, UnicodeError) else f"cannot be read ({error.strerror})"
        raise InputError(
            f"the Hugging Face token's file, {constants.HF_TOKEN_PATH}, {reason}; log in again with `hf auth login`"
        ) from None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise InputError(
            "the Hugging Face token (HF_TOKEN, or stored by `hf auth login`) holds a blank or a character that is not "
            "ASCII: set it again as the Hub shows it, or unset it"
        )


@contextmanager
def hub_errors(repo: str, revision: str | None, file: str | None) -> Iterator[None]:
    """The library's many errors as one line that says what to do."""
    from huggingface_hub import errors

    what = f"{repo}{f'@{revision}' if revision else ''}{f', file {file},' if file else ''}"
    try:
        check_token()
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: accept its conditions on its page on the Hub, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"the Hub has no dataset {repo}; if it is private, log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r}; name a branch, a tag or a commit") from error
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} is no dataset's name; write hf:ORG/NAME") from error
    except http_error() as error:
        raise _unreachable(what, error) from error
    except (
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
        errors.CachedRepoTreeNotFoundError,
        errors.OfflineModeIsEnabled,
    ) as error:
        if isinstance(error.__cause__, http_error()):
            raise _unreachable(what, error.__cause__) from error
        raise CalsetError(
            f"{what} is not in the cache, and the Hub cannot be reached; connect, or unset HF_HUB_OFFLINE"
        ) from error
    except OSError as error:  # a download that stays short, a full disk
        raise CalsetError(f"cannot download {what}: {error.strerror or first_line(error)}") from error


def _unreachable(what: str, error: Exception) -> CalsetError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return InputError(f"the Hub refuses the token for {what}; log in again with `hf auth login`")
    if status == 403:
        return InputError(f"the Hub gives no access to {what}; log in with `hf auth login` as someone who has it")
    said = f"answers {status}" if status else f"cannot be reached ({type(error).__name__})"
    return CalsetError(f"the Hub {said} for {what}; run the same command again later")

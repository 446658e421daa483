"""Names on the Hub: references, repositories, tags, and the paths of a subset's files in its repository.

Several subsets share a repository, each with a config, a manifest, a picture and tags of its own::

    README.md                                  the card
    data/<subset>/train-00000-of-00001.parquet  rows; a config per subset
    manifests/<subset>.json                    provenance, counts, licences, hashes
    plots/<subset>.png                         lengths and difficulties

Must not know: files, HTTP, the Hub's client library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from calset.catalog.subsets import versions
from calset.errors import InputError

PREFIX = "hub:"
# The Hub's own rule: at most 96 characters a part, no two dots or hyphens together, none at an end.
_REPO_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"


@dataclass(frozen=True, slots=True)
class HubReference:
    """``hub:org/repo/name@2``; without a version the latest that has a tag."""

    repo: str
    name: str
    version: int | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}/{self.name}{'' if self.version is None else f'@{self.version}'}"


def parse_hub(ref: str) -> HubReference:
    """A ``hub:`` reference.

    Raises:
        InputError: it is none.
    """
    parts = ref.removeprefix(PREFIX).split("/")
    if not ref.startswith(PREFIX) or len(parts) != 3:
        raise InputError(f"{ref!r} names no subset on the Hub: write hub:ORG/REPO/NAME or hub:ORG/REPO/NAME@VERSION")
    return HubReference(check_repo("/".join(parts[:2])), *versions.parse_reference(parts[2]))


def check_repo(repo: str) -> str:
    """A repository's name, ``ORG/NAME``.

    Raises:
        InputError: it cannot be one.
    """
    parts = repo.split("/")
    if len(parts) != 2 or not all(re.fullmatch(_REPO_PART, part) for part in parts) or repo.endswith(".git"):
        raise InputError(
            f"{repo!r} cannot name a repository on the Hub: write ORG/NAME, each of letters, digits, '.', '_' or '-'"
        )
    return repo


def tag_of(name: str, version: int) -> str:
    """``math-v2``."""
    return f"{name}-v{version}"


def versions_in(name: str, tags: Iterable[str]) -> list[int]:
    """The versions of a subset that have a tag, in order."""
    found = (re.fullmatch(rf"{re.escape(name)}-v([1-9]\d{{0,8}})", tag) for tag in tags)
    return sorted(int(match[1]) for match in found if match)


def manifest_path(name: str) -> str:
    return f"manifests/{name}.json"


def plot_path(name: str) -> str:
    return f"plots/{name}.png"


def data_folder(name: str) -> str:
    return f"data/{name}/"

"""Find published subsets on the Hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from calset.catalog.hub import card
from calset.io import hub


@dataclass(frozen=True, slots=True)
class Found:
    """A repository that calset published to; ``subsets`` are the names of its configs."""

    repo: str
    subsets: list[str]
    licence: str | None
    downloads: int | None
    updated_at: datetime | None
    private: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def search(text: str | None = None, *, author: str | None = None, limit: int = 50) -> list[Found]:
    """Published calset repositories: datasets with the tag ``calset``, the most downloaded first.

    Args:
        text: what their names hold.
        author: whose.

    Raises:
        CalsetError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with hub.hub_errors("the list of repositories", None, None):
        found = HfApi().list_datasets(
            filter=card.TAG,
            search=text,
            author=author,
            limit=limit,
            sort="downloads",
            expand=["cardData", "downloads", "lastModified", "private"],
        )
        return [_found(info) for info in found]


def _found(info: Any) -> Found:
    metadata = info.card_data.to_dict() if info.card_data else {}
    configs = metadata.get("configs")
    names = [str(c.get("config_name")) for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    return Found(
        repo=info.id,
        subsets=names,
        licence=hub.licence_of(metadata),
        downloads=info.downloads,
        updated_at=info.last_modified,
        private=bool(info.private),
    )

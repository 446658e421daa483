"""Publish a subset: check that it may be published, make its files, and hand them to ``upload``.

The token is huggingface_hub's own business and never passes through here. Must not know: what the files hold
(``release``), what the card says (``card``), how the commit and the tag are made (``upload``).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from calset.catalog.catalog import Catalog
from calset.catalog.hub import card, release
from calset.catalog.hub.names import check_repo
from calset.catalog.hub.upload import Publishing, writing_to
from calset.catalog.records import Publication, Subset
from calset.catalog.subsets import versions
from calset.errors import InputError
from calset.io import hub


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What was published, or would be: ``files`` are (path in the repository, bytes), all but the card."""

    repo: str
    ref: str
    content_hash: str
    tag: str
    commit: str | None  # None of a dry run
    new: bool  # False when the Hub had it already, and of a dry run
    public: bool
    url: str | None
    files: list[tuple[str, int]]
    card: str
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- publishing ---------------------------------------------------------------------------------------------------


def publish(
    subset: Subset | str,
    repo: str,
    *,
    catalog: Catalog | str | Path | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> PublishReport:
    """Publish a subset to a dataset repository: one commit, then the tag ``NAME-vVERSION``.

    Run again, after whatever happened, it finds what it did before and does the rest. A repository that does
    not exist is made, private.

    Args:
        subset: a subset of the catalog, or ``name`` or ``name@2``.
        repo: ``org/name``; several subsets may share one.
        public: make the repository public once the release is whole. Without it a public one is refused.
        dry_run: only make the files and the card; the Hub is not asked.

    Raises:
        InputError: not logged in, no such subset, no access, or other content is there under this name and version.
        CalsetError: the Hub cannot be reached, or failed too often; run the same again.
    """
    check_repo(repo)
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subset = versions.load(catalog, subset) if isinstance(subset, str) else subset
    versions.check_name(subset.name)
    if not dry_run:
        _check_login()
    with tempfile.TemporaryDirectory(prefix="calset-publish-") as folder:
        made = release.make(
            subset, catalog, Path(folder), model_licence=_model_licence(subset, catalog, ask=not dry_run)
        )
        report = PublishReport(
            repo=repo,
            ref=subset.ref,
            content_hash=subset.content_hash,
            tag=made.tag,
            commit=None,
            new=False,
            public=public,
            url=None,
            files=[(path, file.stat().st_size) for path, file in made.files.items()],
            card=card.render(repo, [made.manifest]),
            warnings=_licence_warnings(made.manifest, public),
        )
        if dry_run:
            return report
        with writing_to(repo):
            placed = Publishing(repo, made, public).run()
    known = Publication(subset.name, subset.version, subset.content_hash, repo, placed.commit, made.tag)
    catalog.add_publication(known)
    done = {"commit": placed.commit, "new": placed.new, "public": placed.public, "url": placed.url}
    return replace(report, **done, card=placed.card or report.card)


def _check_login() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("publishing needs the Hub: unset HF_HUB_OFFLINE, or see what it would do with --dry-run")
    hub.check_token()
    if get_token() is None:
        raise InputError(
            "publishing needs a login: run `hf auth login` with a token that may write, then the same again"
        )


def _licence_warnings(manifest: Mapping[str, Any], public: bool) -> list[str]:
    unknown = card.unknown_licences(manifest)
    if not unknown:
        return []
    rest = "; it would be public: make sure that you may publish it" if public else ""
    return [f"no licence is known of {', '.join(unknown)}{rest}"]


def _model_licence(subset: Subset, catalog: Catalog, *, ask: bool) -> str | None:
    """What the model's card says: of its folder where that is still here, else of the Hub's at the same revision."""
    from huggingface_hub import hf_hub_download, metadata_load, try_to_load_from_cache

    if not subset.model:
        return None
    sql = "SELECT model_path FROM runs WHERE model = ? AND model_revision = ? AND model_path IS NOT NULL"
    rows = catalog.rows(sql, [subset.model, subset.model_revision]) if catalog.exists() else []
    cards = [Path(row["model_path"]) / "README.md" for row in rows]
    try:
        if not any(map(os.path.isfile, cards)) and "/" in subset.model and not os.path.exists(subset.model):
            name, revision = subset.model, subset.model_revision
            options = {"local_files_only": not ask, "tqdm_class": hub.progress_bar()}
            if ask and not isinstance(try_to_load_from_cache(name, "README.md", revision=revision), str):
                told = hf_hub_download(name, "README.md", revision=revision, dry_run=True)
                hub.require_card_size(name, told.file_size)
            cards = [Path(hf_hub_download(name, "README.md", revision=revision, **options))]
        small = [path for path in cards if os.path.isfile(path) and path.stat().st_size <= hub.CARD_BYTES]
        found = [metadata_load(path) for path in small]
    except Exception:  # no such model there, no access, no YAML: unknown, which the warnings say
        return None
    return next(filter(None, (hub.licence_of(metadata or {}) for metadata in found)), None)

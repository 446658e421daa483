"""Subsets on the Hugging Face Hub: publish one, pull it, find those of others.

A release is one commit and one tag that never moves. Reading turns a tag into a commit once, and checks every file's
sha256 and the content hash of the rows. The token is huggingface_hub's own business and never passes through here.
Must not know: what the files hold (``release``), what the card says (``card``), how writing recovers (``publishing``).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from calset import hubfiles
from calset.catalog import card, release, subsets
from calset.catalog.catalog import Catalog
from calset.catalog.export import write_folder
from calset.catalog.facts import published_rows
from calset.catalog.manifest import require_size
from calset.catalog.names import HubReference, check_repo, manifest_path, parse_hub, tag_of, versions_in
from calset.catalog.publishing import Publishing, writing_to
from calset.catalog.records import Publication, Subset
from calset.errors import CalsetError, InputError


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
    subset = subsets.load(catalog, subset) if isinstance(subset, str) else subset
    subsets.check_name(subset.name)
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
    hubfiles.check_token()
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
            options = {"local_files_only": not ask, "tqdm_class": hubfiles.progress_bar()}
            if ask and not isinstance(try_to_load_from_cache(name, "README.md", revision=revision), str):
                told = hf_hub_download(name, "README.md", revision=revision, dry_run=True)
                hubfiles.require_card_size(name, told.file_size)
            cards = [Path(hf_hub_download(name, "README.md", revision=revision, **options))]
        small = [path for path in cards if os.path.isfile(path) and path.stat().st_size <= hubfiles.CARD_BYTES]
        found = [metadata_load(path) for path in small]
    except Exception:  # no such model there, no access, no YAML: unknown, which the warnings say
        return None
    return next(filter(None, (hubfiles.licence_of(metadata or {}) for metadata in found)), None)


# --- pulling ------------------------------------------------------------------------------------------------------


def pull(ref: str, catalog: Catalog | str | Path | None = None, *, directory: str | Path | None = None) -> Subset:
    """Download a published subset, check it, and keep it in the catalog under its own name and version.

    Args:
        ref: ``hub:org/repo/name@2``, or without a version the latest.
        directory: also write it there as an exported folder.

    Returns:
        the subset; ``origin`` says where it comes from.

    Raises:
        InputError: no such subset, no access, other content than was published, a manifest of a newer schema, or
            another subset under this name and version in the catalog.
        CalsetError: it is not in the cache and the Hub cannot be reached.

    Warns:
        TextsMissing: the texts beside the samples are not sound, and were left out.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    found = _open(parse_hub(ref))
    kept = subsets.keep(catalog, replace(found, data_files=()), published_rows(found))
    if directory is not None:
        write_folder(catalog, kept, directory)
    return kept


def open_reference(ref: str) -> Subset:
    """A ``hub:`` reference as a subset, checked; nothing is kept but the cache.

    Raises:
        InputError, CalsetError: see ``pull``.
    """
    return _open(parse_hub(ref))


def _open(ref: HubReference) -> Subset:
    with hubfiles.hub_errors(ref.repo, None if ref.version is None else tag_of(ref.name, ref.version), None):
        tag, commit, before = _resolve(ref)
        path = manifest_path(ref.name)
        require_size(f"{path} of {ref.repo}", hubfiles.sizes(ref.repo, commit, [path]).get(path, 0))
        folder = _download(ref.repo, commit, [path])
        manifest = release.open_manifest(folder, ref.name)
        if tag_of(ref.name, manifest["version"]) != tag:
            raise InputError(
                f"the tag {tag} of {ref.repo} points to {ref.name}@{manifest['version']}: its owner moved it"
            )
        _check_unmoved(ref, tag, commit, before, manifest)
        wanted = {file["path"]: file["bytes"] for file in manifest["files"]}
        listed = hubfiles.sizes(ref.repo, commit, list(wanted))
        if other := next((path for path, n_bytes in listed.items() if n_bytes != wanted[path]), None):
            raise InputError(
                f"{other} of {ref.repo} at {tag} is not the file that was published (another size, so it was not "
                "downloaded): it was changed on the Hub; ask its owner to publish a new version"
            )
        _download(ref.repo, commit, [path, *wanted])
        for path in release.damaged(folder, manifest):
            # A cache that was damaged, or a download that was: the library checks sizes only. Once more.
            if not _offline():
                hubfiles.fetch(ref.repo, commit, path, again=True)
    hub = {"repo": ref.repo, "commit": commit, "tag": tag, "manifest": manifest_path(ref.name)}
    return release.read(folder, manifest, hub)


def _resolve(ref: HubReference) -> tuple[str, str, str | None]:
    """The tag, its commit, and the commit that the cache remembers for it from before."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    tag = tag_of(ref.name, ref.version if ref.version is not None else _latest(ref))
    before = _cached_refs(ref.repo).get(tag)
    try:
        commit = hubfiles.patiently(
            lambda: HfApi().resolve_revision(ref.repo, repo_type="dataset", revision=tag).resolved, connecting=True
        )
    except RevisionNotFoundError as error:
        raise InputError(_no_such(ref, hubfiles.tags_of(ref.repo))) from error
    return tag, commit, before


def _latest(ref: HubReference) -> int:
    """The newest version that has a tag. Only the Hub can say; the cache's newest might be an old one."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        tags = hubfiles.tags_of(ref.repo)
    except (hubfiles.http_error(), OfflineModeIsEnabled) as error:
        known = versions_in(ref.name, _cached_refs(ref.repo))
        if getattr(error, "response", None) is not None or not known:
            raise
        raise CalsetError(
            f"only the Hub knows the latest version of {ref}, and it cannot be reached; the cache has "
            f"{', '.join(f'{ref}@{version}' for version in known)}: name one"
        ) from error
    versions = versions_in(ref.name, tags)
    if not versions:
        raise InputError(_no_such(ref, tags))
    return versions[-1]


def _no_such(ref: HubReference, tags: Mapping[str, str]) -> str:
    versions = versions_in(ref.name, tags)
    if versions:
        return f"{ref.repo} has no {ref.name}@{ref.version}; it has {', '.join(f'@{v}' for v in versions)}"
    return f"{ref.repo} has no subset {ref.name!r}: calset search lists what repositories hold"


def _check_unmoved(ref: HubReference, tag: str, commit: str, before: str | None, manifest: Mapping[str, Any]) -> None:
    """Refuse a tag that pointed to other content when it was last read here."""
    from huggingface_hub import constants

    if before in (None, commit):
        return
    old = _storage(ref.repo) / "snapshots" / str(before)
    try:
        known = release.open_manifest(old, ref.name)
    except InputError:
        return  # nothing was kept of what it was
    if known["content_hash"] == manifest["content_hash"]:
        return
    # Forget what was just read, or the next time it would be what was known.
    (_storage(ref.repo) / "refs" / tag).write_text(str(before))
    raise InputError(
        f"the tag {tag} of {ref.repo} was moved: it held the content {known['content_hash'][:12]} when it was pulled "
        f"to this machine, and holds {manifest['content_hash'][:12]} now. Published versions never change: ask its "
        f"owner; to take the new content, delete {ref.repo} from the cache ({constants.HF_HUB_CACHE}) with `hf cache`"
    )


def _download(repo: str, commit: str, paths: list[str]) -> Path:
    """Some files of a repository at a commit, from the cache where they are there."""
    from huggingface_hub import snapshot_download

    bar = hubfiles.progress_bar()
    return Path(
        hubfiles.patiently(
            lambda: snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=paths, tqdm_class=bar),
            connecting=True,
        )
    )


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _storage(repo: str) -> Path:
    """Where the cache keeps a repository: ``refs/<tag>`` holds a commit, ``snapshots/<commit>`` its files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"


def _cached_refs(repo: str) -> dict[str, str]:
    """Tag -> commit, as the cache remembers."""
    try:
        return {path.name: path.read_text().strip() for path in (_storage(repo) / "refs").iterdir() if path.is_file()}
    except OSError:
        return {}


# --- searching ----------------------------------------------------------------------------------------------------


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

    with hubfiles.hub_errors("the list of repositories", None, None):
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
        licence=hubfiles.licence_of(metadata),
        downloads=info.downloads,
        updated_at=info.last_modified,
        private=bool(info.private),
    )

"""Pull a published subset: a tag becomes a commit once, and every file and the content hash are checked.

What is in the cache is read offline.

Must not know: how a subset gets onto the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calset.catalog.catalog import Catalog
from calset.catalog.hub import release
from calset.catalog.hub.names import HubReference, manifest_path, parse_hub, tag_of, versions_in
from calset.catalog.records import Subset
from calset.catalog.subsets import versions
from calset.catalog.subsets.facts import published_rows
from calset.catalog.subsets.folder import write_folder
from calset.catalog.subsets.manifest import require_size
from calset.errors import CalsetError, InputError
from calset.io import hub


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
    kept = versions.keep(catalog, replace(found, data_files=()), published_rows(found))
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
    with hub.hub_errors(ref.repo, None if ref.version is None else tag_of(ref.name, ref.version), None):
        tag, commit, before = _resolve(ref)
        path = manifest_path(ref.name)
        require_size(f"{path} of {ref.repo}", hub.sizes(ref.repo, commit, [path]).get(path, 0))
        folder = _download(ref.repo, commit, [path])
        manifest = release.open_manifest(folder, ref.name)
        if tag_of(ref.name, manifest["version"]) != tag:
            raise InputError(
                f"the tag {tag} of {ref.repo} points to {ref.name}@{manifest['version']}: its owner moved it"
            )
        _check_unmoved(ref, tag, commit, before, manifest)
        wanted = {file["path"]: file["bytes"] for file in manifest["files"]}
        listed = hub.sizes(ref.repo, commit, list(wanted))
        if other := next((path for path, n_bytes in listed.items() if n_bytes != wanted[path]), None):
            raise InputError(
                f"{other} of {ref.repo} at {tag} is not the file that was published (another size, so it was not "
                "downloaded): it was changed on the Hub; ask its owner to publish a new version"
            )
        _download(ref.repo, commit, [path, *wanted])
        for path in release.damaged(folder, manifest):
            # A cache that was damaged, or a download that was: the library checks sizes only. Once more.
            if not _offline():
                hub.fetch(ref.repo, commit, path, again=True)
    origin = {"repo": ref.repo, "commit": commit, "tag": tag, "manifest": manifest_path(ref.name)}
    return release.read(folder, manifest, origin)


def _resolve(ref: HubReference) -> tuple[str, str, str | None]:
    """The tag, its commit, and the commit that the cache remembers for it from before."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    tag = tag_of(ref.name, ref.version if ref.version is not None else _latest(ref))
    before = _cached_refs(ref.repo).get(tag)
    try:
        commit = hub.patiently(
            lambda: HfApi().resolve_revision(ref.repo, repo_type="dataset", revision=tag).resolved, connecting=True
        )
    except RevisionNotFoundError as error:
        raise InputError(_no_such(ref, hub.tags_of(ref.repo))) from error
    return tag, commit, before


def _latest(ref: HubReference) -> int:
    """The newest version that has a tag. Only the Hub can say; the cache's newest might be an old one."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        tags = hub.tags_of(ref.repo)
    except (hub.http_error(), OfflineModeIsEnabled) as error:
        known = versions_in(ref.name, _cached_refs(ref.repo))
        if getattr(error, "response", None) is not None or not known:
            raise
        raise CalsetError(
            f"only the Hub knows the latest version of {ref}, and it cannot be reached; the cache has "
            f"{', '.join(f'{ref}@{version}' for version in known)}: name one"
        ) from error
    numbers = versions_in(ref.name, tags)
    if not numbers:
        raise InputError(_no_such(ref, tags))
    return numbers[-1]


def _no_such(ref: HubReference, tags: Mapping[str, str]) -> str:
    numbers = versions_in(ref.name, tags)
    if numbers:
        return f"{ref.repo} has no {ref.name}@{ref.version}; it has {', '.join(f'@{v}' for v in numbers)}"
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

    bar = hub.progress_bar()
    return Path(
        hub.patiently(
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

"""Subsets on the Hugging Face Hub: publish one, pull it, find those of others.

A release is one commit and one tag that never moves. The Hub's answers can be lost at any moment, so publishing is a
loop of "look at what is there, then do the next thing": what a look finds to be done already is not done again, and
the tag comes last, when the commit is known to hold every file. Reading turns a tag into a commit once, and checks
every file's sha256 and the content hash of the rows. The token is huggingface_hub's own business and never passes
through here. Must not know: what the files hold (``release``), what the card says (``card``), pruning.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings as python_warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset import hubfiles
from calset.catalog import card, release, subsets
from calset.catalog.catalog import Catalog
from calset.catalog.export import holds, write_folder
from calset.catalog.records import Publication, Subset
from calset.catalog.release import HubReference, Release, parse_hub
from calset.errors import CalsetError, InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub import HfApi

ATTEMPTS = 6  # at a commit or a tag, when others publish at the same time or the Hub fails
WAIT_SECONDS = 1.0  # before the second attempt; doubled with each


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
    release.check_repo(repo)
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
        with _publishing(repo):
            report = _Publishing(repo, made, public).run(report)
    assert report.commit is not None
    known = Publication(subset.name, subset.version, subset.content_hash, repo, report.commit, made.tag)
    catalog.add_publication(known)
    return report


def _check_login() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("publishing needs the Hub: unset HF_HUB_OFFLINE, or see what it would do with --dry-run")
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
    from huggingface_hub import hf_hub_download, metadata_load

    if not subset.model:
        return None
    sql = "SELECT model_path FROM runs WHERE model = ? AND model_revision = ? AND model_path IS NOT NULL"
    rows = catalog.rows(sql, [subset.model, subset.model_revision]) if catalog.exists() else []
    cards = [Path(row["model_path"]) / "README.md" for row in rows]
    try:
        if not any(map(os.path.isfile, cards)) and "/" in subset.model and not os.path.exists(subset.model):
            name, revision = subset.model, subset.model_revision
            cards = [Path(hf_hub_download(name, "README.md", revision=revision, local_files_only=not ask))]
        found = [metadata_load(path) for path in cards if os.path.isfile(path)]
    except Exception:  # no such model there, no access, no YAML: unknown, which the warnings say
        return None
    return next(filter(None, (hubfiles.licence_of(metadata or {}) for metadata in found)), None)


@contextmanager
def _publishing(repo: str) -> Iterator[None]:
    """What can go wrong while writing, in one line; and no progress bar in a file or a pipe."""
    from huggingface_hub import utils

    silence = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    try:
        if silence:
            utils.disable_progress_bars()
        with hubfiles.hub_errors(repo, None, None):
            yield
    except (RuntimeError, ValueError) as error:  # an upload that was refused, YAML that the Hub does not take
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        said = " ".join(str(cause).split())
        raise CalsetError(f"cannot publish to {repo}: {said}; nothing was tagged, run the same again") from error
    finally:
        if silence:
            utils.enable_progress_bars()


@dataclass(frozen=True, slots=True)
class _Place:
    """What a look at the repository found: its head, the subsets there, and where this release already is."""

    head: str
    public: bool
    tags: Mapping[str, str]  # tag -> commit
    manifests: Mapping[str, Mapping[str, Any]]  # of the subsets at the head
    paths: frozenset[str]  # of all files at the head
    found: str | None  # the commit that holds this very release whole


class _Publishing:
    """One release on its way into one repository."""

    def __init__(self, repo: str, made: Release, public: bool) -> None:
        from huggingface_hub import HfApi

        self.api: HfApi = HfApi()
        self.repo, self.made, self.public = repo, made, public
        self.subset = made.subset
        self.trees: dict[str, dict[str, Any]] = {}  # of commits, which do not change

    def run(self, report: PublishReport) -> PublishReport:
        commit, new, text = self._place()
        self._tag(commit)
        is_public = self._open_up() if self.public else not self._info().private
        return replace(
            report,
            commit=commit,
            new=new,
            public=is_public,
            url=f"{self.api.endpoint}/datasets/{self.repo}/tree/{self.made.tag}",
            card=text or report.card,
        )

    # -- the commit --

    def _place(self) -> tuple[str, bool, str | None]:
        """The commit that holds the release, made if there is none; whether it was, and its card."""
        sent = False
        for attempt in range(ATTEMPTS):
            place = self._look()
            if place.found is not None:
                return place.found, sent, None
            if place.public and not self.public:
                raise InputError(f"{self.repo} is public: add --public to publish {self.subset.ref} there")
            text = card.render(self.repo, [*place.manifests.values()], self._read_card(place))
            try:
                sent = True  # whether the answer arrives or not
                commit = self._send(place, text)
            except Exception as error:
                if attempt + 1 == ATTEMPTS or not _may_pass(error):
                    raise
                if not hubfiles.wait(error, WAIT_SECONDS * 2**attempt):
                    raise
                continue
            if not self._is_whole(commit, self.made.manifest):
                raise CalsetError(
                    f"{self.repo} does not hold what was sent to it (commit {commit[:12]}): not tagged; "
                    "run the same again"
                )
            return commit, True, text
        raise AssertionError("the last attempt returns or raises")

    def _send(self, place: _Place, text: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        stale = [
            path
            for path in place.paths
            if path.startswith(release.data_folder(self.subset.name)) and path not in self.made.files
        ]
        operations = [
            CommitOperationAdd("README.md", text.encode()),
            *(CommitOperationAdd(path, str(file)) for path, file in self.made.files.items()),
            *(CommitOperationDelete(path) for path in sorted(stale)),
        ]
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")  # of the card's YAML; errors raise
            done = self.api.create_commit(
                self.repo,
                operations,
                commit_message=_title(self.subset),
                commit_description=f"Content hash {self.subset.content_hash}",
                repo_type="dataset",
                parent_commit=place.head,
            )
        return done.oid

    def _look(self) -> _Place:
        info = self._info()
        tags = self._tags()
        head = str(info.sha)
        paths = self._paths(head)
        manifests: dict[str, Mapping[str, Any]] = {
            name: self._manifest(head, name)
            for path in sorted(paths)
            if (name := path.removeprefix("manifests/").removesuffix(".json")) and path == release.manifest_path(name)
        }
        found = self._find(head, tags, manifests.get(self.subset.name))
        manifests[self.subset.name] = self.made.manifest
        return _Place(head, not info.private, tags, manifests, frozenset(paths), found)

    def _find(self, head: str, tags: Mapping[str, str], there: Mapping[str, Any] | None) -> str | None:
        """The commit that holds this release.

        Raises:
            InputError: the name and version are taken by other content, or a newer version is there.
        """
        tagged = tags.get(self.made.tag)
        if tagged is not None:
            if self._holds(tagged):
                return tagged
            raise InputError(
                f"the tag {self.made.tag} of {self.repo} points to other content than {self.subset.ref} here: "
                "published versions never change; select again for a new version and publish that"
            )
        if there is None or there["version"] < self.subset.version:
            return None
        if there["version"] == self.subset.version:
            if there["content_hash"] != self.subset.content_hash:
                raise InputError(
                    f"{self.repo} holds another {self.subset.ref} (content hash {there['content_hash'][:12]}, not "
                    f"{self.subset.content_hash[:12]}): publish under another name, or a newer version"
                )
            return head if self._is_whole(head, there) else None
        # A newer version came after the commit of this one, whose answer was lost before its tag was made.
        if commit := self._in_history():
            return commit
        raise InputError(
            f"{self.repo} already holds {self.subset.name}@{there['version']}, which is newer than {self.subset.ref}: "
            "publish versions in their order, or into another repository"
        )

    def _in_history(self) -> str | None:
        commits = self.api.list_repo_commits(self.repo, repo_type="dataset")
        mine = (commit.commit_id for commit in commits if commit.title == _title(self.subset))
        return next((commit for commit in mine if self._holds(commit)), None)

    def _holds(self, commit: str) -> bool:
        """Whether a commit holds this very subset, whole."""
        if release.manifest_path(self.subset.name) not in self._paths(commit):
            return False
        there = self._manifest(commit, self.subset.name)
        same = ("version", "content_hash")
        return all(there[key] == getattr(self.subset, key) for key in same) and self._is_whole(commit, there)

    def _is_whole(self, commit: str, manifest: Mapping[str, Any]) -> bool:
        """Whether a commit's data files are those of a manifest, all of them and no other."""
        folder = release.data_folder(manifest["name"])
        there = {path: entry for path, entry in self._tree(commit).items() if path.startswith(folder)}
        wanted = {file["path"]: file for file in manifest["files"]}
        return set(there) == set(wanted) and all(
            entry.size == wanted[path]["bytes"] and (entry.lfs is None or entry.lfs.sha256 == wanted[path]["sha256"])
            for path, entry in there.items()
        )

    # -- the tag, and who may see it --

    def _tag(self, commit: str) -> None:
        """Tag the commit; that the tag is there and points to this release is as good."""
        from huggingface_hub.errors import HfHubHTTPError

        if self.made.tag in self._tags():
            return  # looked at already
        try:
            hubfiles.patiently(
                lambda: self.api.create_tag(self.repo, tag=self.made.tag, revision=commit, repo_type="dataset"),
                connecting=True,
            )
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 409:
                raise
            # Somebody made it meanwhile, or the answer of the first attempt was lost. Where does it point?
            target = self._tags().get(self.made.tag)
            if target is None or not self._holds(target):
                raise InputError(
                    f"the tag {self.made.tag} of {self.repo} was made by somebody else, for other content than "
                    f"{self.subset.ref} here: publish a newer version"
                ) from error

    def _open_up(self) -> bool:
        if self._info().private:
            hubfiles.patiently(
                lambda: self.api.update_repo_settings(self.repo, private=False, repo_type="dataset"), connecting=True
            )
        return True

    # -- what is there --

    def _info(self) -> Any:
        """The repository, made if there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        ask = lambda: self.api.repo_info(self.repo, repo_type="dataset")  # noqa: E731
        try:
            return hubfiles.patiently(ask, connecting=True)
        except RepositoryNotFoundError:
            hubfiles.patiently(
                lambda: self.api.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True),
                connecting=True,
            )
            return hubfiles.patiently(ask, connecting=True)

    def _tags(self) -> dict[str, str]:
        return _tags(self.api, self.repo)

    def _tree(self, commit: str) -> dict[str, Any]:
        """Path -> file (size, lfs) at a commit."""
        if commit not in self.trees:
            # The library itself asks again for its lists.
            entries = self.api.list_repo_tree(self.repo, recursive=True, revision=commit, repo_type="dataset")
            self.trees[commit] = {entry.path: entry for entry in entries if hasattr(entry, "size")}
        return self.trees[commit]

    def _paths(self, commit: str) -> set[str]:
        return set(self._tree(commit))

    def _manifest(self, commit: str, name: str) -> dict[str, Any]:
        path = release.manifest_path(name)
        return release.open_manifest(_fetch(self.repo, commit, path).parent.parent, name)

    def _read_card(self, place: _Place) -> str | None:
        if "README.md" not in place.paths:
            return None
        return _fetch(self.repo, place.head, "README.md").read_text(encoding="utf-8", errors="replace")


def _title(subset: Subset) -> str:
    return f"Publish {subset.ref}"


def _may_pass(error: Exception) -> bool:
    """Whether another look and another attempt can help: a parent that is no longer the head, or a failing Hub."""
    response = getattr(error, "response", None)
    stale = getattr(response, "status_code", None) in (409, 412)
    # The library reads the answer of the card's check as JSON before it looks at the status.
    return stale or isinstance(error, JSONDecodeError) or hubfiles.is_transient(error, connecting=True)


def _tags(api: HfApi, repo: str) -> dict[str, str]:
    """Tag -> commit."""
    refs = hubfiles.patiently(lambda: api.list_repo_refs(repo, repo_type="dataset"), connecting=True)
    return {tag.name: tag.target_commit for tag in refs.tags}


def _fetch(repo: str, commit: str, path: str, *, again: bool = False) -> Path:
    """A file at a commit, from the cache if it is there; ``again`` downloads it anew."""
    from huggingface_hub import hf_hub_download

    bar = hubfiles.progress_bar(shown=sys.stderr.isatty())
    return Path(
        hubfiles.patiently(
            lambda: hf_hub_download(
                repo, path, repo_type="dataset", revision=commit, force_download=again, tqdm_class=bar
            ),
            connecting=True,
        )
    )


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
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subset, folder, manifest = _open(parse_hub(ref))
    kept = subsets.keep(catalog, subset)
    if directory is not None and not holds(Path(directory), subset):
        write_folder(Path(directory), _rows(folder, manifest), {**manifest, **(subset.origin or {})})
    return kept


def open_reference(ref: str) -> Subset:
    """A ``hub:`` reference as a subset, checked; nothing is kept but the cache.

    Raises:
        InputError, CalsetError: see ``pull``.
    """
    return _open(parse_hub(ref))[0]


def _open(ref: HubReference) -> tuple[Subset, Path, dict[str, Any]]:
    """The subset, the downloaded repository, the manifest."""
    with hubfiles.hub_errors(ref.repo, None if ref.version is None else release.tag_of(ref.name, ref.version), None):
        tag, commit, before = _resolve(ref)
        folder = _download(ref.repo, commit, [release.manifest_path(ref.name)])
        manifest = release.open_manifest(folder, ref.name)
        if release.tag_of(ref.name, manifest["version"]) != tag:
            raise InputError(
                f"the tag {tag} of {ref.repo} points to {ref.name}@{manifest['version']}: its owner moved it"
            )
        _check_unmoved(ref, tag, commit, before, manifest)
        _download(ref.repo, commit, [release.manifest_path(ref.name), *(f["path"] for f in manifest["files"])])
        for path in release.damaged(folder, manifest):
            # A cache that was damaged, or a download that was: the library checks sizes only. Once more.
            if not _offline():
                _fetch(ref.repo, commit, path, again=True)
    hub = {"repo": ref.repo, "commit": commit, "tag": tag, "manifest": release.manifest_path(ref.name)}
    return release.read(folder, manifest, hub), folder, manifest


def _resolve(ref: HubReference) -> tuple[str, str, str | None]:
    """The tag, its commit, and the commit that the cache remembers for it from before."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    tag = release.tag_of(ref.name, ref.version if ref.version is not None else _latest(ref))
    before = _cached_refs(ref.repo).get(tag)
    try:
        commit = hubfiles.patiently(
            lambda: HfApi().resolve_revision(ref.repo, repo_type="dataset", revision=tag).resolved, connecting=True
        )
    except RevisionNotFoundError as error:
        raise InputError(_no_such(ref, _tags(HfApi(), ref.repo))) from error
    return tag, commit, before


def _latest(ref: HubReference) -> int:
    """The newest version that has a tag. Only the Hub can say; the cache's newest might be an old one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        tags = _tags(HfApi(), ref.repo)
    except (hubfiles.http_error(), OfflineModeIsEnabled) as error:
        known = release.versions_in(ref.name, _cached_refs(ref.repo))
        if getattr(error, "response", None) is not None or not known:
            raise
        raise CalsetError(
            f"only the Hub knows the latest version of {ref}, and it cannot be reached; the cache has "
            f"{', '.join(f'{ref}@{version}' for version in known)}: name one"
        ) from error
    versions = release.versions_in(ref.name, tags)
    if not versions:
        raise InputError(_no_such(ref, tags))
    return versions[-1]


def _no_such(ref: HubReference, tags: Mapping[str, str]) -> str:
    versions = release.versions_in(ref.name, tags)
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

    bar = hubfiles.progress_bar(shown=sys.stderr.isatty())
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


def published_rows(subset: Subset) -> pa.Table | None:
    """The rows, with their texts, of a subset that was pulled; None when they are no longer in the cache."""
    hub = (subset.origin or {}).get("hub")
    if not hub:
        return None
    try:
        folder = _storage(release.check_repo(hub["repo"])) / "snapshots" / subsets.check_name(hub["commit"])
        manifest = release.open_manifest(folder, subset.name)
        same = release.read(folder, manifest, hub).content_hash == subset.content_hash
    except InputError:
        return None
    return _rows(folder, manifest) if same else None


def _rows(folder: Path, manifest: Mapping[str, Any]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables([pq.read_table(folder / file["path"]) for file in manifest["files"]])


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

    with hubfiles.hub_errors("the search", None, None):
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

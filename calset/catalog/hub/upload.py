"""Upload a release: one commit, then a tag that never moves, whatever fails on the way.

The Hub's answers can be lost at any moment, so publishing is a loop of "look at what is there, then do the next thing":
what a look finds to be done already is not done again. The tag comes last, when the commit is known to hold every file.
Must not know: catalogs, what the files hold.
"""

from __future__ import annotations

import sys
import warnings as python_warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

from calset.catalog.hub import card, release
from calset.catalog.hub.names import data_folder, manifest_path
from calset.catalog.hub.release import Release
from calset.catalog.records import Subset
from calset.catalog.subsets.manifest import require_size
from calset.errors import CalsetError, InputError
from calset.io import hub
from calset.io.retry import retried

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTEMPTS = 6  # at a commit, when others publish at the same time or the Hub fails


@contextmanager
def writing_to(repo: str) -> Iterator[None]:
    """What can go wrong while writing, in one line; and no progress bar in a file or a pipe."""
    from huggingface_hub import utils

    silence = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    try:
        if silence:
            utils.disable_progress_bars()
        with hub.hub_errors(repo, None, None):
            yield
    except (RuntimeError, ValueError) as error:  # an upload that was refused, YAML that the Hub does not take
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        said = " ".join(str(cause).split())
        raise CalsetError(f"cannot publish to {repo}: {said}; nothing was tagged, run the same again") from error
    finally:
        if silence:
            utils.enable_progress_bars()


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a release stands; ``new`` when this run sent its commit, ``card`` where this run wrote one."""

    commit: str
    new: bool
    public: bool
    url: str
    card: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    """What a look at the repository found: its head, the subsets there, and where this release already is."""

    head: str
    public: bool
    manifests: Mapping[str, Mapping[str, Any]]  # of the subsets at the head
    paths: frozenset[str]  # of all files at the head
    found: str | None  # the commit that holds this very release whole


class Publishing:
    """One release on its way into one repository; ``public`` opens it to everybody at the end."""

    def __init__(self, repo: str, made: Release, public: bool) -> None:
        from huggingface_hub import HfApi

        self.api: HfApi = HfApi()
        self.repo, self.made, self.public = repo, made, public
        self.subset = made.subset
        self.trees: dict[str, dict[str, Any]] = {}  # of commits, which do not change
        # A commit: one whose answer may have been lost, and the present attempt at one.
        self.sent = self.sending = False

    def run(self) -> Placed:
        commit, new, text = self._place()
        self._tag(commit)
        is_public = self._open_up() if self.public else not self._info().private
        url = f"{self.api.endpoint}/datasets/{self.repo}/tree/{self.made.tag}"
        return Placed(commit, new, is_public, url, text)

    # -- the commit --

    def _place(self) -> tuple[str, bool, str | None]:
        """The commit that holds the release, made if there is none; whether it was, and its card."""
        # The questions of a look are asked again by themselves.
        may_pass = lambda error: self.sending and _may_pass(error)  # noqa: E731
        return retried(self._look_and_send, hub.BACKOFF, may_pass, attempts=ATTEMPTS)

    def _look_and_send(self) -> tuple[str, bool, str | None]:
        self.sending = False
        place = self._look()
        if place.found is not None:
            return place.found, self.sent, None
        if place.public and not self.public:
            raise InputError(f"{self.repo} is public: add --public to publish {self.subset.ref} there")
        text = card.render(self.repo, [*place.manifests.values()], self._read_card(place))
        self.sending = True
        try:
            commit = self._send(place, text)
        except Exception as error:
            self.sent = self.sent or not _is_stale(error)  # whose answer was lost may have arrived
            raise
        self.sending = False
        if not self._is_whole(commit, self.made.manifest):
            raise CalsetError(
                f"{self.repo} does not hold what was sent to it (commit {commit[:12]}): not tagged; run the same again"
            )
        return commit, True, text

    def _send(self, place: _Place, text: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        stale = [
            path
            for path in place.paths
            if path.startswith(data_folder(self.subset.name)) and path not in self.made.files
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
            if (name := path.removeprefix("manifests/").removesuffix(".json")) and path == manifest_path(name)
        }
        found = self._find(head, tags, manifests.get(self.subset.name))
        manifests[self.subset.name] = self.made.manifest
        return _Place(head, not info.private, manifests, frozenset(paths), found)

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
        if manifest_path(self.subset.name) not in self._paths(commit):
            return False
        there = self._manifest(commit, self.subset.name)
        same = ("version", "content_hash")
        return all(there[key] == getattr(self.subset, key) for key in same) and self._is_whole(commit, there)

    def _is_whole(self, commit: str, manifest: Mapping[str, Any]) -> bool:
        """Whether a commit's data files are those of a manifest, all of them and no other."""
        folder = data_folder(manifest["name"])
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
            hub.patiently(
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
            hub.patiently(
                lambda: self.api.update_repo_settings(self.repo, private=False, repo_type="dataset"), connecting=True
            )
        return True

    # -- what is there --

    def _info(self) -> Any:
        """The repository, made if there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        ask = lambda: self.api.repo_info(self.repo, repo_type="dataset")  # noqa: E731
        try:
            return hub.patiently(ask, connecting=True)
        except RepositoryNotFoundError:
            hub.patiently(
                lambda: self.api.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True),
                connecting=True,
            )
            return hub.patiently(ask, connecting=True)

    def _tags(self) -> dict[str, str]:
        return hub.tags_of(self.repo)

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
        path = manifest_path(name)
        require_size(f"{path} of {self.repo}", self._tree(commit)[path].size)
        return release.open_manifest(hub.fetch(self.repo, commit, path).parent.parent, name)

    def _read_card(self, place: _Place) -> str | None:
        if "README.md" not in place.paths:
            return None
        hub.require_card_size(self.repo, self._tree(place.head)["README.md"].size)
        return hub.fetch(self.repo, place.head, "README.md").read_text(encoding="utf-8", errors="replace")


def _title(subset: Subset) -> str:
    return f"Publish {subset.ref}"


def _may_pass(error: Exception) -> bool:
    """Whether another look and another attempt can help: a parent that is no longer the head, or a failing Hub."""
    # The library reads the answer of the card's check as JSON before it looks at the status.
    return _is_stale(error) or isinstance(error, JSONDecodeError) or hub.is_transient(error, connecting=True)


def _is_stale(error: Exception) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) in (409, 412)

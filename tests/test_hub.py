"""Subsets on the Hub, over HTTP from a Hub of our own: after whatever fails, a whole release or none, and never other
content than was published."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from factories import fill
from hypothesis import given
from hypothesis import strategies as st
from local_hub import TOKEN, Client, LocalHub
from warm import calset as run_calset
from warm import warm

import calset
from calset.catalog.catalog import Catalog
from calset.catalog.hub import card
from calset.catalog.hub.names import tag_of, versions_in
from calset.catalog.records import Subset
from calset.catalog.references import resolve
from calset.catalog.select import select
from calset.catalog.subsets.folder import MANIFEST_SCHEMA, read_directory
from calset.catalog.subsets.versions import load
from calset.cli import main
from calset.errors import CalsetError, InputError, TextsMissing
from calset.io.markdown import line

PLAN = [[("correct", 10 + n), ("correct", 20 + n), ("incorrect", 30), ("truncated", 40)] for n in range(12)]
TREE = {
    "README.md",
    ".gitattributes",
    "data/math/train-00000-of-00001.parquet",
    "manifests/math.json",
    "plots/math.png",
}


def publish(subset: str, repo: str, catalog: Path, **options: Any) -> Any:
    """Runs in the client's process, as all of these."""
    import calset

    return calset.publish(subset, repo, catalog=catalog, **options)


def pull(ref: str, catalog: Path, cache: Path, *, offline: bool = False, **options: Any) -> Subset:
    from huggingface_hub import constants

    import calset

    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(cache), offline
    try:
        return calset.pull(ref, catalog, **options)
    finally:
        constants.HF_HUB_OFFLINE = False


def search(**options: Any) -> list[Any]:
    import calset

    return calset.search(**options)


def cut(shard_bytes: int) -> None:
    """Shards so small that a test has several."""
    from calset.catalog.hub import release

    release.SHARD_BYTES = shard_bytes


WHOLE = 400_000_000


@pytest.fixture(scope="module")
def colleague(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Another process of somebody who may write too."""
    with hub.writer(tmp_path_factory.mktemp("colleague")) as process:
        yield process


@pytest.fixture(scope="module")
def _filled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    catalog = fill(tmp_path_factory.mktemp("catalog") / "c.duckdb", PLAN)
    select(catalog, "math", samples=6)
    select(catalog, "math", samples=4)
    select(catalog, "other", "rac", tokens=300)
    return catalog.path.read_bytes()


@pytest.fixture
def catalog(tmp_path: Path, _filled: bytes) -> Path:
    """A catalog with the subsets math@1, math@2 and other@1."""
    path = tmp_path / "catalog.duckdb"
    path.write_bytes(_filled)
    return path


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    return "me/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[-80:].strip("-")


def history(hub: LocalHub, repo: str) -> list[str]:
    """The titles of a repository's commits but the first, which makes it."""
    there = hub.repos.get(("dataset", repo))
    return list(there.titles.values())[1:] if there else []


def tags(hub: LocalHub, repo: str) -> dict[str, str]:
    there = hub.repos.get(("dataset", repo))
    return dict(there.tags) if there else {}


def files(hub: LocalHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    there = hub.repos["dataset", repo]
    return there.commits[there.resolve(revision) or ""]


def metadata_of(text: bytes) -> dict[str, Any]:
    return yaml.safe_load(text.decode().split("---")[1])


def ids_in(parquet: bytes) -> list[list[int]]:
    return pq.read_table(io.BytesIO(parquet))["input_ids"].to_pylist()


def check_release(hub: LocalHub, repo: str, catalog: Path, ref: str = "math@1") -> str:
    """The tag stands on a commit whose rows are the subset's; returns the commit."""
    subset = load(Catalog(catalog), ref)
    commit = tags(hub, repo)[tag_of(subset.name, subset.version)]
    there = files(hub, repo, commit)
    shards = sorted(path for path in there if path.startswith(f"data/{subset.name}/"))
    assert [ids for path in shards for ids in ids_in(there[path])] == [list(s.input_ids) for s in subset.samples]
    manifest = json.loads(there[f"manifests/{subset.name}.json"])
    assert manifest["content_hash"] == subset.content_hash
    assert [file["path"] for file in manifest["files"]] == shards
    return commit


def check_pull(client: Client, repo: str, catalog: Path, tmp_path: Path, ref: str = "math@1") -> Subset:
    """Somewhere else, with nothing in the cache, the same content comes back."""
    subset = load(Catalog(catalog), ref)
    pulled = client(pull, f"hub:{repo}/{ref}", tmp_path / "elsewhere.duckdb", tmp_path / "elsewhere")
    assert pulled == subset
    return pulled


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


# --- publishing --------------------------------------------------------------------------------------------------


def test_a_release_is_one_commit_and_a_tag_in_a_private_repository(
    hub: LocalHub, client: Client, catalog: Path, repo: str, tmp_path: Path
) -> None:
    report = client(publish, "math@1", repo, catalog)
    assert report.new
    assert hub.repos["dataset", repo].private
    assert history(hub, repo) == ["Publish math@1"]
    assert set(files(hub, repo)) == TREE
    assert tags(hub, repo) == {"math-v1": report.commit}
    assert check_release(hub, repo, catalog) == report.commit
    kept = Catalog(catalog).publications()
    assert [(p.name, p.version, p.repo, p.revision, p.tag) for p in kept] == [
        ("math", 1, repo, report.commit, "math-v1")
    ]
    manifest = json.loads(files(hub, repo)["manifests/math.json"])
    assert manifest["licences"] == {"questions": {"demo": "MIT"}, "model": None}
    assert [run["model"] for run in manifest["runs"]] == ["tiny"]
    pulled = check_pull(client, repo, catalog, tmp_path)
    assert pulled.origin is not None
    assert pulled.origin["hub"] == {
        "repo": repo, "commit": report.commit, "tag": "math-v1", "manifest": "manifests/math.json",
    }  # fmt: skip
    here = resolve("math@1", catalog).origin or {}
    assert pulled.origin["runs"] == manifest["runs"] == here["runs"]
    assert "hub" not in here  # where it was made


def test_publishing_again_makes_no_commit(hub: LocalHub, client: Client, catalog: Path, repo: str) -> None:
    first = client(publish, "math@1", repo, catalog)
    again = client(publish, "math@1", repo, catalog)
    assert (again.new, again.commit) == (False, first.commit)
    assert history(hub, repo) == ["Publish math@1"]
    assert len(Catalog(catalog).publications()) == 1


@pytest.mark.slow
def test_a_second_version_leaves_the_first_where_it_is(
    hub: LocalHub, client: Client, catalog: Path, repo: str, tmp_path: Path
) -> None:
    client(cut, 700)
    try:
        client(publish, "math@1", repo, catalog)
        client(cut, WHOLE)
        client(publish, "math@2", repo, catalog)
    finally:
        client(cut, WHOLE)
    first, second = check_release(hub, repo, catalog, "math@1"), check_release(hub, repo, catalog, "math@2")
    assert len([p for p in files(hub, repo, first) if p.startswith("data/")]) > 1
    assert set(files(hub, repo, second)) == TREE  # none of the first version's shards is left in the config
    latest = client(pull, f"hub:{repo}/math", tmp_path / "latest.duckdb", tmp_path / "cache")
    assert latest == load(Catalog(catalog), "math@2")
    check_pull(client, repo, catalog, tmp_path, "math@1")
    again = client(publish, "math@1", repo, catalog)
    assert (again.new, again.commit) == (False, first)
    assert history(hub, repo) == ["Publish math@1", "Publish math@2"]


@pytest.mark.slow
def test_an_older_version_does_not_replace_a_newer_one(hub: LocalHub, client: Client, catalog: Path, repo: str) -> None:
    client(publish, "math@2", repo, catalog)
    with pytest.raises(InputError, match=r"already holds math@2, which is newer") as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert history(hub, repo) == ["Publish math@2"]


@pytest.mark.slow
def test_a_second_subset_keeps_the_first_one_and_what_people_wrote(
    hub: LocalHub, client: Client, catalog: Path, repo: str
) -> None:
    client(publish, "math@1", repo, catalog)
    text = files(hub, repo)["README.md"].decode().replace("\n---\n", "\nlanguage: en\n---\nBy hand above.\n", 1)
    hub.commit(repo, {"README.md": f"{text}\nBy hand below.\n".encode(), "notes.txt": b"mine"})
    client(publish, "other@1", repo, catalog)
    there = files(hub, repo)
    both = there["README.md"].decode()
    assert [c["config_name"] for c in metadata_of(there["README.md"])["configs"]] == ["math", "other"]
    assert metadata_of(there["README.md"])["language"] == "en"
    assert both.index("By hand above.") < both.index("## math") < both.index("## other") < both.index("By hand below.")
    assert there["notes.txt"] == b"mine"
    check_release(hub, repo, catalog, "math@1")
    check_release(hub, repo, catalog, "other@1")


def test_it_is_public_only_when_asked(hub: LocalHub, client: Client, catalog: Path, repo: str) -> None:
    client(publish, "math@1", repo, catalog)
    assert hub.repos["dataset", repo].private
    report = client(publish, "math@1", repo, catalog, public=True)  # the same release, now for everybody
    assert not hub.repos["dataset", repo].private
    assert any("no licence is known of model tiny" in w and "public" in w for w in report.warnings)
    with pytest.raises(InputError, match=r"is public: add --public") as caught:
        client(publish, "math@2", repo, catalog)
    one_line(caught)
    assert history(hub, repo) == ["Publish math@1"]


def test_a_dry_run_asks_the_hub_nothing(hub: LocalHub, client: Client, catalog: Path, repo: str) -> None:
    before = len(hub.log)
    report = client(publish, "math@1", repo, catalog, dry_run=True)
    assert len(hub.log) == before
    assert {path for path, _ in report.files} == TREE - {"README.md", ".gitattributes"}
    assert all(size > 0 for _, size in report.files)
    assert "load_dataset" in report.card
    assert not Catalog(catalog).publications()


def test_without_a_login_it_says_how_to_log_in(hub: LocalHub, stranger: Client, catalog: Path, repo: str) -> None:
    with pytest.raises(InputError, match="hf auth login") as caught:
        stranger(publish, "math@1", repo, catalog)
    one_line(caught)
    assert ("dataset", repo) not in hub.repos


# --- a token that cannot be sent ---------------------------------------------------------------------------------


def _ask(what: str, token: str, catalog: Path, cache: Path) -> Any:
    from calset.builder.model.info import inspect
    from calset.diagnosis import hub
    from calset.io.hub import open_dataset

    os.environ["HF_TOKEN"] = token
    asked = {
        "publish": lambda: publish("math@1", "me/token", catalog),
        "pull": lambda: pull("hub:me/token/math@1", cache.with_name("token.duckdb"), cache),
        "search": search,
        "problems": lambda: open_dataset("me/token", types=(".jsonl",)),
        "model": lambda: inspect("me/token"),
        "doctor": lambda: list(hub()),
    }
    return asked[what]()


BAD_TOKENS = ("hf_abcdéfghi", "hf_abcd efghi", "hf_abcd\x01efghi", os.fsdecode(b"hf_abcd\xffefghi"), "")


def test_a_token_that_cannot_be_sent_is_one_line_without_it(hub: LocalHub, catalog: Path, tmp_path: Path) -> None:
    hub.commit("me/token", {"a.jsonl": b"{}"})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_bytes(b"hf_abcd\xffefghi")  # read where HF_TOKEN is empty
    before = len(hub.log)
    with hub.client(tmp_path / "home") as process:
        for token in BAD_TOKENS:
            for what in ("publish", "pull", "search", "problems", "model"):
                with pytest.raises(InputError, match=r"Hugging Face token.*(set it again|log in again)") as caught:
                    process(_ask, what, token, catalog, tmp_path / "cache")
                assert not re.search(r"abcd|efghi|xe9|xff", one_line(caught)), (token, what)
            (check,) = process(_ask, "doctor", token, catalog, tmp_path / "cache")
            assert (check.state, "token" in check.message) == ("problem", True)
            assert not re.search(r"abcd|efghi|xe9|xff", repr(check))
    assert len(hub.log) == before


def test_a_token_with_a_line_end_is_sent_without_it(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(f"{TOKEN}\n")
    with hub.client(tmp_path / "home") as process:
        pulled = process(pull, "hub:me/published/math@1", tmp_path / "mine.duckdb", tmp_path / "cache")
    assert pulled == load(Catalog(published), "math@1")


# --- what goes wrong while publishing ----------------------------------------------------------------------------

ENDPOINTS = {
    "the repository": "POST /api/repos/create",
    "the card's check": "POST /api/validate-yaml",
    "the upload modes": "POST .*/preupload/",
    "the upload": "PUT /lfs-upload/",
    "the commit": "POST .*/commit/",
    "the tag": "POST .*/tag/",
    "the list of tags": "GET .*/refs",
}


@pytest.mark.slow
def test_a_token_that_may_not_write_is_one_clear_line(hub: LocalHub, catalog: Path, repo: str, tmp_path: Path) -> None:
    with hub.client(tmp_path / "home", token="hf_of_somebody_else") as other:
        with pytest.raises(InputError, match="log in") as caught:
            other(publish, "math@1", repo, catalog)
        assert "hf_of" not in one_line(caught)
    assert ("dataset", repo) not in hub.repos


@pytest.mark.slow
def test_the_model_card_says_what_the_traces_are_under(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str
) -> None:
    hub.commit("org/model", {"README.md": b"---\nlicense: apache-2.0\n---\n"}, kind="model", branch="r1")
    catalog = fill(tmp_path / "c.duckdb", PLAN, model="org/model")
    select(catalog, "math", samples=3)
    report = client(publish, "math@1", repo, catalog.path)
    assert report.warnings == []
    assert metadata_of(files(hub, repo)["README.md"])["license"] == ["apache-2.0", "mit"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("what", ["the card's check", "the commit", "the tag", "the list of tags"])
def test_a_busy_hub_is_asked_again(
    hub: LocalHub, client: Client, catalog: Path, repo: str, what: str, status: int
) -> None:
    hub.fail(ENDPOINTS[what], status=status, times=2, body=b"<html>busy</html>")
    client(publish, "math@1", repo, catalog)
    assert history(hub, repo) == ["Publish math@1"]
    check_release(hub, repo, catalog)


@pytest.mark.slow
def test_it_waits_as_long_as_the_hub_says(hub: LocalHub, client: Client, catalog: Path, repo: str) -> None:
    hub.fail("POST .*/commit/", status=429, headers={"Retry-After": "1"}, seconds=1)
    asked = len(hub.asked("POST .*/commit/"))
    client(publish, "math@1", repo, catalog)
    assert len(hub.asked("POST .*/commit/")) == asked + 2
    hub.fail("POST .*/commit/", status=429, headers={"Retry-After": "3600"})  # nobody waits for that
    with pytest.raises(CalsetError, match="answers 429") as caught:
        client(publish, "math@2", repo, catalog)
    one_line(caught)
    assert history(hub, repo) == ["Publish math@1"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the repository", "the card's check", "the commit", "the tag", "the list of tags"])
def test_a_hub_that_stays_down_leaves_no_release_and_the_next_run_makes_it(
    hub: LocalHub, client: Client, catalog: Path, repo: str, what: str
) -> None:
    hub.fail(ENDPOINTS[what], times=50)
    with pytest.raises(CalsetError) as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert not tags(hub, repo)
    assert not Catalog(catalog).publications()
    hub.faults.clear()
    client(publish, "math@1", repo, catalog)
    assert history(hub, repo) == ["Publish math@1"]
    check_release(hub, repo, catalog)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("the repository", marks=pytest.mark.slow),
        "the commit",
        pytest.param("the tag", marks=pytest.mark.slow),
    ],
)
def test_a_lost_answer_is_not_a_second_release(
    hub: LocalHub, client: Client, catalog: Path, repo: str, what: str
) -> None:
    hub.fail(ENDPOINTS[what], "lost")
    client(publish, "math@1", repo, catalog)
    assert history(hub, repo) == ["Publish math@1"]
    check_release(hub, repo, catalog)


@pytest.mark.slow
def test_a_publisher_cut_off_after_its_commit_finds_it_again(
    hub: LocalHub, client: Client, colleague: Client, catalog: Path, repo: str
) -> None:
    hub.fail("POST .*/commit/", "lost")
    hub.fail("(GET|POST) /api/datasets/.*/(tag|commit)/", "drop", times=50)  # and no answer to what comes after it
    hub.fail("GET .*/refs", "drop", times=50)
    hub.faults[-1].times = 0
    hub.before_commit = lambda name: setattr(hub.faults[-1], "times", 50)
    with pytest.raises(CalsetError) as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert not tags(hub, repo)
    assert history(hub, repo) == ["Publish math@1"]
    hub.faults.clear()
    colleague(publish, "math@2", repo, catalog)  # its commit is no longer the head
    report = client(publish, "math@1", repo, catalog)
    assert history(hub, repo) == ["Publish math@1", "Publish math@2"]
    assert check_release(hub, repo, catalog, "math@1") == report.commit
    check_release(hub, repo, catalog, "math@2")


def test_two_publishers_at_once_both_succeed(
    hub: LocalHub, client: Client, colleague: Client, catalog: Path, repo: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.duckdb"
    other.write_bytes(catalog.read_bytes())
    hub.before_commit = lambda name: colleague(publish, "other@1", name, other)
    client(publish, "math@1", repo, catalog)
    assert len(hub.asked(rf"POST /api/datasets/{repo}/commit/")) == 3  # one of them had a stale parent
    assert history(hub, repo) == ["Publish other@1", "Publish math@1"]
    for ref in ("math@1", "other@1"):
        check_release(hub, repo, catalog, ref)
    assert [c["config_name"] for c in metadata_of(files(hub, repo)["README.md"])["configs"]] == ["math", "other"]


@pytest.mark.slow
def test_of_two_contents_under_one_name_the_first_stays(
    hub: LocalHub, client: Client, colleague: Client, catalog: Path, repo: str, tmp_path: Path
) -> None:
    other = fill(tmp_path / "other.duckdb", PLAN, model="another")
    select(other, "math", samples=3)
    hub.before_commit = lambda name: colleague(publish, "math@1", name, other.path)
    with pytest.raises(InputError, match=r"points to other content than math@1") as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert history(hub, repo) == ["Publish math@1"]
    check_release(hub, repo, other.path)
    assert not Catalog(catalog).publications()


@pytest.mark.slow
def test_a_parent_that_is_always_stale_ends_in_an_error(
    hub: LocalHub, client: Client, catalog: Path, repo: str
) -> None:
    hub.fail("POST .*/commit/", status=412, times=50)
    with pytest.raises(CalsetError, match=r"answers 412.*run the same command again") as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert 2 <= len(hub.asked(rf"POST /api/datasets/{repo}/commit/")) < 10
    assert not tags(hub, repo)


@pytest.mark.slow
def test_a_tag_that_points_elsewhere_is_an_error_for_the_publisher(
    hub: LocalHub, client: Client, catalog: Path, repo: str
) -> None:
    client(publish, "math@1", repo, catalog)
    client(publish, "math@2", repo, catalog)
    hub.repos["dataset", repo].tags["math-v1"] = tags(hub, repo)["math-v2"]
    with pytest.raises(InputError, match=r"tag math-v1 .* points to other content than math@1") as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert len(history(hub, repo)) == 2


@pytest.mark.slow
def test_an_upload_that_arrives_changed_is_not_released(
    hub: LocalHub, client: Client, catalog: Path, repo: str
) -> None:
    hub.objects.clear()
    hub.fail("PUT /lfs-upload/", "garble", times=2)
    with pytest.raises(CalsetError, match=f"{repo}") as caught:
        client(publish, "math@1", repo, catalog)
    one_line(caught)
    assert history(hub, repo) == []
    assert not tags(hub, repo)
    client(publish, "math@1", repo, catalog)
    check_release(hub, repo, catalog)


# --- pulling -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(hub: LocalHub, client: Client, tmp_path_factory: pytest.TempPathFactory, _filled: bytes) -> Path:
    """The catalog whose math@1 and math@2 stand in me/published."""
    path = tmp_path_factory.mktemp("published") / "c.duckdb"
    path.write_bytes(_filled)
    for ref in ("math@1", "math@2"):
        client(publish, ref, "me/published", path)
    return path


@pytest.fixture
def copy(hub: LocalHub, published: Path, repo: str) -> str:
    """A repository of one's own with the same releases."""
    there, here = hub.repos["dataset", "me/published"], hub.create(repo, private=True)
    here.commits, here.refs, here.tags = dict(there.commits), dict(there.refs), dict(there.tags)
    here.titles = dict(there.titles)
    return repo


def test_a_pulled_subset_is_kept_whole_with_where_it_comes_from(
    client: Client, published: Path, tmp_path: Path
) -> None:
    mine = Catalog(tmp_path / "mine.duckdb")
    pulled = client(pull, "hub:me/published/math@1", mine.path, tmp_path / "cache", directory=tmp_path / "out")
    kept = load(mine, "math@1")
    assert kept == pulled == load(Catalog(published), "math@1")
    assert kept.origin == pulled.origin
    folder = read_directory(tmp_path / "out")
    assert folder == pulled
    assert folder.origin is not None
    assert folder.origin["hub"] == (pulled.origin or {})["hub"]
    rows = pq.read_table(tmp_path / "out" / "data" / "train.parquet").to_pylist()
    assert all(row["text"] and row["verdict"] == "correct" and row["question"] for row in rows)


@pytest.mark.parametrize("how", ["pulled", "merged", "pulled again"])
def test_a_pulled_subset_is_exported_with_every_published_column_without_the_hub(
    hub: LocalHub, client: Client, published: Path, tmp_path: Path, how: str
) -> None:
    mine = Catalog(tmp_path / "mine.duckdb")
    client(pull, "hub:me/published/math@1", mine.path, tmp_path / "cache")
    if how == "merged":
        pulled, mine = mine, Catalog(tmp_path / "merged.duckdb")
        calset.merge(mine, pulled)
    elif how == "pulled again":  # as an older calset left it
        with mine.transaction() as con:
            con.execute("DELETE FROM published_rows").fetchall()
        with pytest.warns(TextsMissing, match=r"math@1 comes without .* calset pull hub:me/published/math@1 brings"):
            calset.export(mine, "math@1", tmp_path / "without")
        client(pull, "hub:me/published/math@1", mine.path, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    before = len(hub.log)
    there = files(hub, "me/published", "math-v1")
    table = pq.read_table(io.BytesIO(there["data/math/train-00000-of-00001.parquet"]))
    assert all(None not in column.to_pylist() for column in table.columns)  # or this shows nothing
    with pytest.raises(SystemExit) as ended:
        main(["export", "math@1", "-o", str(tmp_path / "out"), "--catalog", str(mine.path)])
    assert not ended.value.code
    assert pq.read_table(tmp_path / "out" / "data" / "train.parquet").equals(table)
    here, first = (
        json.loads(text) for text in ((tmp_path / "out" / "manifest.json").read_bytes(), there["manifests/math.json"])
    )
    assert here.pop("hub")["repo"] == "me/published"
    first.pop("files")
    assert here == first
    assert calset.diff(mine, "math@1", "math@1").distributions["verdict"] == {"correct": (6, 6)}
    page = calset.report(mine, "math@1", tmp_path / "math.html").read_text()
    assert "median difficulty" in page
    assert table["text"][0].as_py().replace("<", "&lt;").replace(">", "&gt;") in page
    assert len(hub.log) == before


def test_a_pulled_subset_can_be_published_elsewhere_with_all_that_is_known(
    hub: LocalHub, client: Client, published: Path, repo: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.duckdb"
    client(pull, "hub:me/published/math@1", mine, tmp_path / "cache")
    client(publish, "math@1", repo, mine)
    check_release(hub, repo, mine)
    here, there = files(hub, repo), files(hub, "me/published", "math-v1")
    rows = [pq.read_table(io.BytesIO(tree["data/math/train-00000-of-00001.parquet"])) for tree in (here, there)]
    assert rows[0].equals(rows[1])
    first, second = (json.loads(tree["manifests/math.json"]) for tree in (there, here))
    assert second["hub"]["repo"] == "me/published"  # where it was first
    for key in ("runs", "sources", "licences", "difficulty_quantiles", "recipe", "pool", "created_at"):
        assert second[key] == first[key]


def test_pulling_again_changes_nothing(client: Client, published: Path, tmp_path: Path) -> None:
    mine = Catalog(tmp_path / "mine.duckdb")
    for _ in range(2):
        client(pull, "hub:me/published/math@1", mine.path, tmp_path / "cache", directory=tmp_path / "out")
    assert mine.rows("SELECT count(*) AS n FROM subsets") == [{"n": 1}]
    assert mine.rows("SELECT count(*) AS n FROM subset_items") == [{"n": 6}]
    assert mine.rows("SELECT count(*) AS n FROM published_rows") == [{"n": 6}]


def test_a_subset_that_was_selected_here_keeps_to_its_own_traces(
    client: Client, published: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.duckdb"
    own.write_bytes(published.read_bytes())
    client(pull, "hub:me/published/math@1", own, tmp_path / "cache")
    assert Catalog(own).rows("SELECT count(*) AS n FROM published_rows") == [{"n": 0}]


def test_another_subset_under_the_name_is_not_replaced(client: Client, published: Path, tmp_path: Path) -> None:
    mine = fill(tmp_path / "mine.duckdb", PLAN, model="another")
    before = select(mine, "math", samples=3)
    with pytest.raises(InputError, match=r"holds another math@1: .*--catalog") as caught:
        client(pull, "hub:me/published/math@1", mine.path, tmp_path / "cache")
    one_line(caught)
    assert load(mine, "math") == before


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hub:me/published/math@7", r"has no math@7; it has @1, @2"),
        ("hub:me/published/nothing", r"has no subset 'nothing'"),
        ("hub:me/published/nothing@1", r"has no subset 'nothing'"),
        ("hub:me/nowhere/math", r"no dataset me/nowhere"),
        ("hub:me/published/../math", "write hub:ORG/REPO/NAME"),
        ("hub:me/published/..", "cannot name a subset"),
        ("hub:me/../math", "cannot name a repository"),
        ("hub:me/a b/math", "cannot name a repository"),
        ("hub:/x/math", "cannot name a repository"),
        ("hub:me/published/math@x", "not a subset"),
        ("me/published/math", "write hub:ORG/REPO/NAME"),
    ],
)
def test_a_reference_to_nothing_is_one_clear_line(
    client: Client, published: Path, tmp_path: Path, ref: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        client(pull, ref, tmp_path / "mine.duckdb", tmp_path / "cache")
    one_line(caught)
    assert not (tmp_path / "mine.duckdb").exists()


@pytest.mark.parametrize("name", ["math/1", "..", "a..b", "", "/etc/passwd", "math@"])
def test_a_name_that_would_be_a_path_is_never_published(client: Client, catalog: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        client(publish, name, "me/x", catalog, dry_run=True)
    one_line(caught)


@pytest.mark.parametrize("name", ["", "me", "me/x/y", "me/..", "../x", "me/x y", "me/x--y", "-me/x", "me/" + "x" * 97])
def test_a_repository_that_cannot_be_is_refused(client: Client, catalog: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a repository") as caught:
        client(publish, "math@1", name, catalog, dry_run=True)
    one_line(caught)


def test_a_private_repository_without_a_token_is_one_clear_line(
    stranger: Client, published: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no dataset me/published; if it is private, log in") as caught:
        stranger(pull, "hub:me/published/math@1", tmp_path / "mine.duckdb", tmp_path / "cache")
    one_line(caught)
    assert not (tmp_path / "mine.duckdb").exists()


@pytest.mark.slow
def test_the_command_line_says_in_one_line_what_is_wrong(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    for arguments, code, words in [
        (("pull", "hub:me/published/math@1"), 2, "if it is private, log in with `hf auth login`"),
        (("pull", "hub:me/published/../x"), 2, "write hub:ORG/REPO/NAME"),
        (("publish", "math@1", "me/x", "--catalog", published), 2, "hf auth login"),
        (("publish", "../x", "me/x", "--catalog", published), 2, "cannot name a subset"),
        (("export", "hub:me/nowhere/math", "-o", "out"), 2, "no dataset me/nowhere"),
    ]:
        done = run_calset(*arguments, cwd=tmp_path, **hub.settings(tmp_path / "home"))
        assert done.returncode == code, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("calset: ")
        assert words in line
        assert done.stdout == ""
    assert not (tmp_path / "calset.duckdb").exists()


def test_the_token_is_nowhere(hub: LocalHub, client: Client, published: Path, tmp_path: Path) -> None:
    client(pull, "hub:me/published/math@1", tmp_path / "mine.duckdb", tmp_path / "cache", directory=tmp_path / "out")
    token = TOKEN.encode()
    there = hub.repos["dataset", "me/published"]
    assert not any(token in content for tree in there.commits.values() for content in tree.values())
    written = [published, *(path for path in tmp_path.rglob("*") if path.is_file())]
    assert len(written) > 5
    assert not any(token in path.read_bytes() for path in written)


def test_what_was_pulled_once_is_there_offline(
    hub: LocalHub, client: Client, published: Path, copy: str, tmp_path: Path
) -> None:
    client(pull, f"hub:{copy}/math@1", tmp_path / "a.duckdb", tmp_path / "cache")
    before = len(hub.log)
    again = client(pull, f"hub:{copy}/math@1", tmp_path / "b.duckdb", tmp_path / "cache", offline=True)
    assert again == load(Catalog(published), "math@1")
    # Never another version than the one asked for, nor a guess at which is the latest.
    with pytest.raises(CalsetError, match=r"math@2 is not in the cache|@math-v2.* is not in the cache") as caught:
        client(pull, f"hub:{copy}/math@2", tmp_path / "b.duckdb", tmp_path / "cache", offline=True)
    one_line(caught)
    with pytest.raises(CalsetError, match=r"latest version .* cache has hub:.*/math@1") as caught:
        client(pull, f"hub:{copy}/math", tmp_path / "b.duckdb", tmp_path / "cache", offline=True)
    one_line(caught)
    assert len(hub.log) == before


@pytest.mark.slow
def test_a_hub_that_is_down_is_not_missed_for_what_was_pulled_once(
    hub: LocalHub, client: Client, published: Path, copy: str, tmp_path: Path
) -> None:
    client(pull, f"hub:{copy}/math@1", tmp_path / "a.duckdb", tmp_path / "cache")
    hub.fail(".*", "drop", times=1000)
    again = client(pull, f"hub:{copy}/math@1", tmp_path / "b.duckdb", tmp_path / "cache")
    assert again == load(Catalog(published), "math@1")


def test_a_tag_that_moves_is_noticed(hub: LocalHub, client: Client, copy: str, tmp_path: Path) -> None:
    client(pull, f"hub:{copy}/math@1", tmp_path / "a.duckdb", tmp_path / "cache")
    tree = files(hub, copy, "math-v2")
    forged = json.loads(tree["manifests/math.json"]) | {"version": 1}  # other content as version 1
    moved = hub.commit(copy, {"manifests/math.json": json.dumps(forged).encode()})
    hub.repos["dataset", copy].tags["math-v1"] = moved
    for _ in range(2):  # it is not forgotten
        with pytest.raises(InputError, match=r"tag math-v1 .* was moved") as caught:
            client(pull, f"hub:{copy}/math@1", tmp_path / "b.duckdb", tmp_path / "cache")
        one_line(caught)
    assert not (tmp_path / "b.duckdb").exists()


def test_a_tag_on_another_version_is_noticed_without_a_cache(
    hub: LocalHub, client: Client, copy: str, tmp_path: Path
) -> None:
    hub.repos["dataset", copy].tags["math-v1"] = tags(hub, copy)["math-v2"]
    with pytest.raises(InputError, match=r"points to math@2: its owner moved it") as caught:
        client(pull, f"hub:{copy}/math@1", tmp_path / "b.duckdb", tmp_path / "cache")
    one_line(caught)


@pytest.mark.parametrize("kind", ["truncate", "garble"])
def test_a_download_that_arrives_damaged_is_done_again(
    hub: LocalHub, client: Client, published: Path, tmp_path: Path, kind: str
) -> None:
    hub.fail("GET /lfs/", kind)
    pulled = client(pull, "hub:me/published/math@1", tmp_path / "mine.duckdb", tmp_path / "cache")
    assert pulled == load(Catalog(published), "math@1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncate", "garble"])
def test_a_download_that_stays_damaged_is_an_error(
    hub: LocalHub, client: Client, published: Path, tmp_path: Path, kind: str
) -> None:
    hub.fail("GET /lfs/", kind, times=1000)
    with pytest.raises(CalsetError) as caught:
        client(pull, "hub:me/published/math@1", tmp_path / "mine.duckdb", tmp_path / "cache")
    one_line(caught)
    assert not (tmp_path / "mine.duckdb").exists()
    hub.faults.clear()
    pulled = client(pull, "hub:me/published/math@1", tmp_path / "mine.duckdb", tmp_path / "cache")
    assert pulled == load(Catalog(published), "math@1")


def test_a_damaged_cache_is_mended(client: Client, published: Path, tmp_path: Path) -> None:
    client(pull, "hub:me/published/math@1", tmp_path / "a.duckdb", tmp_path / "cache")
    (blob,) = (p for p in tmp_path.glob("cache/*/blobs/*") if p.read_bytes().startswith(b"PAR1"))
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    with pytest.raises(InputError, match="another sha256"):
        client(pull, "hub:me/published/math@1", tmp_path / "b.duckdb", tmp_path / "cache", offline=True)
    again = client(pull, "hub:me/published/math@1", tmp_path / "b.duckdb", tmp_path / "cache")
    assert again == load(Catalog(published), "math@1")


def _other_rows(tree: Mapping[str, bytes]) -> dict[str, bytes]:
    """The Parquet file with one token changed."""
    (path,) = (p for p in tree if p.endswith(".parquet"))
    table = pq.read_table(io.BytesIO(tree[path]))
    rows = table.to_pylist()
    rows[2]["input_ids"][5] += 1
    sink = io.BytesIO()
    pq.write_table(table.from_pylist(rows, schema=table.schema), sink)
    return {path: sink.getvalue()}


def _other_rows_with_their_sums(tree: Mapping[str, bytes]) -> dict[str, bytes]:
    changed = _other_rows(tree)
    manifest = json.loads(tree["manifests/math.json"])
    for file in manifest["files"]:
        content = changed[file["path"]]
        file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {**changed, "manifests/math.json": json.dumps(manifest).encode()}


def _manifest(**changes: Any) -> Any:
    def change(tree: Mapping[str, bytes]) -> dict[str, bytes]:
        manifest = json.loads(tree["manifests/math.json"])
        kept = {key: value for key, value in {**manifest, **changes}.items() if value is not ...}
        return {"manifests/math.json": json.dumps(kept).encode()}

    return change


SUM = "0" * 64


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_other_rows, "another (sha256|size)"),
        (_other_rows_with_their_sums, "do not have the content hash"),
        (_manifest(schema=MANIFEST_SCHEMA + 1), "pip install -U calset"),
        (_manifest(content_hash="0" * 64), "do not have the content hash"),
        (_manifest(version=9), "points to math@9"),
        (_manifest(name="../../x"), "not the manifest of math"),
        (_manifest(files=[]), "lists no usable files"),
        (_manifest(files=[{"path": "../../../etc/passwd", "bytes": 1, "sha256": SUM}]), "lists no usable files"),
        (_manifest(files=[{"path": "README.md", "bytes": 1, "sha256": SUM}]), "lists no usable files"),
        (_manifest(files="all"), "lists no usable files"),
        (_manifest(recipe=...), "missing required field `recipe`"),
        (_manifest(runs=["x"]), r"is not a calset manifest .*runs"),
        (lambda tree: {"manifests/math.json": b"{"}, "cannot read"),
        (lambda tree: {"manifests/math.json": b"[1]"}, "not a calset manifest"),
        (lambda tree: {"manifests/math.json": None}, "has no manifests/math.json|not an exported subset"),
        (lambda tree: {p: None for p in tree if p.endswith(".parquet")}, "another sha256|not the file|missing"),
    ],
)
def test_what_was_tampered_with_is_never_taken(
    hub: LocalHub, client: Client, copy: str, tmp_path: Path, tamper: Any, message: str
) -> None:
    there = hub.repos["dataset", copy]
    there.refs["main"] = there.tags["math-v1"]
    there.tags["math-v1"] = hub.commit(copy, tamper(files(hub, copy, "math-v1")))
    with pytest.raises(CalsetError, match=message) as caught:
        client(pull, f"hub:{copy}/math@1", tmp_path / "mine.duckdb", tmp_path / "cache")
    one_line(caught)
    assert not (tmp_path / "mine.duckdb").exists()


# --- searching ---------------------------------------------------------------------------------------------------


def test_search_lists_what_calset_published(hub: LocalHub, client: Client, stranger: Client, published: Path) -> None:
    hub.commit("me/published-otherwise", {"README.md": b"---\ntags:\n- math\n---\n"})
    (found,) = client(search, text="me/published")
    assert (found.repo, found.subsets, found.licence, found.private) == (
        "me/published", ["math"], "mit, unknown", True,
    )  # fmt: skip
    assert client(search, text="me/published", author="nobody") == []
    assert stranger(search, text="me/published") == []  # it is private
    hub.fail("GET /api/datasets", status=400)
    with pytest.raises(CalsetError, match="answers 400") as caught:
        stranger(search)
    one_line(caught)


# --- the page in docs/ -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_about_the_hub_runs_against_one(hub: LocalHub, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "hub.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```(bash|python)\n(.*?)```", page, re.S)
    assert len(snippets) == 4
    env = {key: value for key, value in os.environ.items() if key != "CALSET_CATALOG"}
    env |= hub.settings(tmp_path / "home", token=TOKEN) | {"CALSET_ENGINE": "transformers"}
    env["PATH"] = f"{warm().programs()}{os.pathsep}{env['PATH']}"
    for language, code in snippets:
        runner = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else ["python", "-c"]
        done = subprocess.run([*runner, code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert history(hub, "my-org/calibration") == ["Publish sums@1"]
    assert not hub.repos["dataset", "my-org/calibration"].private
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert record["calibration"]["origin"]["hub"]["tag"] == "sums-v1"


# --- the card ----------------------------------------------------------------------------------------------------

NASTY = st.text(st.sampled_from("ab|<>`[]!*\n&\\\"'-# é"), max_size=12)
MANIFESTS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True),
            "version": st.integers(1, 99),
            "content_hash": st.just("0" * 64),
            "model": NASTY,
            "recipe": st.dictionaries(NASTY, NASTY, max_size=2),
            "n_samples": st.integers(0, 10**7),
            "n_tokens": st.integers(0, 10**12),
            "pool": st.dictionaries(NASTY, st.one_of(st.integers(), NASTY), max_size=2),
            "warnings": st.lists(NASTY, max_size=2),
            "runs": st.lists(st.fixed_dictionaries({"model": NASTY, "engine": NASTY}), max_size=2),
            "sources": st.just([]),
            "licences": st.fixed_dictionaries({"questions": st.dictionaries(NASTY, NASTY, max_size=2), "model": NASTY}),
        }
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda m: m["name"],
)


@given(MANIFESTS, NASTY)
def test_a_card_reads_back_whatever_the_texts_are(manifests: list[dict[str, Any]], before: str) -> None:
    text = card.render("me/x", manifests, before)
    metadata = metadata_of(text.encode())
    assert [c["config_name"] for c in metadata["configs"]] == sorted(m["name"] for m in manifests)
    assert "calset" in metadata["tags"]
    assert card.render("me/x", manifests, text) == text  # publishing again does not let it grow
    assert before.strip() in text
    body = text[text.index(card.BEGIN) + len(card.BEGIN) : text.rindex(card.END)]
    assert not re.search(r"<(?!!--)", body)  # no tag of anybody's
    for table in re.findall(r"(?:^\|.*\n)+", body, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


STRUCTURE = (
    "# a",
    "## a",
    "- a",
    "+ a",
    "* a",
    "1. a",
    "1) a",
    "> a",
    "---",
    "===",
    "~~~",
    "```",
    "    a",
    "a | b",
    "$a$",
)
PARTS = ("<b>a</b>", "<!-- a", f"{card.END} {card.BEGIN}", "![a](b)", "[a](b)", "[a]: b", "**a**", "__a__", "`a`")
LINKS = (
    "http://a.b/c",
    "www.a.b",
    "a@b.c",
    "<http://a.b>",
    "\\[a](b)",
    "&lt;b&gt;",
    "&#35; a",
    "@a",
    "a\x00\x1b[2J\u202eb",
)
HOSTILE = st.one_of(
    st.sampled_from(STRUCTURE + PARTS + LINKS),
    st.lists(
        st.sampled_from(STRUCTURE + PARTS + LINKS + ("\n", "\n\n", "\r", " ", "a", ":", "a.b-c_d")), max_size=5
    ).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    NASTY,
)


def _parsed(text: str) -> list[Any]:
    """The parts of a card below its YAML, in order, as a reader's Markdown program finds them."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    blocks = reader.parse(text.split("\n---\n", 1)[1])
    return [token for block in blocks for token in (block, *(block.children or ()))]


def _shape(text: str) -> list[tuple[str, str]]:
    """What stands in a card but its words: each part's kind, and where a link or picture leads."""
    ends = {"text", "softbreak", "inline", "html_block", "code_inline", "fence"}
    kept = [token for token in _parsed(text) if token.type not in ends]
    return [(token.type, str(token.attrs.get("href") or token.attrs.get("src") or "")) for token in kept]


@given(st.data())
def test_no_text_of_others_becomes_a_part_of_a_card(data: st.DataObject) -> None:
    def manifest(text: Any) -> dict[str, Any]:
        return {
            "name": "math", "version": 1, "content_hash": "0" * 64, "model": text(), "model_revision": text(),
            "tokenizer_hash": text(), "recipe": {"name": text(), f"k{text()}": text()}, "seed": 1,
            "n_samples": 3, "n_tokens": 9, "pool": {f"k{text()}": text()}, "warnings": [text(), text()],
            "runs": [{key: text() for key in ("model", "engine", "run_id")} | {"sampling": {f"k{text()}": text()}}],
            "sources": [], "licences": {"questions": {f"k{text()}": text()}, "model": text()},
        }  # fmt: skip

    plain = card.render("me/x", [manifest(lambda: "plain")])
    hostile = card.render("me/x", [manifest(lambda: data.draw(HOSTILE))])
    assert _shape(hostile) == _shape(plain)
    html = [token.content.strip() for token in _parsed(hostile) if token.type.startswith("html")]
    assert html == [card.BEGIN, card.END]
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", hostile, flags=re.S)
    assert (
        len(re.findall(r"://|www\.[a-z]", outside, re.IGNORECASE)) == 2
    )  # calset's own; some programs make links of them
    assert not re.search(r"[\x00\x1b\u202e]", hostile)


def test_a_text_of_a_card_reads_as_it_was() -> None:
    from html import unescape

    for text in ("Qwen/Qwen2.5-1.5B_it", "n_tokens > 5 AND source = 'a|b'", "# heading <b>", "1) one", "é 日本 - x"):
        assert unescape(line(text)) == text
    assert line("Qwen/Qwen2.5-1.5B_it, 50% (about 3)") == "Qwen/Qwen2.5-1.5B_it, 50% (about 3)"
    assert len(line("x" * 10**6)) < 2000


def test_licences_are_carried_as_the_hub_names_them() -> None:
    def manifest(model: str | None, **questions: str | None) -> dict[str, Any]:
        return {"model": "m", "licences": {"questions": questions, "model": model}}

    assert card.licences([manifest("MIT", a="mit")]) == "mit"
    assert card.licences([manifest("My own", a="CC-BY-4.0"), manifest(None, a="mit")]) == [
        "cc-by-4.0", "mit", "other", "unknown",
    ]  # fmt: skip
    assert card.unknown_licences(manifest(None, a="mit", b=None)) == ["questions of b", "model m"]


def test_versions_are_read_from_tags() -> None:
    there = ["math-v1", "math-v10", "math-v2", "math-vx", "math-v0", "other-v7", "math-v1-v3", "v1"]
    assert versions_in("math", there) == [1, 2, 10]
    assert versions_in("math-v1", there) == [3]

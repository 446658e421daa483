"""Manifests that may be anybody's: each is refused in one line, or everything that reads it afterwards works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import fewer
from factories import fill
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calset.catalog.catalog import Catalog
from calset.catalog.hub import card, release
from calset.catalog.hub.names import manifest_path
from calset.catalog.records import Subset
from calset.catalog.references import diff, export
from calset.catalog.report.page import report
from calset.catalog.select import select
from calset.catalog.subsets import versions
from calset.catalog.subsets.compare import tables
from calset.catalog.subsets.folder import MANIFEST, read_directory
from calset.errors import InputError
from calset.io.terminal import cell
from calset.pruning.calibration import read

MISSING, DEEP = "calset-test-missing", "calset-test-deep"  # stand for no key at all, and for 100,000 open brackets
PLACE = {"repo": "me/math", "commit": "0" * 40, "tag": "math-v1", "manifest": "manifests/math.json"}


class Bench:
    """One subset exported and as a repository of the Hub, whose manifests are written anew by each test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        catalog = fill(folder / "c.duckdb", [[("correct", 4), ("incorrect", 9)], [("correct", 6)]] * 4)
        subset = select(catalog, "math", "correct", stratify="source", difficulty=(0.0, 1.0), length_tokens=(1, 99))
        self.exported = export(catalog, subset, folder / "out")
        self.published = folder / "repo"
        self.published.mkdir()
        made = release.make(subset, catalog, self.published)
        self.manifests = {
            self.exported / MANIFEST: json.loads((self.exported / MANIFEST).read_text()) | {"hub": PLACE},
            self.published / manifest_path("math"): json.loads(json.dumps(made.manifest)),
        }
        self.empty = folder / "empty.duckdb"
        with Catalog(self.empty).transaction():
            pass

    def read(self, path: Path, manifest: dict[str, Any]) -> Subset:
        """The subset as ``resolve`` and ``pull`` read it, from a folder or a downloaded repository."""
        path.write_text(json.dumps(manifest).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000))
        if path.parent == self.exported:
            return read_directory(self.exported)
        return release.read(self.published, release.open_manifest(self.published, "math"), PLACE)

    def use(self, subset: Subset, manifest: dict[str, Any], *, publish: bool = False) -> None:
        """Everything that reads a subset which was pulled or named as a folder, and what reads its manifest."""
        work = self.folder / "work"
        work.mkdir()
        try:
            catalog = Catalog(shutil.copy(self.empty, work / "c.duckdb"))
            kept = versions.keep(catalog, subset)
            assert versions.load(catalog, kept.ref) == kept
            assert report(catalog, kept, work / "r.html").stat().st_size > 1000
            other = replace(kept, samples=kept.samples[1:])
            shown = [*diff(catalog, kept, other).rows(), *diff(catalog, other, kept).rows()]
            shown += [row for _, _, rows in tables(kept) for row in rows]
            shown += [tuple(listed.items()) for listed in versions.list_subsets(catalog)]
            assert "".join(cell(value) for row in shown for value in row).encode()
            again = read_directory(export(catalog, kept, work / "out"))
            assert again == subset
            if "files" in manifest:  # as it is found beside others when a further subset is published
                assert kept.ref in card.render("me/x", [manifest])
            if publish:  # which draws a picture of the rows, and takes a while
                (work / "repo").mkdir()
                assert kept.ref in card.render("me/x", [release.make(kept, catalog, work / "repo").manifest])
            assert read(kept).n_tokens == kept.n_tokens
        finally:
            shutil.rmtree(work)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("manifests"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a path, or without what is there."""
    tree = deepcopy(tree)
    if not path:
        return value
    if value == MISSING:
        del at(tree, path[:-1])[path[-1]]
    else:
        at(tree, path[:-1])[path[-1]] = value
    return tree


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"x": value}
    return value


ODD = st.one_of(
    st.sampled_from([None, True, 0, -1, 7, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), [], {}]),
    st.sampled_from(["", "x", MISSING, DEEP, "x" * 1_000_000, "\ud800", "a\nb\x1b[2J\x00", "2026-01-01T00:00+01:00"]),
    st.sampled_from([[[]], [None], ["x"], [1, 2], [1, 2, 3], {"x": None}, {"": []}, {"x": {"taken": 1}}]),
    st.builds(nested, st.integers(2, 400)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)  # fmt: skip


@settings(fewer(2), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_manifest_changed_anywhere_is_refused_or_usable(bench: Bench, data: st.DataObject) -> None:
    path, tree = data.draw(st.sampled_from(list(bench.manifests.items())))
    for _ in range(data.draw(st.integers(1, 2))):
        there = list(places(tree))
        # Also what stands elsewhere in it: a list of runs where a pool belongs.
        value = data.draw(ODD | st.sampled_from(there).map(lambda place, tree=tree: at(tree, place)))
        tree = changed(tree, data.draw(st.sampled_from(there)), value)
    subset, refusal = None, ""
    try:
        subset = bench.read(path, tree)
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 1000
    if subset is not None:
        bench.use(subset, tree)


def test_what_was_exported_and_published_is_usable(bench: Bench) -> None:
    for path, tree in bench.manifests.items():
        bench.use(bench.read(path, tree), tree, publish=True)


POOL = ("pool", "difficulty_length")


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("pool", "length_band"), "ab", "pool.length_band"),
        (("pool", "length_band"), [1], "pool.length_band"),
        (("pool", "strata"), {"x": {"taken": 1}}, "offered"),
        (("recipe", "stratify"), None, "pool has strata"),
        (POOL, {"lengths": ["short"], "taken_of": {"0 (always correct)": [[1, 2], [3, 4]]}}, "unequal rows"),
        (POOL, {"lengths": ["short"], "taken_of": {"x": [3]}}, "difficulty_length"),
        (("recipe", "order"), "backwards", "recipe: order must be one of"),
        (("recipe", "kind"), MISSING, "recipe lacks kind"),
        (("recipe", "difficulty"), [0.2], "recipe: difficulty must be two numbers"),
        (("recipe", "name"), ["x"], "recipe: name must be"),
        (("runs", 0, "max_tokens"), "many", "max_tokens"),
        (("runs", 0, "sampling"), 5, "sampling"),
        (("runs", 0, "command"), MISSING, "command"),
        (("sources", 0, "licence"), ["MIT"], "licence"),
        (("length_quantiles",), [1], "length_quantiles"),
        (("warnings",), [None], "warnings"),
        (("seed",), 2**63, "more than 64 bits"),
        (("seed",), 1.0, "seed"),
        (("version",), True, "version"),
        (("n_samples",), 10**6, "says n_samples 1000000, its rows have"),
        (("model_revision",), None, "model_revision"),
        (("extra",), nested(40), "nested more than"),
        (("extra",), DEEP, "nested too deeply"),
        (("extra",), float("nan"), "nan is not a number"),
        (("extra",), "\ud800", "utf-8"),
        (("created_at",), "0001-01-01T00:00:00+14:00", "date value out of range"),
        (("hub",), {"repo": "me/math"}, "commit"),
    ],
)  # fmt: skip
def test_what_is_read_later_is_checked_when_a_manifest_is_read(
    bench: Bench, place: tuple[Any, ...], value: Any, reason: str
) -> None:
    for path, tree in bench.manifests.items():
        with pytest.raises(InputError, match=reason) as caught:
            bench.read(path, changed(tree, place, value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [("recipe", "where"), ("model",), ("runs", 0, "command"), ("sources", 0, "name")])
def test_long_and_untrusted_texts_are_kept_as_texts(bench: Bench, place: tuple[Any, ...]) -> None:
    for path, tree in bench.manifests.items():
        odd = changed(tree, place, "<script>\x1b[2J|`" * 50_000)
        bench.use(bench.read(path, odd), odd)

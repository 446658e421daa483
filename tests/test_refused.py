"""What is tampered with, newer, or no name: refused by a real process in one line, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import fill
from warm import calset

from calset.catalog.catalog import Catalog
from calset.catalog.references import export
from calset.catalog.select import select


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of a few traces, a subset ``a`` and its export."""
    folder = tmp_path_factory.mktemp("refused")
    catalog = fill(folder / "calset.duckdb", [[("correct", 9), ("incorrect", 12)]] * 3)
    export(catalog, select(catalog, "a", "rac"), folder / "out")
    return folder


def refused(folder: Path, *arguments: str) -> str:
    """The one line of a refusal."""
    before = sorted(folder.iterdir())
    done = calset(*arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert sorted(folder.iterdir()) == before
    return line


@pytest.mark.parametrize("sql", ["DELETE FROM traces", "ATTACH 'x.duckdb'"])
def test_query_writes_to_a_file_only_what_a_select_answers(folder: Path, sql: str) -> None:
    assert "calset: " in refused(folder, "query", sql, "-o", "x.csv")


@pytest.mark.parametrize("name", ["../a", "a..b"])
def test_a_name_that_could_leave_its_folder(folder: Path, name: str) -> None:
    assert "cannot name a subset" in refused(folder, "select", name, "--recipe", "rac")
    assert "calset: " in refused(folder, "report", name, "-o", "x.html")


def _token(folder: Path) -> None:
    path = folder / "data" / "train.parquet"
    rows = pq.read_table(path)
    changed = rows.to_pylist()
    changed[0]["input_ids"][0] += 1
    pq.write_table(pa.Table.from_pylist(changed, schema=rows.schema), path)


def _order(folder: Path) -> None:
    path = folder / "data" / "train.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.take(list(reversed(range(rows.num_rows)))), path)


def _cut(folder: Path) -> None:
    path = folder / "data" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def _manifest(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (_token, "content hash"),
        (_manifest(content_hash="0" * 64), "content hash"),
        (_manifest(schema=99), "manifest schema 99"),
        pytest.param(_order, "content hash", marks=pytest.mark.slow),
        pytest.param(_cut, "cannot read", marks=pytest.mark.slow),
        pytest.param(_manifest(name="../a"), "cannot name a subset", marks=pytest.mark.slow),
        pytest.param(_manifest(schema="1"), "schema number", marks=pytest.mark.slow),
    ],
    ids=["token", "hash", "newer", "order", "cut", "name", "schema"],
)
def test_a_tampered_or_newer_export_is_used_by_nothing(
    folder: Path, tmp_path: Path, tamper: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    tamper(tmp_path / "copy" / "out")
    assert said in refused(tmp_path / "copy", "diff", "./out", "a")
    assert Catalog(tmp_path / "copy" / "calset.duckdb").exists()

"""Releases and exported folders that hold more than they say: refused before it is read, and nothing is kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fewer
from factories import fill
from hypothesis import given
from hypothesis import strategies as st
from local_hub import TOKEN, LocalHub
from test_hub import pull

from calset.catalog.hub import release
from calset.catalog.references import export
from calset.catalog.select import select
from calset.catalog.subsets import manifest
from calset.catalog.subsets.folder import DATA, MANIFEST, read_directory
from calset.catalog.subsets.samplefiles import read_rows as read_texts
from calset.errors import InputError, TextsMissing
from calset.io.parquet import Bounds, read_batches
from calset.io.rows import read_document, read_rows

MANY = 6_000_000  # values: 24 MB as token ids, and 50 as lists, where calset's own counts say some hundred
LONG = "x" * 100_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported subset and the same one as a repository of the Hub."""
    folder = tmp_path_factory.mktemp("source")
    catalog = fill(folder / "c.duckdb", [[("correct", 10), ("correct", 12), ("incorrect", 9)]] * 8)
    subset = select(catalog, "math", samples=6)
    export(catalog, subset, folder / "out")
    (folder / "repo").mkdir()
    release.make(subset, catalog, folder / "repo")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """An exported folder of one's own."""
    there = tmp_path / "out"
    (there / "data").mkdir(parents=True)
    for path in (MANIFEST, DATA):
        (there / path).write_bytes((source / "out" / path).read_bytes())
    return there


def columns_of(path: Path) -> dict[str, Any]:
    table = pq.read_table(path)
    return dict(zip(table.schema.names, table.columns, strict=True))


def one_long_row(column: dict[str, Any]) -> dict[str, Any]:
    """The first row's tokens are repeated until there are ``MANY``."""
    lengths = [MANY, *[13] * (len(column["input_ids"]) - 1)]
    ids = pa.repeat(pa.scalar(7, pa.int32()), sum(lengths))
    offsets = pa.array([0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))], pa.int32())
    return {**column, "input_ids": pa.ListArray.from_arrays(offsets, ids)}


def many_rows(column: dict[str, Any]) -> dict[str, Any]:
    n = 200_000
    return {
        name: pa.repeat(values[0], n) for name, values in column.items() if name not in ("messages", "input_ids")
    } | {
        "input_ids": pa.ListArray.from_arrays(
            pa.array(range(n + 1), pa.int32()), pa.repeat(pa.scalar(7, pa.int32()), n)
        )
    }


def long_texts(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A text of 100 kB in each of 2,900 rows: 290 MB, where one is stored."""

    def change(column: dict[str, Any]) -> dict[str, Any]:
        n = 2900
        values = {key: pa.repeat(values[0], n) for key, values in column.items() if key != "messages"}
        return {**values, name: pa.repeat(pa.scalar(LONG), n)}

    return change


CASES = {"one long row": one_long_row, "many rows": many_rows, "long ids": long_texts("sample_id")}


def write(path: Path, columns: dict[str, Any], **options: Any) -> int:
    """Write the columns as a small file; returns the bytes that they take unpacked."""
    table = pa.table(columns)
    pq.write_table(table, path, compression="zstd", **options)
    assert path.stat().st_size < 300_000
    return table.nbytes


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_an_exported_folder_that_holds_more_than_its_manifest_says_is_refused(folder: Path, case: str) -> None:
    write(folder / DATA, CASES[case](columns_of(folder / DATA)))
    assert "manifest and its size allow for" in refusal(lambda: read_directory(folder))


@pytest.mark.parametrize(("case", "n_samples"), [("one long row", 6), ("many rows", 200_000), ("long ids", 2900)])
def test_a_manifest_that_says_as_much_as_the_file_holds_does_not_help(folder: Path, case: str, n_samples: int) -> None:
    write(folder / DATA, CASES[case](columns_of(folder / DATA)))
    there = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(there | {"n_tokens": 2**40, "n_samples": n_samples}))
    assert "manifest and its size allow for" in refusal(lambda: read_directory(folder))


def lying(path: Path, n_values: int) -> None:
    """Let the footer say that every column has as many values as rows; the pages stay as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8]
    number = zigzag(n_values)
    assert number in footer
    footer = footer.replace(number, zigzag(6) + b"" if len(zigzag(6)) == len(number) else padded(6, len(number)))
    path.write_bytes(content[: -8 - length] + footer + content[-8:])


def zigzag(value: int) -> bytes:
    return varint(value * 2)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def padded(value: int, length: int) -> bytes:
    """A number in more bytes than it needs, which Thrift takes."""
    short = zigzag(value)
    return short[:-1] + bytes([short[-1] | 128]) + b"\x80" * (length - len(short) - 1) + b"\x00"


def test_a_footer_that_counts_less_than_its_pages_hold_is_refused(folder: Path) -> None:
    columns = one_long_row(columns_of(folder / DATA))
    n_values = len(columns["input_ids"].flatten())
    write(folder / DATA, columns, data_page_size=1 << 30, max_rows_per_page=1 << 30)
    lying(folder / DATA, n_values)
    metadata = pq.read_metadata(folder / DATA).row_group(0)
    counts = {(c := metadata.column(i)).path_in_schema: c.num_values for i in range(metadata.num_columns)}
    assert counts["input_ids.list.element"] == 6
    assert "values in input_ids" in refusal(lambda: read_directory(folder))


def test_pipes_and_devices_are_no_data(folder: Path) -> None:
    for name in (DATA, Path(MANIFEST)):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refusal(lambda: read_directory(folder))
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refusal(lambda: read_directory(folder))
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    assert read_directory(folder).name == "math"


def test_a_file_of_another_encoding_or_type_is_refused(folder: Path) -> None:
    columns = columns_of(folder / DATA)
    write(folder / DATA, columns, use_dictionary=False, column_encoding={"sample_id": "DELTA_BYTE_ARRAY"})
    assert "encoded in a way" in refusal(lambda: read_directory(folder))
    write(folder / DATA, {**columns, "sample_id": pa.array([b"abcd"] * 6, pa.binary(4))})
    assert "of a type that no subset has" in refusal(lambda: read_directory(folder))
    write(folder / DATA, {name: values for name, values in columns.items() if name != "kind"})
    assert "it has no column kind" in refusal(lambda: read_directory(folder))


@pytest.mark.parametrize("writer", ["polars", "duckdb", "gzip", "lz4", "brotli", "none"])
def test_what_other_programs_write_is_read(source: Path, folder: Path, writer: str) -> None:
    import duckdb
    import polars

    good = source / "out"
    if writer == "polars":
        polars.read_parquet(good / DATA).write_parquet(folder / DATA)
    elif writer == "duckdb":
        duckdb.sql(f"COPY (FROM '{good / DATA}') TO '{folder / DATA}' (FORMAT parquet)")
    else:
        pq.write_table(pq.read_table(good / DATA), folder / DATA, compression=writer, data_page_version="2.0")
    assert (folder / DATA).read_bytes() != (good / DATA).read_bytes()
    assert read_directory(folder) == read_directory(good)
    assert read_texts(read_directory(folder)) == read_texts(read_directory(good))


TEXTS = st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=1, max_size=30)


@fewer(4)
@given(
    texts=TEXTS,
    version=st.sampled_from(["1.0", "2.0"]),
    dictionary=st.booleans(),
    compression=st.sampled_from(["none", "zstd", "snappy", "gzip"]),
    page=st.sampled_from([100, 10**6]),
    group=st.integers(1, 40),
)
def test_what_any_writer_makes_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    version: str,
    dictionary: bool,
    compression: str,
    page: int,
    group: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.parquet"
    rows = [{"ids": [i] * (i % 5), "text": t, "messages": [{"role": t}] * (i % 3)} for i, t in enumerate(texts)]
    schema = pa.schema(
        [
            ("ids", pa.list_(pa.int32())),
            ("text", pa.string()),
            ("messages", pa.list_(pa.struct([("role", pa.string())]))),
        ]
    )
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), path, data_page_version=version, use_dictionary=dictionary,
        compression=compression, data_page_size=page, row_group_size=group,
    )  # fmt: skip
    n_values = sum(len(row["ids"]) or 1 for row in rows) + sum(len(row["messages"]) or 1 for row in rows)
    exact = Bounds(len(rows), n_values, 10**6)
    read = [row for batch in read_batches([path], schema.names, exact) for row in batch.to_pylist()]
    assert read == rows
    for few in (Bounds(len(rows) - 1, n_values, 10**6), Bounds(len(rows), 0, 10**6), Bounds(len(rows), n_values, 1)):
        refusal(lambda few=few: list(read_batches([path], schema.names, few)))


def test_texts_that_are_no_utf8_and_difficulties_that_are_none_stay_out(source: Path, folder: Path) -> None:
    good = columns_of(folder / DATA)
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe"))
    cases = {
        "UTF8": {**good, "question": pa.chunked_array([bad] * 6)},
        "difficulty": {**good, "difficulty": pa.array([0.5] * 5 + [float("nan")])},
        "Unsupported cast": {**good, "text": pa.array([[1]] * 6)},
    }
    for said, columns in cases.items():
        write(folder / DATA, columns)
        with pytest.warns(TextsMissing, match=f"comes without .*{said}"):
            export(source / "none.duckdb", read_directory(folder), folder.parent / said)
        assert set(pq.read_table(folder.parent / said / DATA)["text"].to_pylist()) == {None}
    write(folder / DATA, {**good, "sample_id": pa.chunked_array([bad] * 6)})
    assert "UTF8" in refusal(lambda: read_directory(folder))


def test_files_that_change_after_they_were_checked_lend_no_texts(source: Path, folder: Path) -> None:
    subset = read_directory(folder)
    columns = columns_of(folder / DATA)
    write(folder / DATA, {name: values.take(pa.array([1, 0, 2, 3, 4, 5])) for name, values in columns.items()})
    with pytest.warns(TextsMissing, match="no longer holds the samples"):
        export(source / "none.duckdb", subset, folder.parent / "again")
    assert set(pq.read_table(folder.parent / "again" / DATA)["question"].to_pylist()) == {None}


# --- manifests and cards -----------------------------------------------------------------------------------------


def test_a_long_manifest_is_refused_before_it_is_parsed(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text() + " " * manifest.MAX_BYTES)
    assert "is too long for a manifest" in refusal(lambda: read_directory(folder))


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    catalog = fill(tmp_path / "c.duckdb", [[("correct", 10), ("incorrect", 9)]] * 3)
    subset = replace(select(catalog, "math"), warnings=["x" * manifest.MAX_BYTES])
    assert "is too long for a manifest" in refusal(lambda: export(catalog, subset, tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["c.duckdb"]


# --- the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(hub: LocalHub, source: Path, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Publish the subset's files, some of them changed, under the tag math-v1; returns the repository."""

    def put(changes: dict[str, bytes], *, sums: bool = True) -> str:
        root = source / "repo"
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()} | changes
        if sums:
            there = json.loads(files["manifests/math.json"])
            for file in there["files"]:
                content = files[file["path"]]
                file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            files["manifests/math.json"] = json.dumps(there).encode()
        repo = f"me/bounds-{abs(hash(request.node.name)) % 10**9}"
        hub.repos.pop(("dataset", repo), None)
        commit = hub.commit(repo, files)
        hub.repos["dataset", repo].tags["math-v1"] = commit
        return repo

    return put


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with hub.client(tmp_path_factory.mktemp("client"), token=TOKEN) as process:
        yield process


SHARD = "data/math/train-00000-of-00001.parquet"


def parquet(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_a_release_that_holds_more_than_its_manifest_says_is_not_pulled(
    client: Any, source: Path, repository: Any, tmp_path: Path, case: str
) -> None:
    repo = repository({SHARD: parquet(CASES[case](columns_of(source / "repo" / SHARD)))})
    said = refusal(lambda: client(pull, f"hub:{repo}/math@1", tmp_path / "c.duckdb", tmp_path / "cache"))
    assert "allow for" in said
    assert not (tmp_path / "c.duckdb").exists()


def test_texts_of_a_release_that_unpack_without_bound_are_left_out_of_an_export(
    client: Any, source: Path, repository: Any, tmp_path: Path
) -> None:
    """The samples are good, so they are kept; the texts beside them are not taken."""
    columns = columns_of(source / "repo" / SHARD)
    repo = repository({SHARD: parquet({**columns, "question": pa.repeat(pa.scalar("x" * (50 << 20)), 6)})})
    pulled = client(pull, f"hub:{repo}/math@1", tmp_path / "c.duckdb", tmp_path / "cache", directory=tmp_path / "out")
    assert read_directory(tmp_path / "out") == pulled
    assert set(pq.read_table(tmp_path / "out" / DATA)["question"].to_pylist()) == {None}


def test_a_long_manifest_is_not_even_downloaded(hub: LocalHub, client: Any, repository: Any, tmp_path: Path) -> None:
    repo = repository({"manifests/math.json": b" " * (manifest.MAX_BYTES + 1)}, sums=False)
    said = refusal(lambda: client(pull, f"hub:{repo}/math@1", tmp_path / "c.duckdb", tmp_path / "cache"))
    assert "is too long for a manifest" in said
    assert not hub.asked(rf"GET /datasets/{repo}/resolve/")
    assert not (tmp_path / "c.duckdb").exists()


def test_a_data_file_of_another_size_than_was_published_is_not_downloaded(
    hub: LocalHub, client: Any, source: Path, repository: Any, tmp_path: Path
) -> None:
    content = (source / "repo" / SHARD).read_bytes()
    repo = repository({SHARD: content + b"\0" * 10}, sums=False)
    before = len(hub.asked("GET /lfs/"))
    said = refusal(lambda: client(pull, f"hub:{repo}/math@1", tmp_path / "c.duckdb", tmp_path / "cache"))
    assert "another size" in said
    assert len(hub.asked("GET /lfs/")) == before
    assert not (tmp_path / "c.duckdb").exists()


def _card_of(repo: str) -> str:
    from calset.io.hub import open_dataset

    return str(open_dataset(repo, types=(".jsonl",)).licence)


def _publish(folder: Path, repo: str) -> None:
    import calset

    calset.publish("math@1", repo, catalog=folder / "c.duckdb")


def test_a_card_too_long_to_be_parsed_is_not_downloaded(hub: LocalHub, client: Any, source: Path) -> None:
    from calset.io.hub import CARD_BYTES

    text = b"---\nlicense: mit\n---\n" + b" " * CARD_BYTES
    hub.create("me/long-card", private=True)
    hub.commit("me/long-card", {"README.md": text, "a.jsonl": b'{"question": "q"}\n'})
    for work in (lambda: client(_card_of, "me/long-card"), lambda: client(_publish, source, "me/long-card")):
        assert "README.md of me/long-card has 4.19 MB" in refusal(work)
    assert not hub.asked("GET /datasets/me/long-card/resolve/")


# --- other data files --------------------------------------------------------------------------------------------


def packed(path: Path, text: bytes, times: int) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        for _ in range(times):
            file.write(text)
    assert path.stat().st_size < 1_000_000
    return path


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.csv.zst"])
def test_a_line_without_an_end_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calset.io.rows.MAX_ITEM_CHARS", 1 << 20)
    path = packed(tmp_path / name, b"7" * (1 << 20), 100)
    assert "a.js" in (said := refusal(lambda: list(read_rows(path)))) or "a.csv" in said
    assert "longer than" in said


def test_a_packed_text_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calset.io.rows.MAX_ITEM_CHARS", 1 << 20)
    path = packed(tmp_path / "a.txt.zst", b"word " * 200_000, 100)
    assert "unpacks to more than" in refusal(lambda: read_document(path))

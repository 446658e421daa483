"""Text corpora of the recipe ``text``: where they may come from, how far they are read, what identifies them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import make_problem, make_run, make_source, make_trace
from local_hub import LocalHub

from calset import bundled, ids
from calset.catalog.catalog import Catalog
from calset.catalog.records import Subset
from calset.catalog.select import POOL_WINDOWS, select
from calset.catalog.subsets.text import open_corpus
from calset.errors import InputError

TEXTS = [f"Chapter {n}. " + "It was a bright cold day in April. " * (3 + n) for n in range(40)]


def catalog_at(path: Path) -> Catalog:
    """A catalog with one trace of the bundled model, whose tokenizer a text needs."""
    from transformers import AutoTokenizer

    catalog = Catalog(path)
    vocabulary = AutoTokenizer.from_pretrained(bundled.MODEL).get_vocab()
    run = make_run(str(bundled.MODEL), tokenizer_hash=ids.vocabulary_hash(vocabulary))
    catalog.add_source(make_source())
    catalog.add_problems([make_problem(1)])
    catalog.add_run(run)
    catalog.add_traces([make_trace(make_problem(1), run)])
    return catalog


def take(path: str, spec: str, **options: Any) -> Subset:
    """Runs in a client's process too."""
    return select(catalog_at(Path(path)), "text", "text", text=spec, **{"window": 16, **options})


def read(spec: str) -> tuple[str, list[str]]:
    corpus = open_corpus(spec)
    return corpus.digest, list(corpus.documents())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def joined(texts: list[str], tokenizer: Any) -> list[int]:
    token_ids: list[int] = []
    for n, text in enumerate(texts):
        token_ids += [tokenizer.eos_token_id] * (n > 0) + tokenizer.encode(text, add_special_tokens=False)
    return token_ids


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet", "folder"])
def test_documents_follow_each_other_with_the_end_token_between(tmp_path: Path, tokenizer: Any, name: str) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
        for n, text in enumerate(TEXTS):
            (tmp_path / name / f"{n:02}.txt").write_text(text)
        (tmp_path / name / "notes.md").write_text("not a part")
    else:
        write_rows(tmp_path / name, [{"text": text, "url": "u"} for text in TEXTS] + [{"text": None, "url": "u"}])
    subset = take(str(tmp_path / "c.duckdb"), str(tmp_path / name), order="catalog")
    whole = joined(TEXTS, tokenizer)
    assert [list(s.input_ids) for s in subset.samples] == [whole[i : i + 16] for i in range(0, len(whole) - 15, 16)]
    assert subset.pool["documents"] == len(TEXTS)
    assert subset.recipe["text"]["file"] == name
    assert subset.recipe["text"].get("column") == (None if name == "folder" else "text")


def test_a_packed_text_is_the_same_text(tmp_path: Path) -> None:
    plain, packed = tmp_path / "prose.txt", tmp_path / "prose.txt.gz"
    plain.write_text("".join(TEXTS))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, two = (take(str(tmp_path / f"{p.suffix}.duckdb"), str(p), tokens=200) for p in (plain, packed))
    assert one.content_hash == two.content_hash


def test_a_budget_reads_no_more_documents_than_it_needs(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "c.jsonl"
    write_rows(path, [{"text": text} for text in TEXTS])
    path.write_text(path.read_text() + "this line would fail\n")
    with pytest.raises(InputError, match=r"c\.jsonl:41 is not JSON"):
        take(str(tmp_path / "c.duckdb"), str(path))
    first = joined(TEXTS[:2], tokenizer)
    in_order = take(str(tmp_path / "c.duckdb"), str(path), tokens=len(first), order="catalog")
    assert in_order.pool["documents"] == 2 + (len(first) % 16 > 0)
    seeded = take(str(tmp_path / "c.duckdb"), str(path), samples=3)
    n = next(n for n in range(len(TEXTS)) if len(joined(TEXTS[:n], tokenizer)) >= 3 * 16 * POOL_WINDOWS)
    assert (seeded.pool["documents"], seeded.n_samples) == (n, 3)


def test_the_same_content_and_seed_give_the_same_subset_anywhere(tmp_path: Path) -> None:
    hashes = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        path = write_rows(tmp_path / place / "c.jsonl", [{"body": text} for text in TEXTS])
        specs = [take(str(tmp_path / f"{place}.duckdb"), f"{path}?text=body", tokens=64, seed=seed) for seed in (0, 1)]
        hashes.append([subset.content_hash for subset in specs])
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[0][1]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gone.txt", "cannot read the text .*gone.txt: no such file; pass a text file, a folder"),
        ("c.jsonl", r"c\.jsonl:1 has no column 'text'; its columns: body, n \(choose with \?text=COLUMN\)"),
        ("c.parquet", r"c\.parquet has no column 'text'; its columns: body, n"),
        ("c.jsonl?text=n", r"c\.jsonl:1 holds a int in column 'n', not a text"),
        ("c.jsonl?column=n", "takes no option 'column'; it takes text"),
        ("empty", "the folder .*empty holds no .txt"),
        ("cut.txt.gz", "cut.txt.gz is not a whole gzip file"),
        ("short.jsonl", "less than one window of 16"),
    ],
)
def test_a_bad_corpus_is_said_in_a_line(tmp_path: Path, spec: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("c.jsonl", "c.parquet"):
        write_rows(tmp_path / name, [{"body": "x", "n": 1}])
    write_rows(tmp_path / "short.jsonl", [{"text": "x"}])
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(str(TEXTS).encode())[:40])
    with pytest.raises(InputError, match=says) as caught:
        take(str(tmp_path / "c.duckdb"), str(tmp_path / spec))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_hub_corpus_is_pinned_and_read_shard_by_shard(hub: LocalHub, tmp_path: Path) -> None:
    card = (
        b"---\nlicense: odc-by\nconfigs:\n- config_name: en\n  data_files:\n"
        b"  - split: train\n    path: en/c4-train.*.json.gz\n---\n"
    )

    def shard(texts: list[str]) -> bytes:
        return gzip.compress("".join(json.dumps({"text": t, "timestamp": "2019"}) + "\n" for t in texts).encode())

    shards = {f"en/c4-train.0000{n}-of-00004.json.gz": shard(TEXTS[10 * n : 10 * n + 10]) for n in range(4)}
    old = hub.commit("allenai/c4", {"README.md": card, **shards})
    spec = "hf:allenai/c4?config=en"
    with hub.client(tmp_path / "home") as client:
        with pytest.raises(InputError, match=r"too large to be taken whole: give a budget"):
            client(take, str(tmp_path / "a.duckdb"), spec)
        subset = client(take, str(tmp_path / "a.duckdb"), spec, tokens=64)
        assert len(hub.asked(r"GET .*c4-train.*json\.gz")) == 1
        where = {"hub": "allenai/c4", "revision": old, "config": "en", "split": "train", "column": "text"}
        assert subset.recipe["text"] == {**where, "licence": "odc-by"}
        digest, texts = client(read, spec)
        assert texts == TEXTS
        new = hub.commit("allenai/c4", {name: shard(TEXTS[::-1][:2]) for name in shards})
        moved, other_texts = client(read, spec)
        assert (moved != digest, other_texts) == (True, TEXTS[::-1][:2] * 4)
    with hub.client(tmp_path / "home", offline=True) as client:
        assert client(read, f"hf:allenai/c4@{old}?config=en") == (digest, texts)
        assert client(read, f"hf:allenai/c4@{new}?config=en") == (moved, other_texts)

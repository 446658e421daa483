"""Plain-text corpora for recipes of the kind ``text``: a text, a folder, a column of rows, a dataset on the Hub.

Documents are read as they are asked for, because a selection needs a few thousand of C4's 365 million. What a corpus
says of itself identifies its content: a hash of local files, a commit of the Hub.
Must not know: tokenizers, windows, budgets, and, as all of the catalog, the builder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calset import ids
from calset.errors import InputError
from calset.io.hub import PREFIX, open_dataset
from calset.io.rows import ROW_TYPES, file_type, list_files, read_document, read_rows
from calset.io.specs import parse, parse_options

TYPES = (".txt", *ROW_TYPES)
COLUMN = "text"
ACCEPTED = (
    "a text file, a folder of .txt files, a .jsonl, .json, .csv or .parquet file (FILE?text=COLUMN), or "
    "hf:ORG/NAME?config=C&split=S&text=COLUMN"
)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Args:
        facts: where they are from and what identifies them, for the subset's record.
        digest: identifies the content; equal for equal ones.
        documents: gives the texts from the start.
        whole: a single text, in memory already: all of its windows are there to choose from.
        endless: it may be too large to be read without a budget.
    """

    facts: Mapping[str, Any]
    digest: str
    documents: Callable[[], Iterator[str]] = field(repr=False)
    whole: bool = False
    endless: bool = False


def open_corpus(spec: str | Path) -> Corpus:
    """The corpus that a spec names.

    Args:
        spec: a text file (any name, also ``.gz`` and ``.zst``), a folder of ``.txt`` files or of files of rows, a
            ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, ``hf:org/name@revision?config=&split=``; rows hold
            the text in the column ``text`` unless ``?text=COLUMN`` says otherwise.

    Raises:
        InputError: nothing there, or not readable; says what would do.
        CalsetError: the Hub cannot be reached, and the cache has not got what is needed.
    """
    text = str(spec)
    if text.startswith(PREFIX):
        return _hub(text)
    if os.path.exists(text):
        name, options = text, {}
    else:
        name, options = parse_options(text, (COLUMN,))
    path, column = Path(name), options.get(COLUMN, COLUMN)
    if not os.path.exists(name):
        raise InputError(f"cannot read the text {text}: no such file; pass {ACCEPTED}")
    return _rows_or_folder(path, column) if path.is_dir() or file_type(path) in ROW_TYPES else _text(path)


def _text(path: Path) -> Corpus:
    content = read_document(path)
    digest = ids.text_hash(content)
    return Corpus({"file": path.name, "sha256": digest}, digest, lambda: iter([content]), whole=True)


def _rows_or_folder(path: Path, column: str) -> Corpus:
    files = list_files(path, TYPES)
    digest = ids.files_hash(files, path if path.is_dir() else None)
    facts = {"file": path.name or path.resolve().name, "sha256": digest}
    if any(file_type(file) in ROW_TYPES for file in files):
        facts["column"] = column
    return Corpus(
        facts,
        ids.digest("corpus", digest, facts.get("column")),
        lambda: (text for file in files for text in _documents(file, str(file), column)),
    )


def _hub(spec: str) -> Corpus:
    repo, revision, options = parse(spec.removeprefix(PREFIX), ("config", "split", COLUMN))
    column = options.get(COLUMN, COLUMN)
    dataset = open_dataset(
        repo, revision=revision, config=options.get("config"), split=options.get("split"), types=TYPES
    )
    facts = {
        "hub": repo,
        "revision": dataset.revision,
        "config": dataset.config,
        "split": dataset.split,
        "column": column,
        "licence": dataset.licence,
    }
    return Corpus(
        facts,
        ids.digest("corpus", repo, dataset.revision, dataset.config, dataset.split, column),
        lambda: (text for f in dataset.files for text in _documents(dataset.fetch(f), f"{repo}/{f}", column)),
        endless=True,
    )


def _documents(path: Path, label: str, column: str) -> Iterator[str]:
    """A file's texts; rows without any are passed over."""
    if file_type(path) not in ROW_TYPES:
        yield read_document(path, label=label)
        return

    def choose(names: Mapping[str, bool]) -> list[str]:
        _require(column, names, label)
        return [column]

    for number, row in read_rows(path, label=label, choose=choose):
        _require(column, row, f"{label}:{number}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{label}:{number} holds a {type(text).__name__} in column {column!r}, not a text")
        if text:
            yield text


def _require(column: str, names: Mapping[str, Any], label: str) -> None:
    if column not in names:
        raise InputError(
            f"{label} has no column {column!r}; its columns: {', '.join(names)} (choose with ?text=COLUMN)"
        )

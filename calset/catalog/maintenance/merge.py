"""Bringing another catalog's rows into this one: shards of a build, or what another machine collected.

Every table has a key; a row whose key is here stays as it is here, every other one is brought. So a merge is
idempotent, and one that was killed is simply run again: it is one transaction. Rows hang on others (tokens, grades and
judgements on their trace, items on their subset) and come with them or not at all.

Columns go by name, so that a column added to the schema needs nothing here. The other file may be anybody's: only the
tables of the schema are read, on connections that can reach no further file, and a file that holds anything else is
refused. Must not know: how the rows were made.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from calset.catalog.catalog import Catalog
from calset.catalog.store import definitions, migrations
from calset.catalog.store.connection import in_memory, opened, opened_as_it_is, quoted, translate
from calset.catalog.store.schema import TABLES
from calset.catalog.store.values import identifier
from calset.errors import InputError
from calset.io.progress import OnProgress, Progress, silent

# What a file says of itself.
OWN_TABLES = ("meta", "migrations")
# Table -> what makes two of its rows the same one. A table that is not here is compared by whole rows.
KEYS: Mapping[str, Sequence[str]] = {
    "sources": ("source_id",),
    "problems": ("problem_id",),
    "runs": ("run_id",),
    "traces": ("trace_id", "attempt"),
    "subsets": ("name", "version"),
    "trace_tokens": ("trace_id", "attempt"),
    "grades": ("trace_id", "attempt", "grader", "grader_version", "verdict", "graded_at"),
    "judgements": ("trace_id", "attempt", "judge", "judge_revision", "prompt_hash", "judged_at"),
    "contaminations": ("problem_id", "evaluation_source", "evaluation_revision", "evaluation_row", "n"),
    "subset_items": ("name", "version", "position"),
    "published_rows": ("name", "version", "position"),
    "prunings": ("pruning_id",),
    "evaluations": ("evaluation_id",),
}
# Child -> parent: such rows come only with a parent that was brought, or that is the same here and there.
PARENTS: Mapping[str, str] = {
    "grades": "traces", "judgements": "traces", "publications": "subsets", "published_rows": "subsets",
}  # fmt: skip
# Part -> whole: such rows come with a whole that was brought, all of them.
PARTS: Mapping[str, str] = {"trace_tokens": "traces", "subset_items": "subsets"}
MAX_NAMED = 20  # conflicts that a report names one by one

_THEIRS = "calset_merged_from"  # the other file's name inside the connection
_LEFT_OUT = {"traces": "calset_other_traces", "subsets": "calset_other_subsets"}


@dataclass(frozen=True, slots=True)
class SubsetConflict:
    """One ``name@version`` with two contents. What is here stays, the other is left out."""

    ref: str
    here: str  # content hashes
    there: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. ``added`` and ``not_added``: the other's rows by table, the latter here already or left out."""

    catalog: str
    other: str
    added: Mapping[str, int]
    not_added: Mapping[str, int]
    n_trace_conflicts: int  # traces of one id and attempt with other token ids
    n_subset_conflicts: int
    trace_conflicts: tuple[str, ...] = field(repr=False)  # the first trace ids
    subset_conflicts: tuple[SubsetConflict, ...]  # the first ones
    upgraded_from: int | None  # the other's schema where it was an older one, read from an upgraded copy
    seconds: float

    @property
    def n_added(self) -> int:
        return sum(self.added.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was left out and why, a line each."""
        lines = [
            f"the subset {c.ref} has the content {c.here[:12]} here and {c.there[:12]} in {self.other}: this stays, "
            f"theirs is left out (calset export {c.ref} --catalog {self.other} -o DIR keeps it as a folder)"
            for c in self.subset_conflicts
        ]
        if (more := self.n_subset_conflicts - len(self.subset_conflicts)) > 0:
            lines.append(f"{more} more subsets have another content here and are left out")
        if self.n_trace_conflicts:
            lines.append(
                f"traces of {self.other} with other token ids here: {self.n_trace_conflicts}, such as "
                f"{self.trace_conflicts[0]}; those here stay, the others are left out with their grades"
            )
        return tuple(lines)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "n_added": self.n_added, "warnings": list(self.warnings)}


def merge(
    catalog: Catalog | str | Path,
    other: Catalog | str | Path,
    *,
    progress: OnProgress | None = None,
) -> MergeReport:
    """Bring the rows of another catalog into this one, in one transaction; a catalog that is not there is made.

    The other file is only read. What both hold stays as it is here, and the same merge again adds nothing. A trace with
    other token ids than here, and a subset ``name@version`` with another content, are left out with all that hangs on
    them, and the report names them.

    Args:
        progress: called with a ``Progress`` of tables before each; the phase is "conflicts", the table that comes
            next, or "commit".

    Raises:
        InputError: there is no other catalog, it is this one, its schema is newer, it is damaged, or it holds something
            that calset did not make.
        CatalogLocked: another process holds one of the files.
        CatalogError: a full disk, or whatever else DuckDB reports. Whatever it is, nothing was added.
    """
    began, emit = time.monotonic(), progress or silent
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    path = other.path if isinstance(other, Catalog) else Path(other)
    _check_paths(store.path, path)
    with _readable(store, path) as (place, version), store.merging(place) as con:
        work = _Merge(con, path)
        _attach(con, place, path)
        work.run(emit)
    emit(Progress("done", len(work.tables), len(work.tables), final=True))
    return MergeReport(
        catalog=str(store.path),
        other=str(path),
        added=work.added,
        not_added=work.not_added,
        n_trace_conflicts=work.n_trace_conflicts,
        n_subset_conflicts=work.n_subset_conflicts,
        trace_conflicts=work.trace_conflicts,
        subset_conflicts=work.subset_conflicts,
        upgraded_from=None if version == migrations.SCHEMA_VERSION else version,
        seconds=time.monotonic() - began,
    )


# --- the other file ----------------------------------------------------------------------------------------------


def _check_paths(here: Path, other: Path) -> None:
    if not os.path.isfile(other):
        raise InputError(f"there is no catalog at {other} to merge from")
    same = os.path.samefile(here, other) if os.path.exists(here) else os.path.realpath(here) == os.path.realpath(other)
    if same:
        raise InputError(f"{other} is the catalog {here} itself: name another file to merge from")


@contextmanager
def _readable(store: Catalog, other: Path) -> Iterator[tuple[Path, int]]:
    """A file of the present schema with the other's rows, and the schema that the other has.

    The other is held open for reading all the while: nobody writes to it between the first look and the last row.
    """
    with opened_as_it_is(other, store.lock_timeout) as con:
        version = definitions.check(con, str(other), foreign=True)
        if version == 0:
            raise InputError(f"{other} is an empty database, not a calset catalog")
        if version == migrations.SCHEMA_VERSION:
            yield other, version
            return
        # Beside the catalog, where there must be room for the rows anyway; /tmp may be small.
        with _folder_beside(store.path) as folder:
            copy = Path(folder) / "copy.duckdb"
            _copy(other, copy)
            with warnings.catch_warnings(action="ignore"), opened(copy, "write", store.lock_timeout):
                pass  # opening it for writing upgrades it
            yield copy, version


@contextmanager
def _folder_beside(path: Path) -> Iterator[str]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".merge", dir=path.absolute().parent)
    except OSError as error:
        raise InputError(f"cannot write beside {path}: {error.strerror}") from error
    with folder as name:
        yield name


def _copy(other: Path, copy: Path) -> None:
    """The tables of an older schema. By DuckDB and not byte by byte: what waits in a write-ahead log comes too, and the
    lock on the other stays."""
    con = in_memory(other, copy)
    try:
        _attach(con, other, other)
        con.execute(f"ATTACH {quoted(copy)} AS copied").fetchall()
        columns = "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = ? AND table_name = ?"
        for table in TABLES:
            found = con.execute(columns, [_THEIRS, table]).fetchall()
            if not found:  # which an upgrade makes
                continue
            defined = ", ".join(f"{identifier(name)} {kind}" for name, kind in found)
            listed = ", ".join(identifier(name) for name, _ in found)
            con.execute(f"CREATE TABLE copied.main.{identifier(table)} ({defined})")
            con.execute(f"INSERT INTO copied.main.{table} SELECT {listed} FROM {_THEIRS}.main.{table}").fetchall()
    except duckdb.Error as error:
        raise translate(error, copy) from error
    finally:
        con.close()


def _attach(con: duckdb.DuckDBPyConnection, place: Path, named: Path) -> None:
    try:
        con.execute(f"ATTACH {quoted(place)} AS {_THEIRS} (READ_ONLY)").fetchall()
    except duckdb.Error as error:
        raise translate(error, named) from error


# --- the rows ----------------------------------------------------------------------------------------------------


class _Merge:
    """One merge inside an open transaction; the other file is attached as ``_THEIRS``."""

    def __init__(self, con: duckdb.DuckDBPyConnection, other: Path) -> None:
        self._con, self._other = con, other
        self.tables = sorted(
            (table for table in TABLES if table not in OWN_TABLES), key=lambda table: table in PARENTS or table in PARTS
        )
        self.added: dict[str, int] = {}
        self.not_added: dict[str, int] = {}
        self.n_trace_conflicts = self.n_subset_conflicts = 0
        self.trace_conflicts: tuple[str, ...] = ()
        self.subset_conflicts: tuple[SubsetConflict, ...] = ()

    def run(self, progress: OnProgress) -> None:
        """Bring every table's rows, parents before their children."""
        total = len(self.tables)
        progress(Progress("conflicts", 0, total))
        for table in KEYS:
            self._require_unique(table)
        self._find_conflicts()
        for done, table in enumerate(self.tables):
            progress(Progress(table, done, total))
            self.added[table] = self._bring(table)
            self.not_added[table] = self._count(f"{_THEIRS}.main.{table}") - self.added[table]
        self._require_whole()
        progress(Progress("commit", total, total))

    def _find_conflicts(self) -> None:
        """The other's traces and subsets that have another content here, as temporary tables of keys."""
        self._rows(f"""
            CREATE TEMP TABLE calset_shared AS
            SELECT trace_id, attempt FROM {_THEIRS}.main.traces SEMI JOIN traces USING (trace_id, attempt)
        """)
        # By a hash: a join of the lists themselves would have to hold all token ids of one side.
        hashes = (
            f"SELECT trace_id, attempt, hash(prompt_ids, completion_ids) AS content "
            f"FROM {side}trace_tokens SEMI JOIN calset_shared USING (trace_id, attempt)"
            for side in ("", f"{_THEIRS}.main.")
        )
        here, there = hashes
        self._rows(f"""
            CREATE TEMP TABLE {_LEFT_OUT["traces"]} AS
            SELECT trace_id, attempt FROM ({here}) h JOIN ({there}) o USING (trace_id, attempt)
            WHERE h.content <> o.content
        """)
        self._rows(f"""
            CREATE TEMP TABLE {_LEFT_OUT["subsets"]} AS
            SELECT name, version, h.content_hash AS here, o.content_hash AS there
            FROM {_THEIRS}.main.subsets o JOIN subsets h USING (name, version)
            WHERE h.content_hash <> o.content_hash
        """)
        traces, subsets = (_LEFT_OUT[table] for table in ("traces", "subsets"))
        self.n_trace_conflicts, self.n_subset_conflicts = self._count(traces), self._count(subsets)
        first = f"SELECT DISTINCT trace_id FROM {traces} ORDER BY 1 LIMIT {MAX_NAMED}"
        self.trace_conflicts = tuple(trace for (trace,) in self._rows(first))
        first = f"SELECT name, version, here, there FROM {subsets} ORDER BY 1, 2 LIMIT {MAX_NAMED}"
        self.subset_conflicts = tuple(
            SubsetConflict(f"{n}@{v}", here, there) for n, v, here, there in self._rows(first)
        )

    def _bring(self, table: str) -> int:
        columns = ", ".join(f'"{name}"' for name in TABLES[table])
        if table == "grades":
            return self._bring_grades(columns)
        theirs = self._theirs(table)
        if (whole := PARTS.get(table)) is not None:
            return self._insert(
                table, columns, f"SELECT {columns} FROM ({theirs}) SEMI JOIN {_new(whole)} {_on(whole)}"
            )
        if table not in KEYS:
            return self._insert(
                table, columns, f"SELECT {columns} FROM ({theirs}) EXCEPT SELECT {columns} FROM {table}"
            )
        fresh = f"FROM ({theirs}) o ANTI JOIN {table} h ON {_same(KEYS[table])}"
        if table in PARTS.values():
            key = ", ".join(KEYS[table])
            self._rows(f"CREATE TEMP TABLE {_new(table)} AS SELECT {key} {fresh}")
        return self._insert(table, columns, f"SELECT {columns} {fresh}")

    def _theirs(self, table: str) -> str:
        """The other's rows without those that hang on a parent that is left out, or on none."""
        rows, parent = f"FROM {_THEIRS}.main.{table}", PARENTS.get(table)
        if parent is None:
            return rows
        return f"{rows} SEMI JOIN {parent} {_on(parent)} ANTI JOIN {_LEFT_OUT[parent]} {_on(parent)}"

    def _bring_grades(self, columns: str) -> int:
        """Grades with their place in the trace's history. Those of traces that were here come behind what is here, and
        never at place 0, which is that of a grade that came with its trace."""
        theirs, on = self._theirs("grades"), _on("traces")
        brought = self._insert("grades", columns, f"SELECT {columns} FROM ({theirs}) SEMI JOIN {_new('traces')} {on}")
        place = """coalesce(last, 0) + row_number() OVER (
            PARTITION BY o.trace_id, o.attempt ORDER BY o.graded_at, o.seq, o.grader, o.verdict)"""
        placed = ", ".join(place if name == "seq" else f'o."{name}"' for name in TABLES["grades"])
        further = f"""
            WITH there AS (
                FROM (FROM ({theirs}) SEMI JOIN calset_shared {on}) o ANTI JOIN grades h ON {_same(KEYS["grades"])}
            ), here AS (
                SELECT trace_id, attempt, max(seq) AS last FROM grades SEMI JOIN calset_shared {on} GROUP BY ALL
            )
            SELECT {placed} FROM there o LEFT JOIN here ON here.trace_id = o.trace_id AND here.attempt = o.attempt
        """
        return brought + self._insert("grades", columns, further)

    def _require_unique(self, table: str) -> None:
        key = ", ".join(f'"{name}"' for name in KEYS[table])
        rows = self._rows(f"SELECT count(*) - count(DISTINCT ({key})) FROM {_THEIRS}.main.{table}")
        if rows[0][0]:
            self._refuse(f"holds {rows[0][0]} rows of {table} twice")

    def _require_whole(self) -> None:
        """Refuse rows that the views would never show, or that miss a part: what they name is in neither file."""
        for table, key in (("runs", "run_id"), ("problems", "problem_id")):
            lost = f"(FROM traces SEMI JOIN {_new('traces')} {_on('traces')}) ANTI JOIN {table} USING ({key})"
            if n := self._count(lost):
                self._refuse(f"has {n} traces whose {key} neither file holds")
        if self.added["trace_tokens"] != self.added["traces"]:
            self._refuse("has traces without token ids")
        samples = f"SELECT sum(n_samples) FROM subsets SEMI JOIN {_new('subsets')} {_on('subsets')}"
        if (self._rows(samples)[0][0] or 0) != self.added["subset_items"]:
            self._refuse("has subsets with more or fewer samples than they say")
        rows = f"SELECT name, version, count(*) AS n FROM {_THEIRS}.main.published_rows GROUP BY ALL"
        if n := self._count(f"({rows}) JOIN {_THEIRS}.main.subsets USING (name, version) WHERE n <> n_samples"):
            self._refuse(f"has {n} pulled subsets with more or fewer published rows than samples")

    def _refuse(self, what: str) -> None:
        raise InputError(f"{self._other} {what}: nothing was merged; see calset doctor --catalog {self._other}")

    def _insert(self, table: str, columns: str, rows: str) -> int:
        return self._rows(f"INSERT INTO {table} ({columns}) {rows}")[0][0]

    def _count(self, source: str) -> int:
        return self._rows(f"SELECT count(*) FROM {source}")[0][0]

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self._con.execute(sql).fetchall()


def _new(table: str) -> str:
    """The temporary table with the keys of the rows that were brought."""
    return f"calset_new_{table}"


def _on(table: str) -> str:
    return f"USING ({', '.join(KEYS[table])})"


def _same(key: Sequence[str]) -> str:
    """A key of ``h`` and ``o`` is the same one, NULLs and all."""
    return " AND ".join(f'h."{name}" IS NOT DISTINCT FROM o."{name}"' for name in key)

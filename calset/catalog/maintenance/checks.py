"""Whether a catalog file is whole: schema, rows that hang on nothing, counts and content hashes, what lies beside it.

Reads only, whatever the file's schema, and goes on after each thing that is wrong: a doctor names all of them. Must not
know: engines, the Hub, the terminal.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb

from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.merge import KEYS
from calset.catalog.store import definitions, migrations, schema
from calset.catalog.store.connection import in_memory, opened_as_it_is, translate
from calset.catalog.subsets import versions
from calset.errors import CalsetError
from calset.io.files import size as size_of

State = Literal["ok", "warning", "problem"]

SAMPLED_ROWS = 20_480  # traces whose token ids are counted, unless all are asked for
SAMPLED_PLACES = 10  # in so many places of the file
LOW_DISK_BYTES = 2**30
FULL_DISK_BYTES = 64 * 2**20

# What must be there -> its rows that hang on nothing. The views join on these, so such rows are kept and never seen.
ORPHANS = {
    "traces without a run": "traces ANTI JOIN runs USING (run_id)",
    "traces without a problem": "traces ANTI JOIN problems USING (problem_id)",
    "traces without token ids": "traces ANTI JOIN trace_tokens USING (trace_id, attempt)",
    "token ids without a trace": "trace_tokens ANTI JOIN traces USING (trace_id, attempt)",
    "grades without a trace": "grades ANTI JOIN traces USING (trace_id, attempt)",
    "judgements without a trace": "judgements ANTI JOIN traces USING (trace_id, attempt)",
    "problems without a source": "problems ANTI JOIN sources USING (source_id)",
    "contaminations without a problem": "contaminations ANTI JOIN problems USING (problem_id)",
    "decisions without a run": "decisions ANTI JOIN runs USING (run_id)",
    "samples without a subset": "subset_items ANTI JOIN subsets USING (name, version)",
    "published rows without a subset": "published_rows ANTI JOIN subsets USING (name, version)",
    "pulled subsets with more or fewer published rows than samples": "(SELECT name, version, count(*) AS n FROM "
    "published_rows GROUP BY ALL) JOIN subsets USING (name, version) WHERE n <> n_samples",
    "publications without a subset": "publications ANTI JOIN subsets USING (name, version)",
}
# What a trace repeats of the grade that came with it, so that filters need not join: column of traces, of grades.
REPEATED = {f"first_{name}": name for name in schema.TABLES["grades"] if f"first_{name}" in schema.TABLES["traces"]}
# Of these nothing is lost but where something came from.
HARMLESS = ("problems without a source", "decisions without a run", "publications without a subset")
# Parts of what is gone: a merge brings parts with their wholes, and leaves these behind.
ORPHANED_PARTS = (
    "token ids without a trace", "grades without a trace", "judgements without a trace", "samples without a subset",
    "published rows without a subset",
)  # fmt: skip
RESTORE = "restore a backup of the catalog, or build what is missing again in a new one"
REWRITE = "calset's own are used in their place; calset compact --catalog {path} writes them into the file"
LEAVE_BEHIND = "a copy without them: calset merge {path} --catalog NEW.duckdb"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; ``remedy`` says what to do where it is not ok."""

    name: str
    state: State
    message: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> tuple[str, str, str, str | None]:
        """A table's row."""
        return self.name, self.state, self.message, self.remedy


def examine(catalog: Catalog | str | Path, *, full: bool = False) -> list[Check]:
    """Look at a catalog file; raises nothing for what is wrong with it.

    Args:
        full: read every byte and count every trace's token ids, not those of a sample.
    """
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    checks = [*_surroundings(store.path)]
    if not os.path.exists(store.path):
        return [Check("catalog", "warning", f"there is no catalog at {store.path}", "calset build makes one"), *checks]
    try:
        with opened_as_it_is(store.path, store.lock_timeout) as con:
            return [*_inside(con, store, full), *checks]
    except CalsetError as error:
        return [_failed("catalog", error, store.path), *checks]


def _failed(name: str, error: CalsetError, path: Path) -> Check:
    """What calset's own errors say, "what happened: what to do", as a check."""
    message, _, remedy = str(error).partition(": ")
    if message == str(path) or not remedy:  # DuckDB's words, which name no remedy
        return Check(name, "problem", str(error), RESTORE)
    return Check(name, "problem", message, remedy)


# --- beside the file ---------------------------------------------------------------------------------------------


def _surroundings(path: Path) -> Iterator[Check]:
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        return
    yield _disk(path, folder)
    yield _leftovers(path, folder)


def _disk(path: Path, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    message = f"{size_of(free)} free in {folder}, the catalog has {size_of(size)}"
    if free < FULL_DISK_BYTES:
        return Check("disk", "problem", message, "free some space before building on")
    if free < max(LOW_DISK_BYTES, size):
        # An upgrade and a compaction write a copy beside the file.
        return Check("disk", "warning", message, "free some space: a copy of the catalog would not fit beside it")
    if not os.access(folder, os.W_OK):
        return Check("disk", "warning", f"{folder} cannot be written", "give write permission, or name another folder")
    return Check("disk", "ok", message)


def _leftovers(path: Path, folder: Path) -> Check:
    """What a killed process left: a write-ahead log is part of the catalog, all others are waste."""
    # ``.NAME.*`` are drafts of calset's own; ``NAME.tmp`` is where DuckDB puts what does not fit into memory.
    names = sorted(os.listdir(folder))
    waste = [name for name in names if name.startswith(f".{path.name}.") or name == f"{path.name}.tmp"]
    copies = [name for name in names if name.startswith(f"{path.name}.") and name.endswith(".bak")]
    found = []
    if (wal := Path(f"{path}.wal")).exists():
        found.append(f"{wal.name} ({size_of(wal.stat().st_size)}) belongs to the catalog: the next write takes it in")
    if copies:
        size = sum(os.path.getsize(folder / name) for name in copies)
        found.append(f"copies from before upgrades: {', '.join(copies)} ({size_of(size)})")
    if not waste:
        return Check("leftovers", "ok", "; ".join(found) or "nothing lies beside the catalog")
    found.insert(0, f"{len(waste)} drafts of ended or running commands beside the catalog: {', '.join(waste[:5])}")
    return Check("leftovers", "warning", "; ".join(found), f"while no calset runs, delete the drafts in {folder}")


# --- inside ------------------------------------------------------------------------------------------------------


def _inside(con: duckdb.DuckDBPyConnection, store: Catalog, full: bool) -> Iterator[Check]:
    refused = [Check("schema", "problem", f"the file holds {f.what}", f.remedy) for f in definitions.findings(con)]
    if refused:  # looking at the rows would run it
        yield from refused
        return
    version = migrations.schema_version(con, str(store.path))
    if version < migrations.SCHEMA_VERSION:
        yield Check(
            "schema",
            "warning",
            f"schema {version}, and this calset's is {migrations.SCHEMA_VERSION}; the rows were not looked at",
            "calset stats upgrades it, then run calset doctor again",
        )
        return
    yield from _guarded("schema", store.path, lambda: [_schema(con, version, store.path)])
    yield from _guarded("rows", store.path, lambda: _rows(con, store.path))
    yield from _guarded("token ids", store.path, lambda: [_token_ids(con, store.path, full)])
    yield from _guarded("subsets", store.path, lambda: _subsets(store))
    if full:
        yield from _guarded("file", store.path, lambda: [_every_byte(con)])


def _guarded(name: str, path: Path, look: Callable[[], list[Check]]) -> list[Check]:
    """A check that cannot even be made is a problem of its own, and no reason to leave out the others."""
    try:
        return look()
    except duckdb.Error as error:
        return [_failed(name, translate(error, path), path)]
    except CalsetError as error:
        return [_failed(name, error, path)]


def _schema(con: duckdb.DuckDBPyConnection, version: int, path: Path) -> Check:
    """Tables, columns and indexes against those of a new catalog, views against calset's own definitions."""
    model = in_memory()
    try:
        migrations.migrate(model, "a new catalog")
        wanted, found = _shape(model), _shape(con)
    finally:
        model.close()
    missing = sorted(wanted.keys() - found.keys())
    changed = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    changed += [f"view {view}" for view in definitions.changed_views(con) if f"view {view}" not in missing]
    if missing or changed:
        said = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(changed)} changed"] * bool(changed)
        only_views = all(name.startswith("view ") for name in (*missing, *changed))
        remedy = REWRITE.format(path=path) if only_views else RESTORE
        return Check("schema", "problem", f"schema {version}, but {' and '.join(said)}", remedy)
    n_tables, n_views = len(schema.TABLES), len(schema.VIEWS)
    return Check("schema", "ok", f"schema {version}, the present one; {n_tables} tables, {n_views} views")


def _shape(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    rows = con.execute("""
        SELECT 'column ' || table_name || '.' || column_name, data_type FROM duckdb_columns()
        WHERE NOT internal AND table_name IN (SELECT table_name FROM duckdb_tables())
        UNION ALL SELECT 'view ' || view_name, '' FROM duckdb_views() WHERE NOT internal
        UNION ALL SELECT 'index ' || index_name, table_name || is_unique::VARCHAR FROM duckdb_indexes()
    """).fetchall()
    return dict(rows)


def _rows(con: duckdb.DuckDBPyConnection, path: Path) -> list[Check]:
    """Rows that hang on nothing, and rows that are there twice."""
    orphans = {what: _count(con, source) for what, source in ORPHANS.items()}
    twice = {f"{table} twice": _twice(con, table, KEYS[table]) for table in KEYS}
    # Two grades at one place make two rows of a trace.
    twice["grades at one place of a trace's history"] = _twice(con, "grades", ("trace_id", "attempt", "seq"))
    if REPEATED:
        differs = " OR ".join(f"t.{copy} IS DISTINCT FROM g.{name}" for copy, name in REPEATED.items())
        orphans["traces that repeat another grade than came with them"] = _count(
            con,
            "traces t LEFT JOIN (FROM grades WHERE seq = 0) g "
            f"ON g.trace_id = t.trace_id AND g.attempt = t.attempt WHERE {differs}",
        )
    bad = {what: n for what, n in (orphans | twice).items() if n and what not in HARMLESS}
    harmless = {what: orphans[what] for what in HARMLESS if orphans[what]}
    checks = []
    if bad:
        remedy = LEAVE_BEHIND.format(path=path) if set(bad) <= set(ORPHANED_PARTS) else RESTORE
        checks.append(Check("rows", "problem", _listed(bad), remedy))
    if harmless:
        checks.append(
            Check("rows", "warning", _listed(harmless), "nothing to do: only where they came from is not known")
        )
    n_traces, n_grades = _count(con, "traces"), _count(con, "grades")
    whole = f"{n_traces:,} traces, {n_grades:,} grades: all hang together, none is there twice"
    return checks or [Check("rows", "ok", whole)]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def _twice(con: duckdb.DuckDBPyConnection, table: str, key: Any) -> int:
    names = ", ".join(f'"{name}"' for name in key)
    return con.execute(f"SELECT count(*) - count(DISTINCT ({names})) FROM {table}").fetchall()[0][0]


def _count(con: duckdb.DuckDBPyConnection, source: str) -> int:
    return con.execute(f"SELECT count(*) FROM {source}").fetchall()[0][0]


def _token_ids(con: duckdb.DuckDBPyConnection, path: Path, full: bool) -> Check:
    """The counts and offsets that traces give against the token ids themselves."""
    total = _count(con, "trace_tokens")
    sampled = not full and total > SAMPLED_ROWS
    places = "true"
    if sampled:
        # Stretches at equal distances, and not single rows: DuckDB reads 2,048 at a time.
        length = SAMPLED_ROWS // SAMPLED_PLACES
        starts = [i * (total - length) // (SAMPLED_PLACES - 1) for i in range(SAMPLED_PLACES)]
        places = " OR ".join(f"(rowid >= {start} AND rowid < {start + length})" for start in starts)
    n, wrong = con.execute(f"""
        SELECT count(*), count(*) FILTER (
            n_tokens <> n_completion_ids OR n_prompt_tokens <> n_prompt_ids
            OR greatest(reasoning_start, reasoning_end, answer_start) > n_tokens
            OR n_reasoning_tokens <> greatest(0, reasoning_end - reasoning_start)
        ) FROM traces JOIN (
            SELECT trace_id, attempt, len(prompt_ids) AS n_prompt_ids, len(completion_ids) AS n_completion_ids
            FROM trace_tokens WHERE {places}
        ) USING (trace_id, attempt)
    """).fetchall()[0]
    looked = f"{n:,} of {total:,} traces" if sampled else f"all {n:,} traces"
    if wrong:
        message = f"{wrong:,} traces give other numbers of tokens than they have ({looked} looked at)"
        return Check("token ids", "problem", message, RESTORE)
    more = "; --full counts all" if sampled else ""
    return Check("token ids", "ok", f"as many as the traces say, {looked}{more}")


def _subsets(store: Catalog) -> list[Check]:
    """Every subset's content hash, computed again."""
    heads = versions.list_subsets(store)
    failed = []
    for head in heads:
        try:
            subset = versions.load(store, head["ref"])
        except CalsetError as error:
            failed.append(Check("subsets", "problem", *str(error).partition(": ")[::2]))
            continue
        if (subset.n_samples, subset.n_tokens) != (head["n_samples"], head["n_tokens"]):
            message = f"{subset.ref} says {head['n_samples']} samples and holds {subset.n_samples}"
            failed.append(Check("subsets", "problem", message, "select again, or restore a backup"))
    whole = f"{len(heads)} subsets, each with its content hash" if heads else "none yet"
    return failed or [Check("subsets", "ok", whole)]


def _every_byte(con: duckdb.DuckDBPyConnection) -> Check:
    """Read all of all tables: DuckDB checks each block's checksum when it reads it."""
    n = 0
    for table in schema.TABLES:
        n += con.execute(f"SELECT count(hash({', '.join(schema.TABLES[table])})) FROM {table}").fetchall()[0][0]
    return Check("file", "ok", f"every block has its checksum ({n:,} rows read)")

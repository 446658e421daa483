"""Opening a catalog file: who may, for how long one waits, and what is said when it does not work.

DuckDB gives one process the file to itself for writing, or many processes for reading. calset therefore opens for one
batch or one question, closes, and retries on the lock with jitter up to a deadline, in turn with other processes.
Inside one process DuckDB refuses to open a file twice with different settings, and a connection shared between threads
returns other threads' rows: a gate a path serialises that.

A file may be somebody else's. So every connection of calset's own can reach no other file and no network, and what the
file holds is checked (``definitions``) before anything of it could run: once a process and version of the file, as
listing a catalog's macros takes longer than all else that an open does. Must not know: tables, except through
``migrations`` and ``definitions``.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import duckdb

from calset.catalog.store import definitions, migrations
from calset.catalog.store.interrupts import as_keyboard_interrupt, interruptible
from calset.catalog.store.lock import turn
from calset.errors import CatalogError, CatalogLocked, InputError, first_line
from calset.io.files import drafted
from calset.io.retry import Backoff, retried

_T = TypeVar("_T")
# "own" is calset's own reading SQL: it joins "read" or "query", whichever is open already, and opens "query" else.
Mode = Literal["write", "read", "query", "own"]

# A file written by DuckDB 2 opens in 1.5 only with this; 1.5 takes the option too.
_STORAGE = {"storage_compatibility_version": "v1.5.0"}
_NO_DOWNLOADS = {"autoinstall_known_extensions": "false"}
# No extensions and no Python variables; and no files but the catalog's own, no network.
_WALLS = {**_NO_DOWNLOADS, "autoload_known_extensions": "false", "python_enable_replacements": "false"}
_NO_FILES = {"enable_external_access": "false"}
_CONFIG: dict[Mode, dict[str, str | bool | int | float | list[str]]] = {
    "write": {**_STORAGE, **_WALLS, **_NO_FILES, "max_vacuum_tasks": "0"},
    "read": {**_NO_DOWNLOADS},  # a user's own
    "query": {**_WALLS, **_NO_FILES},
}
# What DuckDB reads and writes beside a file that is attached.
_BESIDE = ("", ".wal", ".wal.checkpoint", ".wal.recovery")

# Each commit adds a row group to a table, and DuckDB would merge it with the last ones at every close: measured on
# traces of 3,000 tokens, that writes up to a row group of 122,880 texts again each time (1 to 8 s), where adding takes
# 0.05 s. So one close in MERGE_EVERY merges (a hundred small row groups cost an open 0.02 s), and only while that
# writes less than MERGE_BYTES, about two seconds; the rest is for ``calset compact``.
MERGE_EVERY = 64
MERGE_BYTES = 256 << 20
_ROW_GROUP = 122_880
_LOCK = Backoff(first=0.005, longest=0.2, factor=1.5)  # while another process holds the file


class _Gate:
    """Lets threads of this process share one mode at a time; a writer is alone and goes before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._mode: Mode | None = None
        self._holders: dict[int, int] = {}
        self._writers_waiting = 0

    def _free(self, mode: Mode) -> bool:
        if self._mode is None:
            return True
        return self._shares(mode) and not self._writers_waiting

    def _shares(self, mode: Mode) -> bool:
        return self._mode != "write" and mode in (self._mode, "own")

    def enter(self, mode: Mode, path: Path, deadline: float) -> Mode:
        """Wait for the path to be free for ``mode``; returns the mode to open it in, which is never "own"."""
        me = threading.get_ident()
        with self._changed:
            if me in self._holders and not self._shares(mode):
                instead = "ask on that connection, or " if (mode, self._mode) == ("query", "read") else ""
                raise CatalogError(
                    f"this thread still has {path} open ({self._mode}): {instead}close that connection first"
                )
            if me not in self._holders:
                self._wait(mode, path, deadline)
            self._mode = mode if mode != "own" else self._mode or "query"
            self._holders[me] = self._holders.get(me, 0) + 1
            return self._mode

    def _wait(self, mode: Mode, path: Path, deadline: float) -> None:
        self._writers_waiting += mode == "write"
        try:
            # A writer waits for nobody but holders; counting itself as waiting must not stop it.
            free = (lambda: self._mode is None) if mode == "write" else (lambda: self._free(mode))
            if not self._changed.wait_for(free, timeout=max(0.0, deadline - time.monotonic())):
                raise CatalogLocked(
                    f"{path} is still open for {self._mode} in another thread of this process (PID {os.getpid()}): "
                    "close that connection"
                )
        finally:
            self._writers_waiting -= mode == "write"
            self._changed.notify_all()

    def leave(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._holders[me] -= 1
            if not self._holders[me]:
                del self._holders[me]
            if not self._holders:
                self._mode = None
            self._changed.notify_all()


# DuckDB's own instance cache is per process and path; what guards it has to be, too.
_gates: dict[str, _Gate] = {}
_gates_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A forked child holds none of its parent's connections.
    os.register_at_fork(after_in_child=_gates.clear)


def _gate(path: Path) -> _Gate:
    with _gates_lock:
        return _gates.setdefault(os.path.realpath(path), _Gate())


class _Checked(NamedTuple):
    """A file that was found to be in order: its content, its schema, and whether a view's text is not calset's."""

    content: tuple[int, ...]
    schema_version: int
    views_differ: bool  # then calset's own are put before them


_checked: dict[str, _Checked] = {}


@contextmanager
def opened(
    path: Path, mode: Mode, lock_timeout: float, *, other: Path | None = None, own_sql: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """An open, migrated catalog for the length of a ``with`` block; every DuckDB error leaves as a calset error.

    Args:
        other: the one other file that may be attached (in the mode "write").
        own_sql: only statements of calset's own are run in the block, so that the file need not be checked again.

    Raises:
        InputError: no such catalog (reading), not a database, a folder that cannot be written, a newer schema, or a
            file that holds what calset refuses to run.
        CatalogLocked: others held the file for ``lock_timeout`` seconds.
        CatalogError: a full disk, or anything else that DuckDB reports.
        KeyboardInterrupt: Ctrl-C while DuckDB was reading.
    """
    deadline = time.monotonic() + lock_timeout
    _check_path(path, mode)
    if mode == "write" and not os.path.exists(path):
        _create(path)
    connect = lambda mode: _connect_current(path, mode, deadline, other)  # noqa: E731
    with _held(path, mode, deadline, connect, own_sql=own_sql) as con:
        if mode == "write":
            if random.random() * MERGE_EVERY < 1:
                _merge_row_groups(con, path)
            con.execute("SET lock_configuration = true")
        yield con


@contextmanager
def _held(
    path: Path,
    mode: Mode,
    deadline: float,
    connect: Callable[[Mode], duckdb.DuckDBPyConnection],
    *,
    own_sql: bool = False,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection while this process's gate is held; what DuckDB reports in the block leaves as a calset error."""
    gate = _gate(path)
    mode = gate.enter(mode, path, deadline)
    try:
        with as_keyboard_interrupt():
            con = connect(mode)
        try:
            # Not while writing: what is rolled back must not be interrupted. Not in a user's own block, which may last.
            with as_keyboard_interrupt(), interruptible(con) if mode == "query" else nullcontext():
                yield con
        except duckdb.Error as error:
            raise translate(error, path) from error
        finally:
            _close(con, path)
            if mode == "write" and own_sql and (before := _checked.get(_place(path))):
                _checked[_place(path)] = before._replace(content=_content(path))
    finally:
        gate.leave()


@contextmanager
def exclusive(path: Path, lock_timeout: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """A current catalog attached as ``old`` to a connection that nobody shares, with nothing left in its log.

    Call ``allow_only`` on the connection before any statement over what the file holds. The file may be replaced
    inside the block: DuckDB touches neither it nor its log when it is let go, since nothing was written through this
    connection. No code in the block may open the file: closing it would drop the lock, which belongs to the process and
    not to who took it.

    Raises:
        InputError, CatalogLocked, CatalogError: as ``opened``; plain columns that somebody added are no reason.
    """
    deadline = time.monotonic() + lock_timeout
    _check_path(path, "own")

    def connect(mode: Mode) -> duckdb.DuckDBPyConnection:
        _connect_current(path, mode, deadline, extra_columns=True).close()
        return duckdb.connect(config=dict(_WALLS))

    with _held(path, "write", deadline, connect) as con:
        _attach(con, path, deadline)
        con.execute("CHECKPOINT old")
        yield con


def in_memory(*files: Path) -> duckdb.DuckDBPyConnection:
    """A connection to a database in memory that can reach these files, to attach them, and nothing else."""
    con = duckdb.connect(config=dict(_WALLS))
    allow_only(con, files)
    return con


@contextmanager
def opened_as_it_is(path: Path, lock_timeout: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """An open file for reading, whatever its schema: nothing is upgraded, nothing is written, nothing is refused.

    Raises:
        InputError: no such file, or not a DuckDB database.
        CatalogLocked, CatalogError: as ``opened``.
    """
    deadline = time.monotonic() + lock_timeout
    _check_path(path, "query")
    with _held(path, "query", deadline, lambda mode: _connect(path, mode, deadline)) as con:
        yield con


def _merge_row_groups(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Let the checkpoint that ends this write merge small row groups, if they can only be small."""
    ((n_traces,),) = con.execute("SELECT count(*) FROM traces").fetchall()
    if os.path.getsize(path) / max(n_traces, 1) * min(n_traces, _ROW_GROUP) < MERGE_BYTES:
        con.execute("RESET max_vacuum_tasks")


def _close(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    # Closing after a failed write can fail again (a full disk); the first error is the one to tell.
    with suppress(duckdb.Error):
        con.close()


def _check_path(path: Path, mode: Mode) -> None:
    # os.path says False, where Path's methods raise, of a name too long to be one.
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, not a catalog: name a file with --catalog")
    if not os.path.isdir(path.parent):
        raise InputError(f"the folder of the catalog {path} does not exist: create it first")
    if mode != "write" and not os.path.exists(path):
        raise InputError(
            f"there is no catalog at {path}: calset build makes one, --catalog or CALSET_CATALOG names another"
        )


def _create(path: Path) -> None:
    """Make the file complete under another name first: a kill leaves a catalog or none, never half of one."""
    try:
        with drafted(path) as draft:
            con = duckdb.connect(_place(draft), config=_CONFIG["write"])
            try:
                migrations.migrate(con, str(path))
            finally:
                _close(con, draft)
            _publish(draft, path)
    except duckdb.Error as error:
        raise translate(error, path) from error
    except OSError as error:
        raise translate(duckdb.IOException(f"cannot create the catalog: {error.strerror}"), path) from error


def _publish(draft: Path, path: Path) -> None:
    """Put the draft in its place unless another process was faster: unlike rename, link replaces nothing."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            draft.rename(path)


def _connect_current(
    path: Path, mode: Mode, deadline: float, other: Path | None = None, *, extra_columns: bool = False
) -> duckdb.DuckDBPyConnection:
    """A connection to a file that was checked and has the present schema, with calset's own views where they differ."""
    if mode == "read" and not _known(path):  # behind walls first
        _connect_current(path, "query", deadline).close()
    con = _connect(path, mode, deadline, other)
    try:
        if not (known := _known(path)):
            if not _is_current(con, path, mode, extra_columns):
                # An older catalog: the upgrade needs the file for itself for a moment.
                con.close()
                _connect_current(path, "write", deadline).close()
                return _connect_current(path, mode, deadline, extra_columns=extra_columns)
            known = _Checked(_content(path), migrations.SCHEMA_VERSION, definitions.views_differ(con))
            if not extra_columns:
                _checked[_place(path)] = known
        if known.views_differ and mode != "write":
            definitions.create_own_views(con)
        return con
    except BaseException as error:
        _close(con, path)
        if isinstance(error, duckdb.Error):
            raise translate(error, path) from error
        raise


def _is_current(con: duckdb.DuckDBPyConnection, path: Path, mode: Mode, extra_columns: bool) -> bool:
    """Check what the file holds, and upgrade it where it can be written; returns False for an older schema."""
    current = definitions.check(con, str(path), extra_columns=extra_columns) == migrations.SCHEMA_VERSION
    if not current and mode == "write":
        migrations.migrate(con, str(path))
        definitions.check(con, str(path), extra_columns=extra_columns)
    return current or mode == "write"


def _known(path: Path) -> _Checked | None:
    """What is known of a file that was checked and has not been written to since."""
    known = _checked.get(_place(path))
    same = known and known.schema_version == migrations.SCHEMA_VERSION and known.content == _content(path)
    return known if same else None


def _content(path: Path) -> tuple[int, ...]:
    """What changes with every write to a file: where it is, its size and time, and those of its log."""
    seen: list[int] = []
    for file in (path, f"{path}.wal"):
        with suppress(OSError):
            found = os.stat(file)
            seen += (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return tuple(seen)


def _place(path: Path) -> str:
    """The path as DuckDB must get it: in full, or a file named ":memory:" or "md:x" would be something else."""
    return os.path.abspath(path)


def quoted(path: Path) -> str:
    """The path as a SQL text, for ATTACH, which takes no parameter."""
    return "'" + _place(path).replace("'", "''") + "'"


def _connect(path: Path, mode: Mode, deadline: float, other: Path | None = None) -> duckdb.DuckDBPyConnection:
    config = dict(_CONFIG[mode])
    if other is not None:  # DuckDB takes the list of files that may be reached only before it closes off all others
        config = {name: value for name, value in config.items() if name not in _NO_FILES}
    while True:
        found = _inode(path)
        con = _retried(lambda: duckdb.connect(_place(path), read_only=mode != "write", config=config), path, deadline)
        # ``compact`` may have put a new file there between DuckDB's opening the old one and its getting the lock:
        # what is written to the old one then would be lost.
        if _inode(path) == found:
            _settle(con, mode)
            if other is not None:
                allow_only(con, [other])
            return con
        con.close()


def _settle(con: duckdb.DuckDBPyConnection, mode: Mode) -> None:
    """What ``connect`` does not take: no progress bar on standard output (DuckDB draws one where Python is interactive
    or runs ``-c``), and then no further setting in the mode "query"."""
    for statement in ("SET enable_progress_bar = false", "SET lock_configuration = true"):
        if mode == "query" or "progress" in statement:
            with suppress(duckdb.InvalidInputException):  # another thread's connection has locked this file's settings
                con.execute(statement)


def allow_only(con: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> None:
    """Close off all files but these and those that are attached, and the network and Python's variables, for good."""
    places = ", ".join(quoted(Path(f"{_place(file)}{end}")) for file in files for end in _BESIDE)
    con.execute(f"SET allowed_paths = [{places}]")
    con.execute("SET enable_external_access = false")


def _attach(con: duckdb.DuckDBPyConnection, path: Path, deadline: float) -> None:
    while True:
        found = _inode(path)
        _retried(lambda: con.execute(f"ATTACH {quoted(path)} AS old"), path, deadline)
        if _inode(path) == found:  # as in _connect
            return
        con.execute("DETACH old")


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _retried(open_file: Callable[[], _T], path: Path, deadline: float) -> _T:
    """Open a file as soon as nobody else holds it."""
    try:
        with turn(path.parent, deadline) as mine:
            return retried(open_file, _LOCK, _is_lock, deadline=deadline, waiting=mine.tick)
    except duckdb.Error as error:
        raise translate(error, path) from error


def _is_lock(error: Exception) -> bool:
    return "Could not set lock on file" in str(error)


def translate(error: duckdb.Error, path: Path) -> CatalogError | InputError:
    """DuckDB's error as one line that says what to do."""
    text = str(error)
    line = first_line(error)  # the rest is a picture of the query
    if _is_lock(error):
        holder = re.search(r"held in (.+?) \(PID (\d+)\)", text)
        who = f"process {holder[2]} ({holder[1]})" if holder else "another process"
        stop = f"wait for it, or stop it (kill {holder[2]})" if holder else "wait for it"
        return CatalogLocked(f"{path} is locked by {who}: {stop}, then run the same command again")
    if "not a valid DuckDB database" in text:
        return InputError(f"{path} is not a calset catalog (not a DuckDB file): name another with --catalog")
    if re.search(r"database file with version number|serialization version|storage version", text, re.IGNORECASE):
        return InputError(
            f"{path} was written by a newer DuckDB than {duckdb.__version__}: pip install -U duckdb ({line})"
        )
    if "No space left" in text or "File too large" in text or "Disk quota" in text:
        return CatalogError(
            f"no space left for {path}: free some and run the same command again; what was saved is safe"
        )
    if "File name too long" in text:
        return InputError(f"{path} is too long for a file name: name a shorter one with --catalog")
    if "Permission denied" in text or "Read-only file system" in text or "Operation not permitted" in text:
        reason = line.rsplit(": ", 1)[-1].lower()
        return InputError(f"{path} cannot be opened ({reason}): check the permissions of the file and of its folder")
    return CatalogError(f"{path}: {line}")

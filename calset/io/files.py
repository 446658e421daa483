"""Files and disks: a file that appears whole or not at all, what a full disk says, sizes in words.

Must not know: what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from calset.errors import CatalogError, InputError

NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes ``path`` at the end of the block, or is removed when the block raises.

    Raises:
        InputError: the folder cannot be written to, or ``path`` is a folder, or a database that would be lost.
        CatalogError: no space left.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: name a file")
    if _is_database(path):
        raise InputError(f"{path} is a DuckDB file, perhaps a catalog, and would be lost: name another file")
    with written(path, "file"), drafted(path) as draft:
        yield draft
        draft.replace(path)


@contextlib.contextmanager
def written(path: Path, kind: str) -> Iterator[None]:
    """Report the operating system's errors of the block as one line about ``path``, a "file" or a "folder".

    Raises:
        InputError: ``path`` cannot be written.
        CatalogError: no space left.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        report = CatalogError if error.errno in NO_SPACE else InputError
        raise report(f"cannot write {path}: {reason}; make room or name another {kind}") from error


@contextlib.contextmanager
def drafted(path: Path, suffix: str = ".new") -> Iterator[Path]:
    """Give a path beside ``path`` for a draft of it, a file or a folder, to be renamed inside the block.

    The draft is made in a folder of its own, ``.NAME.RANDOM.new``, that only this user can enter and that is removed
    at the end of the block. Nobody can guess the draft's path and put a link there first, and the draft gets the modes
    of the umask, as any new file does; tempfile's own files would stay private.

    Raises:
        OSError: the folder of ``path`` cannot be written.
    """
    folder = tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=suffix, dir=path.parent, ignore_cleanup_errors=True
    )
    with folder as name:
        yield Path(name) / (path.name or "draft")


def _is_database(path: Path) -> bool:
    # In the first block of each. Only read here, with no connection open: a closed descriptor drops DuckDB's lock.
    try:
        with path.open("rb") as file:
            return file.read(12)[8:] == b"DUCK"
    except OSError:
        return False


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file's bytes, or a folder's entries, on the disk: a rename is kept only when its folder is.

    Raises:
        OSError: the disk is full, or broken.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def size(n_bytes: float) -> str:
    """``1.23 GB``: three digits, in units of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"

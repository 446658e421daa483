"""Files and disks: a file that appears whole or not at all, what a full disk says, sizes in words.

Must not know: what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from calset.errors import CatalogError, InputError

NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` at the end of the block, or is removed when the block raises.

    Raises:
        InputError: the folder cannot be written to, or ``path`` is a folder, or a database that would be lost.
        CatalogError: no space left.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: name a file")
    if _is_database(path):
        raise InputError(f"{path} is a DuckDB file, perhaps a catalog, and would be lost: name another file")
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        kind = CatalogError if error.errno in NO_SPACE else InputError
        raise kind(f"cannot write {path}: {error.strerror or error}; make room or name another file") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


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

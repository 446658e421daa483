"""The copy of a catalog file that an upgrade leaves behind: ``name.duckdb.schema1.bak``, whole or not there.

Why a process of its own does the copying: file locks belong to a process, and closing any descriptor of a file drops
all locks that the process has on it. A copy made by the process that has the catalog open would let another one write
in the middle of the upgrade. Must not know: DuckDB, what is upgraded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from calset.errors import CatalogError
from calset.io.files import drafted

_COPY = """
import os, shutil, sys
try:
    with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
except OSError as error:
    sys.exit(str(error.strerror))
"""


def keep_copy(path: Path, number: int) -> Path:
    """Copy a file that nobody writes to, under a name with its schema's number; one that is there already stays.

    Raises:
        CatalogError: the copy could not be made (no space, a folder that cannot be written); nothing is left of it.
    """
    target = path.with_name(f"{path.name}.schema{number}.bak")
    if target.exists():
        return target
    try:
        with drafted(target) as draft:
            command = [sys.executable, "-I", "-S", "-c", _COPY, str(path), str(draft)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(0, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
            os.replace(draft, target)
    except OSError as error:
        raise CatalogError(
            f"{path} must be upgraded, and the copy that is made first, {target}, failed: {error.strerror}; make room "
            "or check the folder's permissions, then run the same command again: the catalog is as it was"
        ) from error
    return target

"""Child interpreters that read what strangers wrote: how they are started, and the resources that they may take.

Why apart: grading workers and the process that renders chat templates start in the same way, with calset and the
caller's path importable and without the caller's environment. Must not know: graders, templates, pipes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Variables of the parent that the interpreter and its libraries may need to start: where programs are, where shared
# libraries are (module systems of clusters, some conda environments), where an interpreter that was moved has its
# library, and Windows' own folder.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT")


def command(module: str, call: str) -> list[str]:
    """Command line of an interpreter that imports a module of calset as this process would, and runs one call of it.

    Not multiprocessing: its children import the caller's main module again.
    """
    path = [str(Path(__file__).parents[2]), *(os.path.abspath(entry) for entry in sys.path)]
    # What the parent's variables said of compiled modules holds, although the child does not see them.
    flags = ["-B"] if sys.dont_write_bytecode else []
    flags += ["-X", f"pycache_prefix={os.path.abspath(sys.pycache_prefix)}"] if sys.pycache_prefix else []
    code = f"import sys; sys.path[:] = {path!r}; from {module} import work; {call}"
    return [sys.executable, *flags, "-c", code]


def environment(names: Iterable[str] = (), **values: str) -> dict[str, str]:
    """Environment variables of a child: ``PASSED_ON``, others of the parent by name, and values of the child's own."""
    kept = {name: os.environ[name] for name in (*PASSED_ON, *names) if name in os.environ}
    return kept | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | values


def limit(name: str, value: int) -> bool:
    """Lower both limits of a resource of this process (``FSIZE`` is RLIMIT_FSIZE).

    Returns:
        False where the system does not have the limit or does not let it be set.
    """
    try:
        import resource

        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    except (ImportError, AttributeError, ValueError, OSError):
        return False
    return True


def limit_memory(n_bytes: int) -> bool:
    """Limit the address space of this process to what it has mapped and ``n_bytes`` more; returns as ``limit``."""
    mapped = 0
    with suppress(OSError), open("/proc/self/statm", "rb") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return limit("AS", mapped + n_bytes)

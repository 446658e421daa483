"""Processes that tests start: with calset and the factories importable, holding a catalog, or killed in their work."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from warm import warm

ROOT = Path(__file__).parent.parent
# What a process needs in its environment to import calset and the tests' factories.
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
_HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
_HOLD = """
    import sys
    from calset.catalog.catalog import Catalog
    with Catalog(sys.argv[1]).transaction():
        print("open", flush=True)
        sys.stdin.read()
"""


def heeding(*command: object) -> list[str]:
    """A command whose process heeds SIGINT, for tests that send it.

    A script's background jobs ignore it (``make test &`` in a shell script), and so does whatever they start.
    """
    return [sys.executable, "-I", "-S", "-c", _HEED, *map(str, command)]


def python(code: str, *args: object) -> subprocess.Popen[str]:
    """A process of its own that runs code with calset and the factories importable; it heeds SIGINT."""
    return subprocess.Popen(
        heeding(sys.executable, "-c", textwrap.dedent(code), *args),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


@contextmanager
def holding(catalog: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a catalog open for writing as long as the block lasts, or until its stdin is closed."""
    holder = python(_HOLD, catalog)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        yield holder
    finally:
        holder.kill()
        with holder:  # closes its pipes
            pass


def peak_bytes(setup: str, warm_up: str, work: str) -> int:
    """Resident memory at the fullest while a process does ``work``, beyond what it held after it had warmed up.

    ``setup`` is run first. All on one thread; Linux only.
    """
    # glibc keeps freed blocks of up to 32 MB for later (mallopt's M_MMAP_THRESHOLD); a real model's matrices are larger
    # than those of tests.
    code = f"""
import ctypes; ctypes.CDLL(None).mallopt(-3, 65536)
import torch; torch.set_num_threads(1)
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
{setup}
{warm_up}
open("/proc/self/clear_refs", "w").write("5")  # begin a new high-water mark
base = kib("VmRSS")
{work}
print((kib("VmHWM") - base) * 1024)
"""
    done = warm().run("python", "-c", code, cwd=ROOT, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def ranks(code: str, n: int = 2) -> list[int]:
    """Exit codes of the processes of one distributed run. One that fails ends the others, as torchrun has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = {**os.environ, **ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    running = {
        rank: warm().start(
            "python", "-c", textwrap.dedent(code), cwd=ROOT, streams=[0, 1, 2],
            env={**team, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    }  # fmt: skip
    codes = {}
    while running:
        ended = select.select([process.connection for process in running.values()], [], [])[0]
        for rank in [rank for rank, process in running.items() if process.connection in ended]:
            codes[rank] = running.pop(rank).wait()
            if codes[rank]:
                for other in running.values():
                    os.kill(other.pid, signal.SIGKILL)
    return [codes[rank] for rank in range(n)]


def killed(work: Callable[[], object]) -> None:
    """Run in a forked child that is to kill itself (``die``), and check that it did."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*args: object) -> None:
    """As ``kill -9`` would have it."""
    os.kill(os.getpid(), signal.SIGKILL)

"""What memory a device or the host can still give, and how running out of it is told from other failures.

Why apart: whoever loads, computes or stores must let it through as it is, to the one place that says what to lower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from calset.errors import PruningError

if TYPE_CHECKING:
    import torch

WORTHWHILE = 256 << 20  # bytes; beside less, asking the system again costs more than it is worth
# The CPU's allocator raises a plain RuntimeError; pinned memory and cuBLAS have their own words.
_WORDS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Too little memory is the user's to solve: said with what to do.

    Raises:
        PruningError: memory ran out inside.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise PruningError(f"out of memory: {remedy}") from error


def ran_out(error: BaseException) -> bool:
    """Whether it was memory that ended it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def give_back(beside: torch.Tensor) -> None:
    """Let the system have what was freed, where a large tensor lies on the host: glibc keeps pieces of up to 32 MB, in
    all some 200 MB."""
    if _is_large_on_host(beside.nbytes, beside.device):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def square_of_zeros(width: int, device: torch.device | str) -> torch.Tensor:
    """width x width zeros, float32. A large one on the host takes memory page by page, as it is written to: of a Gram
    that is half of it, until something uses the other half."""
    import torch

    n_bytes = 4 * width * width
    if not _is_large_on_host(n_bytes, torch.device(device)):
        return torch.zeros(width, width, dtype=torch.float32, device=device)
    # Neither torch nor numpy: the one writes the zeros, the other asks for pages that are wider than a row.
    try:
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes for a Gram of {width} inputs") from error
    with suppress(OSError):  # a kernel without such pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).view(width, width)


def forget_above(matrix: torch.Tensor, tile: int, columns: int) -> None:
    """Give back what a large square matrix on the host holds above its ``tile`` x ``tile`` tiles on the diagonal, in
    its first ``columns``: whole pages, so that some of it still stands there, and the rest reads as 0."""
    if not _is_large_on_host(matrix.nbytes, matrix.device):
        return
    assert matrix.is_contiguous()
    page, item, row = mmap.PAGESIZE, matrix.element_size(), matrix.stride(0) * matrix.element_size()
    with suppress(OSError, AttributeError):  # another C library
        advise = ctypes.CDLL(None).madvise
        for i in range(min(columns, len(matrix))):
            begin = matrix.data_ptr() + i * row
            first = (begin + (i // tile + 1) * tile * item + page - 1) // page * page
            stop = (begin + columns * item) // page * page
            if first < stop:
                advise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED)


def _is_large_on_host(n_bytes: int, device: torch.device) -> bool:
    """Whether pages of a tensor can be asked for and given back one by one, and that pays."""
    return sys.platform == "linux" and device.type == "cpu" and n_bytes >= WORTHWHILE


def free_memory(device: torch.device | None) -> int:
    """Bytes that a device can still give; of the host for None or a CPU.

    Of the host's, the least of what the machine and this process's control groups (containers, batch systems) have
    left, shared out evenly over the processes that torchrun started here.
    """
    import torch

    if device is not None and device.type == "cuda":
        # PyTorch keeps what it freed; the driver counts that as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    left = [_free_on_machine(), *free_in_groups()]
    return max(0, min(left)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_on_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: what is installed, for lack of what is free.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_in_groups(root: Path = Path("/")) -> list[int]:
    """What each of this process's control groups has left of its limit, in bytes; a group without a limit says nothing.

    A group's parents limit it too. What it holds of files can be given up, and counts as free, as in MemAvailable.

    Args:
        root: where /proc and /sys are.
    """
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = mount / path.lstrip("/")
        # Inside a container the path may be the host's, and only the mount itself is there.
        groups = [g for g in (here, *here.parents) if g == mount or mount in g.parents]
        for group in groups:
            most, now = _read(group / limit).strip(), _read(group / usage).strip()
            if most.isdigit() and now.isdigit():
                found.append(int(most) - int(now) + _file_pages(_read(group / "memory.stat")))
    return found


def _file_pages(stat: str) -> int:
    values = dict(line.split(None, 1) for line in stat.splitlines() if line.strip())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # another system, or another version of it
        return ""

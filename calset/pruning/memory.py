"""What memory a device or the host can still give, and how running out of it is told from other failures.

Why apart: whoever loads, computes or stores must let it through as it is, to the one place that says what to lower.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The CPU's allocator raises a plain RuntimeError; pinned memory and cuBLAS have their own words.
_WORDS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether it was memory that ended it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def free_memory(device: torch.device | None) -> int:
    """Bytes that a device can still give; of the host for None or a CPU."""
    import torch

    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: what is installed, for lack of what is free.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

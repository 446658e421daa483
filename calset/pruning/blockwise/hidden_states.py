"""Hidden states between two blocks, one entry a micro-batch, on the device, in host memory or on disk.

Why a choice: they are all that grows with the calibration set (1M tokens of a model 4096 wide are 8 GB in bfloat16),
so where they are decides whether a pruning fits. It must not know what made them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calset.errors import PruningError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Where = Literal["device", "host", "disk"]


SHARE = 0.5  # of the free memory that hidden states may take before they move on


class HiddenStates:
    """``put`` replaces an entry, ``get`` gives a copy of it on the device: a block may write on what it reads.

    Entries are what a block returns: a tensor, or a tuple with tensors and None in it.
    """

    def __init__(self, n: int, device: torch.device, where: Where = "device", folder: Path | None = None) -> None:
        assert where != "disk" or folder is not None
        self.device = device
        # On a CPU the device's memory is the host's.
        self.where: Where = "device" if where == "host" and device.type == "cpu" else where
        self.folder = folder
        self._entries: list[Any] = [None] * n

    def put(self, index: int, value: Any) -> None:
        if self.where == "device":
            self._entries[index] = value
        elif self.where == "host":
            self._entries[index] = _to_host(value, self._entries[index])
        else:
            self._entries[index] = self._to_disk(index, value)

    def get(self, index: int) -> Any:
        value = self._entries[index]
        if self.where == "disk" and value is not None:
            return self._from_disk(index, value)
        return _map(value, lambda t: t.to(self.device, non_blocking=True, copy=True))

    def clear(self) -> None:
        self._entries = [None] * len(self._entries)
        if self.where == "disk" and self.folder is not None:
            for path in self.folder.glob("hidden-*.safetensors"):
                path.unlink()

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"hidden-{index:06d}.safetensors"

    def _to_disk(self, index: int, value: Any) -> Any:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}

        def name(tensor: Tensor) -> str:
            tensors[str(len(tensors))] = tensor.detach().to("cpu").contiguous()
            return str(len(tensors) - 1)

        names = _map(value, name)
        try:
            save_file(tensors, self._path(index))
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise PruningError(
                f"could not write hidden states to {self._path(index)}: {first_line(error)}; make room and run the "
                "same command again"
            ) from OSError(str(error))
        return names

    def _from_disk(self, index: int, names: Any) -> Any:
        from safetensors.torch import load_file

        tensors = load_file(self._path(index))
        return _map(names, lambda name: tensors[name].to(self.device, copy=True))


def _to_host(value: Any, old: Any) -> Any:
    """A copy in pinned memory, in the old entry's place where it fits: pinning is slow, and pinned memory is scarce."""
    import torch

    kept: list[Tensor] = []
    _map(old, kept.append)
    places = iter(kept)

    def copy(tensor: Tensor) -> Tensor:
        place = next(places, None)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return place.copy_(tensor)

    return _map(value, copy)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return tuple(_map(part, change) for part in value)
    return change(value)


def nearest_place(hidden: int, device: torch.device, others: int, device_free: int, host_free: int) -> Where:
    """Where ``hidden`` bytes of hidden states fit beside ``others`` on the device, the nearest first."""
    if others + hidden <= device_free and hidden <= SHARE * device_free:
        return "device"
    if device.type != "cpu" and hidden <= SHARE * host_free:
        return "host"
    return "disk"

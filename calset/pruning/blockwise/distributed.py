"""Several processes prune one model (torchrun): samples and solves are shared out, statistics are added up.

Each process walks its part of the micro-batches through the same blocks. Statistics are raw sums, so adding them up
gives what one process would have; then each solves its share of the block's matrices and tells the others. The first
process alone writes. Without torchrun there is one process, and nothing here does anything.

A process that fails ends the others: torchrun stops them. It must not know methods or models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calset.errors import InputError
from calset.pruning.blockwise.statistics import InputStatistics, Needs
from calset.pruning.blockwise.workfolder import WorkFolder, folder_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


def n_processes() -> int:
    """How many torchrun started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process, when torchrun started several and ``device`` is CUDA without a number.

    Raises:
        InputError: fewer GPUs than processes, or one number for all of them.
    """
    import torch

    if device.type != "cuda" or n_processes() == 1:
        return device
    n_gpus = torch.cuda.device_count()
    if n_gpus == 1:  # some launchers show each process only its own
        return torch.device("cuda", device.index or 0)
    if device.index is not None:
        raise InputError(f"{n_processes()} processes cannot share {device}: leave the number out of --device")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= n_gpus:
        raise InputError(f"there are {n_gpus} GPUs for process {index} and those before it: lower --nproc-per-node")
    return torch.device("cuda", index)


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: this process's own; see ``own_gpu``.
    """
    if n_processes() == 1:
        yield Team()
        return
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL sends objects through the current one
    # The first process copies the whole checkpoint while the others wait: far longer than the usual minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    yield Team(dist.get_rank(), dist.get_world_size())
    # Not after a failure: NCCL waits here for what the others will never do, and torchrun for the end of this process.
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Team:
    rank: int = 0
    size: int = 1

    def part(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's micro-batches.

        Raises:
            InputError: fewer than processes: one would have nothing to tell which weights share an input by.
        """
        if batches and len(batches) < self.size:
            raise InputError(
                f"{len(batches)} micro-batches cannot be shared out over {self.size} processes: lower --batch-tokens"
            )
        return batches[self.rank :: self.size]

    def add_up(
        self,
        statistics: dict[str, InputStatistics],
        widths: Mapping[str, int],
        needs: Needs,
        device: torch.device,
    ) -> dict[str, InputStatistics]:
        """The sums over all processes, in place.

        Args:
            widths: inputs of every reader that is asked for; an expert may have got tokens elsewhere only.
        """
        if self.size == 1:
            return statistics
        done: set[int] = set()
        for name in sorted(widths):
            if name not in statistics:
                statistics[name] = InputStatistics.zeros(widths[name], needs, device)
            if id(statistics[name]) not in done:
                done.add(id(statistics[name]))
                _all_reduce(statistics[name], device)
        return statistics

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who solves what: the dearest first, each to the process with the least to do."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[index] = min(range(self.size), key=lambda r: (loads[r], r))
            loads[owners[index]] += costs[index]
        return owners

    def broadcast(self, values: Tensor, owner: int) -> None:
        """Give every process what ``values`` (any strides) is at its owner, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        sent = values.contiguous()
        dist.broadcast(sent, owner)
        if owner != self.rank:
            values.copy_(sent)

    def broadcast_object(self, value: T) -> T:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        told: list[Any] = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def gather(self, found: Mapping[Any, T]) -> dict[Any, T]:
        """What all processes found, together."""
        if self.size == 1:
            return dict(found)
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, dict(found))
        return {key: value for part in parts for key, value in part.items()}

    @contextmanager
    def work(self, out: Path, opened: Callable[[], AbstractContextManager[WorkFolder]]) -> Iterator[WorkFolder]:
        """The first process's work folder; the others follow what it has done."""
        if self.size == 1:
            with opened() as work:
                yield work
            return
        import torch.distributed as dist

        shared: list[Any] = [None, None, None]
        if self.rank == 0:
            with opened() as work:
                shared = [work.blocks, work.resumed_at, work.shares]
                dist.broadcast_object_list(shared, 0)
                yield work
                dist.barrier()
        else:
            dist.broadcast_object_list(shared, 0)
            yield _Follower(out, folder_of(out), *shared)
            dist.barrier()


class _Follower(WorkFolder):
    """Sees the first process's work folder, and writes nothing to it but its own hidden states."""

    @property
    def scratch(self) -> Path:
        path = self.folder / f"scratch-{os.environ['RANK']}"
        path.mkdir(exist_ok=True)
        return path

    def finish_block(self, tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> None:
        self.blocks.append(record)

    def note(self, record: Mapping[str, Any]) -> None:
        self.blocks.append(record)

    def fill(self, write: Callable[[Path], None]) -> None:
        pass

    def remember(self, shares: Mapping[str, float]) -> None:
        self.shares = dict(shares)

    def complete(self, source: Path, record: Mapping[str, Any], section: str, switches: Any = None) -> None:
        pass


def _all_reduce(statistics: InputStatistics, device: torch.device) -> None:
    """Whatever sums it holds: adding up is what they have in common."""
    import torch
    import torch.distributed as dist

    for each in fields(statistics):
        value = getattr(statistics, each.name)
        if isinstance(value, torch.Tensor):
            dist.all_reduce(value)
        elif value is not None:
            number = torch.tensor(float(value), dtype=torch.float64, device=device)
            dist.all_reduce(number)
            setattr(statistics, each.name, type(value)(number.item()))

"""Through a causal language model block by block, whatever its architecture.

The model's own forward runs every time: finished blocks are stand-ins that return the stored hidden states, the block
at hand runs with whatever arguments the model gives it for this batch, and then the forward is cut off. So masks,
positions, rotary embeddings and arguments that a later transformers invents need no code here, and none is stored.

Shared inputs are found by identity. It must not know methods, masks or files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from calset.errors import PruningError
from calset.pruning.blockwise.hidden_states import HiddenStates
from calset.pruning.blockwise.statistics import InputStatistics, Needs, is_finite
from calset.pruning.model import experts
from calset.pruning.model.decoder import Block, Decoder
from calset.pruning.model.layout import place, unload

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from calset.pruning.calibration import Batch

Load = Callable[[Block], None]


class Watcher:
    """Sees what a block does with each batch; nothing by itself."""

    def start(self, batch: Batch) -> None:
        """Before a batch."""

    def states(self, before: Tensor, after: Tensor) -> None:
        """The hidden states that the block read and those it gave: samples x positions x width, padding included."""

    def outputs(self, module_name: str) -> experts.OnOutputs | None:
        """What to call with the outputs of a module of fused experts; its tokens are positions of the whole batch."""
        return None


class Walk:
    """Calibration batches on their way through the blocks; use as a context manager.

    Holds one hidden state per batch, replaced in place as blocks finish. Only the block at hand and what surrounds the
    blocks (embeddings, norms) are on ``device``.

    Usage: for each block ``statistics(i, needs)``, prune, ``advance(i)``, ``finish(i)``. ``logits`` after the last.

    Args:
        hidden: where the hidden states are kept; default: on the device.
        load: puts a block's weights on the device; the block is emptied when it is finished. Default: the model is in
            memory, and finished blocks go back to the CPU.
        data: what the batches are, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        batches: Sequence[Batch],
        device: torch.device,
        *,
        hidden: HiddenStates | None = None,
        load: Load | None = None,
        data: str = "the calibration data",
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.batches = batches
        self.device = device
        self.hidden = hidden or HiddenStates(len(batches), device)
        self._load = load
        self._data = data
        self._input: Any = None  # what the last finished block gave for the batch at hand
        self._ready: int | None = None

    def __enter__(self) -> Walk:
        layers = {id(b.module) for b in self.decoder.blocks}
        for child in self.decoder.parent.children():
            if not any(id(m) in layers for m in child.modules()):
                place(child, self.device)
        return self

    def __exit__(self, *exc: object) -> None:
        import torch

        self.hidden.clear()
        for block in self.decoder.blocks:
            block.module.__dict__.pop("forward", None)
        place(self.model, torch.device("cpu"))

    def ready(self, index: int) -> Block:
        """Block ``index`` with its weights on the device."""
        block = self.decoder.blocks[index]
        if self._ready != index:
            if self._load is not None:
                self._load(block)
            place(block.module, self.device)
            self._ready = index
        return block

    def statistics(
        self, index: int, needs: Needs, *, keep: bool, only: Collection[str] | None = None
    ) -> dict[str, InputStatistics]:
        """Run block ``index`` over all batches and sum what its weights read.

        Args:
            keep: also keep the block's outputs, as the inputs of the next one (dense propagation).
            only: the readers that are asked for, by what ``Weight.reads`` calls them; default: all.

        Returns:
            What ``Weight.reads`` calls them -> statistics; weights that read one tensor share one object. Experts that
            no token was routed to are not in it.

        Raises:
            PruningError: activations that are not finite, or a linear whose inputs cannot be told apart by token.
        """
        block = self.ready(index)
        readers = {r for w in block.weights.values() for r in w.readers()}
        asked = readers if only is None else readers & set(only)
        collector = _Collector(needs, self.device, asked, cut_off=not keep)
        linears = {name: linear for name, linear in block.linears.items() if name in collector.readers}
        handles = [linear.register_forward_pre_hook(collector.hook(name)) for name, linear in linears.items()]
        try:
            self._run(block, keep=keep, before=collector.start, tell=collector.tell)
        finally:
            for handle in handles:
                handle.remove()
        return collector.result(linears)

    def watch(self, index: int, watcher: Watcher, *, keep: bool) -> None:
        """Run block ``index`` over all batches and let ``watcher`` see them.

        Args:
            keep: also keep the block's outputs, as the inputs of the next one.

        Raises:
            PruningError: activations that are not finite.
        """
        self._run(self.ready(index), keep=keep, before=watcher.start, watcher=watcher)

    def advance(self, index: int, through: Block | None = None) -> None:
        """Run block ``index`` as it now is over all batches; its outputs are the next block's inputs.

        Args:
            through: a block to run in its place, on the device.
        """
        if self.batches:
            self._run(self.ready(index), keep=True, through=through)

    def finish(self, index: int) -> None:
        """Put a stand-in in the place of block ``index``, and take the block off the device."""
        import torch

        module = self.decoder.blocks[index].module
        # A patched forward rather than another module: models read attributes of their blocks (attention_type).
        module.forward = self._stand_in
        if self._load is not None:
            unload(module)
        else:
            place(module, torch.device("cpu"))
        self._ready = None

    def logits(self, position: int, columns: Iterable[Tensor]) -> Iterator[Tensor]:
        """What the model predicts for a batch once every block is finished, a few of its positions at a time.

        The model's own forward again, all blocks being stand-ins: whatever comes after them (a norm, an output layer,
        soft-capping) needs no code here. What surrounds the blocks and the output layer must be loaded.

        Args:
            position: the batch's.
            columns: positions within the padded samples (int64), one tensor a turn.

        Yields:
            samples x positions x vocabulary, in the model's dtype, for each tensor of ``columns``.
        """
        import torch

        batch = self.batches[position]
        takes_columns = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._input = self.hidden.get(position)
        try:
            for chosen in columns:
                keep = {"logits_to_keep": chosen.to(self.device)} if takes_columns else {}
                with torch.no_grad():
                    logits = self.model(
                        input_ids=batch.input_ids.to(self.device),
                        attention_mask=batch.attention_mask.to(self.device),
                        use_cache=False,
                        **keep,
                    ).logits
                yield logits if takes_columns else logits[:, chosen]
        finally:
            self._input = None

    def _stand_in(self, *args: Any, **kwargs: Any) -> Any:
        # Earlier blocks' outputs were replaced by this one's: only the last one is read.
        return self._input

    def _run(
        self,
        block: Block,
        *,
        keep: bool,
        before: Callable[[Batch], None] | None = None,
        tell: Callable[[str], experts.OnInputs] | None = None,
        watcher: Watcher | None = None,
        through: Block | None = None,
    ) -> None:
        import torch

        running = through or block
        own_forward = running.module.forward

        def run_and_stop(*args: Any, **kwargs: Any) -> Any:
            # A copy: a block may write on what it reads.
            read: Any = None if watcher is None else _read(block, args, kwargs).clone()
            output = own_forward(*args, **kwargs)
            if watcher is not None:
                watcher.states(read, _states(output))
            raise _Stop(output)

        block.module.forward = run_and_stop
        try:
            with torch.no_grad(), _experts_one_by_one(running, tell, watcher):
                for position, batch in enumerate(self.batches):
                    self._input = self.hidden.get(position)
                    if before is not None:
                        before(batch)
                    output = self._forward(batch, block)
                    if keep:
                        self.hidden.put(position, output)
        finally:
            self._input = None
            del block.module.forward

    def _forward(self, batch: Batch, block: Block) -> Any:
        try:
            self.model(
                input_ids=batch.input_ids.to(self.device),
                attention_mask=batch.attention_mask.to(self.device),
                use_cache=False,
            )
        except _Stop as stop:
            if stop.output is None:
                return None
            if not is_finite(_states(stop.output)):
                raise PruningError(f"the outputs of {block.name} are not finite on {self._data}") from None
            return stop.output
        raise PruningError(f"the model never ran its block {block.name}: calset cannot follow its forward")


def _read(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a block is called with."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not hasattr(found, "clone"):
        raise PruningError(f"calset cannot tell what {block.name} reads: it is called with {sorted(kwargs)}")
    return found


def _states(output: Any) -> Any:
    """The hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _experts_one_by_one(
    block: Block, tell: Callable[[str], experts.OnInputs] | None, watcher: Watcher | None
) -> Iterator[None]:
    """Run a block's fused experts in one way throughout: a resumed pruning must meet the same numbers."""
    for name, module in block.experts.items():
        inputs = tell(name) if tell is not None else None
        outputs = watcher.outputs(name) if watcher is not None else None
        module.forward = experts.forward(module, inputs, outputs)
    try:
        yield
    finally:
        for module in block.experts.values():
            del module.forward


class _Stop(Exception):
    """Carries a block's output out of the model's forward; None where only its inputs were of interest."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Collector:
    """Sums the inputs of a block's weights, once per tensor: those that read the same one share statistics.

    Args:
        cut_off: nobody needs the block's output. From the second batch on it is not run further than to the last
            reader's input, which saves that one's product (down_proj: a quarter of a Llama block), when each reader
            was called once in the batch before.
    """

    def __init__(self, needs: Needs, device: torch.device, readers: Collection[str], *, cut_off: bool = False) -> None:
        self.readers = readers
        self.cut_off = cut_off
        self.needs: Needs = needs
        self.device = device
        self.leaders: dict[str, str] = {}  # linear -> the first linear that read the same tensor
        self.sums: dict[str, InputStatistics] = {}
        self._counted: Any = None
        self._weights: Any = None
        self._seen: list[tuple[Tensor, int, str]] = []  # held, so that no memory is reused within a batch
        self._calls: list[str] = []  # of linears, in this batch
        self._last: int | None = None  # how many calls a batch takes, where it may be cut off

    def start(self, batch: Batch) -> None:
        each_once = sorted(self._calls) == sorted(self.readers)
        self._last = len(self._calls) if self.cut_off and self._calls and each_once else None
        self._calls = []
        self._counted = batch.counted.reshape(-1).to(self.device)
        self._weights = None if batch.weights is None else batch.weights.reshape(-1).to(self.device)
        self._seen = []

    def hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def see(module: Any, args: tuple[Any, ...]) -> None:
            self._see(name, args[0])
            self._calls.append(name)
            if len(self._calls) == self._last:
                raise _Stop(None)

        return see

    def tell(self, module_name: str) -> experts.OnInputs:
        """For one module of fused experts: sums what each expert's matrices read, over the counted tokens it got."""

        def see(attribute: str, expert: int, inputs: Tensor, tokens: Tensor) -> None:
            if (name := f"{module_name}.{attribute}[{expert}]") in self.readers:
                weights = None if self._weights is None else self._weights[tokens]
                self._sum(name, inputs, self._counted[tokens], weights)

        return see

    def _see(self, name: str, inputs: Tensor) -> None:
        leader = next((first for tensor, version, first in self._seen if _is_same(tensor, version, inputs)), None)
        if leader is None:
            leader = name
            self._seen.append((inputs, inputs._version, name))
            self._add(name, inputs)
        if self.leaders.setdefault(name, leader) != leader:
            raise PruningError(f"{name} shares its input with {leader} in some batches only: calset cannot follow it")

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        counted, weights = self._counted, self._weights
        if len(rows) != len(counted):
            # A linear in an expert of its own reads some tokens; which ones matters unless all count alike.
            if weights is not None or not bool(counted.all()):
                raise PruningError(
                    f"{name} reads {len(rows)} vectors for {len(counted)} tokens: calset cannot tell which count, but "
                    f"need not with --tokens all --batch-tokens 1 and no token weights"
                )
            counted = counted.new_ones(len(rows))
        self._sum(name, rows, counted, weights)

    def _sum(self, name: str, rows: Tensor, counted: Tensor, weights: Tensor | None) -> None:
        if name not in self.sums:
            self.sums[name] = InputStatistics.zeros(rows.shape[1], self.needs, self.device)
        self.sums[name].add(rows, counted, weights)

    def result(self, linears: Collection[str]) -> dict[str, InputStatistics]:
        self._seen = []
        if unread := [name for name in linears if name not in self.leaders]:
            raise PruningError(f"{unread[0]} was never used on the calibration data: there is nothing to prune it by")
        for name, statistics in self.sums.items():
            if not statistics.is_finite():
                raise PruningError(f"the inputs of {name} are not finite on the calibration data")
        shared = {name: self.sums[leader] for name, leader in self.leaders.items()}
        return {**self.sums, **shared}


def _is_same(tensor: Tensor, version: int, other: Tensor) -> bool:
    """One tensor, or two views of the same values in the same order; not written to in between."""
    if tensor._version != version:
        return False
    if tensor is other:
        return True
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.shape[-1] == other.shape[-1]
        and tensor.numel() == other.numel()
        and tensor.is_contiguous()
        and other.is_contiguous()
    )

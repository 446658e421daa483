"""Through a causal language model block by block, whatever its architecture.

The model's own forward runs every time: finished blocks are stand-ins that return the stored hidden states, the block
at hand runs with whatever arguments the model gives it for this batch, and then the forward is cut off. So masks,
positions, rotary embeddings and arguments that a later transformers invents need no code here, and none is stored.

Blocks are found by structure and shared inputs by identity; there is no table of architectures. It must not know
methods or masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, PruningError
from calset.pruning.stats import InputStatistics, Needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from calset.pruning.calibration import Batch


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block. ``linears`` maps a linear's full module name in the model to it."""

    name: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's decoder: its blocks in order, and the module that holds their list."""

    parent: nn.Module
    blocks: Sequence[Block]

    def linears(self) -> dict[str, nn.Linear]:
        return {name: linear for block in self.blocks for name, linear in block.linears.items()}


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder blocks: of the module lists whose every child holds a linear, the one with most parameters.

    Works on a model on the meta device, so that a model can be refused before its weights are loaded.

    Raises:
        InputError: no such list, decoder matrices that calset does not understand, or tied ones, by name.
    """
    name, layers = _largest_list(model)
    blocks = [_block(f"{name}.{i}", module) for i, module in enumerate(layers)]
    _refuse_unknown(blocks)
    _refuse_tied(model, blocks)
    return Decoder(model.get_submodule(name.rpartition(".")[0]), blocks)


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    from torch import nn

    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if not all(any(isinstance(m, nn.Linear) for m in child.modules()) for child in module):
            continue
        size = sum(p.numel() for p in module.parameters())
        # Outer lists come first, so a list of experts inside the only block does not win on a tie.
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise InputError(f"{type(model).__name__} has no list of blocks with linear layers: calset cannot prune it")
    return best[1], best[2]


def _block(name: str, module: nn.Module) -> Block:
    from torch import nn

    found = {f"{name}.{inner}": m for inner, m in module.named_modules() if isinstance(m, nn.Linear)}
    return Block(name, module, found)


def _refuse_unknown(blocks: Sequence[Block]) -> None:
    """Fused experts are 3-D parameters that no ``nn.Linear`` shows: skipping them would skip 97 % of some models."""
    unknown = []
    for block in blocks:
        known = {id(p) for linear in block.linears.values() for p in linear.parameters(recurse=False)}
        for name, parameter in block.module.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in known:
                unknown.append(f"{block.name}.{name} {tuple(parameter.shape)}")
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise InputError(
            f"calset does not know how to prune these decoder weights, and would leave them dense: "
            f"{', '.join(unknown[:4])}{more}; mixture-of-experts models and layers other than nn.Linear are not "
            f"supported yet"
        )


def _refuse_tied(model: nn.Module, blocks: Sequence[Block]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for block in blocks:
        for linear in block.linears.values():
            if len(names := owners[id(linear.weight)]) > 1:
                raise InputError(f"{' and '.join(names[:3])} are one tied matrix: calset cannot prune it for each use")


class Walk:
    """Calibration batches on their way through the blocks; use as a context manager.

    Holds one hidden state per batch, replaced in place as blocks finish. Only the block at hand and what surrounds the
    blocks (embeddings, norms) are on ``device``.

    Usage: for each block ``statistics(i, needs)``, prune, ``advance(i)``.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, batches: Sequence[Batch], device: torch.device) -> None:
        self.model = model
        self.decoder = decoder
        self.batches = batches
        self.device = device
        self._outputs: list[Any] = [None] * len(batches)  # of the last finished block
        self._batch = 0

    def __enter__(self) -> Walk:
        layers = {id(b.module) for b in self.decoder.blocks}
        for child in self.decoder.parent.children():
            if not any(id(m) in layers for m in child.modules()):
                child.to(self.device)
        return self

    def __exit__(self, *exc: object) -> None:
        self._outputs.clear()
        for block in self.decoder.blocks:
            block.module.__dict__.pop("forward", None)
        self.model.to("cpu")

    def statistics(self, index: int, needs: Needs, *, keep: bool) -> dict[str, InputStatistics]:
        """Run block ``index`` over all batches and sum what its linears read.

        Args:
            keep: also keep the block's outputs, as the inputs of the next one (dense propagation).

        Returns:
            Linear name -> statistics; linears that read one tensor share one object.

        Raises:
            PruningError: activations that are not finite, or a linear whose inputs cannot be told apart by token.
        """
        block = self.decoder.blocks[index]
        collector = _Collector(needs, self.device)
        handles = [linear.register_forward_pre_hook(collector.hook(name)) for name, linear in block.linears.items()]
        try:
            self._run(index, keep=keep, before=collector.start)
        finally:
            for handle in handles:
                handle.remove()
        return collector.result(block)

    def advance(self, index: int) -> None:
        """Run block ``index`` as it now is over all batches; its outputs are the next block's inputs."""
        self._run(index, keep=True)

    def finish(self, index: int) -> None:
        """Put a stand-in in the place of block ``index``, and the block back on the CPU."""
        module = self.decoder.blocks[index].module
        # A patched forward rather than another module: models read attributes of their blocks (attention_type).
        module.forward = self._stand_in
        module.to("cpu")

    def _stand_in(self, *args: Any, **kwargs: Any) -> Any:
        return self._outputs[self._batch]

    def _run(self, index: int, *, keep: bool, before: Callable[[Batch], None] | None = None) -> None:
        import torch

        block = self.decoder.blocks[index]
        block.module.to(self.device)
        own_forward = block.module.forward

        def run_and_stop(*args: Any, **kwargs: Any) -> Any:
            raise _Stop(own_forward(*args, **kwargs))

        block.module.forward = run_and_stop
        try:
            with torch.no_grad():
                for position, batch in enumerate(self.batches):
                    self._batch = position
                    if before is not None:
                        before(batch)
                    output = self._forward(batch, block)
                    if keep:
                        self._outputs[position] = output
        finally:
            del block.module.forward

    def _forward(self, batch: Batch, block: Block) -> Any:
        try:
            self.model(
                input_ids=batch.input_ids.to(self.device),
                attention_mask=batch.attention_mask.to(self.device),
                use_cache=False,
            )
        except _Stop as stop:
            hidden = stop.output[0] if isinstance(stop.output, tuple) else stop.output
            if not bool(hidden.isfinite().all()):
                raise PruningError(f"the outputs of {block.name} are not finite on the calibration data") from None
            return stop.output
        raise PruningError(f"the model never ran its block {block.name}: calset cannot follow its forward")


class _Stop(Exception):
    """Carries a block's output out of the model's forward."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Collector:
    """Sums the inputs of a block's linears, once per tensor: those that read the same object share statistics."""

    def __init__(self, needs: Needs, device: torch.device) -> None:
        self.needs: Needs = needs
        self.device = device
        self.leaders: dict[str, str] = {}  # linear -> the first linear that read the same tensor
        self.sums: dict[str, InputStatistics] = {}
        self._counted: Any = None
        self._weights: Any = None
        self._seen: list[tuple[Tensor, str]] = []  # held, so that no id is reused within a batch

    def start(self, batch: Batch) -> None:
        self._counted = batch.counted.reshape(-1).to(self.device)
        self._weights = None if batch.weights is None else batch.weights.reshape(-1).to(self.device)
        self._seen = []

    def hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def see(module: Any, args: tuple[Any, ...]) -> None:
            self._see(name, args[0])

        return see

    def _see(self, name: str, inputs: Tensor) -> None:
        leader = next((first for tensor, first in self._seen if tensor is inputs), None)
        if leader is None:
            leader = name
            self._seen.append((inputs, name))
            self._add(name, inputs)
        if self.leaders.setdefault(name, leader) != leader:
            raise PruningError(f"{name} shares its input with {leader} in some batches only: calset cannot follow it")

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) != len(self._counted):
            raise PruningError(
                f"{name} reads {len(rows)} vectors for {len(self._counted)} tokens: calset cannot tell which count"
            )
        if name not in self.sums:
            self.sums[name] = InputStatistics.zeros(rows.shape[1], self.needs, self.device)
        self.sums[name].add(rows, self._counted, self._weights)

    def result(self, block: Block) -> dict[str, InputStatistics]:
        self._seen = []
        if unread := [name for name in block.linears if name not in self.leaders]:
            raise PruningError(f"{unread[0]} was never used on the calibration data: there is nothing to prune it by")
        for name, statistics in self.sums.items():
            if not statistics.is_finite():
                raise PruningError(f"the inputs of {name} are not finite on the calibration data")
        return {name: self.sums[leader] for name, leader in self.leaders.items()}

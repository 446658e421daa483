"""A checkpoint run to its logits, block by block from its files.

Why: loading a pruned model whole to look at it would need more memory than pruning it did. Held are what surrounds the
blocks (embeddings, output layer), one block, and the hidden states. It must not know how a model was pruned.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, PruningError, VerificationError
from calset.pruning.blockwise.hidden_states import HiddenStates, Where, nearest_place
from calset.pruning.blockwise.phases import Phase
from calset.pruning.blockwise.statistics import is_finite
from calset.pruning.blockwise.walk import Walk
from calset.pruning.calibration import Calibration
from calset.pruning.model.decoder import find_decoder
from calset.pruning.model.layout import Layout, place
from calset.pruning.model.memory import free_memory
from calset.pruning.model.tensorfiles import DTYPES, TensorFiles, exact_dtype

if TYPE_CHECKING:
    import torch

    from calset.pruning.calibration import Batch
    from calset.pruning.model.checkpoint import Source
    from calset.pruning.model.decoder import Block, Decoder

LOGIT_TOKENS = 16


@contextmanager
def walked(
    source: Source, batches: Sequence[Batch], device: torch.device, data: str, phase: Phase | None = None
) -> Iterator[Walk]:
    """A walk over ``batches`` with every block finished: ``Walk.logits`` is what is left to do.

    It runs in the narrowest dtype that holds the blocks' matrices exactly, as pruning does, whatever the config says.

    Args:
        data: what the batches are, for messages.
        phase: takes a step a block.

    Raises:
        InputError: the files do not fit the model, or cannot be read.
        PruningError: activations that are not finite, or a model that calset cannot follow.
    """
    import torch

    with TensorFiles(source.folder) as files, tempfile.TemporaryDirectory(prefix="calset-") as scratch:
        trial = source.skeleton()
        whole = Layout.of(files, trial)
        whole.check(torch.float32)
        dtype = _dtype(whole, find_decoder(trial, allow_partial=True))
        model = source.skeleton(dtype)
        decoder = find_decoder(model, allow_partial=True)
        layout = Layout.of(files, model)
        hidden = HiddenStates(len(batches), device, _where(model, decoder, batches, device, dtype), Path(scratch))
        _load_around(layout, decoder, dtype, device)

        def load(block: Block) -> None:
            layout.load(layout.names(f"{block.name}."), dtype, device)

        with Walk(model, decoder, batches, device, hidden=hidden, load=load, data=data) as walk:
            n_blocks, phase = len(decoder.blocks), phase or Phase()
            phase.step(0, n_blocks)
            for index in range(n_blocks):
                walk.advance(index)
                walk.finish(index)
                phase.step(index + 1, n_blocks)
            yield walk


def _dtype(layout: Layout, decoder: Decoder) -> torch.dtype:
    inside = tuple(f"{block.name}." for block in decoder.blocks)
    stored = [layout.files.stored[name] for name, target in layout.target.items() if target.startswith(inside)]
    return exact_dtype(s.torch_dtype for s in stored if len(s.shape) > 1 and s.dtype in DTYPES)


def _load_around(layout: Layout, decoder: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    """Everything outside the blocks; the output layer is tied to the embeddings where config and files say so."""
    inside = tuple(f"{block.name}." for block in decoder.blocks)
    layout.load([n for n, target in layout.target.items() if not target.startswith(inside)], dtype, device)
    model = layout.model
    absent = {n for n, p in model.named_parameters(remove_duplicate=False) if p.device.type == "meta"}
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    place(model, device)


def _where(model: Any, decoder: Decoder, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype) -> Where:
    """The nearest place where the hidden states fit beside the weights that are held at a time."""
    width = model.get_input_embeddings().weight.shape[1]
    inside = {id(p) for block in decoder.blocks for p in block.module.parameters()}
    around = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    largest = max(sum(p.numel() for p in block.module.parameters()) for block in decoder.blocks)
    n_bytes = sum(batch.input_ids.numel() for batch in batches) * width * dtype.itemsize
    return nearest_place(n_bytes, device, (around + largest) * dtype.itemsize, free_memory(device), free_memory(None))


def check_logits(source: Source, device: torch.device, phase: Phase) -> None:
    """Run a few tokens through a model, block by block, each a step of ``phase``.

    Raises:
        VerificationError: its tensors do not make it, or its logits are not finite.
    """
    import torch

    vocabulary = source.config.get_text_config().vocab_size
    token_ids = [i % vocabulary for i in range(1, LOGIT_TOKENS + 1)]
    batches = Calibration([token_ids], [(0, LOGIT_TOKENS)]).batches()
    try:
        with walked(source, batches, device, "a few tokens", phase) as walk:
            for logits in walk.logits(0, [torch.arange(LOGIT_TOKENS)]):
                if not is_finite(logits):
                    raise VerificationError(f"{source.folder} gives logits that are not finite")
    except (InputError, PruningError) as error:
        raise VerificationError(str(error)) from error

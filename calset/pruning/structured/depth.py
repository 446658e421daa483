"""Depth pruning: which decoder blocks change the hidden states least, and what is left without them.

Block Influence (Men et al. 2024, "ShortGPT", arXiv 2403.03853): 1 - the mean cosine similarity of what a block reads
and what it gives, over the counted tokens of the dense model. It must not know files, nor how models are run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calset.errors import InputError
from calset.pruning.blockwise.walk import Watcher
from calset.pruning.methods.masks import nearest
from calset.pruning.structured.copy import Part, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from calset.pruning.calibration import Batch
    from calset.pruning.model.layout import Layout

# Settings of a config that follow the number of a block. Lists that name blocks, and numbers of first blocks.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
FIRST_BLOCKS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "moe_layer_start_index")
# Lists with an entry a block, which transformers works out where config.json does not say them.
WORKED_OUT = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "moe_layers")
NUMBER_OF_BLOCK = re.compile(r"(idx|index|number|layer_id|block_id)$")  # what modules call the number of their block


class BlockInfluence(Watcher):
    """Sums 1 - cos(read, given) of one block over the counted tokens, in float64 where the device has it.

    ``sums``: [the sum of w (1 - cos), the sum of w, how many tokens]; w is 1 unless the calibration says otherwise.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=wide, device=device)
        self._counted: Any = None
        self._weights: Any = None

    def start(self, batch: Batch) -> None:
        device = self.sums.device
        self._counted = batch.counted.to(device)
        self._weights = None if batch.weights is None else batch.weights.to(device)

    def states(self, before: Tensor, after: Tensor) -> None:
        import torch

        read, given = before[self._counted].to(self.sums.dtype), after[self._counted].to(self.sums.dtype)
        change = 1 - torch.nn.functional.cosine_similarity(read, given, dim=-1, eps=1e-30)
        weights = torch.ones_like(change) if self._weights is None else self._weights[self._counted].to(change.dtype)
        self.sums += torch.stack([(weights * change).sum(), weights.sum(), torch.ones_like(change).sum()])


def influence(sums: Sequence[float]) -> float:
    """Block Influence from the sums over all tokens."""
    return sums[0] / max(sums[1], 1e-30)


def n_kept(n_blocks: int, sparsity: float) -> int:
    """How many blocks stay: the nearest count, and one at least.

    Raises:
        InputError: none would go.
    """
    kept = max(1, n_blocks - nearest(sparsity * n_blocks))
    if kept == n_blocks:
        raise InputError(f"sparsity {sparsity:g} drops none of {n_blocks} blocks: ask for {1 / n_blocks:.3g} or more")
    return kept


def choose(scores: Sequence[float], n_dropped: int, kinds: Sequence[str] | None = None) -> tuple[int, ...]:
    """The blocks that stay, ascending: the least influential go, of equals the later ones.

    Args:
        kinds: of each block (``layer_types``): the last of its kind stays, since caches and masks are made by kind.

    Raises:
        InputError: more would have to go than can.
    """
    kept = set(range(len(scores)))
    for index in sorted(kept, key=lambda i: (scores[i], -i)):
        if len(kept) == len(scores) - n_dropped:
            break
        if kinds is None or sum(kinds[i] == kinds[index] for i in kept) > 1:
            kept.remove(index)
    if len(kept) > len(scores) - n_dropped:
        raise InputError(f"one block of each kind ({', '.join(sorted(set(kinds or ())))}) stays: lower --sparsity")
    return tuple(sorted(kept))


def kinds(config: Any) -> Sequence[str] | None:
    """What kind of block each is, where the config says it."""
    found = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return found if isinstance(found, list) and len(found) == config.num_hidden_layers else None


def config_changes(text: Mapping[str, Any], config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """What config.json's text part is to say differently when only these blocks are left.

    Args:
        text: the part as it is in the file.
        config: the same as transformers reads it.

    Raises:
        InputError: blocks that depend on each other by number.
    """
    if getattr(config, "num_kv_shared_layers", 0):
        raise InputError(
            "its blocks share keys and values by their numbers (num_kv_shared_layers): none can be dropped"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError("its attention is scaled by the block's number: none can be dropped")
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        raise InputError("its blocks share what their indexers choose (indexer_types): none can be dropped")
    total = config.num_hidden_layers
    new = {old: i for i, old in enumerate(kept)}
    own_name = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    found: dict[str, Any] = {name: len(kept) for name in {own_name, "num_hidden_layers"} if name in text}
    found = found or {own_name: len(kept)}
    # Some configs only work these out, by rules of their own, and take none.
    taken = [name for name in WORKED_OUT if not isinstance(getattr(type(config), name, None), property)]
    values = {**{name: getattr(config, name, None) for name in taken}, **text}
    for name, value in values.items():
        if value is None:
            value = getattr(config, name, None)
        if name in INDEX_LISTS and isinstance(value, list):
            found[name] = [new[i] for i in value if i in new]
        elif isinstance(value, list) and len(value) == total and _is_by_block(name):
            found[name] = [value[i] for i in kept]
        elif name in FIRST_BLOCKS and isinstance(value, int) and not isinstance(value, bool):
            found[name] = sum(i < value for i in kept)
    found.update(_sparse_step(config, kept))
    return found


def _is_by_block(name: str) -> bool:
    return name != "architectures" and not re.search(r"token_ids?$", name)


def _sparse_step(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """Qwen's mixtures: every so-manieth block has experts. Once blocks are gone, only a list can say which."""
    step = getattr(config, "decoder_sparse_step", 1)
    if not isinstance(step, int) or step <= 1:
        return {}
    dense = [i for i in range(config.num_hidden_layers) if (i + 1) % step or i in (config.mlp_only_layers or [])]
    return {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(kept) if old in dense]}


def check_same(dense: Sequence[nn.Module], smaller: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Whether each block that stays is built as it was, by the new config: its modules, shapes and settings.

    Raises:
        InputError: naming the first difference.
    """
    for new, old in enumerate(kept):
        before, after = _described(dense[old], old), _described(smaller[new], new)
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                raise InputError(
                    f"block {old} would become block {new} and another one: its {name} would be "
                    f"{after.get(name)!r}, not {before.get(name)!r}; calset cannot say this in the model's config"
                )


def _described(block: nn.Module, number: int) -> dict[str, Any]:
    """Everything plain that a block says of itself, but its own number."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[f"{path} type"] = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}.{name} shape"] = tuple(parameter.shape)
        for name, value in vars(module).items():
            if _is_plain(value) and not (value == number and NUMBER_OF_BLOCK.search(name)):
                found[f"{path}.{name}"] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | bool)


def parts(layout: Layout, blocks: Sequence[str], kept: Sequence[int], unused: Sequence[str]) -> list[Part]:
    """The tensors that stay, those of the blocks under their new numbers.

    Args:
        blocks: the names of the dense model's blocks.
        unused: stored tensors that no parameter takes, and that stay.

    Raises:
        InputError: stored names in which the block's number cannot be told.
    """
    new = {old: i for i, old in enumerate(kept)}
    names: dict[str, str] = dict.fromkeys(unused, "")
    prefixes = set()
    for stored, target in layout.target.items():
        number = next((i for i, name in enumerate(blocks) if target.startswith(f"{name}.")), None)
        if number is None:
            names[stored] = stored
            continue
        words = stored.split(".")
        if str(number) not in words:
            raise InputError(f"{stored} is of block {number}, but its name does not say so: no block can be dropped")
        place = words.index(str(number))
        prefixes.add(".".join(words[:place]))
        if number in new:
            names[stored] = ".".join([*words[:place], str(new[number]), *words[place + 1 :]])
    if len(prefixes) != 1:
        raise InputError(f"the blocks are stored under {' and '.join(sorted(prefixes))}: no block can be dropped")
    return whole(layout.files, {old: name or old for old, name in names.items()})

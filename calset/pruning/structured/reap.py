"""Dropping experts: which of a mixture's experts matter least, and what is left without them.

REAP (Lasby et al. 2025, arXiv 2510.13999): an expert's score is the mean, over the counted tokens that the router sends
to it, of the weight that the router gives it x the norm of what it makes of the token. The weight is the one by which
the model multiplies (normalised and scaled, where the model does that). It must not know how models are run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calset.errors import InputError
from calset.pruning.blockwise.walk import Watcher
from calset.pruning.methods.masks import nearest
from calset.pruning.model.decoder import n_chosen_experts
from calset.pruning.structured.copy import Part, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from calset.pruning.calibration import Batch
    from calset.pruning.model.decoder import Block, Decoder
    from calset.pruning.model.experts import OnOutputs
    from calset.pruning.model.layout import Layout

NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
FROM_A_GROUP = 2  # DeepSeek-V3's router scores a group by its two best experts


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a model's mixtures have in common: experts, how many a token gets, and the groups that are chosen first.

    ``modules``: the name of the module of experts of each block that has one, by the block's name.
    """

    modules: Mapping[str, str]
    n_experts: int
    n_chosen: int
    n_groups: int = 1
    n_chosen_groups: int = 1

    def n_kept(self, sparsity: float) -> int:
        """How many experts stay: the nearest count that the router can choose from, in groups of equal size.

        Raises:
            InputError: none would go.
        """
        group = self.n_experts // self.n_groups
        dropped = nearest(sparsity * group)
        kept = max(group - dropped, self._fewest())
        if kept >= group:
            raise InputError(
                f"sparsity {sparsity:g} drops none of {self.n_experts} experts"
                + (f" in {self.n_groups} groups of equal size" if self.n_groups > 1 else "")
                + f": {self._fewest() * self.n_groups} at least stay, and counts are whole"
            )
        return kept * self.n_groups

    def _fewest(self) -> int:
        """Experts of a group that must stay."""
        if self.n_groups == 1:
            return self.n_chosen
        return max(FROM_A_GROUP, -(-self.n_chosen // self.n_chosen_groups))


def find_mixture(decoder: Decoder, config: Any) -> Mixture:
    """
    Raises:
        InputError: no experts that calset can tell apart, or mixtures that differ in their number.
    """
    modules: dict[str, str] = {}
    numbers = set()
    for block in decoder.blocks:
        if len(block.experts) > 1:
            raise InputError(f"{block.name} has {len(block.experts)} mixtures of experts: calset drops experts of one")
        for name, module in block.experts.items():
            modules[block.name] = name
            numbers.add(int(getattr(module, "num_experts", 0)))
    if not modules:
        raise InputError("reap drops experts, and this model has no mixture of experts that calset knows: use depth")
    chosen = n_chosen_experts(config)
    if len(numbers) != 1 or chosen is None:
        raise InputError("its mixtures differ in their number of experts, or it does not say how many a token gets")
    groups, chosen_groups = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    return Mixture(modules, numbers.pop(), chosen, groups, chosen_groups)


class ExpertScores(Watcher):
    """Sums, over the counted tokens that each of a block's experts gets, its weight x the norm of its output.

    ``sums`` (3 x experts, float64 where the device has it): the sum of w g |f|, the sum of w, how many tokens; w is 1
    unless the calibration says otherwise.
    """

    def __init__(self, n_experts: int, device: torch.device) -> None:
        import torch

        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, n_experts, dtype=wide, device=device)
        self._counted: Any = None
        self._weights: Any = None

    def start(self, batch: Batch) -> None:
        device = self.sums.device
        self._counted = batch.counted.reshape(-1).to(device)
        self._weights = None if batch.weights is None else batch.weights.reshape(-1).to(device)

    def outputs(self, module_name: str) -> OnOutputs:
        def see(expert: int, outputs: Tensor, gates: Tensor, tokens: Tensor) -> None:
            import torch

            wide = self.sums.dtype
            counted = self._counted[tokens].to(wide)
            weights = counted if self._weights is None else counted * self._weights[tokens].to(wide)
            norms = outputs.to(wide).norm(dim=-1)
            self.sums[:, expert] += torch.stack([weights @ (gates.to(wide) * norms), weights.sum(), counted.sum()])

        return see


def scores(sums: Sequence[Sequence[float]]) -> list[float]:
    """REAP's scores from the sums over all tokens; an expert that got none adds nothing and scores 0."""
    return [total / weight if weight else 0.0 for total, weight in zip(sums[0], sums[1], strict=True)]


def choose(found: Sequence[float], n_kept: int, n_groups: int = 1) -> tuple[int, ...]:
    """The experts that stay, ascending: the highest scores, as many of each group; of equals the earlier ones."""
    size = len(found) // n_groups
    kept: list[int] = []
    for group in range(n_groups):
        members = range(group * size, (group + 1) * size)
        kept.extend(sorted(members, key=lambda i: (-found[i], i))[: n_kept // n_groups])
    return tuple(sorted(kept))


def config_changes(text: Mapping[str, Any], config: Any, mixture: Mixture, n_kept: int) -> dict[str, Any]:
    """What config.json's text part is to say differently.

    Raises:
        InputError: the number of experts is not in the config under a name that calset knows.
    """
    found = {name: n_kept for name in NAMES if text.get(name) == mixture.n_experts}
    if found:
        return found
    name = next((n for n in NAMES if getattr(config, n, None) == mixture.n_experts), None)
    if name is None:
        raise InputError(f"its config does not say the number of experts ({mixture.n_experts}) under a name known here")
    return {getattr(config, "attribute_map", {}).get(name, name): n_kept}


def sliced(dense: nn.Module, smaller: nn.Module, mixture: Mixture) -> list[str]:
    """The parameters and buffers of a model, or a block, that have a row for each expert.

    How: a model built with fewer experts shows them, whatever they are called.

    Raises:
        InputError: something that shrinks in another way.
    """
    fewer = smaller.state_dict()
    found = []
    for name, tensor in dense.state_dict().items():
        other = fewer.get(name)
        if other is not None and other.shape == tensor.shape:
            continue
        if other is None or tensor.shape[0] != mixture.n_experts or other.shape[1:] != tensor.shape[1:]:
            raise InputError(f"{name} changes with the number of experts in a way that calset cannot follow")
        found.append(name)
    return found


def parts(
    layout: Layout, decoder: Decoder, names: Sequence[str], kept: Mapping[str, Sequence[int]], unused: Sequence[str]
) -> list[Part]:
    """The tensors that stay, cut to the kept experts.

    Args:
        names: the parameters with a row for each expert.
        kept: the experts that stay, by the name of their module.
        unused: stored tensors that no parameter takes, and that stay.

    Raises:
        InputError: a parameter that the files keep in a form that calset cannot cut.
    """
    cut: dict[str, Part] = {}
    gone: set[str] = set()
    for block in decoder.blocks:
        own = [name for name in names if name.startswith(f"{block.name}.")]
        if not own:
            continue
        rows = tuple(kept[next(iter(block.experts))])
        for name in own:
            if name in layout.plain:
                source = layout.plain[name]
                cut[source] = Part(source, source, layout.files.stored[source], rows)
        merged = {name for name in own if name not in layout.plain}
        found, dropped = _merged(layout, block, merged, rows)
        cut.update(found)
        gone |= dropped
    whole_ones = [n for n in [*layout.target, *unused] if n not in cut and n not in gone]
    return [*cut.values(), *whole(layout.files, {n: n for n in whole_ones})]


def _merged(
    layout: Layout, block: Block, names: Collection[str], rows: Sequence[int]
) -> tuple[dict[str, Part], set[str]]:
    """Of parameters that the files keep in pieces: source -> what stays of it, and the sources that go."""
    if unknown := [name for name in names if name not in block.weights]:
        raise InputError(f"calset cannot tell how {layout.files.folder} stores {unknown[0]}: no expert can be dropped")
    cut: dict[str, Part] = {}
    of_experts: dict[tuple[str, tuple[int, int]], dict[int, str]] = {}
    for matrix in layout.matrices([block.weights[name] for name in names]):
        assert matrix.in_expert is not None
        if matrix.expert is not None:  # a slice of a stored 3-D tensor
            if matrix.expert != matrix.in_expert:
                raise InputError(f"{matrix.name} keeps its experts in another order: none can be dropped")
            cut[matrix.name] = Part(matrix.name, matrix.name, layout.files.stored[matrix.name], tuple(rows))
        else:
            of_experts.setdefault((matrix.weight.name, matrix.in_rows), {})[matrix.in_expert] = matrix.name
    everyone: set[str] = set()
    for stored in of_experts.values():
        everyone |= set(stored.values())
        for new, old in enumerate(rows):
            source = stored[old]
            cut[source] = Part(stored[new], source, layout.files.stored[source])
    return cut, everyone - cut.keys()


def fill(smaller: nn.Module, dense: nn.Module, rows: Sequence[int]) -> None:
    """Give a block with fewer experts the weights of the dense one: those of the experts that stay are copies."""
    from torch import nn

    for path, module in smaller.named_modules():
        twin = dense.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = _cut_to(parameter, twin.get_parameter(name).data, rows)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = _cut_to(buffer, twin.get_buffer(name), rows)


def _cut_to(like: Tensor, values: Tensor, rows: Sequence[int]) -> Tensor:
    return values if like.shape == values.shape else values[list(rows)]

"""What of a causal language model can be pruned, found by structure: blocks, linears, fused experts, routers.

Why structure: a table of architectures is out of date the day a model appears, and a list of ``nn.Linear`` misses the
experts that transformers keeps as 3-D parameters (97 % of some models). What is not understood is named, never
skipped in silence. It must not know methods, statistics or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from calset.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# What configs call the number of experts that a token gets; some have a list with an entry a block.
CHOSEN_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k",
)  # fmt: skip
NAMED = 4  # weights that a message names before it counts the rest


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a block that calset can prune: a matrix, or one matrix per expert.

    ``name`` is the parameter's full name; ``transposed``: kept as inputs x outputs (Conv1D, some experts).
    """

    name: str
    module: nn.Module
    attribute: str
    n_experts: int | None = None
    transposed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of a matrix."""
        first, second = self.parameter.shape[-2:]
        return (second, first) if self.transposed else (first, second)

    def matrix(self, expert: int | None = None) -> Tensor:
        """A view of one matrix, outputs x inputs: writing to it writes the parameter."""
        tensor = self.parameter.data if expert is None else self.parameter.data[expert]
        return tensor.T if self.transposed else tensor

    def reads(self, expert: int | None = None) -> str:
        """The name under which its input statistics go: the linear's, or the expert's."""
        return self.name.removesuffix(".weight") if expert is None else f"{self.name}[{expert}]"

    def readers(self) -> list[str]:
        return [self.reads(e) for e in ([None] if self.n_experts is None else range(self.n_experts))]


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block.

    ``weights``: what can be pruned, by parameter name. ``experts``: module name -> a module of fused experts.
    ``routers``: parameters that choose experts, never pruned. ``unknown``: parameters that calset does not understand.
    """

    name: str
    module: nn.Module
    weights: Mapping[str, Weight]
    experts: Mapping[str, nn.Module]
    routers: Sequence[str] = ()
    unknown: Sequence[str] = ()

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Linear modules (and Conv1D) by full module name."""
        return {w.reads(): w.module for w in self.weights.values() if w.n_experts is None}


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's decoder: its blocks in order, and the module that holds their list."""

    parent: nn.Module
    blocks: Sequence[Block]

    def linears(self) -> dict[str, nn.Module]:
        return {name: linear for block in self.blocks for name, linear in block.linears.items()}

    def weights(self) -> dict[str, Weight]:
        return {name: weight for block in self.blocks for name, weight in block.weights.items()}

    def unknown(self) -> list[str]:
        return [name for block in self.blocks for name in block.unknown]


def find_decoder(model: nn.Module, *, allow_partial: bool = False) -> Decoder:
    """Find the decoder blocks: of the module lists whose every child holds a linear, the one with most parameters.

    One in what transformers calls the model's decoder goes before one elsewhere, such as in an image tower.

    Works on a model on the meta device, so that a model can be refused before its weights are loaded.

    Args:
        allow_partial: leave decoder weights that calset does not understand as they are, instead of refusing.

    Raises:
        InputError: no such list, decoder weights that calset does not understand, or tied ones, by name.
    """
    name, layers = _largest_list(model)
    blocks = [_block(f"{name}.{i}", module) for i, module in enumerate(layers)]
    decoder = Decoder(model.get_submodule(name.rpartition(".")[0]), blocks)
    if not allow_partial:
        _refuse_unknown(model, decoder)
    _refuse_tied(model, decoder)
    return decoder


def is_linear(module: nn.Module) -> bool:
    """A linear layer that computes what its name says."""
    from torch import nn

    return (isinstance(module, nn.Linear) and _computes_linear(type(module))) or is_conv1d(module)


@cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass's forward is still x W^T + b, tried on a small one: Falcon's is, a grouped linear's not."""
    import torch
    from torch import nn

    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            probe, inputs = kind(8, 4), torch.linspace(-1, 1, 24).reshape(3, 8)
            return torch.allclose(probe(inputs), nn.functional.linear(inputs, probe.weight, probe.bias), atol=1e-5)
    except Exception:  # it takes other arguments: whatever it computes, it is not known here
        return False


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is inputs x outputs."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_experts(module: Any) -> bool:
    """Fused experts with the interface that transformers gives its own: see ``calset.pruning.model.experts``."""
    if not all(hasattr(module, a) for a in ("num_experts", "has_gate", "has_bias", "is_transposed")):
        return False
    own = dict(module.named_parameters(recurse=False))
    return all(a in own and own[a].ndim == 3 and len(own[a]) == module.num_experts for a in projections(module))


def projections(experts: Any) -> tuple[str, str]:
    """The attributes of fused experts that hold their first and second matrices."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def _largest_list(model: Any) -> tuple[str, nn.ModuleList]:
    # An image tower can be larger than a decoder that lost blocks; get_decoder is a best effort, so it is not all.
    get_decoder = getattr(model, "get_decoder", lambda: model)
    text = {id(m) for m in (get_decoder() or model).modules()}
    best: tuple[bool, int, str, nn.ModuleList] | None = None
    for name, module in _lists(model):
        # Outer lists come first, so a list of experts inside the only block does not win on a tie.
        found = (id(module) in text, sum(p.numel() for p in module.parameters()), name, module)
        if best is None or found[:2] > best[:2]:
            best = found
    if best is None:
        raise InputError(f"{type(model).__name__} has no list of blocks with linear layers: calset cannot prune it")
    return best[2], best[3]


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Module lists whose every child holds a linear."""
    from torch import nn

    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if all(any(map(is_linear, child.modules())) for child in module):
            yield name, module


def _block(name: str, module: nn.Module) -> Block:
    routers = dict(_routers(module))
    weights: dict[str, Weight] = {}
    experts: dict[str, nn.Module] = {}
    known = set(routers)
    part: Any
    for inner, part in module.named_modules():
        if is_experts(part):
            experts[f"{name}.{inner}"] = part
            known.update(id(p) for p in part.parameters(recurse=False))
            for attribute in projections(part):
                weight = Weight(f"{name}.{inner}.{attribute}", part, attribute, part.num_experts, part.is_transposed)
                weights[weight.name] = weight
        elif is_linear(part) and id(part.weight) not in routers:
            known.update(id(p) for p in part.parameters(recurse=False))
            weight = Weight(f"{name}.{inner}.weight", part, "weight", transposed=is_conv1d(part))
            weights[weight.name] = weight
        elif _is_left_alone(part):
            known.update(id(p) for p in part.parameters(recurse=False))
    unknown = [f"{name}.{n}" for n, p in module.named_parameters() if p.ndim >= 2 and id(p) not in known]
    return Block(name, module, weights, experts, [f"{name}.{n}" for n in routers.values()], unknown)


def _is_left_alone(module: nn.Module) -> bool:
    """Understood, and not pruned: embeddings, and the short convolutions of linear attention."""
    from torch import nn

    return isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _routers(block: nn.Module) -> Iterator[tuple[int, str]]:
    """(id, name) of the parameters that choose experts or weigh a shared one.

    Shapes alone would take a shared expert's matrix for a router, when it has as many outputs as there are experts, and
    names alone its ``gate_proj``. So: all of a module whose class says that it routes; and of what stands beside
    experts, all of a ``router``, and of a ``gate`` what has one output, or where nothing else routes one an expert.
    """
    inside: dict[int, str] = {}
    for path, module in block.named_modules():
        if _says_router(type(module).__name__):
            inside.update(_matrices_of(module, path))
    for path, module in block.named_modules():
        if (n := _n_experts(module)) is None:
            continue
        place = path.rpartition(".")[0]
        beside = [(name, part) for name, part in block.get_submodule(place).named_children() if part is not module]
        routers = [(name, part) for name, part in beside if _says_router(type(part).__name__) or _ends(name, "router")]
        for name, part in routers:
            inside.update(_matrices_of(part, f"{place}.{name}"))
        outputs = (1,) if routers else (1, n)
        for name, part in beside:
            if _ends(name, "gate"):
                found = _matrices_of(part, f"{place}.{name}")
                own = {id(p) for p in part.parameters() if len(p) in outputs}
                inside.update({key: full for key, full in found.items() if key in own})
    yield from inside.items()


def _says_router(class_name: str) -> bool:
    return "Router" in class_name or class_name.endswith("Gating")


def n_chosen_experts(config: Any) -> int | None:
    """How many experts a token gets, at most over the blocks; None where the config does not say."""
    for value in (getattr(config, name, None) for name in CHOSEN_EXPERTS):
        if isinstance(value, int):
            return value
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return max(value)
    return None


def _ends(name: str, word: str) -> bool:
    """``shared_expert_gate`` ends in "gate", ``gate_proj`` does not."""
    return name.rpartition("_")[2] == word


def _matrices_of(module: nn.Module, path: str) -> dict[int, str]:
    """Ids and full names of a module's parameters of two dimensions or more."""
    named = module.named_parameters(prefix=path)
    return {id(p): name.removeprefix(".") for name, p in named if p.ndim >= 2}


def _n_experts(module: Any) -> int | None:
    from torch import nn

    if is_experts(module):
        return module.num_experts
    if isinstance(module, nn.ModuleList) and len(module) > 1 and all(any(map(is_linear, m.modules())) for m in module):
        return len(module)
    return None


def _refuse_unknown(model: nn.Module, decoder: Decoder) -> None:
    if unknown := decoder.unknown():
        shapes = [f"{name} {tuple(model.get_parameter(name).shape)}" for name in unknown[:NAMED]]
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise InputError(
            f"calset does not know how to prune these decoder weights, and would leave them dense: "
            f"{', '.join(shapes)}{more}; --allow-partial prunes the others"
        )


def _refuse_tied(model: nn.Module, decoder: Decoder) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for weight in decoder.weights().values():
        if len(names := owners[id(weight.parameter)]) > 1:
            raise InputError(f"{' and '.join(names[:3])} are one tied matrix: calset cannot prune it for each use")


def surroundings(model: Any, blocks: Sequence[Block]) -> set[str]:
    """What runs before the first block, by name: all parameters outside the blocks but an output layer of its own."""
    inside = tuple(f"{block.name}." for block in blocks)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    unused = set()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        unused = {id(p) for p in head.parameters()}
    return {n for n, p in model.named_parameters() if not n.startswith(inside) and id(p) not in unused}

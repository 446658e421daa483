"""Fused experts run one by one, telling what each of their matrices reads.

transformers keeps the experts of a layer as two 3-D parameters and runs them through an interface that all its
mixture-of-experts models share (``transformers.integrations.moe``): (hidden states, chosen experts, their weights) in,
and the attributes ``has_gate``, ``has_bias``, ``is_transposed`` and ``_apply_gate``. This is that interface's plain
form. It must not know statistics or models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from calset.pruning.model.decoder import projections

if TYPE_CHECKING:
    from torch import Tensor

# (attribute of the weight, expert, its inputs: rows x width, the token of each row)
OnInputs = Callable[[str, int, "Tensor", "Tensor"], None]
# (expert, its outputs before they are weighed: rows x width, the weight and the token of each row)
OnOutputs = Callable[[int, "Tensor", "Tensor", "Tensor"], None]


def forward(experts: Any, tell: OnInputs | None = None, tell_outputs: OnOutputs | None = None) -> Callable[..., Tensor]:
    """A forward for ``experts`` that calls ``tell`` with the inputs of every expert that gets tokens.

    ``tell_outputs`` is called with what each of them made of its tokens.

    Deterministic also on CUDA, where summing with ``index_add_`` is not.
    """

    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **_: Any) -> Tensor:
        import torch

        n_tokens, width = hidden_states.shape
        chosen = top_k_index.reshape(-1)
        order = torch.sort(chosen, stable=True).indices
        outputs = hidden_states.new_zeros(len(chosen), width)
        counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
        start = 0
        for expert in range(experts.num_experts):
            pairs = order[start : start + counts[expert]]
            start += counts[expert]
            if len(pairs):
                tokens = pairs.div(top_k_index.shape[-1], rounding_mode="floor")
                outputs[pairs] = _run_one(experts, expert, hidden_states[tokens], tokens, tell)
                if tell_outputs is not None:
                    tell_outputs(expert, outputs[pairs], top_k_weights.reshape(-1)[pairs], tokens)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.reshape(n_tokens, -1, width).sum(1).to(hidden_states.dtype)

    return run


def _run_one(experts: Any, expert: int, inputs: Tensor, tokens: Tensor, tell: OnInputs | None) -> Tensor:
    first, second = projections(experts)
    if tell is not None:
        tell(first, expert, inputs, tokens)
    hidden = _linear(experts, first, expert, inputs)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    if tell is not None:
        tell(second, expert, hidden, tokens)
    return _linear(experts, second, expert, hidden)


def _linear(experts: Any, attribute: str, expert: int, inputs: Tensor) -> Tensor:
    from torch.nn.functional import linear

    weight = getattr(experts, attribute)[expert]
    bias = getattr(experts, f"{attribute}_bias")[expert] if experts.has_bias else None
    return linear(inputs, weight.T if experts.is_transposed else weight, bias)

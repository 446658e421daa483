"""Slow pruners written from the papers' equations, in float64, to hold the real ones against.

They share no code with calset: masks by sorting (score, index) pairs, and SparseGPT by inverting the Hessian of the
remaining columns anew at every column, without Cholesky or blocks of updates.
"""

from __future__ import annotations

import math

import numpy as np


def lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """The k lowest, ties by row-major index."""
    flat = sorted((float(s), i) for i, s in enumerate(scores.reshape(-1)))
    mask = np.zeros(scores.size, dtype=bool)
    mask[[i for _, i in flat[:k]]] = True
    return mask.reshape(scores.shape)


def half_up(value: float) -> int:
    return math.floor(value + 0.5 + 1e-9)


def magnitude(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """The mask over the whole matrix."""
    return lowest(np.abs(weight), half_up(sparsity * weight.size))


def wanda(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> np.ndarray:
    """Sun et al. 2023, equation 1: S_ij = |W_ij| ||X_j||_2, compared within each output."""
    scores = np.abs(weight) * np.linalg.norm(inputs, axis=0)
    return np.stack([lowest(row, half_up(sparsity * weight.shape[1])) for row in scores])


def n_of_m(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Keep the n highest of every m consecutive weights of a row."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            mask[row, start : start + m] = lowest(scores[row, start : start + m], m - n)
    return mask


def sparsegpt(
    weight: np.ndarray,
    inputs: np.ndarray,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Frantar & Alistarh 2023, section 3: OBS over columns, the mask chosen block by block on the updated weights."""
    w = weight.astype(np.float64).copy()
    x = inputs.astype(np.float64)
    rows, width = w.shape
    hessian = x.T @ x / len(x)
    dead = np.diag(hessian) == 0
    mean = np.diag(hessian)[~dead].mean()
    hessian[dead, dead] = 1
    hessian += damping * mean * np.eye(width)
    w[:, dead] = 0
    mask = np.zeros(w.shape, dtype=bool)

    def remaining(j: int) -> np.ndarray:
        """The first row of the inverse Hessian of the columns from j on."""
        return np.linalg.inv(hessian[j:, j:])[0]

    first = np.array([remaining(j)[0] for j in range(width)])
    done = 0
    for j in range(width):
        if pattern is not None and j % pattern[1] == 0:
            part = slice(j, j + pattern[1])
            mask[:, part] = n_of_m(w[:, part] ** 2 / first[part], *pattern)
        if sparsity is not None and j % block == 0:
            end = min(j + block, width)
            total = half_up(sparsity * rows * end)
            mask[:, j:end] = lowest(w[:, j:end] ** 2 / first[j:end], total - done)
            done = total
        inverse = remaining(j)
        error = np.where(mask[:, j], w[:, j], 0) / inverse[0]
        w[:, j:] -= np.outer(error, inverse)
    w[mask] = 0
    return w, mask


def prune_model(model, layers, sequences, sparsity: float, *, method: str, skip: str = "") -> None:
    """Prune a whole causal language model in place, in float64: every block is found anew by running the whole model.

    Each sequence runs alone, so nothing is padded. An expert is pruned with the tokens that its router sends it, which
    are looked up token by token; its two first matrices, where the checkpoint keeps them apart, apart.

    Args:
        layers: the decoder blocks, in order.
        skip: part of the names of linears that are routers.
    """
    import torch

    model.double()
    model.config._experts_implementation = "eager"  # the others take no float64
    for layer in layers:
        inputs, routed = {}, {}
        handles = []
        for name, module in layer.named_modules():
            if type(module).__name__ in ("Linear", "Conv1D") and not (skip and skip in name):
                handles.append(module.register_forward_pre_hook(_keep_inputs(inputs, name)))
            if type(module).__name__.endswith("Experts"):
                handles.append(module.register_forward_pre_hook(_keep_routing(routed, name)))
        with torch.no_grad():
            for sequence in sequences:
                model(input_ids=torch.tensor([list(sequence)]), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, rows in inputs.items():
            module = layer.get_submodule(name)
            transposed = type(module).__name__ == "Conv1D"
            weight = module.weight.detach().numpy()
            new = _prune(weight.T if transposed else weight, np.concatenate(rows), sparsity, method)
            module.weight.data = torch.tensor(new.T.copy() if transposed else new)
        for name, calls in routed.items():
            _prune_experts(layer.get_submodule(name), calls, sparsity, method)


def _keep_inputs(inputs: dict, name: str):
    def hook(module, args):
        inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).numpy().copy())

    return hook


def _keep_routing(routed: dict, name: str):
    def hook(module, args):
        routed.setdefault(name, []).append((args[0].numpy().copy(), args[1].numpy().copy()))

    return hook


def _prune(weight: np.ndarray, inputs: np.ndarray, sparsity: float, method: str) -> np.ndarray:
    if method == "sparsegpt":
        return sparsegpt(weight, inputs, sparsity=sparsity)[0]
    return np.where(wanda(weight, inputs, sparsity), 0, weight)


def _prune_experts(experts, calls, sparsity: float, method: str) -> None:
    import torch

    first = experts.gate_up_proj.detach().numpy()
    second = experts.down_proj.detach().numpy()
    is_gpt_oss = type(experts).__name__ == "GptOssExperts"
    for e in range(len(first)):
        reads, passes = [], []
        for hidden, chosen in calls:
            for token in range(len(hidden)):
                if e in chosen[token]:
                    x = hidden[token]
                    reads.append(x)
                    passes.append(_gpt_oss_inner(experts, e, x) if is_gpt_oss else _swiglu(first[e], x))
        x, y = np.array(reads), np.array(passes)
        if is_gpt_oss:  # one matrix, kept as inputs x outputs, gate and up interleaved
            new_first = _prune(first[e].T, x, sparsity, method).T
            new_second = _prune(second[e].T, y, sparsity, method).T
        else:
            half = first.shape[1] // 2
            new_first = np.concatenate(
                [_prune(part, x, sparsity, method) for part in (first[e][:half], first[e][half:])]
            )
            new_second = _prune(second[e], y, sparsity, method)
        experts.gate_up_proj.data[e] = torch.tensor(new_first.copy())
        experts.down_proj.data[e] = torch.tensor(new_second.copy())


def _swiglu(gate_up: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up @ x, 2)
    return gate / (1 + np.exp(-gate)) * up


def _gpt_oss_inner(experts, e: int, x: np.ndarray) -> np.ndarray:
    """gpt-oss's gated unit: alpha 1.702, limit 7, and one added to the linear half."""
    both = x @ experts.gate_up_proj[e].detach().numpy() + experts.gate_up_proj_bias[e].detach().numpy()
    gate, up = np.minimum(both[::2], 7.0), np.clip(both[1::2], -7.0, 7.0)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))

"""Slow pruners written from the papers' equations, in float64, to hold the real ones against.

They share no code with calset: masks by sorting (score, index) pairs, and SparseGPT by inverting the Hessian of the
remaining columns anew at every column, without Cholesky or blocks of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


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


def prune_blocks(
    model, layers, sequences, sparsity: float, *, method: str, skip: str = ""
) -> Iterator[tuple[torch.nn.Module, dict[str, np.ndarray]]]:
    """Prune a whole causal language model in place, in float64: every block is found anew by running the whole model.

    Each sequence runs alone, so nothing is padded. An expert is pruned with the tokens that its router sends it, which
    are looked up token by token; its two first matrices, where the checkpoint keeps them apart, apart.

    Args:
        layers: the decoder blocks, in order.
        skip: part of the names of linears that are routers.

    Yields:
        each block as it is done, and what its linears read, by name. What the caller then writes to it is what the next
        block is pruned after.
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
        rows = {name: np.concatenate(parts) for name, parts in inputs.items()}
        for name, read in rows.items():
            module = layer.get_submodule(name)
            transposed = type(module).__name__ == "Conv1D"
            weight = module.weight.detach().numpy()
            new = _prune(weight.T if transposed else weight, read, sparsity, method)
            module.weight.data = torch.tensor(new.T.copy() if transposed else new)
        for name, calls in routed.items():
            _prune_experts(layer.get_submodule(name), calls, sparsity, method)
        yield layer, rows


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
    how = {"sparsity": sparsity, "group": "matrix"}
    if method == "ria":
        return np.where(choose(ria(weight, inputs), how), 0, weight)
    if method in ("admm", "alps"):
        return {"admm": admm, "alps": alps}[method](weight, inputs, how)[0]
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


def choose(scores: np.ndarray, how: dict, share: float = 1.0) -> np.ndarray:
    """The mask of ``how``: {"sparsity", "group": row or matrix} or {"pattern"}; a ``share`` of it on the way there."""
    width = scores.shape[1]
    if "pattern" in how:
        final = n_of_m(scores, *how["pattern"])
        return lowest(np.where(final, scores, np.inf), half_up(share * final.sum()))
    sparsity = share * how["sparsity"]
    if how["group"] == "matrix":
        return lowest(scores, half_up(sparsity * scores.size))
    return np.stack([lowest(row, half_up(sparsity * width)) for row in scores])


def ria(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Zhang et al. 2024: relative importance times the root of the input norm, weight by weight."""
    size = np.abs(weight)
    scores = np.zeros(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            share = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
            scores[i, j] = share * np.sqrt(np.linalg.norm(inputs[:, j]))
    return scores


def dsnot(
    weight: np.ndarray, inputs: np.ndarray, mask: np.ndarray, pattern: tuple[int, int] | None = None, swaps: int = 50
) -> np.ndarray:
    """Zhang et al. 2024 (DSnoT), section 3.3, row by row with lists of candidates."""
    mask = mask.copy()
    mean, variance, norm = inputs.mean(axis=0), inputs.var(axis=0), np.linalg.norm(inputs, axis=0)
    for i, row in enumerate(weight):
        effect = row * mean
        error = effect[mask[i]].sum()
        sign = np.sign(error)
        to_grow = sorted(np.flatnonzero(mask[i]), key=lambda j: -sign * effect[j] / variance[j])
        to_prune = sorted(np.flatnonzero(~mask[i]), key=lambda j: abs(row[j]) * norm[j])
        for grown in to_grow[:swaps]:
            if abs(error) <= 0.1 / 2048:
                break
            if pattern is None:
                candidates = [j for j in to_prune if sign * effect[j] < 0]
            else:
                candidates = [j for j in to_prune if j // pattern[1] == grown // pattern[1]]
            if not candidates:
                break
            after = error - effect[grown] + effect[candidates[0]]
            if np.sign(after) != sign or abs(after) >= abs(error):
                break
            mask[i, grown], mask[i, candidates[0]] = False, True
            to_prune.remove(candidates[0])
            error = after
    return mask


def scaled_problem(weight: np.ndarray, inputs: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(damped H with unit diagonal, what inputs were scaled by, scaled weights) of a problem without dead inputs."""
    x = inputs.astype(np.float64)
    hessian = x.T @ x / len(x)
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    scale = np.sqrt(np.diag(hessian))
    return hessian / np.outer(scale, scale), scale, weight * scale


def admm(weight: np.ndarray, inputs: np.ndarray, how: dict, damping: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Boža 2024, algorithms 1 and 2 with gradual masks: columns are outputs, as there."""
    hessian, scale, target = scaled_problem(weight, inputs, damping)
    dense = w = target.T
    u = np.zeros_like(w)
    for t in range(20):
        if t < 15:
            mask = choose(np.abs((w + u).T), how, 1 - (1 - (t + 1) / 15) ** 3).T
        z = np.where(mask, 0, w + u)
        u = u + w - z
        w = np.linalg.solve(hessian + np.eye(len(hessian)), hessian @ dense + (z - u))
    return np.where(mask, 0, w + u).T / scale, mask.T


def cg(matrix: np.ndarray, right: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Plain conjugate gradients for one right-hand side (Hestenes & Stiefel 1952)."""
    x = start.copy()
    r = right - matrix @ x
    p = r.copy()
    for _ in range(steps):
        if r @ r < 1e-28:
            break
        a = (r @ r) / (p @ matrix @ p)
        x, new = x + a * p, r - a * (matrix @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


def alps(weight: np.ndarray, inputs: np.ndarray, how: dict, damping: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Meng et al. 2024, algorithms 1 and 2: inverses from an eigendecomposition, each output's support on its own."""
    hessian, scale, target = scaled_problem(weight, inputs, damping)
    values, vectors = np.linalg.eigh(hessian)
    rho, begun = 0.1, False
    dense, v = target.T, np.zeros(target.T.shape)

    def project(b: np.ndarray) -> np.ndarray:
        return choose(np.abs(b.T), how).T

    last = project(dense)
    begin = d = np.where(last, 0, dense)
    k = d.size - last.sum()
    for t in range(1, 301):
        w = vectors @ ((vectors.T @ (hessian @ dense - v + rho * d)) / (values + rho)[:, None])
        mask = project(w + v / rho)
        d = np.where(mask, 0, w + v / rho)
        v = v + rho * (w - d)
        if t % 3 == 0:
            s, last = (mask != last).sum(), mask
            begun = begun or s > 0.005 * k
            if begun and s == 0:
                break
            if begun:
                rho = min(1e6, rho * (1.3 if s > 0.1 * k else 1.2 if s > 0.005 * k else 1.1))
            else:
                rho /= 5
                if s:
                    d, v = begin, np.zeros(v.shape)
            if t >= 30 and s < 0.0003 * k:
                break
    mask = project(w).T
    out = np.zeros(weight.shape)
    for i in range(len(weight)):
        kept = ~mask[i]
        right = (hessian @ dense[:, i])[kept]
        out[i, kept] = cg(hessian[np.ix_(kept, kept)], right, w[kept, i], 10)
    return out / scale, mask


def owl(shares: list[float], sizes: list[int], sparsity: float, limit: float = 0.08) -> list[float]:
    """Yin et al. 2024: blocks with more outliers keep more, within 2 x limit, the mean by parameters as asked."""
    spread = max(shares) - min(shares)
    moved = [(s - min(shares)) / spread * 2 * limit for s in shares]
    mean = sum(m * n for m, n in zip(moved, sizes, strict=True)) / sum(sizes)
    return [sparsity - (m - mean) for m in moved]

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

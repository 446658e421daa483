"""How the zeros are shared out: every matrix the same, or some decoder blocks more than others.

Whatever the rule, the total by parameter count is the asked one. Pure functions on numbers, and ``read_ratios`` for a
file; ``sensitivity`` measures blocks on a model. It must not know methods.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calset.errors import InputError, first_line
from calset.pruning.methods.masks import Group, nearest

if TYPE_CHECKING:
    from torch import Tensor

RULES = ("uniform", "owl")
OWL_OUTLIER = 5.0  # times the mean score: M, of 3 to 10 in the paper
OWL_LIMIT = 0.08  # either side of the asked sparsity: lambda


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix to prune: its name, the decoder block that it is in, its outputs and inputs.

    ``module``: what the model calls it, where that may be another name than the checkpoint's.
    """

    name: str
    block: str
    rows: int
    width: int
    module: str = ""

    @property
    def size(self) -> int:
        return self.rows * self.width

    def is_within(self, name: str) -> bool:
        """Whether a name is the matrix's, or that of a module, a block or a stack of experts that it is part of."""
        return any(own == name or own.startswith((f"{name}.", f"{name}[")) for own in (self.name, self.module))


def bounds(sparsity: float) -> tuple[float, float]:
    """The least and the most that a block gets: at least half of what is asked, at least half of what is kept."""
    return sparsity / 2, (1 + sparsity) / 2


def outlier_share(scores: Iterable[Tensor], times: float = OWL_OUTLIER) -> float:
    """The share of a block's weights whose score exceeds ``times`` the block's mean (Yin et al. 2024).

    Args:
        scores: |W| x input norm of each matrix (OWL's choice); gone through twice. None: no outliers.
    """
    n, total = 0, 0.0
    for part in scores:
        n += part.numel()
        total += float(part.mean()) * part.numel()
    if not n:
        return 0.0
    return sum(int((part > times * total / n).sum()) for part in scores) / n


def owl(shares: Sequence[float], sizes: Sequence[int], sparsity: float, limit: float = OWL_LIMIT) -> list[float]:
    """A sparsity a block: blocks with more outliers keep more (OWL, Yin et al. 2024, arXiv 2310.05175, section 3).

    Shares are stretched to a range of 2 x ``limit``; here the mean by parameters is then exactly the asked sparsity,
    where the reference code takes the mean over blocks. Equal shares give equal sparsities.
    """
    low, high = min(shares), max(shares)
    stretched = [0.0 if high == low else (share - low) / (high - low) * 2 * limit for share in shares]
    return settle([sparsity - kept for kept in stretched], sizes, sparsity)


def settle(wanted: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """Shift all by one number, within ``bounds``, so that the mean by size is the asked sparsity."""
    low, high = bounds(sparsity)
    total = sum(sizes)

    def moved(shift: float) -> list[float]:
        return [min(high, max(low, value + shift)) for value in wanted]

    # The mean grows with the shift, from `low` to `high`, and the asked sparsity lies between: bisect.
    least, most = low - max(wanted), high - min(wanted)
    for _ in range(100):
        shift = (least + most) / 2
        mean = sum(v * n for v, n in zip(moved(shift), sizes, strict=True)) / total
        least, most = (shift, most) if mean < sparsity else (least, shift)
    return moved(most)


def shares(
    measured: Mapping[str, float], matrices: Sequence[Matrix], sparsity: float, group: Group
) -> dict[str, float]:
    """Return every matrix's own sparsity by OWL.

    Args:
        measured: the outlier share of each block, by its name.
    """
    blocks = list(measured)
    sizes = [sum(matrix.size for matrix in matrices if matrix.block == block) for block in blocks]
    per_block = owl(list(measured.values()), sizes, sparsity)
    return share_out(matrices, dict(zip(blocks, per_block, strict=True)), sparsity, group)


def share_out(
    matrices: Sequence[Matrix], per_block: Mapping[str, float], sparsity: float, group: Group
) -> dict[str, float]:
    """Every matrix's own sparsity, as whole weights that sum to the asked total.

    With groups ``matrix`` and ``block`` exactly nearest(sparsity x parameters) weights go; with ``row`` a matrix
    changes by a weight of every row at once, and the total is off by at most one such step.
    """
    units = [matrix.rows if group == "row" else 1 for matrix in matrices]
    ideal = [per_block[matrix.block] * matrix.size for matrix in matrices]
    counts = [math.floor(value / unit + 1e-9) * unit for value, unit in zip(ideal, units, strict=True)]
    left = nearest(sparsity * sum(matrix.size for matrix in matrices)) - sum(counts)
    # The matrices that lost most by rounding down get a step first.
    order = sorted(range(len(matrices)), key=lambda i: (counts[i] - ideal[i]) / units[i])
    for i in order:
        if 2 * left >= units[i]:
            counts[i] += units[i]
            left -= units[i]
    return {matrix.name: count / matrix.size for matrix, count in zip(matrices, counts, strict=True)}


def read_ratios(path: Path, matrices: Sequence[Matrix], default: float) -> dict[str, float]:
    """Every matrix's sparsity from a JSON object of names (of blocks, matrices or what lies between) and sparsities.

    The longest name wins: {"model.layers.0": 0.4, "model.layers.0.mlp.down_proj": 0.2}.

    Args:
        default: for matrices that no name covers.

    Raises:
        InputError: no such file, no such object, a share out of range, a name that covers nothing.
    """
    ratios = _read_object(path)
    for name, share in ratios.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"{path}: {name} has {share!r}: a share of zeros lies between 0 and 1")
    found, used = {}, set()
    for matrix in matrices:
        covering = [name for name in ratios if matrix.is_within(name)]
        best = max(covering, key=len, default=None)
        used.add(best)
        found[matrix.name] = default if best is None else float(ratios[best])
    if unused := [name for name in ratios if name not in used]:
        raise InputError(f"{path}: {unused[0]} is no block or matrix of the model, or other names cover all of it")
    return found


def _read_object(path: Path) -> dict[str, float]:
    try:
        ratios = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--allocation takes {', '.join(RULES)} or a JSON file of ratios, and {path} is none: {first_line(error)}"
        ) from error
    if not isinstance(ratios, dict) or not ratios:
        raise InputError(f"{path} is no JSON object of names and sparsities")
    return ratios

"""The difficulty x length picture of a selection, as SVG: the pool as shaded cells, what was taken as dots on it.

Why by hand: a report must follow the reader's light or dark mode, which an image with colours of its own cannot; here
every colour is a CSS class. Cells and not points, because a pool may have a million. Must not know: catalogs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46
COLUMNS, ROWS = 21, 24  # difficulty in steps of 0.05, lengths in equal steps of their logarithm
MAX_DOTS = 1500


class Dot(NamedTuple):
    """One sample that was taken."""

    sample_id: str
    difficulty: float
    n_tokens: int


class Scale(NamedTuple):
    """The lengths that the picture spans, in tokens, both at least 1 and different."""

    shortest: int
    longest: int

    @classmethod
    def of(cls, shortest: int, longest: int) -> Scale:
        shortest = max(1, shortest)
        return cls(shortest, max(longest, shortest + 1))

    def y(self, n_tokens: float) -> float:
        return HEIGHT - BOTTOM - self._share(n_tokens) * (HEIGHT - TOP - BOTTOM)

    def _share(self, n_tokens: float) -> float:
        span = math.log(self.longest) - math.log(self.shortest)
        return min(1.0, max(0.0, (math.log(max(n_tokens, 1)) - math.log(self.shortest)) / span))

    def ticks(self) -> list[int]:
        """Round lengths inside the span: 1, 2 and 5 times the powers of ten; at least both ends."""
        powers = range(int(math.log10(self.longest)) + 1)
        found = [m * 10**p for p in powers for m in (1, 2, 5) if self.shortest <= m * 10**p <= self.longest]
        return found if len(found) > 1 else [self.shortest, self.longest]


def cell_sql(difficulty: str, n_tokens: str, scale: Scale) -> tuple[str, str]:
    """SQL expressions for the column and the row (0 at the bottom) of the cell of a difficulty and a length.

    In SQL, because a pool may have as many pairs of them as traces.
    """
    low, span = math.log(scale.shortest), math.log(scale.longest) - math.log(scale.shortest)
    share = f"(ln(greatest({n_tokens}, 1)) - {low!r}) / {span!r}"
    return (
        f"greatest(0, least({COLUMNS - 1}, round({difficulty} * {COLUMNS - 1})))::INTEGER",
        f"greatest(0, least({ROWS - 1}, floor({share} * {ROWS})))::INTEGER",
    )


def draw(cells: dict[tuple[int, int], int], dots: Sequence[Dot], scale: Scale, label: str) -> str:
    """The SVG element.

    Args:
        cells: (column, row) -> traces of the pool.
        dots: what was taken; more than ``MAX_DOTS`` are thinned to the first of them.
        label: what a screen reader says; must be HTML already.
    """
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" class="picture">',
        *_axes(scale),
        *_cells(cells),
        *_dots(dots[:MAX_DOTS], scale),
        "</svg>",
    ]
    return "\n".join(parts)


def _x(difficulty: float) -> float:
    """The middle of a difficulty's column is where that difficulty is."""
    step = (WIDTH - LEFT - RIGHT) / COLUMNS
    return LEFT + step / 2 + difficulty * step * (COLUMNS - 1)


def _axes(scale: Scale) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{base - TOP}" class="frame"/>']
    for difficulty in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(f'<text x="{_x(difficulty):.1f}" y="{base + 18}" class="tick middle">{difficulty:g}</text>')
    for n_tokens in scale.ticks():
        y = scale.y(n_tokens)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick end">{n_tokens:,}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" class="axis middle">difficulty (1 - pass rate)</text>')
    parts.append(
        f'<text transform="translate(13 {(TOP + base) / 2:.0f}) rotate(-90)" class="axis middle">tokens</text>'
    )
    return parts


def _cells(cells: dict[tuple[int, int], int]) -> list[str]:
    most = math.log1p(max(cells.values(), default=1))
    width, height = (WIDTH - LEFT - RIGHT) / COLUMNS, (HEIGHT - TOP - BOTTOM) / ROWS
    return [
        f'<rect x="{LEFT + i * width + 0.5:.1f}" y="{HEIGHT - BOTTOM - (j + 1) * height + 0.5:.1f}" '
        f'width="{width - 1:.1f}" height="{height - 1:.1f}" rx="1.5" class="pool" '
        f'fill-opacity="{0.12 + 0.68 * math.log1p(n) / most:.2f}"><title>{n:,} traces</title></rect>'
        for (i, j), n in sorted(cells.items())
    ]


def _dots(dots: Sequence[Dot], scale: Scale) -> list[str]:
    """Circles, moved within their column by a hash so that equals do not hide each other."""
    step = (WIDTH - LEFT - RIGHT) / COLUMNS
    parts = []
    for dot in dots:
        jitter = hashlib.sha256(dot.sample_id.encode("utf-8", "replace")).digest()[0] / 255 - 0.5
        x, y = _x(dot.difficulty) + jitter * step * 0.8, scale.y(dot.n_tokens)
        said = f"difficulty {dot.difficulty:.3f}, {dot.n_tokens:,} tokens"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="taken"><title>{said}</title></circle>')
    return parts

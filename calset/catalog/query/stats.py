"""Statistics of a catalog: counts, pass rate, verdicts, and a difficulty x length table.

Why apart from printing: the same numbers go to a terminal and to JSON. Traces of evaluations are left out, since the
question is what there is to calibrate with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calset.catalog.catalog import Catalog
from calset.catalog.records import JUDGED
from calset.catalog.store.connection import opened
from calset.catalog.store.schema import SUSPECT
from calset.catalog.store.values import clean_params
from calset.errors import InputError

_Ask = Callable[..., list[dict[str, Any]]]

# Difficulty bands: their highest value, included; the lowest is the one before, excluded.
_BANDS = ((0.0, "0"), (0.2, "(0, 0.2]"), (0.4, "(0.2, 0.4]"), (0.6, "(0.4, 0.6]"), (0.8, "(0.6, 0.8]"))
_LAST_BANDS = ("(0.8, 1)", "1", "unknown")

# The pools that are asked about, one row a (problem, model, revision), and the numbers of their traces. Apart, since
# a million traces are counted by integer keys, and names come in when there are only as many rows as problems.
_POOLS = """
    CREATE TEMP TABLE pool AS
    SELECT s.pool_key, s.problem_id, s.model, p.source, s.k, s.n_correct,
        (s.k - s.n_correct) / nullif(s.k, 0)::DOUBLE AS difficulty
    FROM pools s JOIN problems p ON p.problem_id = s.problem_id
    WHERE s.kind = 'build' AND (? IS NULL OR s.model = ?) AND (? IS NULL OR p.source = ?)
"""
_TRACES = """
    CREATE TEMP TABLE t AS
    SELECT pool_key, coalesce(verdict, 'ungraded') AS verdict, finish_reason, n_tokens, n_prompt_tokens,
        n_reasoning_tokens
    FROM graded_traces SEMI JOIN pool USING (pool_key)
"""
_JUDGED = ", ".join(f"'{verdict}'" for verdict in JUDGED)
_COUNTED = f"""
    CREATE TEMP TABLE counted AS
    SELECT p.problem_id, p.model, p.source, c.* EXCLUDE (pool_key)
    FROM pool p JOIN (
        SELECT pool_key,
            count(*) AS traces,
            count(*) FILTER (WHERE verdict <> 'ungraded') AS graded,
            count(*) FILTER (WHERE verdict IN ({_JUDGED})) AS judged,
            count(*) FILTER (WHERE verdict = 'correct') AS correct,
            sum(n_tokens) AS tokens, sum(n_reasoning_tokens) AS reasoning_tokens, sum(n_prompt_tokens) AS prompt_tokens
        FROM t GROUP BY pool_key
    ) c USING (pool_key)
"""
_SUMS = ("traces", "graded", "judged", "correct", "tokens", "reasoning_tokens", "prompt_tokens")
_COUNTS = ", ".join(
    ["count(DISTINCT problem_id) AS problems", *(f"coalesce(sum({c}), 0)::BIGINT AS {c}" for c in _SUMS)]
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the difficulty x length table."""

    difficulty: str
    length: str
    traces: int
    correct: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Numbers of the build traces of a catalog. ``pass_rate`` is correct / judged; None when nothing was judged."""

    catalog: str
    model: str | None
    source: str | None
    problems: int
    traces: int
    graded: int
    judged: int
    correct: int
    tokens: int
    reasoning_tokens: int
    prompt_tokens: int
    pass_rate: float | None
    length_quartiles: tuple[int, int, int, int, int] | None  # tokens: least, 25 %, median, 75 %, greatest
    by_verdict: dict[str, int]
    by_finish_reason: dict[str, int]
    by_model: list[dict[str, Any]]
    by_source: list[dict[str, Any]]
    difficulty_bands: tuple[str, ...]
    length_bands: tuple[str, ...]
    difficulty_length: list[Cell]  # only cells that hold traces
    suspect_gold: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def tables(self) -> list[tuple[str, list[str], list[tuple[Any, ...]]]]:
        """What a terminal shows: (title, column names, rows)."""
        rate = "" if self.pass_rate is None else f"{self.pass_rate:.3f}"
        totals = [("problems", self.problems), ("traces", self.traces), ("graded", self.graded), ("pass rate", rate)]
        totals += [("completion tokens", self.tokens), ("of these reasoning", self.reasoning_tokens)]
        totals += [("problems whose reference looks wrong", self.suspect_gold)]
        columns = ["problems", "traces", "graded", "pass_rate", "tokens"]
        groups = [
            (f"by {what}", [what, *columns], [tuple(row[c] for c in (what, *columns)) for row in rows])
            for what, rows in (("model", self.by_model), ("source", self.by_source))
        ]
        return [
            ("catalog", ["", self.catalog], totals),
            *groups,
            ("verdicts", ["verdict", "traces"], list(self.by_verdict.items())),
            ("finish reasons", ["finish reason", "traces"], list(self.by_finish_reason.items())),
            ("difficulty x length: correct / traces", ["difficulty", *self.length_bands], self.grid()),
        ]

    def grid(self) -> list[tuple[str, ...]]:
        """The difficulty x length table as text: "correct/traces", a row a difficulty band."""
        cells = {(c.difficulty, c.length): f"{c.correct}/{c.traces}" for c in self.difficulty_length}
        used = [band for band in self.difficulty_bands if any(c.difficulty == band for c in self.difficulty_length)]
        return [(band, *(cells.get((band, length), "") for length in self.length_bands)) for band in used]

    def heat(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """The difficulty x length table as a picture: a row a difficulty band, each cell its text and its shade.

        The text is the traces and the share of them that is correct; the shade, 0 to 1, the logarithm of the traces.
        """
        cells = {(c.difficulty, c.length): c for c in self.difficulty_length}
        most = math.log1p(max((c.traces for c in cells.values()), default=1))

        def cell(band: str, length: str) -> tuple[str, float]:
            c = cells.get((band, length))
            return (f"{c.traces:,} {c.correct / c.traces:4.0%}", math.log1p(c.traces) / most) if c else ("", 0.0)

        return [(row[0], [cell(row[0], length) for length in self.length_bands]) for row in self.grid()]


def stats(catalog: Catalog | str | Path, model: str | None = None, source: str | None = None) -> Stats:
    """Count a catalog's build traces, or those of one model or source.

    Raises:
        InputError: no catalog, or a model or source that it does not hold.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    with opened(catalog.path, "own", catalog.lock_timeout) as con:
        # One pass over the joins, into memory; every number below then counts the same rows.
        con.execute(_POOLS, clean_params([model, model, source, source])).fetchall()
        for table in (_TRACES, _COUNTED):
            con.execute(table).fetchall()

        def ask(sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
            cursor = con.execute(sql, clean_params(params))
            names = [column[0] for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

        total = ask(f"SELECT {_COUNTS} FROM counted")[0]
        if not total["traces"]:
            _explain_nothing(ask, catalog, model=model, source=source)
        (found,) = ask("SELECT quantile_disc(n_tokens, [0, 0.25, 0.5, 0.75, 1]) AS quartiles FROM t")
        quartiles = tuple(found["quartiles"] or ())
        bands = _length_bands(quartiles)
        return Stats(
            catalog=str(catalog.path),
            model=model,
            source=source,
            **total,
            pass_rate=_rate(total),
            length_quartiles=quartiles or None,  # type: ignore[arg-type]
            by_verdict=_count_by(ask, "verdict"),
            by_finish_reason=_count_by(ask, "finish_reason"),
            by_model=_groups(ask, "model"),
            by_source=_groups(ask, "source"),
            difficulty_bands=(*(label for _, label in _BANDS), *_LAST_BANDS),
            length_bands=tuple(label for _, label in bands),
            difficulty_length=_cells(ask, bands),
            suspect_gold=_suspects(ask),
        )


def _explain_nothing(ask: _Ask, catalog: Catalog, **asked: str | None) -> None:
    there = {
        "model": "SELECT DISTINCT model AS name FROM runs",
        "source": "SELECT DISTINCT source AS name FROM problems",
    }
    for what, value in asked.items():
        names = sorted(row["name"] for row in ask(there[what]))
        if value is not None and value not in names:
            raise InputError(f"no {what} {value!r} in {catalog.path}: there is {', '.join(names[:20]) or 'none'}")


def _count_by(ask: _Ask, column: str) -> dict[str, int]:
    rows = ask(f"SELECT {column} AS name, count(*) AS n FROM t GROUP BY ALL ORDER BY n DESC, name")
    return {row["name"]: row["n"] for row in rows}


def _groups(ask: _Ask, column: str) -> list[dict[str, Any]]:
    rows = ask(f"SELECT {column}, {_COUNTS} FROM counted GROUP BY {column} ORDER BY traces DESC, {column}")
    return [{**row, "pass_rate": _rate(row)} for row in rows]


def _rate(counts: dict[str, Any]) -> float | None:
    return counts["correct"] / counts["judged"] if counts["judged"] else None


def _length_bands(quartiles: Sequence[int]) -> list[tuple[int, str]]:
    """(longest length, label) of the quartile bands; equal quartiles make one band."""
    if not quartiles:
        return []
    bands, least = [], quartiles[0]
    for longest in quartiles[1:]:
        if not bands or longest > bands[-1][0]:
            bands.append((longest, f"{least}..{longest}"))
            least = longest + 1
    return bands


def _cells(ask: _Ask, bands: Sequence[tuple[int, str]]) -> list[Cell]:
    if not bands:
        return []
    length = " ".join(f"WHEN n_tokens <= {longest} THEN {i}" for i, (longest, _) in enumerate(bands))
    highest = " ".join(f"WHEN difficulty <= {top} THEN {i}" for i, (top, _) in enumerate(_BANDS))
    n = len(_BANDS)
    sql = f"""
        SELECT CASE WHEN difficulty IS NULL THEN {n + 2} {highest} WHEN difficulty < 1 THEN {n} ELSE {n + 1} END AS d,
            CASE {length} END AS l, count(*) AS traces, count(*) FILTER (WHERE verdict = 'correct') AS correct
        FROM t JOIN pool USING (pool_key) GROUP BY ALL ORDER BY d, l
    """
    labels = (*(label for _, label in _BANDS), *_LAST_BANDS)
    return [Cell(labels[row["d"]], bands[row["l"]][1], row["traces"], row["correct"]) for row in ask(sql)]


def _suspects(ask: _Ask) -> int:
    """The problems of the view ``suspect_gold``, whose votes are counted here for the never solved ones alone."""
    sql = f"""
        WITH votes AS (
            SELECT pool_key, extracted, count(*) AS n
            FROM graded_traces SEMI JOIN (SELECT pool_key FROM pool WHERE k > 0 AND n_correct = 0) USING (pool_key)
            WHERE verdict IN ({_JUDGED}) AND extracted IS NOT NULL GROUP BY ALL
        ), majority AS (SELECT pool_key, max(n) AS majority_n FROM votes GROUP BY pool_key)
        SELECT count(DISTINCT problem_id) AS n FROM (
            SELECT problem_id, majority_n, n_correct / k AS pass_rate, majority_n / k AS majority_share
            FROM majority JOIN pool USING (pool_key)
        ) WHERE {SUSPECT}
    """
    return ask(sql)[0]["n"]


# -- the same bands for whoever holds the rows already --------------------------------------------------------------

DIFFICULTY_BANDS = (*(label for _, label in _BANDS), *_LAST_BANDS)


def difficulty_band(difficulty: float | None) -> int:
    """The index in ``DIFFICULTY_BANDS`` of a difficulty; the last is for unknown ones."""
    n = len(_BANDS)
    if difficulty is None:
        return n + 2
    found = next((i for i, (highest, _) in enumerate(_BANDS) if difficulty <= highest), None)
    return found if found is not None else n if difficulty < 1 else n + 1


def difficulty_bands(difficulties: np.ndarray) -> np.ndarray:
    """Return the indices in ``DIFFICULTY_BANDS`` of many difficulties; NaN where one is unknown."""
    n = len(_BANDS)
    found = np.searchsorted([highest for highest, _ in _BANDS], difficulties)
    return np.where(np.isnan(difficulties), n + 2, found + (difficulties >= 1))


def length_bands(lengths: Sequence[int] | np.ndarray) -> list[tuple[int, str]]:
    """(longest length, label) of the quartile bands of some lengths, as ``stats`` cuts them (nearest rank)."""
    ordered = np.sort(np.asarray(lengths))
    n = len(ordered)
    return _length_bands([int(ordered[max(1, -(-q * n // 4)) - 1]) for q in range(5)] if n else [])

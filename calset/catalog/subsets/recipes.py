"""Recipes: what a selection takes, as data, by name or from a TOML file.

``calset.catalog.subsets.take`` applies one. Must not know: candidates, files other than a recipe's own TOML.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from calset.errors import InputError, did_you_mean

Kind = Literal["trace", "prompt", "gold", "text"]
Order = Literal["harder", "random", "catalog"]
Shares = Literal["equal", "proportional"]


class RecipeError(InputError):
    """A recipe that makes no sense; ``key`` is the one to change, which a file's reader turns into a line."""

    def __init__(self, recipe: str, key: str, said: str) -> None:
        super().__init__(f"recipe {recipe}: {said}")
        self.key, self.said = key, said


class RecipeOptions(TypedDict, total=False):
    """Keyword parameters of ``select`` that replace fields of its recipe."""

    correct: bool
    finished: bool
    difficulty: tuple[float, float] | None
    min_k: int | None
    length_quantiles: tuple[float, float] | None
    length_tokens: tuple[float, float] | None
    order: Order
    per_problem: int | None
    samples: int | None
    tokens: int | None
    window: int | None
    stratify: str | None
    shares: Shares


@dataclass(frozen=True, slots=True)
class Recipe:
    """A declarative selection: filter, bands, order, budget.

    Args:
        name: what it is called in manifests.
        kind: what a sample holds: prompt and completion of a trace, a prompt only, prompt and reference solution, or a
            window of a plain text.
        correct: only traces whose verdict is correct.
        finished: only traces whose finish reason is "stop".
        difficulty: lowest and highest difficulty, both included; None takes every trace, judged or not.
        min_k: only traces of problems with at least so many judged traces; None for any. An adaptive build stops most
            problems early, so its selections ask for the full number.
        length_quantiles: band of completion lengths as quantiles within the candidates that passed the filters above,
            both ends included: with n lengths in ascending order, quantile q is the ceil(q n)-th (the first for q = 0).
        length_tokens: the same band given in tokens instead.
        order: "harder" (difficulty descending, ties seeded), "random" (seeded) or "catalog" (problem id, sample index).
        per_problem: at most so many traces of one problem, the first in order; None for all.
        samples: budget in samples; None for no limit.
        tokens: budget in tokens, prompt tokens counted; samples are taken whole, one that does not fit is passed over.
        window: tokens in a sample of a "text" recipe. Of a "trace" recipe: a longer trace gives one window of so many
            tokens, at a seeded place (``window_start``), instead of all its tokens; shorter ones stay whole.
        stratify: divide the budget among strata: "source", or a key of the problems' metadata ("domain").
        shares: of a stratified budget: "equal", or "proportional" to what each stratum offers. Shares are whole
            samples or tokens by largest remainder; what a stratum cannot fill goes to the others.

    Raises:
        InputError: a value that makes no sense; the message names the key.
    """

    name: str
    kind: Kind = "trace"
    correct: bool = False
    finished: bool = False
    difficulty: tuple[float, float] | None = None
    min_k: int | None = None
    length_quantiles: tuple[float, float] | None = None
    length_tokens: tuple[int, int] | None = None
    order: Order = "random"
    per_problem: int | None = 1
    samples: int | None = None
    tokens: int | None = None
    window: int | None = None
    stratify: str | None = None
    shares: Shares = "equal"

    def __post_init__(self) -> None:
        self._require(isinstance(self.name, str) and bool(self.name), "name", "a non-empty text")
        self._require(self.kind in get_args(Kind), "kind", f"one of {', '.join(get_args(Kind))}")
        self._require(self.order in get_args(Order), "order", f"one of {', '.join(get_args(Order))}")
        self._require(self.shares in get_args(Shares), "shares", f"one of {', '.join(get_args(Shares))}")
        stratum = self.stratify is None or (isinstance(self.stratify, str) and bool(self.stratify))
        self._require(stratum, "stratify", 'the text "source" or a key of the problems\' metadata')
        for key in ("correct", "finished"):
            self._require(isinstance(getattr(self, key), bool), key, "true or false")
        for key in ("min_k", "per_problem", "samples", "tokens", "window"):
            value = getattr(self, key)
            self._require(value is None or (_is_int(value) and value > 0), key, "a positive whole number")
        for key in ("difficulty", "length_quantiles"):
            self._require_band(key, 1.0, "two numbers 0 <= low <= high <= 1")
        self._require_band("length_tokens", None, "two whole numbers 0 <= low <= high")
        self._require_sense()

    def _require_sense(self) -> None:
        """Values that are good alone and make no sense together."""
        if self.length_quantiles and self.length_tokens:
            raise RecipeError(self.name, "length_tokens", "give length_quantiles or length_tokens, not both")
        if self.samples and self.tokens:
            raise RecipeError(self.name, "tokens", "give a budget in samples or in tokens, not both")
        if self.kind not in ("text", "trace") and self.window is not None:
            raise RecipeError(self.name, "window", "window is for recipes of the kind text or trace")
        if self.kind == "text" and self.window is None:
            raise RecipeError(self.name, "window", "a text recipe needs a window (tokens a sample)")
        if self.kind == "text" and self.stratify is not None:
            raise RecipeError(self.name, "stratify", "a text has no problems to stratify by")

    def _require(self, good: bool, key: str, wanted: str) -> None:
        if not good:
            raise RecipeError(self.name, key, f"{key} must be {wanted}, not {getattr(self, key)!r}")

    def _require_band(self, key: str, highest: float | None, wanted: str) -> None:
        band = getattr(self, key)
        if band is None:
            return
        number = _is_whole if highest is None else _is_number
        good = isinstance(band, (tuple, list)) and len(band) == 2 and all(map(number, band))
        good = good and 0 <= band[0] <= band[1] and (highest is None or band[1] <= highest)
        self._require(good, key, wanted)
        # A command line's 2000..8000 arrives as floats.
        object.__setattr__(self, key, tuple(int(end) if highest is None else end for end in band))

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able values; bands as lists.

        An unset ``min_k`` or ``stratify`` is left out: subsets kept before there was one must stay the same question.
        """
        values = asdict(self)
        if self.min_k is None:
            del values["min_k"]
        if self.stratify is None:
            del values["stratify"], values["shares"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def with_options(self, **options: object) -> Recipe:
        """The recipe with options replaced; a budget or a length band of one sort drops the other sort's default.

        Raises:
            InputError: an unknown option, or a value that makes no sense.
        """
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(options) - known):
            near, there = did_you_mean(unknown[0], known), ", ".join(sorted(known))
            raise RecipeError(self.name, unknown[0], f"unknown option {unknown[0]!r}{near}; there are {there}")
        for one, other in (("samples", "tokens"), ("length_quantiles", "length_tokens")):
            for given, default in ((one, other), (other, one)):
                if options.get(given) is not None and default not in options:
                    options[default] = None
        return replace(self, **options)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_ALL = (
    # The paper's thresholds are not public; these are a published re-implementation's (arXiv 2609.17890).
    Recipe("ssgr", correct=True, finished=True, difficulty=(0.2, 0.8), length_quantiles=(0.25, 0.75), order="harder"),
    # arXiv 2509.12464: unfiltered own traces, one million tokens.
    Recipe("rac", per_problem=None, tokens=1_000_000),
    Recipe("correct", correct=True, finished=True),
    Recipe("random", finished=True),
    Recipe("prompts", kind="prompt"),
    Recipe("gold", kind="gold"),
    Recipe("text", kind="text", window=2048, per_problem=None),
)
# The paper's ablation varies difficulty and length of correct, finished traces; its bands are not public. Here: thirds
# of the difficulty, whose ends lie where no k below 200 can put a pass rate, so that no problem is in two of them; and
# thirds of the lengths among those. The order is random: "harder" would tilt what is compared within a band.
_DIFFICULTIES = {"easy": (0.0, 0.345), "medium": (0.345, 0.655), "hard": (0.655, 1.0)}
_LENGTHS = {"short": (0.0, 0.33), "moderate": (0.34, 0.66), "long": (0.67, 1.0)}


def _grid() -> Iterable[Recipe]:
    """``easy`` to ``hard``, ``short`` to ``long``, and each pair: ``easy-short`` to ``hard-long``."""
    for hardness in (None, *_DIFFICULTIES):
        for length in (None, *_LENGTHS):
            if name := "-".join(filter(None, (hardness, length))):
                yield Recipe(
                    name,
                    correct=True,
                    finished=True,
                    difficulty=_DIFFICULTIES[hardness] if hardness else None,
                    length_quantiles=_LENGTHS[length] if length else None,
                )


RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (*_ALL, *_grid())}


def get_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A recipe by its name, from a TOML file, or as it is.

    Raises:
        InputError: no such recipe, or a file that is not a recipe; the message names file, line and key.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in RECIPES:
        return RECIPES[str(recipe)]
    path = Path(recipe)
    # os.path says False, where Path.is_file raises, of a text that can be no path.
    if path.suffix == ".toml" or os.path.isfile(path):
        return read_recipe(path)
    near = did_you_mean(str(recipe), RECIPES)
    raise InputError(f"no recipe {str(recipe)!r}: there are {', '.join(RECIPES)}, or name a .toml file{near}")


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file: ``base`` names the recipe it starts from, the other keys are Recipe's.

    Raises:
        InputError: naming the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        raise InputError(f"{path}{f':{at[1]}' if at else ''}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    except ValueError as error:
        raise InputError(f"cannot read the recipe {str(path)!r}: {error}") from error
    base = values.pop("base", None)
    if base is not None and not (isinstance(base, str) and base in RECIPES):
        near = did_you_mean(base, RECIPES) if isinstance(base, str) else ""
        raise InputError(f"{_place(path, text, 'base')}: base must be one of {', '.join(RECIPES)}, not {base!r}{near}")
    try:
        values = {"name": path.stem, **values}
        start = RECIPES[base] if base else RECIPES["text"] if values.get("kind") == "text" else Recipe(path.stem)
        return start.with_options(**values)
    except RecipeError as error:
        raise InputError(f"{_place(path, text, error.key)}: {error.said}") from error


def _place(path: Path, text: str, key: str) -> str:
    """``mine.toml:7``: the line where a key of a TOML text is written.

    The parser keeps no lines, but the text up to a line is TOML itself wherever no value is open there: the key is in
    the statement after which it is first there.
    """
    lines = text.splitlines()
    begins = 1
    for n in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:n]))
        except tomllib.TOMLDecodeError:
            continue  # inside a value of several lines
        if key in values:
            return f"{path}:{begins}"
        begins = n + 1
    return str(path)

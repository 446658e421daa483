"""When to stop sampling a problem: the statistics of an adaptive build, as pure functions of counts.

Why: most tokens of a build with K samples a problem go to problems that no recipe with a difficulty band takes. What
the first samples say of such a problem, and what all problems so far say of the population, together tell how probable
it is that K samples would put it inside the band. When that is improbable enough, the rest of its samples is saved.

Why the estimates stay as good as fixed K's: a sample is the same draw in an adaptive and in a fixed-K build, and only
problems with all K samples are selected (a recipe's ``min_k``), so the difficulty of whatever is selected is the very
number that fixed K gives. Stopping cannot bend an estimate, it can only lose a problem. docs/adaptive.md has the rest.

Must not know: traces, engines, catalogs, the order in which problems are sampled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calset.errors import InputError

Action = Literal["continue", "stop", "complete"]
Floats = NDArray[np.float64]

GRID_SIZE = 65
PRIOR_STRENGTH = 8.0  # problems that the default prior weighs as much as
MAX_ITERATIONS = 500
TOLERANCE = 1e-5
MAX_PRICE, PRICE_STEPS = 1e5, 1000  # prices are sought up to the one, in steps of 1.2 %
MAX_SAMPLES = 1000  # beyond, a binomial coefficient is more than a float holds
CONFIDENCE = 0.95  # of stopping a problem


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """How pass rates are spread over the problems of a population: a mixing distribution on a grid, of no given shape.

    Args:
        grid: pass rates in [0, 1], ascending, float64 [m].
        weights: the share of problems at each, float64 [m]; positive, so that no data is impossible; sum 1.

    Raises:
        InputError: anything else.
    """

    grid: Floats
    weights: Floats

    def __post_init__(self) -> None:
        grid, weights = (np.array(values, dtype=np.float64) for values in (self.grid, self.weights))
        good = grid.ndim == 1 and grid.shape == weights.shape and bool(np.all(np.diff(grid) > 0))
        if not (good and grid[0] >= 0 and grid[-1] <= 1 and np.any((grid > 0) & (grid < 1))):
            raise InputError("a prior's grid must be ascending pass rates in [0, 1], one of them inside, each weighted")
        if not (np.all(weights > 0) and math.isclose(weights.sum(), 1.0, abs_tol=1e-9)):
            raise InputError("a prior's weights must be positive and add up to 1")
        for name, values in (("grid", grid), ("weights", weights)):
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    @staticmethod
    def uniform() -> Prior:
        """Every pass rate equally probable: where a fit starts, and what it leans on while problems are few.

        Conservative, because real populations are heavier at 0 and 1 and so are stopped sooner than under this one.
        """
        # Equal steps of the arcsine of sqrt(p), the scale on which a pass rate's error is the same everywhere.
        angles = np.linspace(0.0, np.pi / 2, GRID_SIZE)
        edges = np.sin(np.concatenate([angles[:1], (angles[1:] + angles[:-1]) / 2, angles[-1:]])) ** 2
        return Prior(np.sin(angles) ** 2, np.diff(edges))

    def posterior(self, k: int, n_correct: int) -> Floats:
        """The weights after ``n_correct`` of ``k`` judged samples, float64 [m]."""
        _check_counts(k, n_correct)
        log_likelihood = _log_likelihood(self.grid, k, n_correct)
        weights = self.weights * np.exp(log_likelihood - log_likelihood.max())
        return weights / weights.sum()


def fit_prior(
    observations: Mapping[tuple[int, int], int], towards: Prior | None = None, strength: float = PRIOR_STRENGTH
) -> Prior:
    """The mixing distribution that explains the problems sampled so far, leaning on ``towards`` while they are few.

    Maximum likelihood over all distributions on the grid (Kiefer and Wolfowitz 1956; Laird 1978) by EM, with a penalty
    (Dirichlet) that counts as ``strength`` problems spread like ``towards``. Problems stopped, completed and still open
    go in alike: whatever ended the sampling looked at the samples alone, so the likelihood of a problem is
    p^c (1 - p)^(k - c) each time, up to a factor without p. Leaving the stopped ones out would be the mistake.

    Args:
        observations: (k judged, n_correct) -> number of problems, each with no sample under way: those that come back
            first are the short ones, and short ones are more often correct.
        towards: what few observations change little; its grid is the result's. None: ``Prior.uniform()``. The fit over
            all sources serves as ``towards`` of the fit of each source.
        strength: in problems.

    Raises:
        InputError: counts that cannot be, or a strength that is not positive.
    """
    if not strength > 0:
        raise InputError(f"a prior's strength must be positive, not {strength!r}")
    for (k, n_correct), problems in observations.items():
        _check_counts(k, n_correct)
        if problems < 0:
            raise InputError(f"{problems} problems cannot have {n_correct} correct of {k} samples")
    towards = towards or Prior.uniform()
    seen = {counts: problems for counts, problems in observations.items() if problems and counts[0]}
    if not seen:
        return towards
    likelihoods = np.exp([_log_likelihood(towards.grid, k, n_correct) for k, n_correct in seen])
    problems = np.array(list(seen.values()), dtype=np.float64)
    weights = towards.weights
    for _ in range(MAX_ITERATIONS):
        evidence = np.maximum(likelihoods @ weights, np.finfo(np.float64).tiny)
        update = strength * towards.weights + weights * ((problems / evidence) @ likelihoods)
        update /= update.sum()
        moved = np.abs(update - weights).sum()
        weights = update
        if moved < TOLERANCE:
            break
    return Prior(towards.grid, weights)


def fit_strata(observations: Mapping[str, Mapping[tuple[int, int], int]]) -> tuple[Prior, dict[str, Prior]]:
    """The prior of all problems, and that of each stratum, which leans on it while its own problems are few.

    Args:
        observations: stratum -> (k judged, n_correct) -> number of problems, as ``fit_prior`` takes them. The strata
            are the caller's, from what is known before a problem is sampled; see ``stratum``.
    """
    everywhere: Counter[tuple[int, int]] = Counter()
    for counts in observations.values():
        everywhere.update(counts)
    pooled = fit_prior(everywhere)
    return pooled, {name: fit_prior(counts, towards=pooled) for name, counts in observations.items()}


def stratum(source: str, n_prompt_tokens: int) -> str:
    """Which problems share a prior: those of a source whose prompts are about as long, within half an octave.

    Length stands for difficulty within a source, and is there before the first sample. Where it says nothing the
    strata's priors come out alike, and cost nothing but a slower start.
    """
    return f"{source} {round(2 * math.log2(max(1, n_prompt_tokens)))}"


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When to stop, from the judged samples of one problem and the prior.

    Args:
        band: lowest and highest difficulty of the recipe, both included; None for a recipe without a band, whose
            problems are all completed.
        samples: K, the samples that complete a problem.
        confidence: a problem is stopped when K samples would leave it outside the band with at least this probability.
        first: judged samples before the first decision.

    Raises:
        InputError: a value that makes no sense.
    """

    band: tuple[float, float] | None
    samples: int
    confidence: float = CONFIDENCE
    first: int = 2

    def __post_init__(self) -> None:
        if self.band is not None and not (len(self.band) == 2 and 0 <= self.band[0] <= self.band[1] <= 1):
            raise InputError(f"a band of difficulty must be two numbers 0 <= low <= high <= 1, not {self.band!r}")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise InputError(f"an adaptive build takes 1 to {MAX_SAMPLES} samples a problem, not {self.samples}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence must be at least 0.5 and less than 1, not {self.confidence!r}")
        if self.first < 1:
            raise InputError(f"first must be at least 1 sample, not {self.first}")

    def in_band(self, n_correct: int) -> bool:
        """Return True if ``n_correct`` of K samples put a problem inside the band, as ``subsets.recipes`` does."""
        return self.band is None or self.band[0] <= (self.samples - n_correct) / self.samples <= self.band[1]

    def probability(self, k: int, n_correct: int, prior: Prior, unjudged: int = 0) -> float:
        """That K samples will all be judged and their estimate (K - correct) / K lie in the band.

        The posterior predictive: the pass rate's posterior, and for each pass rate the binomial law of the K - k
        samples to come. Counts are whole numbers throughout, so an end of the band is inside for certain.

        Args:
            k: judged samples so far, all that were drawn but the ``unjudged``.
            n_correct: correct ones among them.
            unjudged: samples drawn that no verdict was reached on (an unreadable reference answer, a grader's
                timeout). One of them and K judged are out of reach; such a problem is not selected, so 0.

        Raises:
            InputError: counts that cannot be.
        """
        _check_counts(k, n_correct)
        if unjudged:
            return 0.0
        left = self.samples - k
        if left <= 0:
            # More than K were judged when a build asks for fewer samples than an earlier one drew: what counts is all.
            return float(StoppingRule(self.band, max(k, 1)).in_band(n_correct))
        wanted = [to_come for to_come in range(left + 1) if self.in_band(n_correct + to_come)]
        if len(wanted) in (0, left + 1):
            return float(bool(wanted))
        inside = _binomial(prior.grid, left)[:, wanted].sum(axis=1)
        return min(1.0, float(prior.posterior(k, n_correct) @ inside))

    def decide(self, k: int, n_correct: int, prior: Prior, unjudged: int = 0) -> Action:
        """What to do with a problem that has no sample under way: draw one more, stop, or nothing more to draw.

        To be asked only when every drawn sample of the problem is back: a decision on those that came first would lean
        to short traces, and so to correct ones.

        Raises:
            InputError: counts that cannot be.
        """
        _check_counts(k, n_correct)
        if k >= self.samples:
            return "complete"
        if unjudged:
            return "stop"
        if k < self.first or self.probability(k, n_correct, prior) > 1 - self.confidence:
            return "continue"
        return "stop"

    def indices(self, prior: Prior) -> Floats:
        """What going on with a problem costs: samples to draw for each problem that ends inside the band.

        The Gittins index (Gittins 1979) of sampling as a search: of all ways to go on from a state and to give up
        later, the least ratio of expected samples to the probability of ending inside the band. Sampling the problem of
        the least price next, a fresh one (the price of 0 of 0) among them, needs the fewest samples in expectation when
        problems are plentiful and the prior is right. A problem whose price has risen above a fresh one's is put off,
        not stopped: it comes back when the source is used up.

        Returns:
            float64 [K + 1, K + 1], to within 1.2 %, by judged samples and by correct ones; inf where the rule stops,
            where the band is out of reach and where the counts cannot be; 0 where K judged samples are inside.
        """
        size = self.samples
        prices = np.full((size + 1, size + 1), np.inf)
        inside = np.array([self.in_band(n_correct) for n_correct in range(size + 1)])
        prices[size, inside] = 0.0
        # What an inside problem is worth, in samples; the value of a state is convex and piecewise linear in it.
        worth = np.geomspace(1.0, MAX_PRICE, PRICE_STEPS)[:, None]
        value, probability = worth * inside, inside.astype(np.float64)
        for k in range(size - 1, -1, -1):
            passes = np.array([prior.posterior(k, n_correct) @ prior.grid for n_correct in range(k + 1)])
            probability = passes * probability[1:] + (1 - passes) * probability[:-1]
            going_on = passes * value[:, 1:] + (1 - passes) * value[:, :-1] - 1
            stops = (k >= self.first) & (probability <= 1 - self.confidence)
            for n_correct in np.flatnonzero((going_on[-1] > 0) & ~stops):
                prices[k, n_correct] = np.interp(0.0, going_on[:, n_correct], worth[:, 0])
            value = np.maximum(going_on, 0.0)
        return prices

    def patience(self, k: int, n_correct: int, prices: Floats, limit: float) -> int:
        """How many samples can be drawn at once without one among them that drawing singly might have saved.

        Args:
            prices: of this rule.
            limit: the price from which on a problem is put off, a fresh problem's; inf where there are no fresh ones.

        Returns:
            samples, 1 to K - k.

        Raises:
            InputError: counts that cannot be, or nothing left to draw.
        """
        _check_counts(k, n_correct)
        if k >= self.samples:
            raise InputError(f"{k} of {self.samples} samples are judged: there is none to draw")
        for more in range(1, self.samples - k):
            if np.any(prices[k + more, n_correct : n_correct + more + 1] >= limit):
                return max(more, min(self.first, self.samples) - k)
        return self.samples - k


def _check_counts(k: int, n_correct: int) -> None:
    if not 0 <= n_correct <= k:
        raise InputError(f"{n_correct} correct of {k} judged samples cannot be")


def _log_likelihood(grid: Floats, k: int, n_correct: int) -> Floats:
    """log p^c (1 - p)^(k - c) at each pass rate, less its maximum over p, so that many samples do not underflow."""
    rates = np.array([0.5]) if k == 0 else np.array([n_correct / k])

    def at(p: Floats) -> Floats:
        total = np.zeros_like(p)
        with np.errstate(divide="ignore"):
            for rate, n in ((p, n_correct), (1 - p, k - n_correct)):
                if n:  # 0 * log 0 is nan
                    total = total + n * np.log(rate)
        return total

    return at(grid) - at(rates)


def _binomial(grid: Floats, n: int) -> Floats:
    """The probability of 0 to n correct among n samples at each pass rate, float64 [m, n + 1]."""
    coefficients = np.array([math.comb(n, i) for i in range(n + 1)], dtype=np.float64)
    correct = np.arange(n + 1)
    return coefficients * grid[:, None] ** correct * (1 - grid[:, None]) ** (n - correct)

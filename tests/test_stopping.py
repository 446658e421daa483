"""When an adaptive build stops a problem: the laws of the rule, and what it does to estimates, by simulation."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.schedule.stopping import Prior, StoppingRule, fit_prior, fit_strata, stratum
from calset.catalog.subsets.recipes import RECIPES, Recipe
from calset.catalog.subsets.take import Candidate, Candidates, take
from calset.errors import InputError

BAND = RECIPES["ssgr"].difficulty
UNIFORM = Prior.uniform()


@st.composite
def some_prior(draw: st.DrawFn) -> Prior:
    grid = sorted(draw(st.sets(st.integers(0, 20), min_size=3, max_size=8)))
    weights = np.array([draw(st.integers(1, 9)) for _ in grid], dtype=float)
    return Prior(np.array(grid) / 20, weights / weights.sum())


@st.composite
def some_rule(draw: st.DrawFn, most: int = 8) -> StoppingRule:
    low, high = sorted((draw(st.integers(0, 20)) / 20, draw(st.integers(0, 20)) / 20))
    confidence = draw(st.sampled_from([0.5, 0.8, 0.95, 0.99]))
    return StoppingRule((low, high), draw(st.integers(1, most)), confidence, draw(st.integers(1, 4)))


# -- the rule -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.data())
def test_the_band_is_the_recipe_s_to_the_last_bit(samples: int, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.integers(0, 100)) / 100 for _ in range(2))
    rule, recipe = StoppingRule((low, high), samples), Recipe("band", difficulty=(low, high))
    for n_correct in range(samples + 1):
        one = Candidate("s", "p", 0, True, True, (samples - n_correct) / samples, samples, 1, 1)
        assert rule.in_band(n_correct) == bool(len(take(Candidates.of([one]), recipe, 0).at))
        assert rule.probability(samples, n_correct, UNIFORM) == rule.in_band(n_correct)


@given(some_rule(6), some_prior())
def test_probability_is_that_of_all_ways_to_go_on(rule: StoppingRule, prior: Prior) -> None:
    rates = [Fraction(round(p * 20), 20) for p in prior.grid]
    weights = [Fraction(w) for w in prior.weights]
    for k in range(rule.samples + 1):
        for n_correct in range(k + 1):
            inside = total = Fraction(0)
            for p, w in zip(rates, weights, strict=True):
                so_far = w * p**n_correct * (1 - p) ** (k - n_correct)
                total += so_far
                for rest in product((0, 1), repeat=rule.samples - k):
                    path = so_far * p ** sum(rest) * (1 - p) ** (len(rest) - sum(rest))
                    inside += path * rule.in_band(n_correct + sum(rest))
            assert rule.probability(k, n_correct, prior) == pytest.approx(float(inside / total), abs=1e-12)


def test_what_is_settled_is_certain_and_not_nearly_so() -> None:
    rule = StoppingRule((0.2, 0.8), 10)
    assert rule.probability(9, 0, UNIFORM) == 0.0  # at most 1 of 10: difficulty 0.9
    assert rule.probability(9, 5, UNIFORM) == 1.0  # 5 or 6 of 10
    assert 0 < rule.probability(9, 8, UNIFORM) < 1  # 8 of 10 is difficulty 0.2, inside; 9 is not
    assert StoppingRule(None, 10).probability(3, 3, UNIFORM) == 1.0


@given(some_rule(), some_prior())
def test_a_decision_follows_probability_and_first(rule: StoppingRule, prior: Prior) -> None:
    for k in range(rule.samples + 2):
        for n_correct in range(k + 1):
            improbable = rule.probability(k, n_correct, prior) <= 1 - rule.confidence
            wanted = "complete" if k >= rule.samples else "stop" if k >= rule.first and improbable else "continue"
            assert rule.decide(k, n_correct, prior) == wanted


def test_a_problem_that_cannot_reach_all_its_verdicts_is_stopped() -> None:
    rule = StoppingRule(BAND, 8)
    assert rule.decide(4, 2, UNIFORM) == "continue"
    assert rule.decide(4, 2, UNIFORM, unjudged=1) == "stop"
    assert rule.decide(0, 0, UNIFORM, unjudged=1) == "stop"
    assert rule.probability(4, 2, UNIFORM, unjudged=1) == 0.0
    assert rule.decide(8, 4, UNIFORM, unjudged=1) == "complete"


def test_a_recipe_without_a_band_completes_everything() -> None:
    rule = StoppingRule(None, 4)
    assert [rule.decide(k, 0, UNIFORM) for k in range(5)] == ["continue"] * 4 + ["complete"]
    assert rule.indices(UNIFORM)[0, 0] == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"band": (0.8, 0.2)}, {"band": (0.2, 1.2)}, {"samples": 0}, {"samples": 5000}, {"confidence": 1.0},
     {"confidence": float("nan")}, {"first": 0}],
)  # fmt: skip
def test_bad_settings_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        StoppingRule(**{"band": BAND, "samples": 8, **options})


@pytest.mark.parametrize(("k", "n_correct"), [(3, 4), (-1, 0), (2, -1)])
def test_counts_that_cannot_be_are_refused(k: int, n_correct: int) -> None:
    rule = StoppingRule(BAND, 8)
    for ask in (rule.probability, rule.decide):
        with pytest.raises(InputError, match="cannot be"):
            ask(k, n_correct, UNIFORM)
    with pytest.raises(InputError, match="cannot be"):
        fit_prior({(k, n_correct): 1})


# -- indices and patience --------------------------------------------------------------------------------------------


@fewer(2)
@given(some_prior(), st.integers(0, 3), st.integers(0, 3))
def test_an_index_is_the_least_of_all_ways_to_go_on_and_give_up(prior: Prior, a: int, b: int) -> None:
    samples = 3
    rule = StoppingRule((min(a, b) / 3, max(a, b) / 3), samples, first=samples)
    states = [(k, c) for k in range(1, samples) for c in range(k + 1)]
    least = math.inf
    for goes_on in product((False, True), repeat=len(states)):
        policy = dict(zip(states, goes_on, strict=True))
        drawn, inside = _walk(rule, prior, policy, 0, 0)
        least = min(least, drawn / inside if inside > 0 else math.inf)
    least = least if least < 9e4 else math.inf  # indices end somewhere
    assert rule.indices(prior)[0, 0] == pytest.approx(least, rel=0.012)


def _walk(rule: StoppingRule, prior: Prior, policy: dict, k: int, n_correct: int) -> tuple[float, float]:
    """Expected samples and the probability of ending inside, of one way to go on."""
    if k == rule.samples:
        return 0.0, float(rule.in_band(n_correct))
    if not policy.get((k, n_correct), True):
        return 0.0, 0.0
    p = float(prior.posterior(k, n_correct) @ prior.grid)
    right, wrong = (_walk(rule, prior, policy, k + 1, n_correct + one) for one in (1, 0))
    return 1 + p * right[0] + (1 - p) * wrong[0], p * right[1] + (1 - p) * wrong[1]


@given(some_rule(), some_prior())
def test_what_the_rule_stops_has_no_index(rule: StoppingRule, prior: Prior) -> None:
    indices = rule.indices(prior)
    for k in range(rule.samples):
        for n_correct in range(k + 1):
            probability = rule.probability(k, n_correct, prior)
            if probability == pytest.approx(1 - rule.confidence, abs=1e-9):
                continue  # a tie may fall either way
            if rule.decide(k, n_correct, prior) == "stop" or probability == 0:
                assert math.isinf(indices[k, n_correct])
            elif probability > 0.001:
                assert 1 <= indices[k, n_correct] < math.inf


@given(some_rule(), some_prior(), st.data())
def test_no_sample_of_a_batch_could_have_been_saved(rule: StoppingRule, prior: Prior, data: st.DataObject) -> None:
    indices = rule.indices(prior)
    k = data.draw(st.integers(0, rule.samples - 1))
    n_correct = data.draw(st.integers(0, k))
    limit = data.draw(st.sampled_from([math.inf, indices[0, 0], 10.0]))
    batch = rule.patience(k, n_correct, indices, limit)
    assert 1 <= batch <= rule.samples - k

    def put_off(more: int) -> bool:
        return bool((indices[k + more, n_correct : n_correct + more + 1] >= limit).any())

    assert not any(put_off(more) for more in range(1, batch) if k + more >= rule.first)
    assert batch == rule.samples - k or put_off(batch) or k + batch == rule.first


# -- the prior ------------------------------------------------------------------------------------------------------

# Correct of 16, of 796 problems: the bundled model on the problems of benchmarks/adaptive.py.
MEASURED = [19, 14, 11, 8, 12, 10, 9, 14, 33, 14, 38, 57, 55, 68, 99, 119, 216]
POPULATIONS = {
    "u-shaped": lambda rng, n: rng.beta(0.3, 0.3, n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "peaked": lambda rng, n: rng.beta(8, 4, n),
    "measured": lambda rng, n: rng.choice(17, size=n, p=np.array(MEASURED) / sum(MEASURED)) / 16,
}
POPULATION = pytest.mark.parametrize("population", POPULATIONS)


def test_few_observations_change_little_and_none_nothing() -> None:
    assert fit_prior({}, UNIFORM) is fit_prior({(0, 0): 5}, UNIFORM) is UNIFORM
    for problems in (1, 3):
        fitted = fit_prior({(8, 8): problems})
        moved = np.abs(fitted.weights - UNIFORM.weights).sum() / 2
        assert moved <= problems / (problems + 8)  # the strength is that of 8 problems


@POPULATION
def test_the_fit_is_right_under_stopping_and_wrong_without_the_stopped(population: str) -> None:
    rule = StoppingRule(BAND, 8)
    world = World(population, rule, 6000, seed=1)
    run = world.run()
    share = world.inside.mean()
    error = 4 * math.sqrt(share * (1 - share) / len(world.inside)) + 0.01
    counts = list(zip(run.k, run.n_correct, strict=True))
    fitted = fit_prior(Counter((int(k), int(c)) for k, c in counts))
    assert rule.probability(0, 0, fitted) == pytest.approx(share, abs=error)
    if run.stopped.mean() > 0.2:
        completed = fit_prior(Counter((int(k), int(c)) for k, c in counts if k == 8))
        assert rule.probability(0, 0, completed) > share + 2 * error


def test_a_stratum_leans_on_all_problems_while_its_own_are_few() -> None:
    easy, hard = {(8, 8): 300}, {(8, 0): 300}
    pooled, priors = fit_strata({"easy": easy, "hard": hard, "new": {(1, 1): 1}})
    rates = {name: float(p.weights @ p.grid) for name, p in {"pooled": pooled, **priors}.items()}
    assert rates["hard"] < 0.1 < 0.4 < rates["pooled"] < 0.6 < 0.9 < rates["easy"]
    assert abs(rates["new"] - rates["pooled"]) < 0.1


def test_strata_part_sources_and_lengths() -> None:
    assert stratum("gsm8k", 100) == stratum("gsm8k", 105)
    assert len({stratum("gsm8k", 100), stratum("gsm8k", 200), stratum("math500", 100), stratum("gsm8k", 0)}) == 4


@pytest.mark.parametrize(
    ("grid", "weights"),
    [
        ([0, 1], [0.5, 0.5]),
        ([0.1, 0.2], [0.5, 0.6]),
        ([0.2, 0.1], [0.5, 0.5]),
        ([0.1, 0.2], [1, 0]),
        ([0.5], [0.5, 0.5]),
    ],
)
def test_a_prior_that_is_none_is_refused(grid: list[float], weights: list[float]) -> None:
    with pytest.raises(InputError, match="a prior's"):
        Prior(np.array(grid, dtype=float), np.array(weights, dtype=float))


# -- simulations ----------------------------------------------------------------------------------------------------


class Run:
    """How far each problem of a world was sampled: judged and correct samples, int [n]."""

    def __init__(self, k: np.ndarray, n_correct: np.ndarray, rule: StoppingRule) -> None:
        self.k, self.n_correct = k, n_correct
        self.completed = k == rule.samples
        self.stopped = ~self.completed


class World:
    """Problems with known pass rates and all their samples drawn: what fixed K sees, and any rule a prefix of it."""

    def __init__(self, population: str, rule: StoppingRule, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rule = rule
        self.p = POPULATIONS[population](rng, n)
        self.samples = rng.uniform(size=(n, rule.samples)) < self.p[:, None]
        self.totals = self.samples.sum(axis=1)
        self.inside = np.array([rule.in_band(c) for c in range(rule.samples + 1)])[self.totals]

    def run(self, start: Prior | None = None, put_off: bool = False) -> Run:
        """The adaptive build, its prior fitted again on everything so far whenever that has grown by a third.

        ``put_off``: problems dearer than a fresh one are left open as well, as when fresh ones never run out.
        """
        start = start or UNIFORM
        prior, parts, begin = start, [], 0
        counts: Counter[tuple[int, int]] = Counter()
        while begin < len(self.p):
            end = min(len(self.p), begin + max(4, begin // 3))
            part = self._sample(self.samples[begin:end], prior, put_off)
            counts.update(zip(part[0].tolist(), part[1].tolist(), strict=True))
            prior = fit_prior(counts, start)
            parts.append(part)
            begin = end
        k, n_correct = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Run(k, n_correct, self.rule)

    def _sample(self, samples: np.ndarray, prior: Prior, put_off: bool) -> tuple[np.ndarray, np.ndarray]:
        k, n_correct = np.zeros(len(samples), dtype=int), np.zeros(len(samples), dtype=int)
        going = np.ones(len(samples), dtype=bool)
        indices = self.rule.indices(prior)
        for drawn in range(self.rule.samples):
            k += going
            n_correct += going & samples[:, drawn]
            stops = np.array([self.rule.decide(drawn + 1, c, prior) == "stop" for c in range(drawn + 2)])
            if put_off:
                stops |= indices[drawn + 1, : drawn + 2] > indices[0, 0]
            going &= ~stops[n_correct]
        return k, n_correct


@pytest.mark.parametrize("put_off", [False, True])
@POPULATION
def test_what_is_selected_has_fixed_k_s_estimates_and_the_stopped_are_no_others(population: str, put_off: bool) -> None:
    rule = StoppingRule(BAND, 8, confidence=0.8)  # many false stops
    world = World(population, rule, 20_000, seed=2)
    run = world.run(put_off=put_off)
    selected = run.completed & world.inside
    assert np.array_equal(run.n_correct[selected], world.totals[selected])
    false = run.stopped & world.inside
    assert np.array_equal(selected | false, world.inside)
    assert false.sum() > 100
    # Of equal estimates, the ones that were stopped are no other problems than the ones that were not: the order of a
    # problem's samples, which is all that a stop depends on beside their sum, says nothing more of its pass rate.
    for total in range(rule.samples + 1):
        there, missing = world.p[selected & (world.totals == total)], world.p[false & (world.totals == total)]
        if min(len(there), len(missing)) >= 20:
            error = 4 * math.sqrt(there.var() / len(there) + missing.var() / len(missing))
            assert abs(there.mean() - missing.mean()) < error + 1e-9


def test_taking_the_samples_so_far_as_the_estimate_is_biased_and_all_k_are_not() -> None:
    """Why a problem inside the band is not stopped too: what stops when it looks good is not as good as it looks."""
    rule = StoppingRule(BAND, 16)
    world = World("measured", rule, 20_000, seed=3)
    run = world.run()
    fixed = (world.totals / 16 - world.p)[world.inside]
    adaptive = (run.n_correct / 16 - world.p)[run.completed & world.inside]
    n_correct, k = np.cumsum(world.samples, axis=1), np.arange(1, 17)
    looks_inside = (n_correct >= np.ceil(0.2 * k)) & (n_correct <= np.floor(0.8 * k)) & (k >= 4)
    taken, first = looks_inside.any(axis=1), looks_inside.argmax(axis=1)
    naive = (n_correct[np.arange(len(first)), first] / (first + 1) - world.p)[taken]

    def error(*errors: np.ndarray) -> float:
        return 4 * math.sqrt(sum(e.var() / len(e) for e in errors))

    # Any selection by an estimate leans to problems whose estimate erred towards the band, fixed K's too.
    assert fixed.mean() == pytest.approx(-0.036, abs=0.005)
    assert abs(adaptive.mean() - fixed.mean()) < error(adaptive, fixed)
    assert naive.mean() < fixed.mean() - 0.02 - error(naive, fixed)
    assert world.inside[taken].mean() < 0.65  # and over a third of what it takes is outside by all 16 samples


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("start", ["uniform", "all hard", "all easy"])
@POPULATION
def test_false_stops_stay_below_what_the_confidence_allows(population: str, start: str, confidence: float) -> None:
    tilt = {"uniform": 0.0, "all hard": -8.0, "all easy": 8.0}[start]
    weights = UNIFORM.weights * np.exp(tilt * UNIFORM.grid)
    rule = StoppingRule(BAND, 8, confidence)
    world = World(population, rule, 4000, seed=4)
    run = world.run(Prior(UNIFORM.grid, weights / weights.sum()))
    stopped, false = run.stopped.sum(), (run.stopped & world.inside).sum()
    assert stopped > 100
    allowed = 1 - confidence
    assert false / stopped <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / stopped)

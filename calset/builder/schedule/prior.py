"""Priors of an adaptive build by stratum, and the indices that follow, fitted to all problems while it runs.

Why apart from ``stopping``: that is pure functions of counts, this is what accumulates. Must not know: traces, engines.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from calset.builder.schedule.stopping import Floats, Prior, StoppingRule, fit_strata

State = tuple[str, int, int]  # stratum, judged, correct
GROWTH = 1.1  # a refit each time that there are so many times the problems of the last one


class Priors:
    """Priors by stratum, and the indices that follow, fitted anew as problems come in.

    From every problem so far, stopped, completed or open, at its counts when last none of its samples was under way:
    those that come back first are the short ones, which are more often right.
    """

    def __init__(self, rule: StoppingRule) -> None:
        self.rule = rule
        self._states: dict[str, State] = {}
        self._counts: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
        self._fit()

    def see(self, problem_id: str, state: State) -> None:
        """A problem has no sample under way; ``state`` is what is known of it now."""
        before = self._states.get(problem_id)
        if before is not None:
            self._counts[before[0]][before[1:]] -= 1
        self._states[problem_id] = state
        self._counts[state[0]][state[1:]] += 1
        if len(self._states) >= self._fitted * GROWTH:
            self._fit()

    def _fit(self) -> None:
        self.pooled, self._priors = fit_strata(self._counts)
        self._indices: dict[str, Floats] = {}
        self._fitted = len(self._states)
        self.limit = float(self.rule.indices(self.pooled)[0, 0])  # a fresh problem's index

    def prior(self, stratum: str) -> Prior:
        """The pass rates of a stratum's problems."""
        return self._priors.get(stratum, self.pooled)

    def indices(self, stratum: str) -> Floats:
        """``StoppingRule.indices`` of a stratum, float64 [K + 1, K + 1]."""
        if stratum not in self._indices:
            self._indices[stratum] = self.rule.indices(self.prior(stratum))
        return self._indices[stratum]

    def index_of(self, state: State) -> float:
        """What going on with a problem costs, in samples for each that ends inside the band: the least goes first."""
        stratum, k, n_correct = state
        return float(self.indices(stratum)[k, n_correct])

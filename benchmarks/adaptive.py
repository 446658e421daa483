"""What an adaptive build saves: tokens for N samples of ``ssgr``, adaptive against K samples of every problem.

Builds real traces of the bundled model once (about five minutes with vLLM on two CPU cores), then replays them: the
problems in several shuffled orders, each sample costing the tokens that it had. What is sampled next is decided by the
schedule of a real build, ``AdaptiveSchedule``. Both builds end as soon as the recipe, applied by
``calset.catalog.subsets.take.take`` with its moving length quantiles, has its N samples. The figure to read is the
ratio of completion tokens, adaptive to fixed.

    python benchmarks/adaptive.py --catalog adaptive.duckdb
    python benchmarks/adaptive.py --traces adaptive.duckdb --confidence 0.95 --first 2
    python benchmarks/adaptive.py --live 3 --samples 8 16

``--live`` replays nothing: it runs the real adaptive build, engine, grading and catalog included, and a real build of
K samples of every problem, over the same problems in the same shuffled order.

Columns: ``ratio`` the median over the orders with the least and the greatest; ``floor`` what a rule would spend that
knew every outcome beforehand and sampled only the problems inside the band; ``false`` the share of the stopped problems
that K samples would have put inside the band; of the problems begun that are inside the band, ``lost`` the share that
was stopped and ``put_off`` the share that was left open for more promising ones; ``problems`` how many were begun;
``difficulty`` and ``length`` the mean of what is selected; ``short`` orders that ran out of problems before the N
samples (left out of ratio).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import tempfile
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path

import calset
from calset.builder.engines import Engine, open_engine
from calset.builder.model.info import inspect
from calset.builder.schedule.adaptive import AdaptiveSchedule, Target
from calset.builder.schedule.fixed import Opened, Unit
from calset.builder.schedule.prior import Priors, State
from calset.builder.schedule.stopping import Floats, Prior, StoppingRule, fit_prior
from calset.bundled import MODEL
from calset.catalog.catalog import Catalog
from calset.catalog.records import JUDGED, Trace
from calset.catalog.records import Problem as Record
from calset.catalog.subsets.recipes import RECIPES, Recipe
from calset.catalog.subsets.take import Candidate, Candidates, take

# The demo's mix of tasks with other seeds, hence other problems.
TASKS = (
    "gym:chain_sum?min_terms=2&max_terms=7&min_digits=1&max_digits=4&seed=300000000&size=600",
    "gym:products?min_terms=2&max_terms=2&min_digits=2&max_digits=2&seed=300000000&size=100",
    "gym:products?min_terms=2&max_terms=2&min_digits=3&max_digits=3&seed=300000000&size=56",
    "gym:products?min_terms=3&max_terms=3&min_digits=1&max_digits=1&seed=300000000&size=44",
)
MAX_TOKENS = 512
HEAD = (
    "in_flight confidence first policy        ratio (least greatest) false  lost  put_off problems difficulty length"
    " short"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--catalog", type=Path, default=Path("adaptive.duckdb"), help="where the traces are built")
    parser.add_argument("--traces", type=Path, help="a catalog that has the traces already: replay only")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--recipe", default="ssgr", choices=[n for n, r in RECIPES.items() if r.difficulty])
    parser.add_argument("--need", type=int, default=50)
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--confidence", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--first", type=int, nargs="+", default=[1, 3, 4])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--live", type=int, metavar="ORDERS", help="real builds, in so many orders")
    args = parser.parse_args()
    if args.live:
        live(args)
        return
    if args.traces is None:
        calset.build(
            MODEL, TASKS, samples=max(args.samples), catalog=args.catalog, engine=args.engine, max_tokens=MAX_TOKENS
        )
    problems = read(args.traces or args.catalog, max(args.samples))
    recipe = RECIPES[args.recipe]
    for k in args.samples:
        table(problems, recipe, k, args)


def table(problems: list[Problem], recipe: Recipe, k: int, args: argparse.Namespace) -> None:
    inside = [p for p in problems if in_band(p, recipe, k)]
    print(f"\nK = {k}, need {args.need}: {len(problems)} problems, {len(inside)} inside the band")
    orders = []
    for seed in range(args.orders):
        orders.append(list(problems))
        random.Random(seed).shuffle(orders[-1])
    fixed = [replay_fixed(order, recipe, k, args.need) for order in orders]
    print(f"fixed K: {' '.join(f'{name} {value:.4g}' for name, value in medians(fixed).items())}")
    print(f"floor {statistics.median(f.floor_tokens / f.tokens for f in fixed):.3f}, best from counts alone", end=" ")
    print(f"{best(problems, recipe, k):.3f} (in samples)")
    print(HEAD)
    for slots, confidence in product(args.in_flight, args.confidence):
        line(orders, fixed, recipe, StoppingRule(recipe.difficulty, k, confidence), slots, "all", Policy(), args)
    for first in args.first:
        rule = StoppingRule(recipe.difficulty, k, first=first)
        line(orders, fixed, recipe, rule, max(args.in_flight), "all", Policy(), args)
    rule = StoppingRule(recipe.difficulty, k)
    for name, policy in (
        ("no batches", Policy(batches=False)),
        ("no strata", Policy(strata=False)),
        ("no indices", Policy(by_index=False)),
        ("none", Policy(False, False, False)),
    ):
        line(orders, fixed, recipe, rule, max(args.in_flight), name, policy, args)


def line(orders, fixed, recipe, rule, slots, name, policy, args) -> None:
    runs = [replay(order, recipe, rule, args.need, slots, policy) for order in orders]
    whole = [(run, f) for run, f in zip(runs, fixed, strict=True) if run.reached and f.reached]
    ratios = [run.tokens / f.tokens for run, f in whole] or [float("nan")]
    stopped, false = sum(r.stopped for r in runs), sum(r.false_stops for r in runs)
    begun, completed = sum(r.begun_inside for r in runs), sum(r.completed_inside for r in runs)
    lost, put_off = false / max(1, begun), 1 - (false + completed) / max(1, begun)
    m = medians(runs)
    print(
        f"{slots:9d} {rule.confidence:10.2f} {rule.first:5d} {name:12s}  {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} {max(ratios):.3f})     {false / max(1, stopped):.3f}  {lost:.3f} {put_off:7.3f} "
        f"{m['problems']:8.0f} {m['difficulty']:10.3f} {m['length']:6.0f} {len(runs) - len(whole):5d}",
        flush=True,
    )


def medians(runs: list[Spent]) -> dict[str, float]:
    names = ("problems", "tokens", "difficulty", "length")
    reached = [run for run in runs if run.reached] or [Spent()]
    return {name: statistics.median(getattr(run, name) for run in reached) for name in names}


def best(problems: list[Problem], recipe: Recipe, k: int) -> float:
    """What the best of all rules that see counts only spends, knowing the population, as a ratio of samples."""
    rule = StoppingRule(recipe.difficulty, k)
    prior = fit_prior(Counter((len(p.correct), sum(p.correct)) for p in problems))
    return rule.indices(prior)[0, 0] / (k / rule.probability(0, 0, prior))


# -- real builds ----------------------------------------------------------------------------------------------------


def live(args: argparse.Namespace) -> None:
    """Tokens that real builds generate: with the target, and with all K samples until the recipe has its N."""
    recipe = RECIPES[args.recipe]
    drawn = [problem for task in TASKS for problem in calset.load_problems(task)[1]]
    print("K order fixed_tokens adaptive_tokens ratio fixed_problems adaptive_problems stopped met")
    with tempfile.TemporaryDirectory() as folder, closing(_engine(args)) as engine:
        for k, seed in product(args.samples, range(args.live)):
            order = random.Random(seed).sample(drawn, len(drawn))
            source = Path(folder) / f"order-{seed}.jsonl"
            source.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in order))
            common = {"samples": k, "engine": engine, "max_tokens": MAX_TOKENS, "concurrency": max(args.in_flight)}
            everything = Path(folder) / f"fixed-{seed}.duckdb"  # a larger K, or more problems, only add to it
            place = {problem.question: i for i, problem in enumerate(order)}
            for limit in range(args.need, len(order) + 1, args.need):
                calset.build(MODEL, str(source), catalog=everything, limit=limit, **common)
                found = sorted(read(everything, k), key=lambda problem: place[problem.question])
                if (fixed := replay_fixed(found, recipe, k, args.need)).reached:
                    break
            report = calset.build(
                MODEL, str(source), target=recipe, need=args.need, catalog=Path(folder) / f"{k}-{seed}.duckdb", **common
            )
            aim = report.target or {}
            begun = Catalog(report.catalog).query("SELECT count(DISTINCT problem_id) FROM trace").rows[0][0]
            print(
                f"{k} {seed} {fixed.tokens:.0f} {report.n_tokens} {report.n_tokens / fixed.tokens:.3f} "
                f"{fixed.problems} {begun} {aim['stopped']} {aim['met']}/{aim['need']}",
                flush=True,
            )


def _engine(args: argparse.Namespace) -> Engine:
    info = inspect(MODEL)
    return open_engine(args.engine, info, max_model_len=info.max_model_len, concurrency=max(args.in_flight))


# -- traces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its samples in the order in which a build draws them."""

    problem_id: str
    source: str
    question: str
    n_prompt_tokens: int
    correct: tuple[bool, ...]
    finished: tuple[bool, ...]
    tokens: tuple[int, ...]
    trace_ids: tuple[str, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Of the length that the prompt had."""
        return (0,) * self.n_prompt_tokens

    def record(self) -> Record:
        return Record(self.problem_id, self.source, self.source, "", self.question, "", "")

    def outcome(self, i: int) -> tuple[Trace, str]:
        """A sample's trace, as long as it was, and its verdict."""
        trace = Trace(
            self.trace_ids[i],
            self.problem_id,
            "",
            "replay",
            i,
            0,
            self.prompt_ids,
            range(self.tokens[i]),
            "",
            "",
            "stop" if self.finished[i] else "length",
            MAX_TOKENS,
        )
        return trace, "correct" if self.correct[i] else "incorrect"

    def candidates(self, k: int) -> list[Candidate]:
        difficulty = (k - sum(self.correct[:k])) / k
        return [
            Candidate(
                self.trace_ids[i],
                self.problem_id,
                i,
                self.correct[i],
                self.finished[i],
                difficulty,
                k,
                n_tokens,
                len(self.prompt_ids) + n_tokens,
            )
            for i, n_tokens in enumerate(self.tokens[:k])
        ]


def read(catalog: Path, samples: int) -> list[Problem]:
    """The problems that have all their samples judged, in the order of their ids."""
    rows = Catalog(catalog).query(
        "SELECT problem_id, source, question, n_prompt_tokens, verdict, finished, n_tokens, trace_id FROM trace "
        f"WHERE kind = 'build' AND sample_index < {samples} ORDER BY problem_id, sample_index"
    )
    by_problem = defaultdict(list)
    for row in rows.rows:
        by_problem[row[0]].append(row)
    found = []
    for problem_id, traces in by_problem.items():
        if len(traces) == samples and all(verdict in JUDGED for _, _, _, _, verdict, *_ in traces):
            _, (source, *_), (question, *_), (prompt, *_), verdicts, finished, tokens, trace_ids = zip(
                *traces, strict=True
            )
            found.append(
                Problem(
                    problem_id,
                    source,
                    question,
                    prompt,
                    tuple(v == "correct" for v in verdicts),
                    finished,
                    tokens,
                    trace_ids,
                )
            )
    return found


def in_band(problem: Problem, recipe: Recipe, k: int) -> bool:
    return StoppingRule(recipe.difficulty, k).in_band(sum(problem.correct[:k]))


class Selected:
    """The candidates so far, and whether the recipe has its N among them."""

    def __init__(self, recipe: Recipe, k: int, need: int) -> None:
        self.recipe, self.k, self.need = recipe, k, need
        self.inside = 0
        self._candidates: list[Candidate] = []

    def complete(self, problem: Problem) -> bool:
        """Take in a completed problem; True when the recipe now has its N."""
        if not in_band(problem, self.recipe, self.k):
            return False  # no candidate of it reaches the length band, so nothing changes
        self.inside += 1
        self._candidates += problem.candidates(self.k)
        if self.inside < self.need:
            return False
        order = [self._candidates[i] for i in take(Candidates.of(self._candidates), self.recipe, 0).at]
        self.difficulty = statistics.mean(c.difficulty or 0.0 for c in order)
        self.length = statistics.mean(c.n_tokens for c in order)
        return len(order) >= self.need


# -- replays --------------------------------------------------------------------------------------------------------


@dataclass
class Spent:
    """What a build cost, in completion tokens."""

    tokens: float = 0
    floor_tokens: float = 0  # of problems inside the band
    problems: int = 0
    stopped: int = 0
    false_stops: int = 0
    begun_inside: int = 0
    completed_inside: int = 0
    reached: bool = False
    difficulty: float = 0.0
    length: float = 0.0

    def reach(self, selected: Selected) -> None:
        self.reached, self.difficulty, self.length = True, selected.difficulty, selected.length


def replay_fixed(order: list[Problem], recipe: Recipe, k: int, need: int) -> Spent:
    """All K samples of one problem after the other until the recipe has its N."""
    spent, selected = Spent(), Selected(recipe, k, need)
    for problem in order:
        spent.problems += 1
        cost = sum(problem.tokens[:k])
        spent.tokens += cost
        spent.floor_tokens += cost * in_band(problem, recipe, k)
        if selected.complete(problem):
            spent.reach(selected)
            break
    return spent


@dataclass(frozen=True, slots=True)
class Policy:
    """What an adaptive build does beside its rule; each part can be left out to see what it is worth."""

    by_index: bool = True  # the lowest index next, a fresh problem's among them; else open problems first
    strata: bool = True  # a prior for each stratum; else one for all
    batches: bool = True  # several samples of a problem at once where none can turn out wasted; else one


class OneByOne(StoppingRule):
    """Decides after every sample."""

    def patience(self, k: int, n_correct: int, indices: Floats, limit: float) -> int:
        return max(1, min(self.first, self.samples) - k)


class Ablated(Priors):
    """A build's priors, less what the policy leaves out."""

    def __init__(self, rule: StoppingRule, policy: Policy) -> None:
        self.policy = policy
        super().__init__(rule)

    def _fit(self) -> None:
        super()._fit()
        self._improbable: dict[State, float] = {}
        if not self.policy.by_index:
            self.limit = math.inf

    def prior(self, stratum: str) -> Prior:
        return super().prior(stratum) if self.policy.strata else self.pooled

    def index_of(self, state: State) -> float:
        if self.policy.by_index:
            return super().index_of(state)
        if state not in self._improbable:
            name, k, n_correct = state
            self._improbable[state] = -self.rule.probability(k, n_correct, self.prior(name))
        return self._improbable[state]


def replay(problems: list[Problem], recipe: Recipe, rule: StoppingRule, need: int, slots: int, policy: Policy) -> Spent:
    """A build's own schedule with ``slots`` samples in flight, a sample taking as long as it has tokens."""
    if not policy.batches:
        rule = OneByOne(rule.band, rule.samples, rule.confidence, rule.first)
    by_id = {problem.problem_id: problem for problem in problems}
    schedule = AdaptiveSchedule(
        (Opened(problem.record(), problem.prompt_ids, {}) for problem in problems),
        "replay",
        rule.samples,
        Target(recipe, need, confidence=rule.confidence),
        render=lambda record: by_id[record.problem_id].prompt_ids,
        priors=Ablated(rule, policy),
    )
    spent, now, begun = Spent(), 0.0, set()
    flying: list[tuple[float, int, Unit]] = []
    for number in count():
        if len(flying) < slots and (unit := schedule.take()) is not None:
            problem = by_id[unit.problem.problem_id]
            begun.add(problem.problem_id)
            cost = problem.tokens[unit.sample_index]
            spent.tokens += cost
            heapq.heappush(flying, (now + cost, number, unit))
        elif flying and not schedule.satisfied:
            now, _, unit = heapq.heappop(flying)
            schedule.settle(unit, *by_id[unit.problem.problem_id].outcome(unit.sample_index))
        else:
            break
    # What the samples in flight have not cost when they are cancelled.
    spent.tokens -= sum(end - now for end, _, _ in flying)
    selected = Selected(recipe, rule.samples, need)
    for decision in schedule.decisions():
        problem = by_id[decision.problem_id]
        inside = in_band(problem, recipe, rule.samples)
        if decision.action == "stop":
            spent.stopped += 1
            spent.false_stops += inside
        elif decision.action == "complete":
            spent.completed_inside += inside
            if selected.complete(problem):
                spent.reach(selected)
    spent.problems = len(begun)
    spent.begun_inside = sum(in_band(by_id[name], recipe, rule.samples) for name in begun)
    return spent


if __name__ == "__main__":
    main()

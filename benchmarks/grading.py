"""How long does grading take? The start of a worker, plain answers, and answers of which some never end.

Each line is a run of its own pool of workers that give way to nobody: the start until a worker has imported ``math``
(the median of five), then 1,000 plain answers, then 2,000 answers of which ten, of a grader that sleeps, hang until the
deadline of 15 seconds ends them. Wall seconds, and CPU seconds of the workers, which is what to look at on a machine
with other work.

``--against FOLDER`` measures another checkout of calset in turn with this one (A B A B ...) and gives the ratios of the
medians; where other programs run, quote those.

    python benchmarks/grading.py
    python benchmarks/grading.py --against ../before --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROCESSES = 2
STARTS = 5


def answers(n: int, seed: int) -> list[tuple[str, str] | None]:
    """Pairs of a reference and a response: numbers, fractions, roots and polynomials, half of them right."""
    draw = random.Random(seed)
    found: list[tuple[str, str] | None] = []
    for _ in range(n):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        gold, same, other = draw.choice(
            [
                (f"{a}", f"{a}", f"{b}.5"),
                (rf"\frac{{{a}}}{{{b}}}", f"{2 * a}/{2 * b}", rf"\frac{{{b}}}{{{a + 1}}}"),
                (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {a}", rf"{a}\sqrt{{{b + 1}}}"),
                (f"x^2-{a * a}", f"(x-{a})(x+{a})", f"(x-{a})(x+{b + 100})"),
            ]
        )
        found.append((gold, rf"So the answer is \boxed{{{draw.choice([same, other])}}}."))
    return found


def grade(found: Sequence[tuple[str, str] | None]) -> dict[str, float]:
    """Grade in a pool of its own, from the first worker's readiness on: wall seconds, and counts of verdicts.

    None stands for an answer that never ends: the grader ``sleeper`` gets it.
    """
    from calset.builder.grading.pool import GradingPool

    with GradingPool(PROCESSES, background=False) as pool:
        pool.submit("math", "1", r"\boxed{2}", {}).result()
        began = time.perf_counter()
        futures = [pool.submit("math", *pair, {}) if pair else pool.submit("sleeper", "", "3600", {}) for pair in found]
        verdicts = Counter(future.result().verdict for future in futures)
        took = time.perf_counter() - began
    return {"seconds": took, **{name: verdicts[name] for name in ("correct", "incorrect", "timeout")}}


@contextmanager
def sleeper() -> Iterator[None]:
    """A package with the grader ``sleeper`` on ``sys.path``."""
    sys.path.insert(0, str(ROOT / "tests"))
    from brought import SLEEPER, bring

    with tempfile.TemporaryDirectory() as folder:
        bring(Path(folder), "sleeper", SLEEPER)
        sys.path.insert(0, folder)
        yield
        sys.path.remove(folder)


def start() -> float:
    """Milliseconds until a worker has started, imported its grader and graded one answer."""
    from calset.builder.grading.pool import GradingPool

    began = time.perf_counter()
    with GradingPool(1, background=False) as pool:
        pool.submit("math", "1", r"\boxed{2}", {}).result()
        return 1000 * (time.perf_counter() - began)


def measure(plain: int, mixed: int, hangs: int) -> dict[str, float]:
    """One round of all three, in this process; CPU seconds are those of the workers."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu()
    row = {"start_ms": statistics.median(start() for _ in range(STARTS))}
    row["start_cpu_ms"] = 1000 * (cpu() - before) / STARTS
    before = cpu()
    done = grade(answers(plain, 0))
    row |= {"plain_s": done["seconds"], "plain_cpu_s": cpu() - before, "plain_correct": done["correct"]}
    if mixed:
        found = answers(mixed - hangs, 1)
        for n in range(hangs):
            found.insert(n * len(found) // max(hangs, 1), None)
        before = cpu()
        with sleeper():
            done = grade(found)
        row |= {"hanging_s": done["seconds"], "hanging_cpu_s": cpu() - before, "hanging_timeouts": done["timeout"]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=int, default=1000, help="plain answers (default: 1000)")
    parser.add_argument("--mixed", type=int, default=2000, help="answers of which some hang (default: 2000; 0: none)")
    parser.add_argument("--hangs", type=int, default=10, help="how many of them hang (default: 10)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, of which the medians are given (default: 1)")
    parser.add_argument("--against", type=Path, help="another checkout of calset, measured in turn with this one")
    parser.add_argument("--json", action="store_true", help="print one round's figures as JSON and nothing else")
    asked = parser.parse_args()
    sizes = ["--plain", str(asked.plain), "--mixed", str(asked.mixed), "--hangs", str(asked.hangs)]
    if asked.json:
        print(json.dumps(measure(asked.plain, asked.mixed, asked.hangs)))
        return
    checkouts = {"this": ROOT} | ({"other": asked.against.resolve()} if asked.against else {})
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(asked.rounds):
        for name, folder in checkouts.items():
            if not (folder / "calset").is_dir():  # an installed calset would be measured instead
                parser.error(f"{folder} holds no calset")
            command = [sys.executable, __file__, "--json", *sizes]
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            rows[name].append(json.loads(done.stdout))
            print(f"{name:6}", *(f"{key} {value:.4g}" for key, value in rows[name][-1].items()), sep="  ", flush=True)
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    for name, figures in medians.items():
        print(f"median of {asked.rounds}, {name}:", *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ")
    if asked.against:
        ratios = {key: medians["this"][key] / value for key, value in medians["other"].items() if value}
        print("this / other:", *(f"{key} {value:.3f}" for key, value in ratios.items()), sep="  ")


if __name__ == "__main__":
    main()

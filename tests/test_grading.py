r"""Graders against hand-labelled answers, and workers against answers that hang, crash or print."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from brought import install
from hypothesis import given
from hypothesis import strategies as st

from calset.builder.grading import (
    Outcome,
    grade_response,
    grader_version,
    graders,
    gym,
    last_boxed,
    verdict_without_grading,
)
from calset.builder.grading.pool import GradingPool
from calset.builder.problems import load_problems
from calset.errors import CalsetError, InputError

# (reference, response after the thinking, finish reason, verdict a careful person gives)
MATH = [
    ("7", r"\boxed{7}", "stop", "correct"),
    ("7", r"The answer is \boxed{7}.", "stop", "correct"),
    ("7", r"\boxed{8}", "stop", "incorrect"),
    ("7", r"First \boxed{8}, no: \boxed{7}", "stop", "correct"),  # the last box alone, not the set {7, 8}
    ("7", r"First \boxed{7}, no: \boxed{8}", "stop", "incorrect"),
    ("{7, 8}", r"\boxed{7} and \boxed{8}", "stop", "correct"),  # together they are a reference of as many parts
    (r"\{7,8\}", r"\boxed{\{8,7\}}", "stop", "correct"),
    ("7", r"\boxed{7}", "length", "truncated"),  # truncated whatever it says
    ("7", r"\boxed{7", "length", "truncated"),
    ("7", "", "length", "truncated"),
    ("7", r"\boxed{7}", "repetition", "truncated"),
    ("7", r"\boxed{7}", "abort", "error"),
    ("7", "", "stop", "no_answer"),
    ("7", "  \n ", "stop", "no_answer"),
    ("7", "I do not know.", "stop", "no_answer"),
    ("7", r"\boxed{}", "stop", "no_answer"),
    ("7", r"\boxed{7", "stop", "no_answer"),  # never closed: its content is not known
    ("7", r"\boxed{7} or \boxed{8", "stop", "correct"),
    ("7", "The answer is 7.", "stop", "correct"),
    ("7", "Answer: **7**", "stop", "correct"),
    ("7", "7", "stop", "correct"),
    ("7", "The final answer is 8", "stop", "incorrect"),
    ("7", "7 apples minus 3 apples", "stop", "no_answer"),  # numbers in passing are no answer
    (r"\frac{1}{2}", r"\boxed{0.5}", "stop", "correct"),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", "stop", "correct"),
    (r"\frac12", r"\boxed{\dfrac{1}{2}}", "stop", "correct"),
    ("0.5", r"\boxed{1/2}", "stop", "correct"),
    ("1/3", r"\boxed{0.333}", "stop", "incorrect"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", "stop", "correct"),
    (r"2\sqrt2", r"\boxed{\sqrt{7}}", "stop", "incorrect"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", "stop", "correct"),
    ("x^2+2x+1", r"\boxed{(x+2)^2}", "stop", "incorrect"),
    ("2^{-98}", r"\boxed{2^{-98}}", "stop", "correct"),
    ("2^{-98}", r"\boxed{2^{-99}}", "stop", "incorrect"),  # equal for verify(), which rounds
    ("2^{-98}", r"\boxed{0}", "stop", "incorrect"),
    ("2^{10}", r"\boxed{1024}", "stop", "correct"),
    ("12345", r"\boxed{12,345}", "stop", "correct"),
    ("12345", r"\boxed{12\,345}", "stop", "correct"),  # math-verify alone reads 357
    ("1000", r"\boxed{1 000}", "stop", "correct"),  # and 0
    ("1{,}000", r"\boxed{1000}", "stop", "correct"),
    ("-5", r"\boxed{−5}", "stop", "correct"),  # a Unicode minus
    ("-5", r"\boxed{5}", "stop", "incorrect"),
    ("3.0", r"\boxed{3}", "stop", "correct"),
    ("007", r"\boxed{7}", "stop", "correct"),
    ("$18", r"\boxed{\$18}", "stop", "correct"),
    ("$18$", r"\boxed{18}", "stop", "correct"),
    (r"\(18\)", r"\boxed{18}", "stop", "correct"),
    (r"\boxed{18}", r"\boxed{18}", "stop", "correct"),
    ("18", r"\boxed{18\text{ cm}}", "stop", "correct"),
    ("10", r"\boxed{10\%}", "stop", "correct"),  # math-verify's leniency, a known limit
    ("A", r"\boxed{A}", "stop", "correct"),
    ("A", r"\boxed{\text{A}}", "stop", "correct"),
    ("A", r"\boxed{(A)}", "stop", "correct"),
    ("A", r"\boxed{A. Paris}", "stop", "correct"),
    ("A", r"\boxed{B}", "stop", "incorrect"),
    (r"\text{Monday}", r"\boxed{Monday}", "stop", "correct"),
    ("Monday", r"\boxed{\text{monday}}", "stop", "correct"),
    ("Monday", r"\boxed{\text{Tuesday}}", "stop", "incorrect"),
    ("Dayton", r"\boxed{Toyand}", "stop", "incorrect"),  # an anagram: equal as a product of letters
    ("no solution", r"\boxed{\text{No solution}}", "stop", "correct"),
    ("yes", r"\boxed{no}", "stop", "incorrect"),
    ("no", r"\boxed{on}", "stop", "incorrect"),
    ("no", r"\boxed{\text{on}}", "stop", "incorrect"),
    ("no", r"\boxed{\text{No}}", "stop", "correct"),
    ("AB", r"\boxed{BA}", "stop", "incorrect"),
    ("AB", r"\boxed{AB}", "stop", "correct"),
    ("xy", r"\boxed{y \cdot x}", "stop", "correct"),
    ("2024-01-05", r"\boxed{2018}", "stop", "incorrect"),  # a date, no subtraction
    ("2018", r"\boxed{2024-01-05}", "stop", "incorrect"),
    ("2024-01-05", r"\boxed{2024-1-5}", "stop", "correct"),
    ("12/6/2024", r"\boxed{2/1/2024}", "stop", "incorrect"),
    ("0.1", r"\boxed{0.10000001}", "stop", "incorrect"),  # verify() rounds
    ("0.50", r"\boxed{.5}", "stop", "correct"),
    ("[0,1)", r"\boxed{[0, 1)}", "stop", "correct"),
    ("[0,1)", r"\boxed{(0, 1)}", "stop", "incorrect"),
    ("(1,2)", r"\boxed{(1, 2)}", "stop", "correct"),
    ("(1,2)", r"\boxed{(2, 1)}", "stop", "incorrect"),
    ("1, 2, 3", r"\boxed{3, 2, 1}", "stop", "correct"),
    ("x=5", r"\boxed{5}", "stop", "correct"),
    ("5", r"\boxed{x = 5}", "stop", "correct"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", "stop", "correct"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", "stop", "incorrect"),
    (r"\infty", r"\boxed{\infty}", "stop", "correct"),
    ("", r"\boxed{3}", "stop", "gold_unparsable"),
    ("٣", r"\boxed{3}", "stop", "correct"),  # math-verify alone reads nothing in it
    ("3", r"\boxed{٣}", "stop", "correct"),
    ("3", r"\boxed{?}", "stop", "pred_unparsable"),
    ("?", r"\boxed{3}", "stop", "gold_unparsable"),
    ("9" * 10_000, r"\boxed{3}", "stop", "gold_unparsable"),
    ("3", r"\boxed{\text{}}", "stop", "no_answer"),
    ("3", "\\boxed{" + "1" * 5000 + "}", "stop", "pred_unparsable"),
    ("3", "$" * 60_000 + r"\boxed{3}", "stop", "correct"),
    ("3", r"\boxed{3}" + " and so on" * 6_000, "stop", "no_answer"),  # the box lies before the last 50k characters
    ("5", r"\boxed{\frac{10}{2}} \text{ and } \}", "stop", "correct"),
    (r"\frac{a}{b}", r"\boxed{\frac{a}{b}}", "stop", "correct"),
    ("5", r"\boxed{\boxed{5}}", "stop", "correct"),
    ("5", r"\fbox{5}", "stop", "correct"),
]  # fmt: skip

GYM = [
    ("1000", "\\boxed{1000}", "stop", "correct"),
    ("1000", "\nThe answer is \\boxed{1000}.", "stop", "correct"),
    ("1000", "The answer is 1000.", "stop", "correct"),
    ("1000", "So, the final answer is: 1000", "stop", "correct"),
    ("1000", "work\n\n+01,000.00", "stop", "correct"),  # the task's scorer tolerates these
    ("1000", "<answer>1000</answer>", "stop", "correct"),
    ("1000", "\\boxed{1000 apples}", "stop", "incorrect"),  # partial credit is not correct
    ("1000", "it is 1000 or so", "stop", "incorrect"),
    ("1000", "\\boxed{999}", "stop", "incorrect"),
    ("1000", "\\boxed{}", "stop", "no_answer"),
    ("1000", "\\boxed{1000}", "length", "truncated"),
    ("1000", "", "stop", "no_answer"),
]


@pytest.fixture(scope="module")
def pool():
    with GradingPool(2, deadline_seconds=20) as running:
        yield running


def verdict(pool: GradingPool, grader: str, row: tuple[str, str, str, str], metadata: dict | None = None) -> Outcome:
    gold, response, finish_reason, _ = row
    known = verdict_without_grading(response, finish_reason, thinking_ended=True)
    return known or pool.submit(grader, gold, response, metadata or {}).result(timeout=60)


def test_math_agrees_with_every_hand_label(pool: GradingPool):
    outcomes = [(row, verdict(pool, "math", row)) for row in MATH]
    assert [(*row[:3], outcome) for row, outcome in outcomes if outcome.verdict != row[3]] == []
    assert len(MATH) >= 60


def test_gym_agrees_with_every_hand_label(pool: GradingPool):
    outcomes = [(row, verdict(pool, "gym", row, {"task": "chain_sum"})) for row in GYM]
    assert [(*row[:3], outcome) for row, outcome in outcomes if outcome.verdict != row[3]] == []


def test_gym_uses_the_tasks_own_scorer_and_the_stored_entry(pool: GradingPool):
    """A knights-and-knaves answer may be worded otherwise; a countdown has many solutions: only the task knows."""
    for task in ("countdown", "knights_knaves", "simple_equations", "basic_arithmetic", "spell_backward"):
        for problem in load_problems(f"gym:{task}?size=3&seed=1")[1]:
            row = (problem.answer, f"The answer is \\boxed{{{problem.answer}}}", "stop", "correct")
            if "{" not in problem.answer:
                assert verdict(pool, "gym", row, dict(problem.metadata)).verdict == "correct", problem
    (problem,) = load_problems("gym:countdown?size=1&seed=1")[1]
    assert problem.answer == "94*4 - 61 - 6"
    for response, expected in (("4*94 - 6 - 61", "correct"), ("94*4 - 61 + 6", "incorrect")):
        row = (problem.answer, response, "stop", expected)
        assert verdict(pool, "gym", row, dict(problem.metadata)).verdict == expected, response


def test_a_board_is_read_whole_without_a_box():
    (problem,) = load_problems("gym:mini_sudoku?size=1&seed=1")[1]
    board = problem.answer
    wrong = board[:-1] + str(5 - int(board[-1]))
    told = {
        f"The board is:\n{board}": "correct",
        f"First I try\n\n{wrong}\n\nwhich fails. Solution:\n```\n{board}\n```\n": "correct",
        f"First I try\n\n{board}\n\nwhich fails. Solution:\n\n{wrong}": "incorrect",
        board.splitlines()[-1]: "incorrect",
        "```\n```": "no_answer",
    }
    for response, verdict in told.items():
        assert gym.grade(board, response, problem.metadata | {"question": problem.question}).verdict == verdict, (
            response
        )


def test_a_task_that_states_no_answer_has_an_empty_one_and_is_scored(pool: GradingPool):
    (problem,) = load_problems("gym:graph_color?size=1&seed=1")[1]
    assert problem.answer == ""
    right = json.dumps(problem.metadata["entry"]["possible_answer"])
    for response, expected in ((right, "correct"), (r"\boxed{nonsense}", "incorrect")):
        row = ("", response, "stop", expected)
        assert verdict(pool, "gym", row, dict(problem.metadata)).verdict == expected


def test_unfinished_thinking_is_never_graded():
    assert verdict_without_grading(r"\boxed{7}", "stop", thinking_ended=False) is not None
    assert verdict_without_grading("", "stop", thinking_ended=False).verdict == "no_answer"
    assert verdict_without_grading(r"\boxed{7}", "length", thinking_ended=True).verdict == "truncated"


@given(st.text(alphabet="\\boxed{}7 $", max_size=80))
def test_the_last_box_is_balanced_or_absent(text: str):
    found = last_boxed(text)
    if found is not None:
        assert re.search(r"\\boxed\s*\{?" + re.escape(found), text)
    assert last_boxed(text + r"\boxed{9}") == "9"


@given(st.text(max_size=200))
def test_no_text_crashes_the_extraction(text: str):
    outcome = grade_response("math", "no number, but words", text, {})
    assert outcome.verdict in ("correct", "incorrect", "no_answer", "pred_unparsable")


def test_versions_name_the_library():
    assert "math-verify-" in grader_version("math")
    assert "reasoning-gym-" in grader_version("gym")


def test_an_unknown_grader_is_refused(pool: GradingPool):
    with pytest.raises(InputError, match="choose choice, exact, gym or math"):
        pool.submit("nonsense", "1", "1", {})


# --- workers -----------------------------------------------------------------------------------------------------


STRANGE = """
import os, time
from pathlib import Path

from calset.builder.grading import Outcome

def version():
    return "1.2"

def grade(answer, response, metadata):
    word, _, number = response.partition(" ")
    if "gate" in metadata:  # a named pipe: waits here until the test has opened and closed it
        Path(metadata["gate"]).read_bytes()
    if word == "crash":
        os._exit(3)
    if word in ("slow", "sleep"):
        time.sleep(float(number or 1))
    began = time.process_time()
    while word == "burn" and time.process_time() - began < float(number):
        pass
    return Outcome("correct", response, "strange")
"""


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A named pipe, and on sys.path a package whose grader ``strange`` waits there, sleeps or crashes if it is told."""
    site = tmp_path / "site"
    known = {"strange": "strange_grader", "absent": "no_such_module", "empty": "this"}
    install(site, "strange-grader", known, strange_grader=STRANGE)
    monkeypatch.syspath_prepend(str(site))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    return gate


def wait_for(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return True


@pytest.fixture
def children():
    """A function that lists this process's grading workers, apart from those of other tests' pools."""
    before = _workers(os.getpid())
    return lambda: _workers(os.getpid()) - before


def _workers(parent: int) -> set[int]:
    listed = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True)
    return {int(line.split()[0]) for line in listed.stdout.splitlines() if "calset.builder.grading" in line}


def test_a_hanging_answer_times_out_and_the_others_are_graded(children, brought: Path):
    with GradingPool(2, deadline_seconds=2) as pool:
        pool.submit("math", "1", r"\boxed{1}", {}).result(timeout=120)
        hanging = pool.submit("strange", "5", "sleep 3600", {})
        others = [pool.submit("math", str(n), rf"\boxed{{{n}}}", {}) for n in range(20)]
        assert [future.result(timeout=120).verdict for future in others] == ["correct"] * 20
        assert hanging.result(timeout=120).verdict == "timeout"
    assert not children()


def test_a_worker_killed_from_outside_costs_no_verdict(children, brought: Path):
    """The answer is graded once more, in a new worker."""
    with GradingPool(1, deadline_seconds=60) as pool:
        graded = pool.submit("strange", "1", "1", {"gate": str(brought)})
        with open(brought, "wb"):  # opens when the grader waits there
            (worker,) = children()
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: worker not in children())

        def let_through() -> bool:
            with suppress(OSError):  # nobody waits there yet; what the dead one left behind may, for a moment
                os.close(os.open(brought, os.O_WRONLY | os.O_NONBLOCK))
            return graded.done()

        wait_for(let_through)  # a second attempt waits there
        assert graded.result().verdict == "correct"
        assert worker not in children()
    assert not children()


def test_an_answer_that_crashes_its_worker_twice_is_an_error_and_the_next_is_graded(children, brought: Path):
    with GradingPool(1, deadline_seconds=60) as pool:
        crashing = pool.submit("strange", "1", "crash", {"gate": str(brought)})
        for _ in range(2):  # a third attempt would wait for ever
            with open(brought, "wb"):  # opens when an attempt waits there
                attempts = children()
            wait_for(lambda: not attempts & children())  # noqa: B023
        crashed = crashing.result(timeout=40)
        assert (crashed.verdict, crashed.detail) == ("error", "the grader crashed twice (exit code 3)")
        assert pool.submit("math", "1", r"\boxed{1}", {}).result(timeout=120).verdict == "correct"


def test_a_worker_that_cannot_start_is_no_verdict(brought: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GradingPool(1) as pool, pytest.raises(CalsetError, match="does not start"):
        pool.submit("math", "1", "1", {}).result(timeout=60)


def waited_for_a_cpu(process: int) -> float:
    """Seconds that a process was ready to run and did not, as the kernel counts them."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


def test_a_worker_without_a_cpu_is_not_out_of_time(children, brought: Path):
    """The worker shares one CPU with a process that goes before it: 0.4 s of work take longer than the deadline."""
    cpu = min(os.sched_getaffinity(0))
    with GradingPool(1, deadline_seconds=1) as pool:
        pool.submit("strange", "1", "1", {}).result(timeout=120)
        (worker,) = children()
        os.sched_setaffinity(worker, {cpu})
        spin = f"import os; os.sched_setaffinity(0, {{{cpu}}}); os.nice(5)\nwhile True: pass"
        spinner = subprocess.Popen([sys.executable, "-c", spin])
        try:
            time.sleep(0.3)
            before = waited_for_a_cpu(worker)
            outcome = pool.submit("strange", "1", "burn 0.4", {}).result(timeout=120)
            waited = waited_for_a_cpu(worker) - before
        finally:
            spinner.kill()
            spinner.wait()
        assert waited > 0.6, "the worker had the CPU: this showed nothing"
        assert outcome.verdict == "correct"
        # Sleeping is no excuse, and neither is work.
        for response in ("sleep 30", "burn 30"):
            assert pool.submit("strange", "1", response, {}).result(timeout=60).verdict == "timeout"


def test_a_second_worker_starts_only_when_the_first_falls_behind(children, brought: Path):
    with GradingPool(2) as pool:
        for n in range(40):
            pool.submit("strange", "1", str(n), {}).result(timeout=120)
        assert len(children()) == 1
        futures = [pool.submit("strange", "1", "burn 0.02", {}) for _ in range(100)]
        assert len(children()) == 2 or wait_for(lambda: len(children()) == 2)
        assert {future.result(timeout=120).verdict for future in futures} == {"correct"}


def test_submitting_waits_when_too_much_waits_already(brought: Path):
    with GradingPool(1, max_waiting=3) as pool:
        pool.submit("strange", "1", "1", {}).result(timeout=120)
        submitted = []
        for _ in range(13):
            submitted.append(pool.submit("strange", "1", "sleep 0.05", {}))
            assert pool.n_waiting <= 3
        assert sum(future.done() for future in submitted) >= 13 - 3 - 1  # all but those in line and in work


@pytest.mark.parametrize(("background", "nice"), [(True, 10), (False, 0)])
def test_workers_give_way_to_a_generation(background: bool, nice: int, children, brought: Path):
    with GradingPool(1, background=background) as pool:
        pool.submit("strange", "1", "1", {}).result(timeout=120)
        (worker,) = children()
        assert os.getpriority(os.PRIO_PROCESS, worker) == os.getpriority(os.PRIO_PROCESS, 0) + nice


def test_closing_drops_what_waits(brought: Path):
    with GradingPool(1) as pool:
        futures = [pool.submit("strange", "5", "sleep 3600", {}) for _ in range(3)]
    assert futures[-1].cancelled()
    with pytest.raises(CalsetError, match="closed"):
        pool.submit("math", "1", "1", {})


def test_workers_start_lazily_and_work_from_other_threads(children):
    with GradingPool(2) as pool:
        assert not children()
        found: list[Outcome] = []
        thread = threading.Thread(target=lambda: found.append(pool.submit("math", "2", "2", {}).result(timeout=120)))
        thread.start()
        thread.join()
        assert found[0].verdict == "correct"
        assert len(children()) == 1


def test_an_interrupt_from_the_terminal_spares_a_worker_that_is_still_starting():
    script = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from calset.builder.grading.pool import GradingPool\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "with GradingPool(1) as pool:\n"
        "    future = pool.submit('math', '1', '1', {})\n"
        "    while not any(file.read_text() for file in Path('/proc/self/task').glob('*/children')):\n"
        "        time.sleep(0.01)\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    print(future.result().verdict)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert done.stdout == "correct\n", done.stderr


def test_workers_end_when_their_parent_is_killed():
    script = (
        "import sys, time\n"
        "from calset.builder.grading.pool import GradingPool\n"
        "pool = GradingPool(1)\n"
        "pool.submit('math', '1', '1', {}).result()\n"
        "print('graded', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "graded\n"
    (worker,) = _workers(parent.pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()


# --- graders that other packages bring ---------------------------------------------------------------------------


def test_a_packages_grader_grades_a_build(brought: Path, tiny_model: Path, tmp_path: Path, scripted_engine):
    from calset.builder.build import build
    from calset.builder.model.info import inspect
    from calset.catalog.catalog import Catalog

    assert graders()["strange"] == "strange_grader"
    engine = scripted_engine(inspect(tiny_model).revision)
    catalog = Catalog(tmp_path / "c.duckdb")
    problems = "gym:chain_sum?min_terms=2&max_terms=2&size=3&seed=3"
    report = build(tiny_model, problems, samples=2, catalog=catalog, engine=engine, grader="strange")
    assert sum(report.verdicts.values()) == 6
    rows = catalog.query("SELECT DISTINCT grader, grader_version FROM grades").rows
    assert rows == [("strange", "1.2")]


def test_a_name_that_two_claim_is_refused_and_the_rest_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, "hijack", {"math": "strange_grader"})
    install(tmp_path, "first", {"twice": "one"})
    install(tmp_path, "second", {"twice": "two"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="'math' is claimed by calset and hijack"):
        grade_response("math", "1", "1", {})
    with pytest.raises(InputError, match="'twice' is claimed by first and second"):
        grader_version("twice")
    assert graders()["math"] == "calset.builder.grading.math"
    assert "twice" not in graders()
    assert grade_response("exact", "1", "1", {}).verdict == "correct"


def test_a_packages_grader_that_does_not_work_is_named(brought: Path):
    with pytest.raises(InputError, match="'absent' cannot be imported from no_such_module"):
        grader_version("absent")
    with pytest.raises(InputError, match=r"'empty' is no grader: this has no function version\(\)"):
        grader_version("empty")
    with GradingPool(1) as pool, pytest.raises(CalsetError, match="the absent grader cannot be imported"):
        pool.submit("absent", "1", "1", {}).result(timeout=60)


def test_closing_a_pool_does_not_wait_for_a_worker_that_is_still_importing(children, brought: Path):
    (brought.with_name("site") / "this_one_waits.py").write_text(f"open({str(brought)!r}, 'rb').read()")
    install(brought.with_name("site"), "waiting-grader", {"waiting": "this_one_waits"})
    pool = GradingPool(1)
    pool.warm("waiting")
    with open(brought, "wb"):  # opens when the import waits there
        pool.close()
    assert not children()


def test_a_pool_can_be_closed_at_any_moment_of_its_start(children):
    for n in range(4):
        pool = GradingPool(1)
        pool.warm("exact")
        time.sleep(0.05 * n)
        pool.close()
    assert not children()

"""The gym grader's wall: no answer, entry or option is run, whatever a task's own scorer would do with it."""

from __future__ import annotations

import ast
import json
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calset
from calset.builder.grading import formulas, gym, gym_checks
from calset.builder.grading.pool import GradingPool
from calset.builder.grading.scorers import SCORERS, VERSION, check_scorers, source_digest, why_refused
from calset.builder.problems import load_problems
from calset.catalog.records import Problem
from calset.errors import InputError

CHECKED = sorted(task for task, scorer in SCORERS.items() if scorer.check is not None)
DOCS = Path(__file__).parents[1] / "docs"


BOX_MOVES = json.dumps([{"Agent[0.5, 0.5]": "move(box_red, target_red)"}])


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    """The first problem of every task."""
    return {task: load_problems(f"gym:{task}?size=1&seed=1")[1][0] for task in tasks()}


def tasks() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def grade(problem: Problem, text: str, **changes: Any) -> Any:
    metadata = {**problem.metadata, "question": problem.question, **changes}
    return gym.grade(changes.get("answer", problem.answer), f"<answer>{text}</answer>", metadata)


# --- the list of scorers -----------------------------------------------------------------------------------------


def test_somebody_has_read_every_scorer_of_the_installed_reasoning_gym():
    unread = [task for task in tasks() if why_refused(task)]
    assert not unread, (
        f"nobody has read these scorers of the installed reasoning-gym: {', '.join(unread)}. Read each one's "
        "score_answer and all it calls. If it evaluates the answer or the entry (eval, parse_expr, a number that says "
        "how long a loop runs), give it a check in calset/builder/grading/gym_checks.py. Then put it into SCORERS of "
        "scorers.py, with source_digest() of the files that its scoring runs, raise VERSION there and the floor in "
        "pyproject.toml, and bring the table of docs/problems.md up to date"
    )
    assert sorted(SCORERS) == tasks(), "SCORERS lists a task that the installed reasoning-gym has not"


def test_the_files_of_a_scorer_are_all_that_run_when_the_task_scores(problems: dict[str, Problem]):
    from importlib.util import find_spec

    root = Path(find_spec("reasoning_gym").submodule_search_locations[0])
    missing = []
    for task, problem in problems.items():
        ran: set[str] = set()

        def profile(frame: Any, event: str, argument: Any, ran: set[str] = ran) -> None:
            if event == "call":
                ran.add(frame.f_code.co_filename)

        for text in (problem.answer, "12", "nonsense"):
            with suppressed():
                grade(problem, text)  # constructs the dataset, which runs more than the scorer
            sys.setprofile(profile)
            try:
                with suppressed():
                    grade(problem, text)
            finally:
                sys.setprofile(None)
        own = {str(Path(file).relative_to(root)) for file in ran if Path(file).is_relative_to(root)}
        if own - set(SCORERS[task].files):
            missing.append((task, own))
    assert missing == []


def test_the_page_lists_every_task_by_how_its_answers_are_scored():
    page = (DOCS / "problems.md").read_text(encoding="utf-8")
    by_check: dict[str, list[str]] = {}
    for task in CHECKED:
        said = (SCORERS[task].check.__doc__ or "").splitlines()[0].rstrip(".")
        by_check.setdefault(said, []).append(f"`{task}`")
    rows = [f"| {', '.join(names)} | {said} |" for said, names in sorted(by_check.items(), key=lambda x: x[1])]
    others = [f"`{task}`" for task in sorted(SCORERS) if task not in CHECKED]
    table = [f"| tasks of reasoning-gym {VERSION} | what calset does with an answer |", "|---|---|", *rows]
    assert "\n".join(table) in page
    assert f"The other {len(others)} scorers only compare" in page
    assert ", ".join(others) in re.sub(r"\s+", " ", page)


# --- right answers stay right ------------------------------------------------------------------------------------


def test_each_tasks_own_answer_scores_from_the_catalog_as_it_does_there(problems: dict[str, Problem]):
    """What the catalog keeps of an entry is JSON, without tuples and with text for keys."""
    from reasoning_gym.factory import create_dataset

    different, n = [], 0
    for task, problem in problems.items():
        dataset = create_dataset(task, seed=1, size=1)
        entry = dataset[0]
        if entry["answer"] is None:
            continue
        n += 1
        direct = dataset.score_answer(str(entry["answer"]), entry)
        outcome = grade(problem, problem.answer)
        if outcome.detail != f"score {direct:.4g}":
            different.append((task, direct, outcome))
    assert different == []
    assert n > 90


@pytest.mark.parametrize("task", CHECKED)
def test_a_check_accepts_what_the_tasks_own_scorer_accepts(task: str):
    """Also of other options than the defaults. Only an integral that was left as one is no answer."""
    from reasoning_gym.factory import create_dataset

    options = {
        "bitwise_arithmetic": "difficulty=5",
        "countdown": "max_numbers=9&max_value=300",
        "polynomial_multiplication": "max_degree=6&max_terms=6&allow_cross_variable_product=true",
        "propositional_logic": "max_vars=6&max_statements=8&max_complexity=4",
        "rubiks_cube": "max_scramble_steps=60",
        "simple_integration": "min_degree=-3&max_degree=30",
    }
    n = 0
    for option in {"", options.get(task, "")}:
        _, found = load_problems(f"gym:{task}?size=12&seed=5&{option}".rstrip("&"))
        scorer = create_dataset(task, seed=5, size=1).score_answer
        for problem in found:
            entry = problem.metadata["entry"]
            answer = problem.answer or entry.get("example_correct_answer") or entry.get("example_answer")
            if not answer or "Integral" in answer:
                continue
            n += 1
            direct = scorer(answer, {"answer": problem.answer, "metadata": json.loads(json.dumps(entry))})
            assert (grade(problem, answer).verdict == "correct") == (direct >= 1), (problem, answer)
    assert n >= 6 or task in ("boxnet", "rush_hour")  # which state no answer


@pytest.mark.parametrize(
    ("task", "entry", "answer", "text", "verdict"),
    [
        ("countdown", {"numbers": [94, 4, 61, 6], "target": 309}, "", "4 * 94 - (6 + 61)", "correct"),
        ("countdown", {"numbers": [94, 4, 61, 6], "target": 309}, "", "4*94 - 67", "incorrect"),
        ("countdown", {"numbers": [94, 4, 61, 6], "target": 309}, "", "94/(4 - 4) + 61 + 6", "incorrect"),
        ("countdown", {"numbers": [2, 2], "target": 4}, "", "2**2", "pred_unparsable"),
        ("countdown", {"numbers": "all"}, "", "2*2", "gold_unparsable"),
        ("puzzle24", {"numbers": [8, 3, 8, 3]}, "", "8/(3 - 8/3)", "correct"),
        ("puzzle24", {"numbers": [8, 3, 8, 3]}, "", "-(-8)*3/(8/8)", "incorrect"),
        ("spiral_matrix", {}, "1 2 3", "1 2 3", "correct"),
        ("spiral_matrix", {}, "1 2 3", "[1, 2, 3]", "incorrect"),
        ("n_queens", {"valid_answers": ["Q _", "_ Q"]}, "Q _", "_ Q", "correct"),
        ("bitwise_arithmetic", {}, "-0x1f", "-31", "correct"),
        ("bitwise_arithmetic", {}, "-0x1f", "31 or so", "pred_unparsable"),
        ("coin_flip", {}, "0.25", "1/4", "correct"),
        ("coin_flip", {}, "0.25", "1/3", "incorrect"),
        ("number_sorting", {"direction": "ascending"}, "['1', '2.5']", '[1, "2.5"]', "correct"),
        ("number_sorting", {"direction": "ascending"}, "['1', '2.5']", "[NaN, NaN]", "pred_unparsable"),
        ("number_sorting", {"direction": "ascending"}, "one, two", "[1, 2]", "gold_unparsable"),
        ("polynomial_multiplication", {}, "x**2 - 1", "-1 + x*x", "correct"),
        ("polynomial_multiplication", {}, "x**2 - 1", "(x + 1)*(x - 1)", "incorrect"),
        ("polynomial_multiplication", {}, "x**2 - 1", "x**1001", "pred_unparsable"),
        ("simple_integration", {"variable": "X", "integrand": "3*X**2/10"}, "", "X**3/10 + K", "correct"),
        ("simple_integration", {"variable": "X", "integrand": "3*X**2/10"}, "", "X*X*0.15*X - C", "incorrect"),
        ("simple_integration", {"variable": "X", "integrand": "3*X**2/10"}, "", "X**3/9 + C", "incorrect"),
        ("simple_integration", {"variable": "X", "integrand": "2*X"}, "", "X**2 + 9**4000", "pred_unparsable"),
        ("intermediate_integration", {"variable": "x", "integrand": "exp(2*x)"}, "", "E**(2*x)/2 + C", "correct"),
        ("intermediate_integration", {"variable": "x", "integrand": "1/x"}, "", "ln(abs(x)) + pi", "incorrect"),
        ("intermediate_integration", {"variable": "x", "integrand": "1/x"}, "", "log(x) + C", "correct"),
        ("intermediate_integration", {"variable": "x", "integrand": "no(x)"}, "", "x", "gold_unparsable"),
        ("propositional_logic", {"variables": ["P", "Q"], "premises": ["(P ∧ Q)"]}, "", "(P ∨ ¬Q)", "correct"),
        ("propositional_logic", {"variables": ["P", "Q"], "premises": ["(P ∧ Q)"]}, "", "P ∧ R", "pred_unparsable"),
        ("propositional_logic", {"variables": ["P", "Q"], "premises": ["P and"]}, "", "P ∨ Q", "gold_unparsable"),
        ("rubiks_cube", {"cube_size": 3, "scramble_moves": "U R"}, "", "R' U'", "correct"),
        ("rubiks_cube", {"cube_size": 3, "scramble_moves": "U R"}, "", "R3 U3", "correct"),
        ("rubiks_cube", {"cube_size": 3, "scramble_moves": "U R"}, "", "R' U' R9999 R9999", "pred_unparsable"),
        ("rubiks_cube", {"cube_size": 8, "scramble_moves": "U R"}, "", "R' U'", "gold_unparsable"),
        ("tower_of_hanoi", {"num_disks": 1_001, "num_pegs": 3}, "", "Move disk 1", "gold_unparsable"),
        ("rush_hour", {"board_config": "o" * 12 + "AAoooo" + "o" * 18}, "", "A+4", "correct"),
        ("rush_hour", {"board_config": "o" * 12 + "AAoooo" + "o" * 18}, "", "A+3", "incorrect"),
        ("rush_hour", {"board_config": "o" * 12 + "AAoooo" + "o" * 18}, "", "A+100", "pred_unparsable"),
        ("boxnet", {"initial_state": {"0.5_0.5": ["box_red", "target_red"]}}, "", BOX_MOVES, "correct"),
        ("boxnet", {"initial_state": {"0.5_0.5": ["box_red", "target_red"]}}, "", "[]", "incorrect"),
        ("boxnet", {"initial_state": {}}, "", "no JSON", "pred_unparsable"),
        ("boxnet", {"initial_state": {}}, "", "[" * 10_000, "pred_unparsable"),
    ],
)
def test_a_check_gives_the_verdict_a_careful_person_gives(
    task: str, entry: dict[str, Any], answer: str, text: str, verdict: str
):
    outcome = gym.grade(answer, f"<answer>{text}</answer>", {"task": task, "entry": entry})
    assert outcome.verdict == verdict, outcome


# --- nothing is run ----------------------------------------------------------------------------------------------

_WATCHED: dict[int, list[tuple[str, tuple[Any, ...]]]] = {}  # by thread: another test's may still open files


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("compile", "exec", "open", "import") and (found := _WATCHED.get(threading.get_ident())) is not None:
        found.append((event, arguments))


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """What this thread compiles, runs, imports and opens meanwhile, as Python's audit hooks tell."""
    me = threading.get_ident()
    try:
        yield _WATCHED.setdefault(me, [])
    finally:
        del _WATCHED[me]


sys.addaudithook(_audit)


def programs(marker: Path) -> list[str]:
    """Texts that would write the marker file if Python ran them, as they are or inside what a task expects."""
    call = f"open({str(marker)!r}, 'w').close()"
    return [call, f"[{call}]", f"[[{call}]]", f"1 + {call}", f"x + {call}", f"sin({call})", f"P ∧ {call}"]


@pytest.mark.parametrize("task", sorted(SCORERS))
def test_no_answer_is_run(task: str, problems: dict[str, Problem], tmp_path: Path):
    marker = tmp_path / "marker"
    for text in programs(marker):
        with suppressed():
            grade(problems[task], text)  # imports and constructs what is needed
        with watched() as events, suppressed():
            grade(problems[task], text)
        assert events == []
        assert not marker.exists()


@pytest.mark.parametrize("task", sorted(SCORERS))
def test_no_entry_is_run(task: str, problems: dict[str, Problem], tmp_path: Path):
    problem, marker = problems[task], tmp_path / "marker"
    entry = problem.metadata["entry"]
    texts = [problem.answer or entry.get("example_correct_answer") or "1", "[1]", "x"]
    for program in programs(marker):
        altered = [("entry", {**entry, name: _filled(entry[name], program)}) for name in entry]
        altered += [("answer", program), ("question", program)]
        for name, value in altered:
            for text in texts:
                with watched() as events, suppressed():
                    grade(problem, text, **{name: value})
                assert [e for e in events if str(marker) in str(e)] == []
        assert not marker.exists()


def _filled(value: Any, text: str) -> Any:
    """The same lists with the text in place of all that is in them."""
    if isinstance(value, list):
        return [_filled(item, text) for item in value]
    return text


@contextmanager
def suppressed() -> Iterator[None]:
    """Scorers that only compare may raise where an entry is not theirs: the worker makes that an error."""
    try:
        yield
    except AssertionError:
        raise
    except Exception:
        pass


def test_no_option_of_an_entry_names_a_file_to_read(tmp_path: Path):
    named = tmp_path / "words.txt"
    named.write_text("alpha beta gamma")
    (problem,) = load_problems("gym:spell_backward?size=1")[1]
    with watched() as events:
        outcome = grade(problem, problem.answer, options={"data_file": str(named), "min_word_len": 1_000})
    assert outcome.verdict == "correct"
    assert [e for e in events if str(named) in str(e)] == []


def test_an_option_that_a_scorer_needs_is_a_small_whole_number():
    (problem,) = load_problems("gym:decimal_arithmetic?size=1&max_num_decimal_places=12&precision=14")[1]
    assert problem.metadata["options"] == {"max_num_decimal_places": 12, "precision": 14}
    assert grade(problem, problem.answer).verdict == "correct"
    for value in (1_001, -1, "12", True):
        options = {"max_num_decimal_places": 12, "precision": value}
        assert grade(problem, problem.answer, options=options).verdict == "gold_unparsable"


# --- formulas ----------------------------------------------------------------------------------------------------

NUMBERS = formulas.Grammar((("+", "-"), ("*", "/")), ("+", "-"), decimals=True)
ARITHMETIC = formulas.Grammar((("+", "-"), ("*", "/")), ("+", "-"))
WORDS = ["x", "y", "2", "3", "0.5", *"+-*/()", "**", *",.[]'=", "__class__", "sin", "eval", "x.y"]
_NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UAdd, ast.USub)


@given(
    st.integers(-(10**50), 10**50)
    | st.floats(allow_nan=False, allow_infinity=False, min_value=1e-90, max_value=1e90)
    | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e90, max_value=-1e-90)
    | st.fractions(max_denominator=10**20)
)
def test_a_number_is_read_as_python_prints_it(number: int | float | Fraction):
    expected = Fraction(str(number))
    assert formulas.value(formulas.parse(str(number), NUMBERS)) == expected


@given(st.text("0123456789+-*/() ", min_size=1, max_size=16))
def test_arithmetic_is_what_python_reads_as_arithmetic_of_whole_numbers(text: str):
    expected = _python(text)
    try:
        found = formulas.parse(text, ARITHMETIC)
    except formulas.Unreadable:
        assert expected is None
        return
    assert expected is not None
    try:
        assert formulas.value(found) == _valued(expected)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            _valued(expected)


def _python(text: str) -> ast.expr | None:
    """Python's own tree of a text, or None where it holds more than arithmetic. Nothing is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError:
            return None
    return tree.body if all(isinstance(node, _NODES) for node in ast.walk(tree)) else None


def _valued(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(node.value)
        case ast.UnaryOp():
            return -_valued(node.operand) if isinstance(node.op, ast.USub) else _valued(node.operand)
        case ast.BinOp():
            left, right = _valued(node.left), _valued(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            return left * right if isinstance(node.op, ast.Mult) else left / right
    raise AssertionError(node)


@given(st.text(max_size=30).filter(lambda text: set("".join(text.split())) - set("0123456789+-*/()")))
def test_a_text_with_anything_else_in_it_is_no_arithmetic(text: str):
    with pytest.raises(formulas.Unreadable):
        formulas.parse(text, ARITHMETIC)


@given(st.lists(st.sampled_from(WORDS), max_size=9))
def test_a_polynomial_is_read_as_python_reads_it(words: list[str]):
    """Signs, powers and products bind as in Python; a text that Python takes for more is no polynomial."""
    import sympy

    text = " ".join(words)
    entry = {"answer": "x", "metadata": {}}
    try:
        gym_checks.polynomial(text, entry, lambda *_: 0.0)
    except formulas.Unreadable:
        return
    tree = ast.parse(text.strip(), mode="eval")
    assert all(isinstance(node, (*_NODES, ast.Pow, ast.Name, ast.Load)) for node in ast.walk(tree))

    def made(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return sympy.Integer(node.value) if isinstance(node.value, int) else sympy.Float(str(node.value))
        if isinstance(node, ast.Name):
            return sympy.Symbol(node.id)
        if isinstance(node, ast.UnaryOp):
            return -made(node.operand) if isinstance(node.op, ast.USub) else made(node.operand)
        assert isinstance(node, ast.BinOp)
        left, right = made(node.left), made(node.right)
        if isinstance(node.op, ast.Pow):
            return left**right
        if isinstance(node.op, ast.Div):
            return left / right
        return (
            left * right
            if isinstance(node.op, ast.Mult)
            else left + right
            if isinstance(node.op, ast.Add)
            else left - right
        )

    expected = str(made(tree.body))
    if re.fullmatch(r"[xy0-9.e+*/() -]+", expected):  # not zoo, nan, and not what sympy prints otherwise than Python
        assert gym_checks.polynomial(text, {**entry, "answer": expected}, lambda *_: 0.0) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "1" * 201,
        "1 + " * 3_000 + "1",
        "(" * 60 + "1" + ")" * 60,
        "-" * 101 + "1",
        "1e100",
        "01",
        "1_000",
        "１",
        "2x",
        "1 2",
        "",
    ],
)
def test_a_formula_beyond_the_bounds_is_none(text: str):
    with pytest.raises(formulas.Unreadable):
        formulas.parse(text, NUMBERS)


# --- scorers that nobody has read --------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A task that is taken off the list of scorers."""
    monkeypatch.delitem(SCORERS, "chain_sum")
    why_refused.cache_clear()
    yield "chain_sum"
    monkeypatch.undo()
    why_refused.cache_clear()


def test_a_scorer_that_nobody_has_read_is_refused_by_task_and_version(unread: str, problems: dict[str, Problem]):
    check_scorers(["products", "countdown"])
    with pytest.raises(InputError, match=rf"reasoning-gym {VERSION} .*'{unread}'.*--unsafe-scorers") as refused:
        check_scorers(["products", unread])
    assert "\n" not in str(refused.value)
    check_scorers([unread], unsafe_scorers=True)
    outcome = grade(problems[unread], problems[unread].answer)
    assert outcome.verdict == "error"
    assert outcome.detail == str(refused.value)
    problem = problems[unread]
    allowed = gym.grade(problem.answer, problem.answer, problem.metadata, unsafe_scorers=True)
    assert allowed.verdict == "correct"


def test_a_scorer_whose_source_is_another_is_refused(monkeypatch: pytest.MonkeyPatch):
    files = SCORERS["chain_sum"].files
    assert source_digest(files) == SCORERS["chain_sum"].digest
    assert source_digest([*files, "dataset.py"]) != SCORERS["chain_sum"].digest
    assert source_digest(["no/such/file.py"]) is None


def test_build_import_grade_and_evaluate_refuse_before_anything_starts(
    unread: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class NoEngine:
        name, version, max_model_len, loaded = "none", "1", 1024, None

        def stream(self, *_: Any) -> Any:
            raise AssertionError("the engine was asked")

    spec, catalog = f"gym:{unread}?size=2&seed=3", tmp_path / "c.duckdb"
    rows = tmp_path / "traces.jsonl"
    _, found = load_problems(spec)
    rows.write_text("".join(json.dumps({"problem": p.question, "generations": [p.answer]}) + "\n" for p in found))
    says = rf"'{unread}'.*--unsafe-scorers"
    for refused in (
        lambda: calset.build(tiny_model, spec, catalog=catalog, engine=NoEngine()),
        lambda: calset.build(tiny_model, "demo", catalog=catalog, engine=NoEngine()),
        lambda: calset.evaluate(tiny_model, spec, catalog=catalog, engine=NoEngine()),
        lambda: calset.dry_run(tiny_model, spec, catalog=catalog, tokens_per_second=1),
        lambda: calset.import_traces(tiny_model, rows, problems=spec, catalog=catalog),
    ):
        with pytest.raises(InputError, match=says):
            refused()
    report = calset.import_traces(tiny_model, rows, problems=spec, catalog=catalog, unsafe_scorers=True)
    assert report.n_matched == 2
    with pytest.raises(InputError, match=says):
        calset.grade(catalog, force=True)
    assert calset.grade(catalog, force=True, grader="exact").n_graded == 2  # another grader needs no scorer
    assert calset.grade(catalog, force=True, unsafe_scorers=True).n_graded == 2


def test_a_worker_refuses_what_its_caller_did_not_and_metadata_cannot_allow_it(
    tmp_path: Path, problems: dict[str, Problem], monkeypatch: pytest.MonkeyPatch
):
    """A worker that finds another reasoning-gym than the caller: links to the installed one, one file changed."""
    from importlib.util import find_spec

    installed = Path(find_spec("reasoning_gym").submodule_search_locations[0])
    copy = tmp_path / "reasoning_gym"
    (copy / "arithmetic").mkdir(parents=True)
    for folder, target in ((installed, copy), (installed / "arithmetic", copy / "arithmetic")):
        for item in folder.iterdir():
            if item.name not in ("__pycache__", "arithmetic", "chain_sum.py"):
                (target / item.name).symlink_to(item)
    source = (installed / "arithmetic" / "chain_sum.py").read_text()
    (copy / "arithmetic" / "chain_sum.py").write_text(source + "\n# another version\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = problems["chain_sum"]
    metadata = {**problem.metadata, "unsafe_scorers": True}
    with GradingPool(1) as pool:
        outcome = pool.submit("gym", problem.answer, problem.answer, metadata).result(60)
        other = problems["products"]
        assert pool.submit("gym", other.answer, other.answer, other.metadata).result(60).verdict == "correct"
    assert outcome.verdict == "error"
    assert "chain_sum" in outcome.detail
    with GradingPool(1, unsafe_scorers=True) as pool:
        assert pool.submit("gym", problem.answer, problem.answer, metadata).result(60).verdict == "correct"

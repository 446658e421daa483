"""The gym grader's verdicts, task by task: right answers in any mark-up, wrong answers of every kind, unreadable ones.

A new version of reasoning-gym changes what its scorers take for right: then the table of docs/problems.md, which
``test_the_page_says_which_wrong_answers_reasoning_gyms_scorers_take`` computes, says what changed.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from calset.builder.grading import gym
from calset.builder.grading.markup import bare
from calset.builder.grading.scorers import VERSION
from calset.builder.problems import load_problems
from calset.catalog.records import Problem
from calset.io.reasoning_gym import open_gym

DOCS = Path(__file__).parents[1] / "docs"


def tasks() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


@cache
def problems(task: str, size: int = 4) -> list[Problem]:
    return load_problems(f"gym:{task}?size={size}&seed=11")[1]


def right_answer(problem: Problem) -> str:
    """The reference answer, or the example that a task keeps which states none; empty where there is neither."""
    entry = problem.metadata["entry"]
    if problem.answer or "possible_answer" not in entry:
        return problem.answer or str(entry.get("example_correct_answer") or "")
    return json.dumps(entry["possible_answer"])


def grade(problem: Problem, response: str) -> Any:
    return gym.grade(problem.answer, response, {**problem.metadata, "question": problem.question})


def answered(size: int = 4) -> Iterator[tuple[str, Problem, str]]:
    """Problems with a right answer. An integral that was left as one is none."""
    for task in tasks():
        for problem in problems(task, size):
            text = right_answer(problem)
            if text and "Integral" not in text:
                yield task, problem, text


# --- right answers -----------------------------------------------------------------------------------------------


def test_every_reference_answer_scores_one():
    assert [(task, text) for task, problem, text in answered() if grade(problem, box(text)).verdict != "correct"] == []


@pytest.mark.nightly
def test_every_one_of_many_reference_answers_scores_one():
    wrong = [(task, text) for task, problem, text in answered(60) if grade(problem, box(text)).verdict != "correct"]
    assert wrong == []


def box(text: str) -> str:
    """An answer in tags: braces of an answer would close a box."""
    return f"<answer>{text}</answer>"


STYLES = [
    r"So it is \boxed{\text{%s}}.",
    r"\boxed{\mathrm{%s}}",
    r"$\boxed{\textbf{\text{%s}}}$",
    "Some thought.\n\n**Answer:** %s",
    "**Final Answer**\n**%s**",
    "The answer is **%s**.",
    "The answer is `%s`.",
    "The answer is $%s$.",
    r"The answer is \(%s\).",
    "Final Answer: %s",
    "I think so.\n\n**%s**",
    "I think so.\n%s",
    "I think.\n\n$%s$",
    "Here it is:\n```\n%s\n```",
    "```json\n%s\n```",
    "<answer>**%s**</answer>",
    "<answer>\nAnswer: %s\n</answer>",
    "#### %s",
    "**Answer: %s**",
    "### Final Answer\n\n%s",
    "<answer>\n```\n%s\n```\n</answer>",
]


@pytest.mark.parametrize("style", STYLES)
def test_the_mark_up_around_a_right_answer_costs_nothing(style: str):
    """In any task, boards of several lines included."""
    lost = [(task, text) for task, problem, text in answered(2) if not says(problem, style.replace("%s", text))]
    assert lost == []


def says(problem: Problem, response: str) -> bool:
    return grade(problem, response).verdict == "correct"


@pytest.mark.parametrize(
    ("text", "like", "expected"),
    [
        (r"\text{True}", "True", "True"),
        (r"\textbf{\text{Yes}}", "Yes", "Yes"),
        (r"\text{{\"a\": 1}}".replace('\\"', '"'), '{"a": 1}', '{"a": 1}'),
        ("**Answer:** True", "True", "True"),
        ("A **bold** word", "bold", "A bold word"),
        ('"abc"', "abc", "abc"),
        ('"abc"', '"abc"', '"abc"'),
        ("`True`", "`x`", "`True`"),
        ("$244/607$", "$138/583$", "$244/607$"),
        ("Smith has to perform.", "He has to.", "Smith has to perform."),
        ("True.", "True", "True"),
        (r"\frac{737}{960}", "1/2", "737/960"),
        (r"\dfrac{464}{887}", r"\dfrac{1}{2}", r"\dfrac{464}{887}"),
        (r"45.57^\circ", "12.30°", "45.57°"),
        (r"2 \times 2 \times 41", "2 × 3", "2 × 2 × 41"),
        (r"A \rightarrow B", "B → A", "A → B"),
        (r"(P \land \lnot Q)", "(P ∨ Q)", "(P ∧ ¬ Q)"),
        (r"1{,}234", "5", "1,234"),
        (r"\$12", "5", "$12"),
        ("$5 and $6", "5", "$5 and $6"),
        ("x**2 + y**2", "x", "x**2 + y**2"),
        ("2 * 3 * 4", "24", "2 * 3 * 4"),
        ("_ Q\nQ _", "Q _\n_ Q", "_ Q\nQ _"),
        ("#B A# #A", "#A A#", "#B A# #A"),
        ("['1', '2']", "['2']", "['1', '2']"),
        ("``True''", "True", "True"),
        (r"{\bf True}", "True", "True"),
        (r"1\ 2 \\ 3\ 4", "1 1\n1 1", "1 2\n3 4"),
        ("1 2<br>3 4", "1 1\n1 1", "1 2\n3 4"),
        (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", "1 1\n1 1", "1 2\n3 4"),
        (r"\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]", "1 1\n1 1", "[1 2\n3 4]"),
    ],
)
def test_only_the_mark_up_that_the_reference_has_not_is_removed(text: str, like: str, expected: str):
    assert re.sub(r"\s*\n\s*", "\n", bare(text, like=like)).replace("[\n", "[").replace("\n]", "]") == expected


@pytest.mark.parametrize("opening", [r"\text{", "**", "$", r"\frac{", r"\begin{matrix}", "`", "<b>", r"\(", '"', "{"])
def test_mark_up_that_never_ends_costs_no_time(opening: str):
    """A text that is cut to the longest response; pytest's own deadline is what would fail."""
    for text in ((opening * 50_000)[:50_000], opening + " " * 49_000, f"{opening} " * 9_000):
        assert len(bare(text, like="True")) <= len(text)


NUMERAL = {"question": "How many apples are there? A pear costs $3."}
AVERAGES = {"pool_type": "average", "matrix": [[5], [6], [6], [4]], "pool_size": 3}
MILLISECONDS = {"task_type": "time_ms", "start_time": "2026-12-01 10:00:00", "end_time": "2026-12-01 10:00:07.123000"}
BOARD = "1 2\n3 4"


@pytest.mark.parametrize(
    ("task", "entry", "answer", "response", "verdict"),
    [
        # Numbers: their exact value, in any form.
        ("gsm_symbolic", {}, "70", r"\boxed{70}", "correct"),
        ("gsm_symbolic", {}, "70", "The answer is -70.", "incorrect"),
        ("gsm_symbolic", {}, "70", "The answer is 70 or 7", "incorrect"),
        ("gsm_symbolic", {}, "70", r"\boxed{70 \text{ apples}}", "correct"),
        ("gsm_symbolic", {}, "70", r"\boxed{\$70}", "correct"),
        ("gsm_symbolic", {}, "70", "**70 dollars**", "correct"),
        ("gsm_symbolic", {}, "70", r"\boxed{70 \text{ cents}}", "incorrect"),
        ("gsm_symbolic", {}, "70", r"\boxed{70 \text{ million}}", "incorrect"),
        ("gsm_symbolic", {}, "70", r"\boxed{70\%}", "incorrect"),
        ("products", {}, "1234", r"\boxed{1,234}", "correct"),
        ("products", {}, "1234", r"\boxed{1{,}234}", "correct"),
        ("products", {}, "37", r"\boxed{3,7}", "incorrect"),
        ("simple_equations", {}, "13", "$x = 13$", "correct"),
        ("simple_geometry", {}, "104", r"\boxed{104^\circ}", "correct"),
        ("number_format", {"solution": 91585693.041}, "91585693.041", "91585693.05", "incorrect"),
        ("number_format", {"solution": 91585693.041}, "91585693.041", "91,585,693.0410", "correct"),
        ("number_format", {"solution": 947865419.1689999}, "947865419.1689999", "947865419.169000", "correct"),
        ("number_format", {"solution": 947865419.1689999}, "947865419.1689999", "9.47865419169e8", "correct"),
        ("calendar_arithmetic", {"task": "recurring_event_calculations"}, "-1", "5", "incorrect"),
        ("calendar_arithmetic", {"task": "weekday_of_date"}, "Friday", "**friday**", "correct"),
        ("decimal_arithmetic", {}, "6.32098837209", "6.321", "incorrect"),
        ("decimal_arithmetic", {}, "6.32098837209", "6.32098837209", "correct"),
        ("power_function", {}, "-0.0013674811612376526", r"\boxed{-1.37 \times 10^{-3}}", "correct"),
        ("power_function", {}, "-0.0013674811612376526", r"\boxed{1.37 \times 10^{-3}}", "incorrect"),
        ("complex_arithmetic", {"result": [-15, 3]}, "-15.0 + 3.0i", r"\boxed{-15+3i}", "correct"),
        ("complex_arithmetic", {"result": [-15, 3]}, "-15.0 + 3.0i", "nan", "pred_unparsable"),
        ("complex_arithmetic", {"result": [0, -1]}, "-1.00i", "-i", "correct"),
        ("complex_arithmetic", {"result": [0, -1]}, "-1.00i", "i", "incorrect"),
        ("coin_flip", {"rational": {"numerator": 1, "denominator": 8192}}, "0.0001220703125", "0", "incorrect"),
        ("coin_flip", {"rational": {"numerator": 1, "denominator": 8192}}, "0.0001220703125", "0.0001", "incorrect"),
        ("coin_flip", {"rational": {"numerator": 1, "denominator": 8192}}, "0.0001220703125", "0.000122", "correct"),
        ("coin_flip", {"rational": {"numerator": 10, "denominator": 32}}, "0.3125", r"\boxed{\frac{5}{16}}", "correct"),
        ("coin_flip", {"rational": {"numerator": 10, "denominator": 32}}, "0.3125", r"\boxed{31.25\%}", "correct"),
        ("coin_flip", {"rational": {"numerator": 10, "denominator": 32}}, "0.3125", "5/16 = 0.3125", "correct"),
        ("coin_flip", {"rational": {"numerator": 10, "denominator": 32}}, "0.3125", "0.3126", "incorrect"),
        ("polynomial_equations", {}, "-3.625, 0.0", r"\boxed{e = 0, e = -3.625}", "correct"),
        ("polynomial_equations", {}, "-3.625, 0.0", "-3.625", "incorrect"),
        ("polynomial_equations", {}, "1.5", "1.5, 1.5", "incorrect"),
        ("polynomial_equations", {}, "", r'\boxed{""}', "correct"),
        ("polynomial_equations", {}, "", r"\boxed{}", "correct"),
        ("polynomial_equations", {}, "", r"\boxed{\text{no real solutions}}", "correct"),
        ("polynomial_equations", {}, "", "I do not know", "pred_unparsable"),
        ("polynomial_equations", {}, "1.5", r"\boxed{}", "no_answer"),
        ("prime_factorization", {}, "2 × 2 × 41", r"\boxed{2 \times 2 \times 41}", "correct"),
        ("prime_factorization", {}, "2 × 2 × 41", r"\boxed{2^2 \cdot 41}", "correct"),
        ("prime_factorization", {}, "2 × 2 × 41", "164 = 2² × 41", "correct"),
        ("prime_factorization", {}, "2 × 2 × 41", "4 × 41", "incorrect"),
        ("prime_factorization", {}, "2 × 2 × 41", "164", "incorrect"),
        ("prime_factorization", {}, "139", "139", "correct"),
        ("prime_factorization", {}, "2 × 2 × 41", "I do not know", "pred_unparsable"),
        ("fraction_simplification", {"simplified_numerator": 46, "simplified_denominator": 81}, "$46/81$",
         r"\boxed{\frac{46}{81}}", "correct"),
        ("fraction_simplification", {"simplified_numerator": 46, "simplified_denominator": 81}, "$46/81$",
         r"\frac{46}{81} or \frac{1}{2}", "pred_unparsable"),
        ("time_intervals", {"task_type": "date"}, "42 days", "42", "correct"),
        ("time_intervals", {"task_type": "date"}, "42 days", "42 or 43 days", "incorrect"),
        ("time_intervals", {"task_type": "time_ms"}, "00:00:07.005", "00:00:07.5", "incorrect"),
        ("time_intervals", MILLISECONDS, "00:00:07.122", "00:00:07.123", "correct"),  # the reference is one off
        ("time_intervals", MILLISECONDS, "00:00:07.122", "00:00:07.122", "correct"),
        ("time_intervals", MILLISECONDS, "00:00:07.122", "00:00:07.121", "incorrect"),
        ("time_intervals", {"task_type": "datetime"}, "1 days, 02:03", "1 day, 02:03", "correct"),
        ("time_intervals", {"task_type": "datetime"}, "1 days, 02:03", "1 days, 02:03, or 4 days", "incorrect"),
        ("pool_matrix", {"pool_type": "max"}, "100 7", "101 7", "incorrect"),
        ("pool_matrix", AVERAGES, "5.67\n4.0", r"\boxed{\begin{matrix}5.67\\4\end{matrix}}", "correct"),
        ("pool_matrix", AVERAGES, "5.67\n4.0", "5.667\n4.00", "correct"),
        ("pool_matrix", AVERAGES, "5.67\n4.0", "5.671\n4.00", "incorrect"),
        ("pool_matrix", AVERAGES, "5.67\n4.0", "5.7\n4.00", "incorrect"),
        ("advanced_geometry", {"task_type": "orthocenter"}, "(4.051, -5.487)", r"\boxed{(4.051, -5.487)}", "correct"),
        ("advanced_geometry", {"task_type": "orthocenter"}, "(4.051, -5.487)", "(4.051, -5.487, 9)", "incorrect"),
        ("advanced_geometry", {"task_type": "angle_measure"}, "45.57°", r"\boxed{45.57^\circ}", "correct"),
        # Words, and their length.
        ("game_of_life_halting", {}, "False", r"\boxed{\text{False}}", "correct"),
        ("game_of_life_halting", {}, "False", "True", "incorrect"),
        ("game_of_life_halting", {}, "False", "whatever", "incorrect"),
        ("spell_backward", {}, "talps", "talpszz", "incorrect"),
        ("letter_jumble", {}, "and may not be", "and may not be so", "incorrect"),
        ("letter_jumble", {}, "and may not be", "**And may not be**", "correct"),
        ("figlet_font", {}, "BABBLEDABB", "BABBLEDABBJUNK", "incorrect"),
        ("word_sorting", {"sorted_words": ["a", "b"]}, "a, b", "a, b, c", "incorrect"),
        ("word_sorting", {"sorted_words": ["a", "b"]}, "a, b", r"\boxed{\text{a,b}}", "correct"),
        ("syllogism", {}, "Yes", r"\boxed{\text{yes}}", "correct"),
        # Lists, boards and moves.
        ("list_functions", {}, "[28, 88, 49]", r"\boxed{[28,88,49]}", "correct"),
        ("list_functions", {}, "[28, 88, 49]", "[28, 88, 49, 1]", "incorrect"),
        ("number_filtering", {}, "['14', '-48.9860']", '["14", "-48.986"]', "correct"),
        ("number_sorting", {"direction": "ascending"}, "['1', '2']", "['1.4', '2.4']", "incorrect"),
        ("game_of_life", {}, "[[0,1],[1,0]]", "[[0, 1], [1, 0]]", "correct"),
        ("game_of_life", {}, "[[0,1],[1,0]]", "[[0,1,9],[1,0],[9]]", "incorrect"),
        ("game_of_life", {}, "[[0,1],[1,0]]", "{}", "incorrect"),
        ("codeio", {}, '{"a": true, "b": 1.0}', '{"b": 1, "a": true}', "correct"),
        ("codeio", {}, '{"a": true, "b": 1.0}', '{"b": 1, "a": 1}', "incorrect"),
        ("rotate_matrix", {}, BOARD, r"\[\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}\]", "correct"),
        ("rotate_matrix", {}, BOARD, "Result:\n\\[\n\\begin{bmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{bmatrix}\n\\]",
         "correct"),
        ("rotate_matrix", {}, BOARD, "**Answer:**\n```\n1 2\n3 4\n```\nEach row was turned.", "correct"),
        ("rotate_matrix", {}, BOARD, "The rotated matrix is:\n\n1 2\n3 4\n\n", "correct"),
        ("rotate_matrix", {}, BOARD, "1 2\n3 4\n\nThis is what a turn makes of it.", "correct"),
        ("rotate_matrix", {}, BOARD, "```\n1 2\n3 4\n```\n\nNo:\n\n1 2\n3 5", "incorrect"),
        ("rotate_matrix", {}, BOARD, "1 2\n3 4\n3 4", "incorrect"),
        ("game_of_life", {}, "[[0,1],[1,0]]", "It becomes\n\n[[0, 1], [1, 0]]\n\nafter a step.", "correct"),
        ("game_of_life", {}, "[[0,1],[1,0]]", "```json\n[[0, 1],\n [1, 0]]\n```\nafter a step.", "correct"),
        ("game_of_life", {}, "[[0,1],[1,0]]", "```\n[[0, 1], [1, 0]]\n```\nNo, it is\n[[0, 1], [1, 1]]", "incorrect"),
        ("kakurasu", {"row_sums": [1, 2], "col_sums": [1, 2], "n_rows": 2, "n_cols": 2}, "1 0\n0 1", "1 0\n0 1",
         "correct"),
        ("kakurasu", {"row_sums": [1, 2], "col_sums": [1, 2], "n_rows": 2, "n_cols": 2}, "1 0\n0 1", "-1 0\n0 1 or 7",
         "pred_unparsable"),
        ("palindrome_partitioning", {"solution": [["a", "b", "c"]]}, '[["a", "b", "c"]]', '["abc"]', "pred_unparsable"),
        ("puzzle24", {"numbers": [8, 3, 8, 3]}, "", "10*(8 - 5) - 6", "incorrect"),
        ("puzzle24", {"numbers": [9, 3, 8, 9]}, "", "9*3*8/9 + 3/4", "incorrect"),
        ("puzzle24", {"numbers": [9, 3, 8, 9]}, "", r"\boxed{9 \times 3 \times 8 \div 9 = 24}", "correct"),
        ("puzzle24", {"numbers": [9, 3, 8, 9]}, "", "9*3*8/9 = 25", "pred_unparsable"),
        ("quantum_lock", {"buttons": [], "initial_value": 0, "target_value": 5}, "A → B", r"\boxed{A \rightarrow B}",
         "correct"),
        ("quantum_lock", {"buttons": [], "initial_value": 0, "target_value": 5}, "A → B", "A → B or C",
         "pred_unparsable"),
        ("knights_knaves", {}, "Ann is a hero, and Bo is a villain.", "**Bo is a villain and Ann is a hero**",
         "correct"),
        ("knights_knaves", {}, "Ann is a hero, and Bo is a villain.", "Ann is a hero or Bo is a villain.",
         "pred_unparsable"),
        ("knights_knaves", {}, "Ann is a hero, and Bo is a villain.",
         "It is not true that Ann is a hero and Bo is a villain.", "pred_unparsable"),
        ("boxnet", {"initial_state": {"0.5_0.5": ["box_red"]}}, "", "7", "pred_unparsable"),
        ("boxnet", {"initial_state": {"0.5_0.5": ["box_red"]}}, "",
         '[{"Agent[0.5, 0.5]": "move(box_red, square[0.5, 1.5])"}]', "pred_unparsable"),
    ],
)  # fmt: skip
def test_an_answer_gets_the_verdict_that_a_careful_person_gives(
    task: str, entry: dict[str, Any], answer: str, response: str, verdict: str
):
    outcome = gym.grade(answer, response, {"task": task, "entry": entry, **NUMERAL})
    assert outcome.verdict == verdict, outcome


# --- wrong answers -----------------------------------------------------------------------------------------------

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def other_number(text: str) -> str:
    """The last number with another last digit."""
    *_, last = NUMBER.finditer(text)
    digit = str((int(last[0][-1]) + 5) % 10)
    return text[: last.end() - 1] + digit + text[last.end() :]


def nearly(text: str) -> str:
    """The first number with a hundredth more."""
    found = NUMBER.search(text)
    assert found is not None
    value = f"{float(found[0]) + 0.01:.{max(2, len(found[0].partition('.')[2]))}f}"
    return text[: found.start()] + value + text[found.end() :]


def one_more(text: str) -> str:
    close = text.rstrip()[-1]
    return text.rstrip()[:-1] + ", 9]" if close == "]" else f"{text}, 9"


KINDS: dict[str, Callable[[str], str]] = {
    "another answer behind it": lambda text: f"{text} or 7",
    "words before it": lambda text: f"It is not {text}",
    "words behind it": lambda text: f"{text} is wrong",
    "letters attached": lambda text: f"{text}zz",
    "another sign": lambda text: text[1:] if text[0] == "-" else f"-{text}",
    "another digit": other_number,
    "a hundredth more": nearly,
    "one item more": one_more,
    "its first half": lambda text: text[: (len(text) + 1) // 2],
    "it, twice": lambda text: f"{text}{text}",
    "another problem's answer": lambda text: text,
    "words without an answer": lambda text: "I do not know",
    "`nan`": lambda text: "nan",
    "`0`": lambda text: "0",
    "`{}`": lambda text: "{}",
}
ANY = ("words without an answer", "`nan`", "`0`", "`{}`")  # which need no right answer
# What a kind makes of some answers is right, too.
RIGHT = {
    "another sign": {
        "quantum_lock": "a hyphen is one of the signs between buttons",
        "sokoban": "a hyphen is one of the signs between moves",
        "tower_of_hanoi": "a hyphen begins an item of a list",
        "ZERO": "minus zero",
    },
    "another digit": {"graph_color": "many colourings", "rubiks_cube": "many solutions", "power_function": "rounded"},
    "another problem's answer": {
        "graph_color": "many colourings",
        "n_queens": "many solutions",
        "rubiks_cube": "many solutions",
    },
    "a hundredth more": {"power_function": "rounded to three digits"},
    "letters attached": {"integration": "a constant of another name"},
    "it, twice": {"knights_knaves": "the same again", "sokoban": "moves that change nothing", "ZERO": "00"},
    "its first half": {
        "time_intervals": "days without the word",
        "power_function": "rounded",
        "decimal": "no fraction",
    },
    "`0`": {"ZERO": "it is"},
}


def wrong_answers() -> Iterator[tuple[str, Problem, str, str]]:
    """(kind, problem, its right answer, a wrong one)."""
    for task in tasks():
        texts = [right_answer(problem) for problem in problems(task)]
        for i, problem in enumerate(problems(task)):
            for kind, make in KINDS.items():
                text, given = texts[i], texts[i - 1] if kind == "another problem's answer" else texts[i]
                if not (given or kind in ANY) or (make in (other_number, nearly) and not NUMBER.search(given)):
                    continue
                made = make(given)
                if made.strip() and made.strip() != text.strip() and not excused(kind, task, text):
                    yield kind, problem, text, made


def excused(kind: str, task: str, text: str) -> bool:
    excuses = RIGHT.get(kind, {})
    return any(name in task for name in excuses) or ("ZERO" in excuses and text != text.strip("0., ") == "")


def test_no_wrong_answer_to_any_task_is_correct_and_each_is_graded():
    found = [
        (kind, problem.source, text, made, grade(problem, box(made))) for kind, problem, text, made in wrong_answers()
    ]
    assert [row for row in found if row[-1].verdict not in ("incorrect", "pred_unparsable")] == []
    assert len(found) > 4_000


def own_score(problem: Problem, text: str) -> str | None:
    """What reasoning-gym's own scorer says of a wrong answer: ``taken``, ``raises``, or None."""
    task, entry = problem.metadata["task"], json.loads(json.dumps(problem.metadata["entry"]))
    if task in ("arc_agi", "rearc"):
        entry["output"] = tuple(map(tuple, entry["output"]))
    try:
        with redirect_stdout(io.StringIO()):
            score = dataset(task).score_answer(text, {"answer": problem.answer, "metadata": entry})
    except Exception:
        return "raises"
    return "taken" if score >= 1 - 1e-9 or score != score else None


@cache
def dataset(task: str) -> Any:
    return open_gym(task, {"size": 1, "seed": 11})


def test_the_page_says_which_wrong_answers_reasoning_gyms_scorers_take():
    """The texts are calset's own, none of them is a program that a scorer could run."""
    taken: dict[str, set[str]] = {kind: set() for kind in KINDS}
    raised: set[str] = set()
    for kind, problem, _, made in wrong_answers():
        found = own_score(problem, made)
        if found is not None:
            (raised if found == "raises" else taken[kind]).add(f"`{problem.metadata['task']}`")
    rows = [f"| {kind} | {', '.join(sorted(found))} |" for kind, found in taken.items() if found]
    head = f"| wrong answer | tasks of reasoning-gym {VERSION} whose own scorer gives it the full score |"
    table = "\n".join(
        [head, "|---|---|", *rows, f"| any that makes the scorer raise an error | {', '.join(sorted(raised))} |"]
    )
    assert table in (DOCS / "problems.md").read_text(encoding="utf-8"), table

r"""Answers that a model should never give and some day will: a seeded generator for the graders' tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

GOLD = {"math": "7", "exact": "7", "choice": "B", "gym": "7", "sleeper": "7"}
# What each grader would accept if it read it, and what is wrong by construction.
RIGHT = {"math": r"\boxed{7}", "exact": r"\boxed{7}", "choice": r"\boxed{B}", "gym": r"\boxed{7}"}
JUNK = "\x00\ud800\udfff\u202e\u200b\u2066\ufeff\x1b[2J\x07\u0301\U0001f600\\{}$^_&%#~"


@dataclass(frozen=True)
class Case:
    """One completion with the answer it is graded against."""

    kind: str
    grader: str
    completion: str
    finish_reason: str = "stop"
    opened_by_template: bool = False
    finished: bool = True  # as the generator made it: the only ones that may be correct
    right: bool | None = None  # whether the answer is right, where the generator knows
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return GOLD[self.grader]


def cases(n: int, seed: int, *, hangs: int) -> Iterator[Case]:
    """``n`` cases; ``hangs`` of them run until somebody ends them, by a grader that sleeps."""
    draw = random.Random(seed)
    slow = set(draw.sample(range(n), hangs))
    for i in range(n):
        grader = draw.choice(["math", "math", "math", "exact", "choice", "gym"])
        metadata = {"task": "chain_sum"} if grader == "gym" else {}
        if grader == "choice" and draw.random() < 0.5:
            metadata = {"choices": {"A": "5", "B": "7", "C": "9", "D": junk(draw, 20)}}
        if i in slow:
            yield Case("hang", "sleeper", "3600", right=False)
            continue
        yield draw.choice(KINDS)(draw, grader, metadata)


def box(content: str) -> str:
    return rf"\boxed{{{content}}}"


def junk(draw: random.Random, most: int) -> str:
    return "".join(draw.choice(JUNK + "abc 0123") for _ in range(draw.randrange(most)))


def unclosed(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    opened = draw.random() < 0.5
    text = ("" if opened else "<think>") + junk(draw, 30) + f"The answer is {RIGHT[grader]}. " * draw.randint(1, 3)
    if draw.random() < 0.3:
        text = f"<think>a</think>{RIGHT[grader]}<think>{RIGHT[grader]}"
        opened = False
    return Case("unclosed thinking", grader, text, "stop", opened, finished=False, metadata=metadata)


def cut(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    text = f"<think>{junk(draw, 30)}</think>{RIGHT[grader]}{junk(draw, 10)}"
    reason = draw.choice(["length", "repetition", "abort", "error"])
    return Case("cut off", grader, text, reason, finished=False, metadata=metadata)


def right_only_in_thought(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    wrong = RIGHT[grader].replace("7", "8").replace("B", "C")
    text = f"<think>{RIGHT[grader]}</think>{junk(draw, 5)}\n{wrong}"
    return Case("right in thought, wrong in answer", grader, text, right=False, metadata=metadata)


def boxes(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    contents = [draw.choice(["8", "C", "9", "", "x", junk(draw, 8)]) for _ in range(draw.randint(1, 40))]
    if draw.random() < 0.5:
        nested = "8" if grader != "choice" else "C"
        for _ in range(draw.randint(1, 200)):
            nested = box(nested)
        return Case("nested boxes", grader, nested, right=False, metadata=metadata)
    return Case("several boxes", grader, " ".join(map(box, contents)), metadata=metadata)


def open_boxes(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    return Case("boxes that never close", grader, r"\boxed{7" * draw.randint(1, 5_000), right=False, metadata=metadata)


def braces(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    deep = draw.randint(1, 200 if grader == "math" else 20_000)  # math-verify takes long over many
    return Case("deep braces", grader, box("{" * deep + "8" + "}" * deep), right=False, metadata=metadata)


def dollars(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    n = 1_000_000 if draw.random() < 0.02 else draw.randint(1, 60_000)
    text = draw.choice(["$", "$$", r"\$", "$ ", "\n$"]) * n
    return Case("dollars", grader, text[:1_000_000] + draw.choice(["", box("8")]), right=False, metadata=metadata)


def garbage(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    text = junk(draw, 300)
    return Case("garbage", grader, draw.choice([text, box(text), f"The answer is {text}"]), metadata=metadata)


def number(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    big = draw.choice(
        ["9" * draw.randint(1, 6_000), f"{draw.random()}e{draw.randint(-9_999, 9_999)}", "1" + ",000" * 999]
    )
    text = draw.choice(["{}", "-{}", "{}%", r"{}\text{{ cm}}", "${}", "1/{}", r"\frac{{{}}}{{3}}"]).format(big)
    return Case("huge number", grader, draw.choice([box(text), f"Answer: {text}"]), right=False, metadata=metadata)


def tower(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    text = "2"
    for _ in range(draw.randint(1, 3)):
        text = f"{draw.choice([2, 3, 'x', '-1'])}^{{{text}}}"
    return Case("nested powers", grader, box(text), right=False, metadata=metadata)


def sets(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    items = ", ".join(str(draw.randint(8, 99)) for _ in range(draw.randint(2, 60)))
    form = draw.choice([r"\{{{}\}}", "({})", "[{})", "{}", r"\left( {} \right]", r"\begin{{pmatrix}}{}\end{{pmatrix}}"])
    return Case("sets and intervals", grader, box(form.format(items)), right=False, metadata=metadata)


def expression(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    text = "x"
    for _ in range(draw.randint(1, 5)):
        text = draw.choice([r"\sqrt{{{}}}", r"\frac{{{}}}{{y}}", r"\sin({})", "({})^2", r"{}!"]).format(text)
    return Case("deep expression", grader, box(text), right=False, metadata=metadata)


def bomb(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    piece = draw.choice(
        ["The answer is ", "(A) or ", "A, B and ", r"\text{a} ", "1,000 ", "1 000", "#### ", "<answer>", "a b ", "**",
         r"\boxed ", "choose the option ", "<=", "e1", "-", "\n", "Answer: ", "   ", "(", "1/", r"\frac", "½",
         "A is the ", "is the answer is "]
    )  # fmt: skip
    return Case("regex bomb", grader, piece * draw.randint(1, 50_000 // len(piece)), right=None, metadata=metadata)


def text_commands(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    deep = draw.randint(1, 300)
    text = "\\text{" * deep + draw.choice(["eight", "C", "8", ""]) + "}" * deep
    return Case("text commands", grader, box(text), right=False, metadata=metadata)


def good(draw: random.Random, grader: str, metadata: dict[str, Any]) -> Case:
    noise = draw.choice(["", "\x00", "\u202e", "\ufeff", " \n", "$" * 70_000 + "\n"])
    return Case("right", grader, f"<think>hm</think>{noise}{RIGHT[grader]}", right=True, metadata=metadata)


Kind = Callable[[random.Random, str, dict[str, Any]], Case]
KINDS: list[Kind] = [
    unclosed, cut, right_only_in_thought, boxes, open_boxes, braces, dollars, garbage, number, tower, sets, expression,
    bomb, text_commands, good,
]  # fmt: skip

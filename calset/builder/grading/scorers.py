"""Scorers of reasoning-gym that somebody has read, and what each of them gets.

Why it exists: several scorers evaluate an answer as Python, and nothing in the library tells which. So a scorer that is
not in ``SCORERS``, or whose source is another than the one that was read, is refused: an answer is a model's text, and
a problem's entry may come from a stranger's catalog. Must not know: catalogs, problem sources, reasoning-gym's modules
(its files are hashed, nothing of it is imported).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from calset.builder.grading import gym_checks, gym_compare
from calset.errors import InputError

VERSION = "0.1.25"  # of reasoning-gym: the one whose scorers were read


class Scorer(NamedTuple):
    """A task's scorer.

    Args:
        digest: of ``files``.
        files: the library's files whose code runs when the task scores, the task's own first.
        check: what stands before the scorer, or in its place. Without one the scorer only compares: it gets the answer
            and the entry as they are.
        options: the task's options that the score depends on, all of them whole numbers; the others are not needed.
    """

    digest: str
    files: tuple[str, ...]
    check: gym_checks.Check | None
    options: tuple[str, ...]


def check_scorers(tasks: Iterable[str], *, unsafe_scorers: bool = False) -> None:
    """Refuse tasks whose scorers nobody has read.

    Raises:
        InputError: such a task, unless ``unsafe_scorers``; the first one is named.
    """
    for task in () if unsafe_scorers else sorted(set(tasks)):
        if why := why_refused(task):
            raise InputError(why)


@lru_cache(maxsize=256)
def why_refused(task: str) -> str | None:
    """Why a task is not scored, in a line; None where its scorer is one that was read."""
    scorer = SCORERS.get(task)
    if scorer is not None and source_digest(scorer.files) == scorer.digest:
        return None
    return (
        f"reasoning-gym {package_version('reasoning-gym')} scores the task {task[:100]!r} by code that calset does not "
        f"know, and that may run an answer as a program; install reasoning-gym {VERSION}, take another grader, or "
        "allow it with --unsafe-scorers (unsafe_scorers=True)"
    )


def source_digest(files: Iterable[str]) -> str | None:
    """The digest of files of the installed reasoning-gym; None where one of them is not there."""
    found = find_spec("reasoning_gym")
    if found is None or not found.submodule_search_locations:
        return None
    root, digest = Path(found.submodule_search_locations[0]), hashlib.sha256()
    for file in files:
        try:
            digest.update(file.encode() + b"\0" + hashlib.sha256((root / file).read_bytes()).digest())
        except OSError:
            return None
    return digest.hexdigest()[:16]


def _read(digest: str, *files: str, options: tuple[str, ...] = ()) -> Scorer:
    return Scorer(digest, files, None, options)


_SOKOBAN = tuple(f"games/contrib/sokoban/src/{name}.py" for name in ("box", "game", "player", "utils"))
_READ: dict[str, Scorer] = {
    "ab": _read("bc5e51fd02f3a537", "algorithmic/ab.py"),
    "acre": _read("8abe708eb690fa6c", "induction/acre/acre.py", "dataset.py"),
    "advanced_geometry": _read("91fea42e13b32053", "geometry/advanced_geometry.py"),
    "aiw": _read("2c7312f07625cd61", "logic/aiw.py", "dataset.py"),
    "arc_1d": _read("4893a792c5238ba3", "arc/arc_1d.py", "dataset.py"),
    "arc_agi": _read("324b38804dbe1603", "arc/arc_agi.py", "arc/board_format.py"),
    "base_conversion": _read("69b4c569a781bb29", "algorithmic/base_conversion.py", "dataset.py"),
    "basic_arithmetic": _read("e639cf3f6b652027", "arithmetic/basic_arithmetic.py", "dataset.py"),
    "bf": _read("2000a35b155c37f1", "code/bf.py", "dataset.py"),
    "binary_alternation": _read("bdac065c6974d751", "algorithmic/binary_alternation.py", "dataset.py"),
    "binary_matrix": _read("ad580e5d27758c8e", "algorithmic/binary_matrix.py"),
    "bitwise_arithmetic": _read("e1af16dd1a19c11f", "arithmetic/bitwise_arithmetic.py"),
    "boxnet": _read("3b15bf78564cf9b6", "games/boxnet.py"),
    "caesar_cipher": _read("dd9d78be5a022f1a", "algorithmic/caesar_cipher.py", "dataset.py"),
    "calendar_arithmetic": _read("41d6348f2846d1d0", "arithmetic/calendar_arithmetic.py"),
    "chain_sum": _read("05db6a7591c5dfcb", "arithmetic/chain_sum.py", "utils.py"),
    "circuit_logic": _read("5526a3d24ad548d0", "logic/circuit_logic.py"),
    "codeio": _read("706f9a2a6d20f87c", "code/codeio.py"),
    "coin_flip": _read("7e9104885336f34e", "probability/coin_flip.py"),
    "color_cube_rotation": _read("041710fb58857933", "cognition/color_cube_rotation.py"),
    "complex_arithmetic": _read("f28e9977249b03b8", "algebra/complex_arithmetic.py"),
    "count_bits": _read("31a394f2b312a427", "arithmetic/count_bits.py", "dataset.py"),
    "count_primes": _read("cbd70b53094ef667", "algorithmic/count_primes.py", "dataset.py"),
    "countdown": _read("e9021cea48d39136", "games/countdown.py"),
    "course_schedule": _read("c5d62acbbdb6a749", "graphs/course_schedule.py", "dataset.py"),
    "cryptarithm": _read("2c380ef9092bbd7c", "algorithmic/cryptarithm.py"),
    "decimal_arithmetic": _read(
        "50e59f1d448f0cf0", "arithmetic/decimal_arithmetic.py", options=("max_num_decimal_places", "precision")
    ),
    "decimal_chain_sum": _read("0853400cb3c81611", "arithmetic/decimal_chain_sum.py"),
    "dice": _read("28999375c0f52de5", "arithmetic/dice.py"),
    "emoji_mystery": _read("5d059752548a0586", "games/emoji_mystery.py"),
    "family_relationships": _read("170e040eb7017019", "graphs/family_relationships.py"),
    "figlet_font": _read("65744a5614fdefb1", "cognition/figlet_fonts.py"),
    "fraction_simplification": _read("e68528a8863e6730", "arithmetic/fraction_simplification.py"),
    "futoshiki": _read("d1d26f95a3830100", "games/futoshiki.py"),
    "game_of_life": _read("b93d57586702feac", "algorithmic/game_of_life.py"),
    "game_of_life_halting": _read("e74d76e0aadfe851", "algorithmic/game_of_life_halting.py"),
    "gcd": _read("d2434df66a3cb29c", "arithmetic/gcd.py", "dataset.py"),
    "graph_color": _read("1342a9ddd6530509", "algorithmic/graph_color.py"),
    "group_anagrams": _read("a54d11c8092daf5d", "algorithmic/group_anagrams.py"),
    "gsm_symbolic": _read("7627625c5ec7d2da", "arithmetic/gsm_symbolic/gsm_symbolic.py"),
    "intermediate_integration": _read("4c7c4e98708cb02c", "algebra/intermediate_integration.py"),
    "isomorphic_strings": _read("81077e7cae103459", "algorithmic/isomorphic_strings.py", "dataset.py"),
    "jugs": _read("e21421e2a5d5e959", "algorithmic/jugs.py"),
    "kakurasu": _read("ff8db3d5ddcb94eb", "games/kakurasu.py"),
    "knight_swap": _read("00da793bc00d2ff5", "games/knight_swap.py"),
    "knights_knaves": _read("f847952b2efb18aa", "logic/knights_knaves.py"),
    "largest_island": _read("8d3be04ca2b18cbe", "graphs/largest_island.py", "dataset.py"),
    "lcm": _read("2235ca89d5a06813", "arithmetic/lcm.py", "dataset.py"),
    "leg_counting": _read("fe6e1eb4de565234", "arithmetic/leg_counting.py", "dataset.py"),
    "letter_counting": _read("11023c6e8f534460", "algorithmic/letter_counting.py", "dataset.py"),
    "letter_jumble": _read("43bea1c2a6e20cea", "algorithmic/letter_jumble.py"),
    "list_functions": _read("3f0cce84456f6b69", "induction/list_functions/list_functions.py", "dataset.py"),
    "mahjong_puzzle": _read("4adbef002e0da40a", "games/mahjong.py", "dataset.py"),
    "manipulate_matrix": _read("6bfb2b16609c4797", "algorithmic/manipulate_matrix.py"),
    "maze": _read("421dbe734e19eae6", "games/maze.py", "dataset.py"),
    "mini_sudoku": _read("948328658de87f90", "games/mini_sudoku.py"),
    "modulo_grid": _read("08b7b42b5c18cacd", "cognition/modulo_grid.py", "dataset.py"),
    "n_queens": _read("74a73c0991bf701d", "games/n_queens.py"),
    "needle_haystack": _read("afd62cf438a35bca", "cognition/needle_haystack.py"),
    "number_filtering": _read("ea503b5ddadaa797", "algorithmic/number_filtering.py", "dataset.py"),
    "number_format": _read("3196991ee5cd28e0", "arithmetic/number_format.py"),
    "number_sequence": _read("7747e875a0ace27f", "cognition/number_sequences.py", "dataset.py"),
    "number_sorting": _read("d43b9f83c7652b15", "algorithmic/number_sorting.py"),
    "palindrome_generation": _read("a3193aba9237aaf6", "algorithmic/palindrome_generation.py"),
    "palindrome_partitioning": _read("e3be842de37a7cd5", "algorithmic/palindrome_partitioning.py"),
    "path_star": _read("56015156971efa15", "graphs/path_star.py"),
    "polynomial_equations": _read("e76cb9fd07873854", "algebra/polynomial_equations.py"),
    "polynomial_multiplication": _read("3961cfa0f94927c0", "algebra/polynomial_multiplication.py"),
    "pool_matrix": _read("4ee21c41d7c32018", "algorithmic/pool_matrix.py"),
    "power_function": _read("887cce46674c021a", "arithmetic/power_function.py"),
    "prime_factorization": _read("c48978336fac8f57", "arithmetic/prime_factorization.py"),
    "products": _read("9d229454112c78dd", "arithmetic/products.py", "utils.py"),
    "propositional_logic": _read("8789b73569351979", "logic/propositional_logic.py"),
    "puzzle24": _read("04aff3d79aed06d1", "games/puzzle24.py"),
    "quantum_lock": _read("6de5af83566a6bfd", "graphs/quantum_lock.py"),
    "ransom_note": _read("9f5076ebdc890434", "algorithmic/ransom_note.py", "dataset.py"),
    "rearc": _read("87e85648343db1ae", "arc/rearc.py", "arc/board_format.py"),
    "rectangle_count": _read("f84569b169e8bdda", "cognition/rectangle_count.py"),
    "rotate_matrix": _read("59784beb4db9e130", "algorithmic/rotate_matrix.py", "dataset.py"),
    "rotten_oranges": _read("3d3927d969592c52", "algorithmic/rotten_oranges.py", "dataset.py"),
    "rubiks_cube": _read("22ef051a8925d775", "cognition/rubiks_cube.py"),
    "rush_hour": _read("1c40950bc772ff08", "games/rush_hour.py"),
    "self_reference": _read("60aa8ab7a7f6e937", "logic/self_reference.py"),
    "sentence_reordering": _read("a711cc9a4b987efa", "algorithmic/sentence_reordering.py"),
    "shortest_path": _read("464380c0f8e0f25a", "graphs/shortest_path.py"),
    "simple_equations": _read("99c8dd3fee206a02", "algebra/simple_equations.py", "dataset.py"),
    "simple_geometry": _read("8cfcb2c3d552784c", "geometry/simple_geometry.py", "dataset.py"),
    "simple_integration": _read("7943b44799eb743c", "algebra/simple_integration.py"),
    "sokoban": _read("e4a0f63f12545840", "games/sokoban.py", *_SOKOBAN),
    "spell_backward": _read("56c790c0d78a4e70", "algorithmic/spell_backward.py"),
    "spiral_matrix": _read("f083b521650eff8d", "algorithmic/spiral_matrix.py"),
    "string_insertion": _read("f5dca0eca6f04c6e", "algorithmic/string_insertion.py"),
    "string_manipulation": _read("2076a6cf19996ee8", "algorithmic/string_manipulation.py", "dataset.py"),
    "string_splitting": _read("345d3f46c07a6ca0", "algorithmic/string_splitting.py", "dataset.py"),
    "string_synthesis": _read("48a7563c80647364", "algorithmic/string_synthesis.py", "dataset.py"),
    "sudoku": _read("fad4eade924c5db9", "games/sudoku.py"),
    "survo": _read("ebfd457e70e823c6", "games/survo.py"),
    "syllogism": _read("e741b33a7239f37c", "logic/syllogisms.py", "dataset.py"),
    "time_intervals": _read("2af6029d3221a5f8", "arithmetic/time_intervals.py"),
    "tower_of_hanoi": _read("54608436922779c6", "games/tower_of_hanoi.py"),
    "tsumego": _read("13d2e8274d64cf44", "games/tsumego.py"),
    "word_ladder": _read(
        "c339eae9e7ca9136", "algorithmic/word_ladder.py", options=("min_word_length", "max_word_length")
    ),
    "word_sequence_reversal": _read("88a03f3b1b37f53a", "algorithmic/word_sequence_reversal.py", "dataset.py"),
    "word_sorting": _read("aed7ee813786c381", "algorithmic/word_sorting.py"),
    "zebra_puzzles": _read("393f4d602848b1a2", "logic/zebra_puzzles.py"),
}
_CHECKS: dict[gym_checks.Check, str] = {
    gym_checks.arithmetic: "countdown puzzle24",
    gym_checks.box_moves: "boxnet",
    gym_checks.button_presses: "quantum_lock",
    gym_checks.car_moves: "rush_hour",
    gym_checks.cells: "survo",
    gym_checks.cube_moves: "rubiks_cube",
    gym_checks.disk_moves: "tower_of_hanoi",
    gym_checks.equal: "binary_matrix n_queens spiral_matrix string_insertion string_manipulation",
    gym_checks.integer: "bitwise_arithmetic",
    gym_checks.integral: "intermediate_integration simple_integration",
    gym_checks.marks: "kakurasu",
    gym_checks.partitions: "palindrome_partitioning",
    gym_checks.polynomial: "polynomial_multiplication",
    gym_checks.proposition: "propositional_logic",
    gym_checks.pusher_moves: "sokoban",
    gym_checks.roles: "knights_knaves",
    gym_checks.sorted_numbers: "number_sorting",
    gym_compare.any_case: (
        "acre base_conversion course_schedule game_of_life_halting isomorphic_strings letter_jumble mahjong_puzzle "
        "ransom_note spell_backward syllogism"
    ),
    gym_compare.array: "game_of_life list_functions number_filtering",
    gym_compare.board: (
        "arc_1d futoshiki manipulate_matrix mini_sudoku modulo_grid rotate_matrix string_splitting string_synthesis "
        "sudoku"
    ),
    gym_compare.complex_number: "complex_arithmetic",
    gym_compare.decimal: "decimal_arithmetic",
    gym_compare.duration: "time_intervals",
    gym_compare.factors: "prime_factorization",
    gym_compare.geometry: "advanced_geometry",
    gym_compare.json_value: "codeio",
    gym_compare.letters: "figlet_font",
    gym_compare.number: (
        "aiw basic_arithmetic binary_alternation calendar_arithmetic chain_sum circuit_logic count_bits count_primes "
        "decimal_chain_sum gcd gsm_symbolic largest_island lcm leg_counting letter_counting maze "
        "number_sequence products rectangle_count rotten_oranges self_reference simple_equations simple_geometry"
    ),
    gym_compare.pooled: "pool_matrix",
    gym_compare.probability: "coin_flip",
    gym_compare.roots: "polynomial_equations",
    gym_compare.significant: "power_function",
    gym_compare.simplified: "fraction_simplification",
    gym_compare.thousandths: "number_format",
    gym_compare.words: "word_sequence_reversal word_sorting",
}
_CHECK_OF = {task: check for check, tasks in _CHECKS.items() for task in tasks.split()}
SCORERS = {task: scorer._replace(check=_CHECK_OF.get(task)) for task, scorer in _READ.items()}

"""Paths of the tiny reasoning model, the problems and the prose that calset brings along, in ``calset/demo``."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "demo"
MODEL = _FOLDER / "model"  # a Hugging Face checkpoint of 2.6M parameters, see its README.md
PROBLEMS = _FOLDER / "problems.json"  # reasoning-gym specs of the calibration and the evaluation set
PROSE = _FOLDER / "prose.txt"  # public-domain English for the `text` baseline

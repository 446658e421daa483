"""The bundled demo: a tiny real reasoning model, its problems and a piece of prose."""

from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"  # a Hugging Face checkpoint of 2.6M parameters, see its README.md
PROBLEMS = HERE / "problems.json"  # reasoning-gym specs of the calibration and the evaluation set
PROSE = HERE / "prose.txt"  # public-domain English for the `text` baseline

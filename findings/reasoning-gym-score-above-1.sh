#!/usr/bin/env bash
# reasoning-gym 0.1.25: a wrong word can score more than 1, so "score >= 1" does not mean right.
#
# spell_backward gives partial credit for words of equal beginning. A word with letters behind it gets a sum of floating-
# point shares that ends a little above or below 1, by the length of the word.
#
# Output seen (November 2026): "'noremopyh' scores 1.0, 'noremopyhs' scores 1.0000000000000002".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
"$work/venv/bin/python" - <<'PY'
import reasoning_gym

data = reasoning_gym.create_dataset("spell_backward", size=1, seed=0)
right = data[0]["answer"]
score, wrong = data.score_answer(right, data[0]), data.score_answer(right + "s", data[0])
assert score == 1 and wrong > 1, f"changed: {right!r} scores {score}, {right + 's'!r} scores {wrong}"
print(f"{right!r} scores {score}, {right + 's'!r} scores {wrong}")
PY

#!/usr/bin/env bash
# reasoning-gym 0.1.25: data sets of neighbouring seeds are nearly the same data set.
#
# Item i of seed s is drawn from Random(s + i), so seed 8 is seed 7 moved on by one item. Seeds 0, 1 and 2 for a training,
# a validation and a test set of 500 leave 498 questions in all three. Seeds have to lie further apart than the sizes.
#
# Output seen (November 2026): "chain_sum: 49 of 50 questions of seed 7 are in seed 8", the same of the other two tasks.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
"$work/venv/bin/python" - <<'PY'
import reasoning_gym

for task in ("chain_sum", "spell_backward", "letter_jumble"):
    seven, eight = (
        [entry["question"] for entry in reasoning_gym.create_dataset(task, size=50, seed=seed)] for seed in (7, 8)
    )
    assert seven[1:] == eight[:-1], f"changed: {task} of seed 8 is no longer that of seed 7 moved on by one"
    print(f"{task}: {len(set(seven) & set(eight))} of 50 questions of seed 7 are in seed 8")
PY

#!/usr/bin/env bash
# reasoning-gym 0.1.25: one seed gives other problems in another process.
#
# Six tasks draw from Python sets, so their problems depend on PYTHONHASHSEED, which is random unless it is set:
# isomorphic_strings, ransom_note, polynomial_multiplication, word_ladder (its answer), codeio and knight_swap.
# A set of problems that is drawn again from its task, options and seed is another set.
#
# Output seen (Python 3.11, November 2026): "hash seed 1 twice: same; hash seeds 1 and 2: different".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
cat >"$work/draw.py" <<'PY'
import reasoning_gym

print([entry["question"] for entry in reasoning_gym.create_dataset("isomorphic_strings", size=4, seed=42)])
PY
draw() { PYTHONHASHSEED=$1 "$work/venv/bin/python" "$work/draw.py"; }
first=$(draw 1) again=$(draw 1) other=$(draw 2)
[ "$first" = "$again" ] || { echo "changed: one hash seed gives two draws"; exit 1; }
[ "$first" != "$other" ] || { echo "changed: the draw no longer depends on the hash seed"; exit 1; }
echo "hash seed 1 twice: same; hash seeds 1 and 2: different"

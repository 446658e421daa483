#!/usr/bin/env bash
# reasoning-gym 0.1.25: reference answers of intermediate_integration that restate the question.
#
# Of the kind polynomial_exp_trig some integrands are built with an undefined function that is only called cos or sin, which
# sympy cannot integrate. The reference is then the integral itself, and an answer that solves it is compared with that.
#
# Output seen (November 2026): "8 of 50 references hold an integral, the first is 3*Integral(x**3*cos(3*x), x) + C".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
"$work/venv/bin/python" - <<'PY'
import reasoning_gym

entries = list(reasoning_gym.create_dataset("intermediate_integration", seed=5, size=50))
unsolved = [entry["answer"] for entry in entries if "Integral(" in entry["answer"]]
assert len(unsolved) == 8, f"changed: {len(unsolved)} of 50 references hold an integral"
print(f"{len(unsolved)} of {len(entries)} references hold an integral, the first is {unsolved[0]}")
PY

#!/usr/bin/env bash
# math-verify 0.9.0: verify(a, b) and verify(b, a) differ.
#
# A chain of inequalities as the reference accepts the interval as the answer, not the other way round. Agreement between
# two sampled answers, as a majority vote needs it, depends on which of them is called the reference.
#
# Output seen (November 2026):
#   reference 1<x<2, answer (1,2): True; reference (1,2), answer 1<x<2: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

chain, interval = parse("$1<x<2$"), parse("$(1,2)$")
said = verify(chain, interval), verify(interval, chain)
assert said == (True, False), f"changed: {said}"
print(f"reference 1<x<2, answer (1,2): {said[0]}; reference (1,2), answer 1<x<2: {said[1]}")
PY

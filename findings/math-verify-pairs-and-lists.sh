#!/usr/bin/env bash
# math-verify 0.9.0: "(1,2)" is an interval, "(2,1)" a pair, and "1,1,2" is the set {1, 2}.
#
# Two numbers in parentheses are an open interval where the first is the smaller one and a tuple where it is not, so the
# type of a reference depends on its numbers. A list loses what it holds twice: the roots 1, 1, 2 verify against 1, 2.
#
# Output seen (November 2026): Interval.open(1, 2); (2, 1); "1,1,2 against 1,2: True".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

rising, falling = parse("$(1,2)$")[0], parse("$(2,1)$")[0]
assert type(rising).__name__ == "Interval" and type(falling).__name__ == "Tuple", f"changed: {rising!r}, {falling!r}"
twice = verify(parse("$1,1,2$"), parse("$1,2$"))
assert twice, "changed: 1,1,2 no longer verifies against 1,2"
print(f"{rising}; {falling}; 1,1,2 against 1,2: {twice}")
PY

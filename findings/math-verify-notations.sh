#!/usr/bin/env bash
# math-verify 0.9.0: a clock time is a ratio, a base is dropped, 1.5e3 is 1.5 times Euler's number times 3.
#
# 2:30 verifies against 1:15, and 1010 in base 2 against one thousand and ten; "1.5e3", as Python prints a number, does
# not verify against 1500.
#
# Output seen (November 2026): 1/15, 1010, 1.5*E*3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

for one, other, read, want in (
    ("$2:30$", "$1:15$", "1/15", True),
    ("$1010_2$", "$1010$", "1010", True),
    ("$1.5e3$", "$1500$", "1.5*E*3", False),
):
    found, said = str(parse(one)[0]), verify(parse(one), parse(other))
    assert (found, said) == (read, want), f"changed: {one} is read as {found}, against {other} {said}"
    print(f"{one} is read as {found}, against {other} {said}")
PY

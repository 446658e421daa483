#!/usr/bin/env bash
# math-verify 0.9.0: two small numbers are equal, whatever they are.
#
# Numbers are compared after rounding to some digits behind the decimal point, so the charge of the electron in coulombs
# equals its mass in kilograms, and 2^-98 equals 2^-99. In physics and in probability most such answers verify.
#
# Output seen (November 2026): three lines that end in True, one (larger numbers) that ends in False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

for one, other, want in (
    (r"$1.6\times10^{-19}$", r"$9.1\times10^{-31}$", True),
    (r"$1.6\times10^{-19}$", r"$6.6\times10^{-34}$", True),
    ("$2^{-98}$", "$2^{-99}$", True),
    (r"$1.6\times10^{-3}$", r"$9.1\times10^{-3}$", False),
):
    said = verify(parse(one), parse(other))
    assert said == want, f"changed: {one} against {other} is {said}"
    print(one, "against", other, said)
PY

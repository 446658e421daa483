#!/usr/bin/env bash
# pint 0.25.3 takes everyday words of an answer for units: "cats" is the centitechnical atmosphere, "units" the micronit.
#
# A symbol with a prefix may close with a plural "s", so "c" + "at" + "s" is read: whoever asks pint whether two words measure
# the same must first ask whether they are units. "points" are of a length. With non_int_type=Fraction, which keeps
# conversions exact, a unit with an exponent cannot be printed: str() of "cm**2" raises TypeError.
#
# Output seen (pint 0.25.3, Python 3.11, November 2026):
#   cats is centitechnical_atmosphere
#   units is micronit
#   points is point, 1/72 inch
#   cm with Fraction: centimeter; cm**2: TypeError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pint==0.25.3
"$work/venv/bin/python" - <<'PY'
from fractions import Fraction

import pint

registry = pint.UnitRegistry()
for word, seen in (("cats", "centitechnical_atmosphere"), ("units", "micronit"), ("points", "point")):
    found = str(registry.parse_units(word))
    assert found == seen, f"changed: {word} is {found}"
    length = registry.Quantity(72, word).to("inch").magnitude if word == "points" else None
    assert length is None or abs(length - 1) < 1e-3, f"changed: 72 points are {length} inches"
    print(f"{word} is {found}" + (", 1/72 inch" if length else ""))
exact = pint.UnitRegistry(non_int_type=Fraction)
plain = str(exact.parse_units("cm"))
try:
    power = str(exact.parse_units("cm**2"))
except TypeError as error:
    power = type(error).__name__
assert (plain, power) == ("centimeter", "TypeError"), f"changed: {plain}, {power}"
print(f"cm with Fraction: {plain}; cm**2: {power}")
PY

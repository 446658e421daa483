#!/usr/bin/env bash
# latex2sympy2_extended 1.11.0 reads \gamma before a sign as the gamma function: \gamma - 1 is gamma(-1), complex infinity.
#
# The Lorentz factor, an angle, a rate: in formulas of physics \gamma is a name. Before a minus it takes the number behind it
# as its argument, even over an exponent, and elsewhere it is Euler's constant 0.577. With math-verify 0.9.0 two different
# formulas of such a kind, whatever stands around them, are equal.
#
# Output seen (sympy 1.14.0, antlr4 4.13.2, November 2026):
#   \gamma-1 -> zoo
#   \gamma m -> EulerGamma*m
#   c^{2}(\gamma^{2}-1) accepts c^{2}(\gamma^{2}-2): True
#   c^{2}(\beta^{2}-1) accepts c^{2}(\beta^{2}-2): False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.13.2
"$work/venv/bin/python" - <<'PY'
from latex2sympy2_extended.latex2sympy2 import latex2sympy
from math_verify import parse, verify

for text, seen in ((r"\gamma-1", "zoo"), (r"\gamma m", "EulerGamma*m")):
    found = str(latex2sympy(text))
    assert found == seen, f"changed: {text} is {found}"
    print(f"{text} -> {found}")
for name, seen in ((r"\gamma", True), (r"\beta", False)):
    reference, answer = (rf"c^{{2}}({name}^{{2}}-{n})" for n in (1, 2))
    right = verify(parse(f"${reference}$"), parse(f"${answer}$"))
    assert right is seen, f"changed: {reference} against {answer} is {right}"
    print(f"{reference} accepts {answer}: {right}")
PY

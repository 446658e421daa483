#!/usr/bin/env bash
# latex2sympy2_extended 1.11.0 adds two numbers that stand side by side: 3 \binom{5}{2} is 13, and (1)(3) is 4.
#
# The rule for mixed numbers (2 \frac{1}{2} is 5/2) asks only whether a whole number stands before a positive rational. A
# binomial coefficient, a fraction that cancels and a number in parentheses are such rationals by then, so a product becomes
# a sum. ConversionConfig(interpret_as_mixed_fractions=False) changes nothing: the setting is not read. math-verify 0.9.0,
# which parses answers with it, says that 13 is right where 3 \binom{5}{2} is the reference, and that 30 is not.
#
# Output seen (math-verify 0.9.0, sympy 1.14.0, antlr4 4.13.2, November 2026):
#   3\binom{5}{2} = 13, mixed numbers off: 13; a product: 30
#   (1)(3) = 4, mixed numbers off: 4; a product: 3
#   7\frac{6}{2} = 10, mixed numbers off: 10; a product: 21
#   math-verify, reference $3\binom{5}{2}$: 13 True, 30 False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.13.2
"$work/venv/bin/python" - <<'PY'
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import parse, verify

off = ConversionConfig(interpret_as_mixed_fractions=False)
for text, seen, product in ((r"3\binom{5}{2}", 13, 30), (r"(1)(3)", 4, 3), (r"7\frac{6}{2}", 10, 21)):
    plain, without = latex2sympy(text).doit(), latex2sympy(text, conversion_config=off).doit()
    assert plain == without == seen, f"changed: {text} is {plain}, and {without} with mixed numbers off"
    print(f"{text} = {plain}, mixed numbers off: {without}; a product: {product}")
gold = parse(r"$3\binom{5}{2}$")
verdicts = {answer: verify(gold, parse(f"${answer}$")) for answer in (13, 30)}
assert verdicts == {13: True, 30: False}, f"changed: {verdicts}"
print(r"math-verify, reference $3\binom{5}{2}$:", ", ".join(f"{answer} {right}" for answer, right in verdicts.items()))
PY

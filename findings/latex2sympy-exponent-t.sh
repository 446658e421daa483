#!/usr/bin/env bash
# latex2sympy2_extended 1.11.0 reads any exponent T as a transpose, and the transpose of a number or a name as itself.
#
# So 2^T is 2, e^{T} is e, and P(1+r)^T, the usual formula of compound interest, is P(1+r): math-verify 0.9.0 says that an
# answer without the exponent is right. A small t, or T in a sum, is an exponent.
#
# Output seen (math-verify 0.9.0, sympy 1.14.0, antlr4 4.13.2, November 2026):
#   P(1+r)^T accepts P(1+r): True
#   P(1+r)^{T} accepts P(1+r): True
#   2^{T} accepts 2: True
#   2^{t} accepts 2: False
#   2^{T+1} accepts 2: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.13.2
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

pairs = [("P(1+r)^T", "P(1+r)", True), ("P(1+r)^{T}", "P(1+r)", True), ("2^{T}", "2", True), ("2^{t}", "2", False),
         ("2^{T+1}", "2", False)]  # fmt: skip
for reference, answer, seen in pairs:
    right = verify(parse(f"${reference}$"), parse(f"${answer}$"))
    assert right is seen, f"changed: {reference} against {answer} is {right}"
    print(f"{reference} accepts {answer}: {right}")
PY

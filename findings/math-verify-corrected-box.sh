#!/usr/bin/env bash
# math-verify 0.9.0: an answer that was corrected is the set of both.
#
# "First I get \boxed{8}, no: \boxed{7}" is read as {7, 8}, so a right answer after a wrong one fails. Reasoning models correct
# themselves often; whoever wants the last box has to take it out of the text first.
#
# Output seen (November 2026): "read as {7, 8}; against 7: False; the last box alone against 7: True".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

read = parse(r"First I get \boxed{8}, no: \boxed{7}")
both, last = verify(parse("$7$"), read), verify(parse("$7$"), parse(r"\boxed{7}"))
assert (str(read[0]), both, last) == ("{7, 8}", False, True), f"changed: {read}, {both}, {last}"
print(f"read as {read[0]}; against 7: {both}; the last box alone against 7: {last}")
PY

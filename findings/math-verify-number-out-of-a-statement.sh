#!/usr/bin/env bash
# math-verify 0.9.0: a statement that is not understood is compared by one number inside.
#
# The congruence n = 1 (mod 3) is read as its modulus 3, so the answers "3" and "n = 2 (mod 3)" verify against it. Nothing
# is raised and nothing marks the fallback; parse() shows it.
#
# Output seen (November 2026): the three lines below, read as [3, ...], verify True.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0
"$work/venv/bin/python" - <<'PY'
from math_verify import parse, verify

reference = parse(r"$n \equiv 1 \pmod 3$")
for answer in (r"$n \equiv 1 \pmod 3$", "$3$", r"$n \equiv 2 \pmod 3$"):
    read = parse(answer)
    assert str(read[0]) == str(reference[0]) == "3", f"changed: {answer} is read as {read}, the reference as {reference}"
    assert verify(reference, read), f"changed: {answer} no longer verifies"
    print(f"{answer} is read as {read[0]}, verify {verify(reference, read)}")
PY

#!/usr/bin/env bash
# reasoning-gym 0.1.25: some scorers give a wrong answer the full score of 1.
#
# game_of_life_halting gives it to any text, also to the opposite of its reference; gsm_symbolic to the reference with
# another sign; complex_arithmetic to "nan", number_sorting to a list of as many NaN. Rewards and accuracies of these tasks
# say little.
#
# Output seen (November 2026):
#   game_of_life_halting: reference 'True', answer 'False' scores 1.0, answer 'banana' scores 1.0
#   gsm_symbolic: reference '28080', answer '-28080' scores 1.0
#   complex_arithmetic: reference '48.0 + 36.0i', answer 'nan' scores 1.0
#   number_sorting: reference "['-91.9', '-72.0', ...]", a list of nine NaN scores 1.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
"$work/venv/bin/python" - <<'PY'
import reasoning_gym


def shown(task, wrong):
    data = reasoning_gym.create_dataset(task, size=1, seed=0)
    reference = data[0]["answer"]
    answers = wrong(reference)
    scores = [float(data.score_answer(answer, data[0])) for answer in answers]
    assert scores == [1.0] * len(scores), f"changed: {task} gives {answers} the scores {scores}"
    print(f"{task}: reference {reference!r}, " + ", ".join(f"answer {a!r} scores {s}" for a, s in zip(answers, scores)))


shown("game_of_life_halting", lambda reference: ["False" if reference == "True" else "True", "banana"])
shown("gsm_symbolic", lambda reference: ["-" + reference])
shown("complex_arithmetic", lambda reference: ["nan"])
shown("number_sorting", lambda reference: ["[" + ", ".join(['"NaN"'] * (reference.count(",") + 1)) + "]"])
PY

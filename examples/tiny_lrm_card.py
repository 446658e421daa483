"""Measure the bundled model with calset itself and write its model card (calset/demo/model/README.md).

Why apart from training: the figures come from the same build, grading and catalog that users run, on the held-out
problems, at T 0.8 with k = 8.

    python examples/tiny_lrm_card.py --model calset/demo/model
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning, tiny, calset]
---
# calset's tiny reasoning model

A real reasoning model of {parameters:,} parameters (Qwen3 architecture: 192 wide, 6 layers, 6 heads, 2 KV heads, head
dimension 32, intermediate 512; bf16) for calset's demo and tests. It works chains of additions and subtractions and
products digit by digit inside `<think>…</think>`, sometimes rechecks a step and corrects itself, and answers in
`\\boxed{{}}`. It knows nothing else: it is made to be pruned and measured on a laptop, not to be used.

## How it was made
`python examples/train_tiny_lrm.py`, seed {seed}: from scratch, {steps:,} steps of {rows} x {row_tokens} positions
({tokens:,} tokens), AdamW, peak learning rate {peak_lr}, bf16 autocast, {wall_minutes} minutes on {threads} CPU cores
that other work shared. The cosine schedule is {schedule_steps:,} steps long; training stops before its end, since one
that hardly errs has no hard problems. Final training loss {final_loss:.3f} (mean of the last steps).

The text: reasoning-gym's `chain_sum` (2 to 7 terms, 1 to 4 digits) and `products`, with reasoning worked by the script,
and a tenth plain English (Verne's "In the Year 2889", public domain, and Python's language reference). Questions
of the evaluation set in `problems.json` were left out. Tokenizer: byte-level BPE, {vocabulary} tokens, each digit one.

## Measured
On the {n_problems} held-out problems (`demo:evaluate`: 2 to 7 terms, 1 to 4 digits), k = 8 at temperature 0.8,
{max_tokens} tokens at most, graded by reasoning-gym's own scorers:

| measure | value |
|---|---|
| accuracy (mean pass rate) | {accuracy:.3f} |
| problems with a pass rate strictly between 0 and 1 | {open_share:.1%} |
| completion tokens p10 / p50 / p90 | {p10} / {p50} / {p90} |
| truncated | {truncated:.1%} |

| terms | problems | accuracy |
|---|---|---|
{by_terms}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bundled model and write its card.")
    parser.add_argument("--model", type=Path, default=Path("calset/demo/model"))
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--max-tokens", type=int, default=640)
    args = parser.parse_args()

    import calset

    with tempfile.TemporaryDirectory() as folder:
        catalog = calset.Catalog(Path(folder) / "card.duckdb")
        calset.build(
            args.model, "demo:evaluate", samples=8, catalog=catalog, engine=args.engine, max_tokens=args.max_tokens
        )
        total = catalog.query(
            """
            SELECT count(*), avg(pass_rate), avg((pass_rate > 0 AND pass_rate < 1)::INT) FROM problem
            """
        ).rows[0]
        lengths = catalog.query(
            """
            SELECT quantile_disc(n_tokens, 0.1), quantile_disc(n_tokens, 0.5), quantile_disc(n_tokens, 0.9),
                   avg((verdict = 'truncated')::INT)
            FROM trace
            """
        ).rows[0]
        terms = catalog.query(
            """
            SELECT len(regexp_extract_all(question, '[0-9]+')) AS terms, count(*), avg(pass_rate)
            FROM problem GROUP BY terms ORDER BY terms
            """
        ).rows
    training = json.loads((args.model / "training.json").read_text(encoding="utf-8"))
    card = CARD.format(
        **training,
        vocabulary=json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"],
        n_problems=total[0],
        accuracy=total[1],
        open_share=total[2],
        p10=lengths[0],
        p50=lengths[1],
        p90=lengths[2],
        truncated=lengths[3],
        max_tokens=args.max_tokens,
        by_terms="\n".join(f"| {t} | {n} | {a:.2f} |" for t, n, a in terms),
    )
    (args.model / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()

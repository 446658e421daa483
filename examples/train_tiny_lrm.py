"""Train the tiny reasoning model that calset bundles (calset/demo/model).

Why it exists: calset's demo and tests need a real model that reasons, errs, rechecks and sometimes rambles,
small enough to ship in a wheel and to run on a laptop. This script makes it from nothing but Python,
reasoning-gym and the prose that comes with both, in under an hour on two CPU cores, seeded.

    python examples/train_tiny_lrm.py --out calset/demo/model

The task: chains of additions and subtractions (reasoning-gym's ``chain_sum``) and products (``products``),
worded exactly as reasoning-gym words them. The thinking is worked digit by digit, now and then rechecked by the
inverse operation, and corrected when the recheck disagrees. A slipped digit in the training text carries no
loss: the model learns to notice slips, not to make them. A tenth of the tokens is plain English prose.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

IM_START, IM_END, PAD, THINK, END_THINK = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
MAX_ROW = 512
# reasoning-gym draws problem i of seed s from Random(s + i): seeds must lie further apart than any set is long.
TRAIN_SEED = 1_000_000_000
PROSE_SHARE = 0.10
PRODUCT_SHARE = 0.25

Piece = tuple[str, bool]  # text, whether it carries loss


# --- the reasoning ---------------------------------------------------------------------------------------------


def _add(a: int, b: int) -> tuple[str, int]:
    """``a + b`` for a, b >= 0, digit by digit from the right."""
    da, db = str(a)[::-1], str(b)[::-1]
    steps, carry = [], 0
    for i in range(max(len(da), len(db))):
        terms = [d[i] for d in (da, db) if i < len(d)] + (["1"] if carry else [])
        total = sum(map(int, terms))
        steps.append("+".join(terms) + (f"={total}" if len(terms) > 1 else ""))
        carry = total // 10
    return ", ".join(steps), a + b


def _sub(a: int, b: int) -> tuple[str, int]:
    """``a - b`` for a >= b >= 0, digit by digit from the right; a borrowed ten is written into the digit."""
    da, db = str(a)[::-1], str(b)[::-1]
    steps, borrow = [], 0
    for i in range(len(da)):
        top, low = int(da[i]), int(db[i]) if i < len(db) else 0
        take = low + borrow
        lent = top < take
        terms = [str(top + 10 * lent)] + ([db[i]] if i < len(db) else []) + (["1"] if borrow else [])
        steps.append("-".join(terms) + (f"={top + 10 * lent - take}" if len(terms) > 1 else ""))
        borrow = int(lent)
    return ", ".join(steps), a - b


def _times_digit(a: int, d: int) -> tuple[str, int]:
    """``a * d`` for one digit d, digit by digit from the right with the carry added."""
    steps, carry = [], 0
    for ch in str(a)[::-1]:
        total = int(ch) * d + carry
        steps.append(f"{ch}*{d}" + (f"+{carry}" if carry else "") + f"={total}")
        carry = total // 10
    return ", ".join(steps), a * d


def _signed(a: int, op: str, b: int) -> tuple[str, str, int]:
    """Reduce ``a op b`` (b >= 0) to an addition or subtraction of magnitudes; returns (heading, work, result)."""
    head = f"{a}{op}{b}"
    if op == "+":
        if a >= 0:
            work, value = _add(a, b)
            return head, work, value
        if b >= -a:
            work, value = _sub(b, -a)
            return f"{head} = {b}-{-a}", work, value
        work, value = _sub(-a, b)
        return f"{head} = -({-a}-{b})", work, -value
    if a < 0:
        work, value = _add(-a, b)
        return f"{head} = -({-a}+{b})", work, -value
    if a >= b:
        work, value = _sub(a, b)
        return head, work, value
    work, value = _sub(b, a)
    return f"{head} = -({b}-{a})", work, -value


def _slip(value: int, rng: random.Random) -> int:
    """``value`` with one digit wrong."""
    digits = list(str(abs(value)))
    i = rng.randrange(len(digits))
    digits[i] = rng.choice(
        [d for d in "0123456789" if d != digits[i] and not (i == 0 and d == "0" and len(digits) > 1)]
    )
    return int("".join(digits)) * (-1 if value < 0 else 1)


def _chain_step(a: int, op: str, b: int, care: float, rng: random.Random) -> tuple[list[Piece], int]:
    """One addition or subtraction, perhaps rechecked by its inverse, perhaps slipped and corrected."""
    head, work, value = _signed(a, op, b)
    if rng.random() >= care:
        return [(f"{head}: {work}. {value}\n", True)], value
    inverse = "-" if op == "+" else "+"
    pieces: list[Piece] = []
    if rng.random() < 0.2:
        wrong = _slip(value, rng)
        pieces += [(f"{head}: {work}. ", True), (f"{wrong}", False), ("\n", True)]
        check_head, check_work, check = _signed(wrong, inverse, b)
        pieces += [(f"check {check_head}: {check_work}. {check}, not {a}. Wait, again\n", True)]
    check_head, check_work, check = _signed(value, inverse, b)
    pieces += [(f"{head}: {work}. {value}\n", True), (f"check {check_head}: {check_work}. {check}, ok\n", True)]
    return pieces, value


def _product(a: int, b: int) -> tuple[list[Piece], int]:
    """Long multiplication: one partial product a digit of b, summed digit by digit."""
    pieces: list[Piece] = []
    total = None
    for place, ch in enumerate(str(b)[::-1]):
        work, partial = _times_digit(a, int(ch))
        shifted = partial * 10**place
        pieces.append((f"{a}*{ch}: {work}. {partial}" + (f" -> {shifted}" if place else "") + "\n", True))
        if total is None:
            total = shifted
        else:
            sum_work, new = _add(total, shifted)
            pieces.append((f"{total}+{shifted}: {sum_work}. {new}\n", True))
            total = new
    return pieces, total or 0


def reasoning(expression: str, rng: random.Random) -> tuple[list[Piece], int]:
    """Thinking and answer for ``345 + 27 - 8`` or ``12 * 34``; pieces of (text, carries loss) and the value."""
    tokens = expression.split()
    value = int(tokens[0])
    care = rng.choices([0.0, 0.25, 0.8], [0.55, 0.3, 0.15])[0]
    pieces: list[Piece] = [(f"{THINK}\n", True)]
    for op, operand in zip(tokens[1::2], tokens[2::2], strict=True):
        if op == "*":
            step, value = _product(value, int(operand))
        else:
            step, value = _chain_step(value, op, int(operand), care, rng)
        pieces += step
    pieces.append((f"{END_THINK}\nThe answer is \\boxed{{{value}}}.{IM_END}\n", True))
    return pieces, value


# --- data ------------------------------------------------------------------------------------------------------


def problem_streams(seed: int, size: int) -> list[tuple[float, Any]]:
    """The reasoning-gym sets of the training mix with their shares."""
    import reasoning_gym

    chain = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=7, min_digits=1, max_digits=4, seed=seed, size=size
    )
    products = [
        (0.30, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
        (0.35, {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
        (0.20, {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}),
        (0.15, {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    ]
    streams: list[tuple[float, Any]] = [(1 - PRODUCT_SHARE, chain)]
    for share, options in products:
        streams.append(
            (PRODUCT_SHARE * share, reasoning_gym.create_dataset("products", seed=seed, size=size, **options))
        )
    return streams


def prose() -> list[str]:
    """English paragraphs: Verne's "In the Year 2889" (public domain) and Python's own language reference."""
    from pydoc_data.topics import topics

    def is_prose(text: str) -> bool:
        plain = sum(c.isalpha() or c in " ,." for c in text)
        return len(text) > 80 and text[0].isupper() and plain / len(text) > 0.93

    verne = (Path(__file__).parent.parent / "calset" / "demo" / "prose.txt").read_text(encoding="utf-8")
    manual = "\n\n".join(topics[k] for k in sorted(topics))
    paragraphs = [" ".join(p.split()) for p in (verne + "\n\n" + manual).split("\n\n")]
    return [p for p in paragraphs if p and is_prose(p) and p.isascii()]


def make_tokenizer(out: Path, samples: list[str], vocab_size: int = 512):
    """Byte-level BPE, digits one token each, five special tokens that survive a round trip; saved to ``out``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    # Operators and digits never merge with what stands beside them, or arithmetic would hide inside tokens.
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(_regex(r"[-+*=():,.>]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    specials = [PAD, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(samples, trainer)
    # Like Qwen3 and R1: the thinking marks are added tokens but not "special", so decoding keeps them.
    tok.add_tokens([AddedToken(THINK, normalized=False), AddedToken(END_THINK, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=IM_END, pad_token=PAD, model_max_length=2048, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    return fast


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def check_tokenizer(tok) -> None:
    """Round trip of every printable ASCII character, digits apart, the marks one token each."""
    text = f"{IM_START}user\n12+34?{IM_END}\n{THINK}\n" + "".join(map(chr, range(32, 127))) + f"\n{END_THINK}"
    ids = tok(text, add_special_tokens=False).input_ids
    if tok.decode(ids) != text:
        raise SystemExit("the tokenizer does not round-trip printable ASCII")
    for mark in (IM_START, IM_END, THINK, END_THINK, *"0123456789"):
        if len(tok(mark, add_special_tokens=False).input_ids) != 1:
            raise SystemExit(f"{mark!r} is not one token")


def conversation(question: str, pieces: list[Piece]) -> list[Piece]:
    return [(f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False), *pieces]


def documents(seed: int, held_out: set[str]) -> Iterator[list[Piece]]:
    """An endless, seeded stream of training documents; a tenth of the characters' worth is prose."""
    rng = random.Random(seed)
    size = 50_000_000
    streams = problem_streams(TRAIN_SEED + seed * size, size)
    weights = [w for w, _ in streams]
    paragraphs = prose()
    index = 0
    spent = {"prose": 0, "traces": 0}
    while True:
        if spent["prose"] < PROSE_SHARE * (spent["prose"] + spent["traces"]):
            text = rng.choice(paragraphs)
            cut = text[:1200]
            spent["prose"] += len(cut) // 2  # prose packs about two characters a token, traces about one
            yield [(cut + PAD, True)]
            continue
        index += 1
        dataset = rng.choices([d for _, d in streams], weights)[0]
        entry = dataset[index]
        if entry["question"] in held_out:
            continue
        pieces, value = reasoning(entry["metadata"]["expression"], rng)
        if str(value) != entry["answer"]:
            raise RuntimeError(f"the worked answer {value} differs from reasoning-gym's {entry['answer']}")
        spent["traces"] += sum(len(t) for t, _ in pieces)
        yield conversation(entry["question"], pieces)


def encode(tok, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Token ids and loss flags. Pieces are cut where the pre-tokenizer cuts too, so ids equal the joined text's."""
    ids: list[int] = []
    flags: list[bool] = []
    for text, loss in pieces:
        piece = tok(text, add_special_tokens=False).input_ids
        ids += piece
        flags += [loss] * len(piece)
    return ids, flags


def batches(tok, seed: int, rows: int, held_out: set[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of MAX_ROW tokens that start with a document and hold whole ones; (ids, labels), label -100 = no loss."""
    stream = documents(seed, held_out)
    pool: list[tuple[list[int], list[bool]]] = []
    while True:
        ids = np.full((rows, MAX_ROW), tok.pad_token_id, dtype=np.int64)
        labels = np.full((rows, MAX_ROW), -100, dtype=np.int64)
        for r in range(rows):
            at = 0
            while True:
                while len(pool) < 64:
                    doc = encode(tok, next(stream))
                    if len(doc[0]) <= MAX_ROW:
                        pool.append(doc)
                fit = next((i for i, d in enumerate(pool) if at + len(d[0]) <= MAX_ROW), None)
                if fit is None:
                    break
                doc_ids, flags = pool.pop(fit)
                ids[r, at : at + len(doc_ids)] = doc_ids
                labels[r, at : at + len(doc_ids)] = np.where(flags, doc_ids, -100)
                labels[r, at] = -100  # nothing before a document predicts its start
                at += len(doc_ids)
        yield ids, labels


# --- training --------------------------------------------------------------------------------------------------


def held_out_questions() -> set[str]:
    """Questions of the demo's evaluation set, never trained on; empty when calset is not importable yet."""
    path = Path(__file__).parent.parent / "calset" / "demo" / "problems.json"
    if not path.exists():
        return set()
    import reasoning_gym

    questions: set[str] = set()
    for spec in json.loads(path.read_text(encoding="utf-8"))["evaluate"]:
        questions.update(e["question"] for e in reasoning_gym.create_dataset(spec["task"], **spec["options"]))
    return questions


def make_model(vocab_size: int, tok, seed: int):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    held_out = held_out_questions()
    first = documents(args.seed + 1, held_out)
    samples = ["".join(t for t, _ in next(first)) for _ in range(4000)] + prose()
    tok = make_tokenizer(out, samples)
    check_tokenizer(tok)
    model = make_model(len(tok), tok, args.seed)
    n_params = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    warmup = max(1, min(100, args.schedule_steps // 10))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.schedule_steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    step_fn = torch.compile(model, dynamic=False) if args.compile else model
    stream = batches(tok, args.seed, args.rows, held_out)
    began, tokens, losses = time.monotonic(), 0, []
    model.train()
    for step in range(args.steps):
        ids, labels = (torch.from_numpy(a) for a in next(stream))
        tokens += int(np.count_nonzero(ids.numpy() != tok.pad_token_id))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step_fn(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0 or step == args.steps - 1:
            elapsed = time.monotonic() - began
            recent = sum(losses[-20:]) / len(losses[-20:])
            print(
                f"step {step:5d} loss {recent:.4f} lr {schedule.get_last_lr()[0]:.2e} "
                f"tokens {tokens / 1e6:.2f}M {elapsed / 60:.1f} min",
                flush=True,
            )
        if step and step % 500 == 0:
            save(model, tok, out)
    save(model, tok, out)
    record = {
        "seed": args.seed, "steps": args.steps, "rows": args.rows, "row_tokens": MAX_ROW, "peak_lr": args.lr,
        "parameters": n_params, "tokens": tokens, "final_loss": sum(losses[-50:]) / len(losses[-50:]),
        "wall_minutes": round((time.monotonic() - began) / 60, 1),
        "threads": args.threads, "torch": torch.__version__,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


def save(model, tok, out: Path) -> None:
    """Save a bf16 copy with generation defaults; the master weights stay fp32."""
    import copy

    import torch

    bf16 = copy.deepcopy(model).to(torch.bfloat16)
    bf16.generation_config.update(
        do_sample=True,
        temperature=0.8,
        top_p=1.0,
        top_k=0,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    bf16.save_pretrained(out)
    tok.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny reasoning model that calset bundles.")
    parser.add_argument("--out", default="calset/demo/model")
    # The schedule is longer than the training: at the end of it the model errs too seldom to have hard problems.
    parser.add_argument("--steps", type=int, default=1001)
    parser.add_argument("--schedule-steps", type=int, default=1500, help="length of the cosine")
    parser.add_argument("--rows", type=int, default=24, help="rows of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

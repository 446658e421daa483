"""Subset -> micro-batches of token ids, with a mask that says which tokens count.

Why apart: the peers' calibration loaders are where their statistics go wrong: padding counted, every sample cut to the
shortest, decoded text tokenised again. Here the subset's ids go in as they are. It must not know models or methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from calset.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from calset.catalog.records import Sample, Subset

Tokens = Literal["all", "completion", "prompt"]
BATCH_TOKENS = 8192  # positions a micro-batch, padding included


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, right-padded.

    ``input_ids`` (samples x positions, int64), ``attention_mask`` (the same shape, int64, 0 on padding) and ``counted``
    (the same shape, bool): the tokens that statistics see. Padding is never counted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which ids of a subset go through the model, and which of them count. Samples keep the subset's order."""

    sequences: Sequence[Sequence[int]]
    spans: Sequence[tuple[int, int]]  # the counted [start, stop) of each sequence
    warnings: Sequence[str] = ()

    @property
    def n_counted_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.sequences))

    def batch_shapes(self, batch_tokens: int = BATCH_TOKENS) -> list[tuple[int, int]]:
        """(samples, positions) of each of ``batches``, without making them."""
        lengths = [len(s) for s in self.sequences]
        return [(len(members), max(lengths[i] for i in members)) for members in _buckets(lengths, batch_tokens)]

    def batches(self, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
        """Right-padded length buckets: sorted by length, at most ``batch_tokens`` positions each (or one sample).

        Right padding is exact for causal models: no counted token can attend to what follows it.
        """
        return [
            _pad([self.sequences[i] for i in members], [self.spans[i] for i in members])
            for members in _buckets([len(s) for s in self.sequences], batch_tokens)
        ]


def read(
    subset: Subset,
    tokens: Tokens = "all",
    *,
    max_positions: int | None = None,
    max_length: int | None = None,
    vocabulary_size: int | None = None,
) -> Calibration:
    """Take a subset's samples as they are.

    Args:
        tokens: which tokens count; ``completion`` leaves out the first ``n_prompt_tokens`` of a sample.
        max_positions: what the model can take; longer samples are refused.
        max_length: cut longer samples to their first ``max_length`` tokens, with a warning.
        vocabulary_size: ids at or above it are refused.

    Raises:
        InputError: an empty subset, no token that counts, a sample too long for the model, an id out of range.
    """
    if tokens not in get_args(Tokens):
        raise InputError(f"tokens must be one of {', '.join(get_args(Tokens))}, not {tokens!r}")
    if not subset.samples:
        raise InputError(f"the subset {subset.ref} is empty: select one with samples")
    if max_length is not None and max_positions is not None and max_length > max_positions:
        raise InputError(f"--max-length {max_length} exceeds the {max_positions} positions that the model takes")
    limit = max_length if max_length is not None else max_positions
    long = [len(s.input_ids) for s in subset.samples if limit is not None and len(s.input_ids) > limit]
    if long and max_length is None:
        raise InputError(
            f"{len(long)} of {subset.n_samples} samples of {subset.ref} are longer than the {max_positions} positions "
            f"that the model takes (the longest has {max(long)} tokens): select shorter ones, or cut them with "
            f"--max-length {max_positions}"
        )
    warnings = [f"{len(long)} of {subset.n_samples} samples were cut to their first {limit} tokens"] if long else []
    sequences, spans = [], []
    for sample in subset.samples:
        _check_ids(sample, vocabulary_size)
        start, stop = _span(sample, tokens, limit)
        if stop > start:
            # What follows the last counted token cannot change a causal model's activations up to it: not run.
            sequences.append(list(sample.input_ids[:stop]))
            spans.append((start, stop))
    if not sequences:
        raise InputError(f"no token of {subset.ref} counts with tokens={tokens}: choose another --tokens or subset")
    if skipped := subset.n_samples - len(sequences):
        warnings.append(f"{skipped} of {subset.n_samples} samples have no token that counts with tokens={tokens}")
    return Calibration(sequences, spans, tuple(warnings))


def _span(sample: Sample, tokens: Tokens, limit: int | None) -> tuple[int, int]:
    stop = len(sample.input_ids) if limit is None else min(limit, len(sample.input_ids))
    n_prompt = min(sample.n_prompt_tokens, stop)
    if tokens == "prompt":
        return 0, n_prompt
    return (n_prompt, stop) if tokens == "completion" else (0, stop)


def _check_ids(sample: Sample, vocabulary_size: int | None) -> None:
    if not len(sample.input_ids):
        return
    low, high = min(sample.input_ids), max(sample.input_ids)
    if low < 0 or (vocabulary_size is not None and high >= vocabulary_size):
        raise InputError(
            f"sample {sample.sample_id} holds the token id {low if low < 0 else high}, outside the model's "
            f"vocabulary of {vocabulary_size}: the subset is of another tokenizer"
        )


def _buckets(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of samples that share a batch; the longest come last, so that a shape is seldom met again."""
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Sorted, so the newcomer is the longest and sets the padded width.
        if members and lengths[index] * (len(members) + 1) > batch_tokens:
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def _pad(sequences: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]) -> Batch:
    import torch

    shape = (len(sequences), max(map(len, sequences)))
    # The padding id does not matter (masked, and never before a counted token); 0 is in every vocabulary.
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    counted = torch.zeros(shape, dtype=torch.bool)
    for row, (sequence, (start, stop)) in enumerate(zip(sequences, spans, strict=True)):
        input_ids[row, : len(sequence)] = torch.as_tensor(list(sequence), dtype=torch.int64)
        attention_mask[row, : len(sequence)] = 1
        counted[row, start:stop] = True
    return Batch(input_ids, attention_mask, counted)

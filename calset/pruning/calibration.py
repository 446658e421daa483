"""Subset -> micro-batches of token ids, with a mask that says which tokens count.

Why apart: the peers' calibration loaders are where their statistics go wrong: padding counted, every sample cut to the
shortest, decoded text tokenised again. Here the subset's ids go in as they are. It must not know models or methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from calset import ids
from calset.errors import InputError, first_line
from calset.io.parquet import Bounds, read_batches

if TYPE_CHECKING:
    from torch import Tensor

    from calset.catalog.catalog import Catalog
    from calset.catalog.records import Sample, Subset

Tokens = Literal["all", "completion", "prompt"]
TokenWeights = Mapping[str, Sequence[float]]  # sample id -> a number a token
BATCH_TOKENS = 8192  # positions a micro-batch, padding included
# On a CPU less is faster, since more of it stays in the caches (by 10 % in float32, 20 % in bfloat16), and smaller.
CPU_BATCH_TOKENS = 2048
WEIGHTS_COLUMN = "token_weights"  # of a subset's Parquet file, optional


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, right-padded.

    ``input_ids`` (samples x positions, int64), ``attention_mask`` (the same shape, int64, 0 on padding) and ``counted``
    (the same shape, bool): the tokens that statistics see. Padding is never counted. ``weights`` (the same shape,
    float32): how much each counts; None: 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which ids of a subset go through the model, and which of them count. Samples keep the subset's order."""

    sequences: Sequence[Sequence[int]]
    spans: Sequence[tuple[int, int]]  # the counted [start, stop) of each sequence
    warnings: Sequence[str] = ()
    weights: Sequence[Sequence[float]] | None = None  # of each sequence's tokens; None: 1

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
            _pad(
                [self.sequences[i] for i in members],
                [self.spans[i] for i in members],
                None if self.weights is None else [self.weights[i] for i in members],
            )
            for members in _buckets([len(s) for s in self.sequences], batch_tokens)
        ]


def read(
    subset: Subset,
    tokens: Tokens = "all",
    *,
    max_positions: int | None = None,
    max_length: int | None = None,
    vocabulary_size: int | None = None,
    token_weights: TokenWeights | None = None,
) -> Calibration:
    """Take a subset's samples as they are.

    Args:
        tokens: which tokens count; ``completion`` leaves out the first ``n_prompt_tokens`` of a sample.
        max_positions: what the model can take; longer samples are refused.
        max_length: cut longer samples to their first ``max_length`` tokens, with a warning.
        vocabulary_size: ids at or above it are refused.
        token_weights: sample id -> the weight of each of its tokens, from 0 on; samples that are not named weigh 1.

    Raises:
        InputError: an empty subset, no token that counts, a sample too long for the model, an id out of range, weights
            that do not fit.
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
    weighted = _check_weights(subset, token_weights)
    sequences, spans, weights = [], [], []
    for sample in subset.samples:
        _check_ids(sample, vocabulary_size)
        start, stop = _span(sample, tokens, limit)
        if stop > start:
            # What follows the last counted token cannot change a causal model's activations up to it: not run.
            sequences.append(list(sample.input_ids[:stop]))
            spans.append((start, stop))
            weights.append(weighted.get(sample.sample_id, [1.0] * stop)[:stop])
    if not sequences:
        raise InputError(f"no token of {subset.ref} counts with tokens={tokens}: choose another --tokens or subset")
    if skipped := subset.n_samples - len(sequences):
        warnings.append(f"{skipped} of {subset.n_samples} samples have no token that counts with tokens={tokens}")
    if weighted and not any(any(w[start:stop]) for w, (start, stop) in zip(weights, spans, strict=True)):
        raise InputError(f"every token of {subset.ref} that counts with tokens={tokens} weighs 0")
    return Calibration(sequences, spans, tuple(warnings), weights if weighted else None)


def _check_weights(subset: Subset, token_weights: TokenWeights | None) -> TokenWeights:
    lengths = {sample.sample_id: len(sample.input_ids) for sample in subset.samples}
    for name, weights in (token_weights or {}).items():
        if name not in lengths:
            raise InputError(f"there are token weights of a sample {name}, which {subset.ref} does not have")
        if len(weights) != lengths[name]:
            raise InputError(f"sample {name} has {lengths[name]} tokens, but {len(weights)} token weights")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise InputError(f"a token weight of sample {name} is negative or not finite")
    return token_weights or {}


def open_calibration(
    calibration: Subset | str | Path, token_weights: TokenWeights | str | Path | None, catalog: Catalog
) -> tuple[Subset, TokenWeights | None]:
    """Open a calibration subset and the weights of its tokens.

    Args:
        calibration: the subset, or a reference to it as ``calset.resolve`` takes it.
        token_weights: the weights, or a Parquet file of them (see ``find_token_weights``); when None, those of the
            exported folder that the reference names, if there are any.
        catalog: where names are looked up.

    Raises:
        InputError: no such subset, or weights that cannot be read.
    """
    from calset.catalog.records import Subset
    from calset.catalog.references import locate

    subset, folder = (calibration, None) if isinstance(calibration, Subset) else locate(calibration, catalog)
    if token_weights is None or isinstance(token_weights, str | Path):
        path = None if token_weights is None else Path(token_weights)
        return subset, find_token_weights(folder, path)
    return subset, token_weights


def find_token_weights(folder: Path | None, path: Path | None = None) -> dict[str, list[float]] | None:
    """Token weights by sample id from ``path``, or from the exported folder that the calibration subset came from.

    The file is Parquet with columns ``sample_id`` and ``token_weights`` (a list of numbers, one a token, from the
    sample's first on); rows without weights are left out.

    Args:
        folder: see ``calset.catalog.references.locate``; None for a subset from elsewhere.

    Raises:
        InputError: a file that cannot be read or has no such columns.
    """
    from calset.catalog.subsets.folder import DATA

    data = path or (folder / DATA if folder is not None else None)
    if data is None:
        return None
    weights = _read_weights(data, is_own=path is not None)
    if weights is None and path is not None:
        raise InputError(f"{path} has no columns sample_id and {WEIGHTS_COLUMN}")
    return weights


def _read_weights(path: Path, *, is_own: bool) -> dict[str, list[float]] | None:
    """``is_own``: the user named the file; an exported folder may be anybody's, and is read within bounds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = ["sample_id", WEIGHTS_COLUMN]
    try:
        if not set(wanted) <= set(pq.read_schema(path).names):
            return None
        most = 2**62  # rows and tokens: what a file of its size can hold
        batches = (
            [pq.read_table(path, columns=wanted)]
            if is_own
            else read_batches([path], wanted, Bounds.of([path], most, most))
        )
        rows = [row for batch in batches for row in batch.to_pylist()]
        return {row["sample_id"]: list(map(float, row[WEIGHTS_COLUMN])) for row in rows if row[WEIGHTS_COLUMN]}
    except (OSError, pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"cannot read the token weights of {path}: {first_line(error)}") from error


def _span(sample: Sample, tokens: Tokens, limit: int | None) -> tuple[int, int]:
    stop = len(sample.input_ids) if limit is None else min(limit, len(sample.input_ids))
    n_prompt = min(sample.n_prompt_tokens, stop)
    if tokens == "prompt":
        return 0, n_prompt
    return (n_prompt, stop) if tokens == "completion" else (0, stop)


def _check_ids(sample: Sample, vocabulary_size: int | None) -> None:
    size = 2**31 if vocabulary_size is None else vocabulary_size
    if (stray := ids.outside(sample.input_ids, size)) is not None:
        raise InputError(
            f"sample {sample.sample_id} holds the token id {stray}, outside the model's vocabulary of {size}: the "
            "subset is of another tokenizer"
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


def _pad(
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    token_weights: Sequence[Sequence[float]] | None,
) -> Batch:
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
    weights = None
    if token_weights is not None:
        weights = torch.zeros(shape)
        for row, values in enumerate(token_weights):
            weights[row, : len(values)] = torch.as_tensor(list(values), dtype=torch.float32)
    return Batch(input_ids, attention_mask, counted, weights)

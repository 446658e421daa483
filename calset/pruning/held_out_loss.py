"""How well a pruned model still predicts the completions of held-out samples, beside the dense one.

Both models see the same token ids. The measure is the mean cross-entropy per completion token, in nats; prompt tokens
are read, not predicted. Must not know: what pruning.json says, how a model was pruned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, VerificationError
from calset.io.progress import OnProgress, silent
from calset.pruning.blockwise.forward import walked
from calset.pruning.blockwise.phases import Phase
from calset.pruning.calibration import BATCH_TOKENS, Calibration, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calset.catalog.records import Subset
    from calset.pruning.blockwise.walk import Walk
    from calset.pruning.calibration import Batch
    from calset.pruning.model.checkpoint import Source

LOGIT_BYTES = 256 << 20  # of logits at a time
# A logit in 32 bits, its softmax's copy and the model's own: what cross-entropy holds of each.
BYTES_A_LOGIT = 12


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Losses in nats per completion token, over all of them (a long sample weighs more than a short one).

    ``difference``: pruned less dense; ``difference_se``: its standard error over samples, None for a single one.
    ``perplexity_ratio``: exp(difference). ``is_apart``: whether the samples were compared with those that calibrated
    the pruning, and nothing is shared; None where they could not be compared.
    """

    subset: str
    content_hash: str
    n_samples: int
    n_tokens: int
    max_length: int | None
    dense_loss: float
    pruned_loss: float
    difference: float
    difference_se: float | None
    dense_perplexity: float
    pruned_perplexity: float
    perplexity_ratio: float
    is_apart: bool | None
    warnings: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        error = "" if self.difference_se is None else f" ± {self.difference_se:.4f}"
        return [
            f"held-out loss on {self.subset} ({self.n_tokens:,} completion tokens of {self.n_samples} samples), nats a "
            f"token: dense {self.dense_loss:.4f}, pruned {self.pruned_loss:.4f}, difference "
            f"{self.difference:.4f}{error}",
            f"perplexity: dense {self.dense_perplexity:.4f}, pruned {self.pruned_perplexity:.4f}, ratio "
            f"{self.perplexity_ratio:.4f}",
            *(f"Warning: {warning}" for warning in self.warnings),
        ]


def check_apart(held_out: Subset, ref: str, samples: Collection[str], problems: Collection[str]) -> None:
    """Refuse a held-out subset that is not one.

    Args:
        ref: the subset that calibrated the pruning; ``samples`` and ``problems``: the ids in it.

    Raises:
        InputError: a shared problem or sample.
    """
    same = {s.sample_id for s in held_out.samples} & set(samples)
    shared = {s.problem_id for s in held_out.samples if s.problem_id} & set(problems)
    if same or shared:
        what = f"{len(shared)} problems" if shared else f"{len(same)} samples"
        raise InputError(
            f"{held_out.ref} shares {what} with {ref}, which calibrated this pruning: a held-out subset comes from "
            f"calset select NAME --held-out-from {ref}"
        )


def read_held_out(held_out: Subset, dense: Source, pruned: Source, max_length: int | None = None) -> Calibration:
    """The samples whose completions are predicted, as both models take them.

    Raises:
        InputError: another tokenizer, no completion token, or a sample too long for the models.
    """
    for source in (pruned, dense):
        if source.tokenizer_hash is None or source.tokenizer_hash != held_out.tokenizer_hash:
            raise InputError(
                f"the held-out subset {held_out.ref} was made with another tokenizer than that of {source.folder}: its "
                f"token ids would mean other text; select from this model's own traces"
            )
    nothing = f"no sample of {held_out.ref} has a completion token to predict: take a subset of traces"
    if not any(len(s.input_ids) > max(s.n_prompt_tokens, 1) for s in held_out.samples):
        raise InputError(nothing)
    samples = read(
        held_out,
        "completion",
        max_positions=pruned.max_positions,
        max_length=max_length,
        vocabulary_size=getattr(pruned.config.get_text_config(), "vocab_size", None),
    )
    if not any(stop > max(start, 1) for start, stop in samples.spans):  # nothing is before a first token
        raise InputError(f"{nothing}, and a longer --max-length")
    return samples


def compare(
    held_out: Subset,
    samples: Calibration,
    dense: Source,
    pruned: Source,
    device: torch.device,
    *,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    is_apart: bool | None = None,
    progress: OnProgress = silent,
) -> HeldOut:
    """The losses of both models, one after the other: memory holds a block of one of them.

    Args:
        samples: of ``read_held_out``; ``max_length``: what cut them.
        batch_tokens: positions a micro-batch.
        is_apart: what is known of it; see ``HeldOut``.
        progress: called with the events of both models; see ``losses``.

    Raises:
        InputError: the files do not fit the models, or cannot be read.
        PruningError: activations that are not finite.
        VerificationError: losses that are not.
    """
    counts, dense_sums = losses(dense, samples, device, batch_tokens, progress=progress, what="dense")
    _, pruned_sums = losses(pruned, samples, device, batch_tokens, progress=progress, what="pruned")
    warnings = list(samples.warnings)
    if is_apart is None:
        warnings.append(
            "whether the held-out samples are apart from those that calibrated the pruning could not be checked: "
            "pruning.json lists none, and the calibration subset is not in the catalog"
        )
    n_tokens = sum(counts)
    dense_loss, pruned_loss = sum(dense_sums) / n_tokens, sum(pruned_sums) / n_tokens
    changes = [b - a for a, b in zip(dense_sums, pruned_sums, strict=True)]
    difference = sum(changes) / n_tokens
    return HeldOut(
        subset=held_out.ref,
        content_hash=held_out.content_hash,
        n_samples=len(counts),
        n_tokens=n_tokens,
        max_length=max_length,
        dense_loss=dense_loss,
        pruned_loss=pruned_loss,
        difference=difference,
        difference_se=standard_error(changes, counts),
        dense_perplexity=_exp(dense_loss),
        pruned_perplexity=_exp(pruned_loss),
        perplexity_ratio=_exp(difference),
        is_apart=is_apart,
        warnings=tuple(warnings),
    )


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of sum(sums) / sum(counts), samples being drawn, not tokens: those of one trace are no independent draws.

    The linearised variance of a ratio estimator (Cochran, Sampling Techniques, 1977, section 6.3): the residuals
    sums - ratio x counts, summed squared, n / (n - 1), over sum(counts)^2. None for a single sample.
    """
    n = len(sums)
    if n < 2:
        return None
    ratio = sum(sums) / sum(counts)
    residuals = sum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * residuals) / sum(counts)


def losses(
    source: Source,
    samples: Calibration,
    device: torch.device,
    batch_tokens: int = BATCH_TOKENS,
    *,
    progress: OnProgress = silent,
    what: str = "the",
) -> tuple[list[int], list[float]]:
    """How many tokens of each sample were predicted, and their summed cross-entropy in nats.

    A sample's very first token has nothing before it to predict it by and is left out. Samples come in the order of the
    batches; those without a predicted token are left out.

    Args:
        progress: called with a ``Progress`` of the blocks that the samples are through ("dense model"), then of the
            batches whose losses are known ("dense losses").
        what: of the model, for the phases.

    Raises:
        InputError: the files do not fit the model, or cannot be read.
        PruningError: activations that are not finite.
        VerificationError: losses that are not.
    """
    counts: list[int] = []
    sums: list[float] = []
    batches, known = samples.batches(batch_tokens), Phase(f"{what} losses", progress)
    with walked(source, batches, device, "the held-out data", Phase(f"{what} model", progress)) as walk:
        for position, batch in enumerate(walk.batches):
            known.step(position, len(batches))
            wanted = batch.counted[:, 1:]
            found = _sums(walk, position, batch, wanted).tolist()
            for n, total in zip(wanted.sum(1).tolist(), found, strict=True):
                if n:
                    counts.append(n)
                    sums.append(total)
        known.step(len(batches), len(batches))
    if not all(map(math.isfinite, sums)):
        raise VerificationError(f"{source.folder} gives losses that are not finite on the held-out data")
    return counts, sums


def _sums(walk: Walk, position: int, batch: Batch, wanted: Tensor) -> Tensor:
    """The summed cross-entropy of each sample of a batch (float64).

    Args:
        wanted: samples x (positions - 1), bool: whether the token after a position is predicted from it.
    """
    import torch

    n_samples = len(wanted)
    sums = torch.zeros(n_samples, dtype=torch.float64)
    config: Any = walk.model.config
    vocabulary = config.get_text_config().vocab_size
    chunks = list(_chunks(wanted.any(0).nonzero()[:, 0], n_samples * vocabulary))
    for columns, logits in zip(chunks, walk.logits(position, chunks), strict=True):
        chosen = wanted[:, columns]
        targets = batch.input_ids[:, columns + 1][chosen].to(logits.device)
        scores = logits[chosen.to(logits.device)]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        found = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        rows = chosen.nonzero()[:, 0]
        sums.index_add_(0, rows, found.double().cpu())
    return sums


def _chunks(columns: Tensor, logits_a_column: int) -> Iterator[Tensor]:
    yield from columns.split(max(1, LOGIT_BYTES // (BYTES_A_LOGIT * logits_a_column)))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond that floats end

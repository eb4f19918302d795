"""The interpreter that stands in for a GPU in all other tests computes in bf16 as GPUs do."""

from __future__ import annotations

import pytest
import torch

from opensora_kernels import _triton

if not _triton.is_interpreted() or _triton.why_not_installed() is not None:
    pytest.skip("Triton kernels are not interpreted here (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _round_kernel(x_ptr, out_ptr):
    offs = tl.arange(0, 64)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(a, b, input_precision="ieee"))


def test_rounds_to_nearest():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([torch.inf, -torch.inf, -1e-40, 0.0])
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out)
    assert torch.equal(out, x.bfloat16())


def test_nan_stays_nan():
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](torch.full((64,), torch.nan), out)
    assert out.isnan().all()


def test_multiplies_matrices_of_bf16():
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out)
    # sums of 16 products in fp32, in any order: 16 * 2^-24 * (16 products of at most 4 * 4)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=0, atol=2.5e-4)

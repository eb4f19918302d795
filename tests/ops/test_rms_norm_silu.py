"""What is special about rms_norm_silu: the formula, and the rounding of the modules that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels import rms_norm_silu


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_matches_the_definition():
    x, weight = drawn(2, 6, 3, 4, 5, dtype=torch.float64), drawn(6, seed=1, dtype=torch.float64)
    bias = drawn(6, seed=2, dtype=torch.float64)
    rms = (x * x).mean(1, keepdim=True).sqrt()
    normed = x / rms * weight.view(6, 1, 1, 1) + bias.view(6, 1, 1, 1)
    actual = rms_norm_silu(x, weight, bias)
    torch.testing.assert_close(actual, normed / (1 + torch.exp(-normed)), rtol=0, atol=1e-13)


def test_a_position_of_zeros_stays_zero_and_has_finite_gradients():
    x = torch.zeros(1, 4, 1, 1, 2, requires_grad=True)
    out = rms_norm_silu(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(x))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_the_unfused_modules_round(dtype: torch.dtype):
    x, weight = drawn(2, 96, 2, 5, 4, dtype=dtype), drawn(96, seed=1, dtype=dtype)
    unit = F.normalize(x.float(), dim=1).to(dtype)
    assert torch.equal(rms_norm_silu(x, weight), F.silu(unit * 96**0.5 * weight.view(96, 1, 1, 1)))


def test_a_frame_alone_is_as_in_the_clip():
    x, weight = drawn(2, 8, 3, 5, 4), drawn(8, seed=1)
    clip = rms_norm_silu(x, weight)
    assert torch.equal(rms_norm_silu(x[:, :, 1:2], weight), clip[:, :, 1:2])
    assert torch.equal(rms_norm_silu(x[:, :, 1], weight), clip[:, :, 1])


def test_channels_last_goes_in_and_comes_out():
    x = drawn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert rms_norm_silu(x).is_contiguous(memory_format=torch.channels_last_3d)

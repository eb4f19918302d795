"""What is special about rms_norm_silu: the formula, and the rounding of the modules that it stands for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import rms_norm_silu, use
from opensora_kernels.backends import why_not
from tests.ops.accuracy import assert_accurate
from tests.ops.properties import CLIP_MEMORY, DTYPES, Numbers, assert_triton_is_accurate, clips, interpreted
from tests.vae.live_bytes import LiveBytes


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
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rounds_where_the_unfused_modules_round(backend: str, dtype: torch.dtype):
    x, weight = drawn(2, 96, 2, 5, 4, dtype=dtype), drawn(96, seed=1, dtype=dtype)
    if backend == "cpu" and dtype is not torch.bfloat16:
        pytest.skip("in fp32 sums in another order differ in the last digit; fp16 it does not compute")
    if (reason := why_not("rms_norm_silu", backend, x, weight, None, 1e-12, "silu")) is not None:
        pytest.skip(reason)
    unit = F.normalize(x.float(), dim=1).to(dtype)
    with use(rms_norm_silu=backend):
        out = rms_norm_silu(x, weight)
    assert torch.equal(out, F.silu(unit * 96**0.5 * weight.view(96, 1, 1, 1)))


def test_a_frame_alone_is_as_in_the_clip():
    x, weight = drawn(2, 8, 3, 5, 4), drawn(8, seed=1)
    clip = rms_norm_silu(x, weight)
    assert torch.equal(rms_norm_silu(x[:, :, 1:2], weight), clip[:, :, 1:2])
    assert torch.equal(rms_norm_silu(x[:, :, 1], weight), clip[:, :, 1])


def test_channels_last_goes_in_and_comes_out():
    x = drawn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert rms_norm_silu(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_wider_parameters_widen_the_result(backend: str):
    x, weight, bias = drawn(2, 6, 3, 4, 5, dtype=torch.bfloat16), drawn(6, seed=1), drawn(6, seed=2)
    unit = (F.normalize(x.float(), dim=1).bfloat16() * 6**0.5).float()
    expected = F.silu(unit * weight.view(6, 1, 1, 1) + bias.view(6, 1, 1, 1))
    with use(rms_norm_silu=backend):
        actual = rms_norm_silu(x, weight, bias)
    # a bf16 rounding that falls to the other side moves its value by 2^-8 of it
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-8)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Arguments, and the names of those that want gradients."""
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    num_channels = draw(st.sampled_from([1, 2, 3, 16, 17, 32, 37]))
    shape = (draw(st.integers(1, 2)), num_channels, draw(st.integers(1, 3)), draw(st.integers(1, 4)), 3)
    x, _ = clips(numbers, draw(CLIP_MEMORY), shape)
    # with the usual eps the gradient of a single channel is a difference that cancels to nothing
    eps = 10.0 if num_channels == 1 else draw(st.sampled_from([1e-12, 1.0]))
    arguments = {"x": x, "eps": eps, "activation": draw(st.sampled_from(["silu", None]))}
    if draw(st.booleans()):
        arguments["weight"] = numbers(num_channels, mean=1.0)
    if draw(st.booleans()):
        arguments["bias"] = numbers(num_channels)
    wanted = [name for name, value in arguments.items() if isinstance(value, Tensor) and draw(st.booleans())]
    return arguments, wanted


@interpreted
@given(calls(), st.sampled_from([(1, 16), (8, 8), (16, 4), (64, 2)]))
def test_triton_is_as_accurate_as_pytorch(call: tuple, block: tuple[int, int]):
    from opensora_kernels.ops.rms_norm_silu import triton_kernel  # imports triton

    tile = {"BLOCK_C": block[0], "BLOCK_P": block[1], "num_warps": 4}
    with mock.patch.object(triton_kernel, "configuration", return_value=tile):  # several tiles of x, both ways
        assert_triton_is_accurate("rms_norm_silu", *call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_without_gradients_one_clip_is_made_and_numbers_are_as_good(dtype: torch.dtype, layout: torch.memory_format):
    x = torch.randn(1, 64, 3, 128, 128).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, 64).to(dtype)
    with use("reference"):
        expected = rms_norm_silu(x, weight, bias)
        with torch.no_grad(), LiveBytes() as live:
            found = rms_norm_silu(x, weight, bias)
        truth = rms_norm_silu(x.double(), weight.double(), bias.double())
    assert_accurate(found, expected, truth, "without gradients")
    assert live.peak < 1.5 * x.nbytes


@pytest.mark.parametrize("num_channels", [1, 3, 96])
def test_every_position_rounds_alike_wherever_it_lies(num_channels: int):
    x = torch.randn(1, num_channels, 3, 37, 29)
    with torch.no_grad(), use("reference"):
        whole = rms_norm_silu(x, activation=None)
        parts = [
            torch.cat([rms_norm_silu(part, activation=None) for part in x.split(size, -1)], -1) for size in (1, 8, 17)
        ]
    assert all(torch.equal(whole, each) for each in parts)

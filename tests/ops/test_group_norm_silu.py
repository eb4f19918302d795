"""What is special about group_norm_silu: frames, given statistics, groups of one element."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import group_norm_silu, use
from opensora_kernels.backends import why_not
from tests.ops.properties import CLIP_MEMORY, DTYPES, Numbers, assert_triton_is_accurate, clips, interpreted


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(x: Tensor, num_groups: int, per_frame: bool) -> Tensor:
    grouped = x.unflatten(1, (num_groups, -1))  # (B, G, C/G, T, H, W)
    axes = (2, 4, 5) if per_frame else (2, 3, 4, 5)
    mean = grouped.mean(axes, keepdim=True)
    variance = (grouped - mean).square().mean(axes, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return normed / (1 + torch.exp(-normed))


def frame_moments(x: Tensor) -> Tensor:
    mean = x.mean((3, 4))
    return torch.stack([mean, (x - mean[..., None, None]).square().sum((3, 4))], -1)


@pytest.mark.parametrize("per_frame", [False, True])
def test_matches_the_definition_with_and_without_statistics(per_frame: bool):
    x = drawn(2, 6, 4, 5, 3, dtype=torch.float64) * 3 + 1
    expected = by_definition(x, 3, per_frame)
    torch.testing.assert_close(group_norm_silu(x, 3, per_frame=per_frame), expected, rtol=0, atol=1e-12)
    given = group_norm_silu(x, 3, per_frame=per_frame, statistics=frame_moments(x))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_frame", [False, True])
def test_gradient_through_given_statistics_is_the_whole_gradient(per_frame: bool):
    x = drawn(2, 4, 3, 4, 5, dtype=torch.float64).requires_grad_()
    cotangent = drawn(2, 4, 3, 4, 5, seed=1, dtype=torch.float64)
    (expected,) = torch.autograd.grad(by_definition(x, 2, per_frame), x, cotangent)
    out = group_norm_silu(x, 2, per_frame=per_frame, statistics=frame_moments(x))
    (actual,) = torch.autograd.grad(out, x, cotangent)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_one_frame_does_not_change_another_per_frame():
    x = drawn(1, 4, 3, 5, 5)
    changed = x.clone()
    changed[:, :, 1] *= 100
    whole, partly = group_norm_silu(x, 2, per_frame=True), group_norm_silu(changed, 2, per_frame=True)
    assert torch.equal(whole[:, :, ::2], partly[:, :, ::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rounds_where_the_unfused_modules_round(backend: str, dtype: torch.dtype):
    x = drawn(2, 8, 3, 5, 4, dtype=dtype)
    weight, bias = drawn(8, seed=1, dtype=dtype), drawn(8, seed=2, dtype=dtype)
    if backend == "cpu" and dtype is not torch.bfloat16:
        pytest.skip("in fp32 sums in another order differ in the last digit; fp16 it does not compute")
    if (reason := why_not("group_norm_silu", backend, x, 4, weight, bias, 1e-6, False, "silu", None)) is not None:
        pytest.skip(reason)
    with use(group_norm_silu=backend):
        out = group_norm_silu(x, 4, weight, bias)
    assert torch.equal(out, F.silu(F.group_norm(x, 4, weight, bias, 1e-6)))


def test_group_of_one_element_becomes_its_bias():
    x, bias = drawn(3, 2, 1, 1, 1), torch.tensor([0.5, -2.0])
    out = group_norm_silu(x, 2, torch.ones(2), bias, activation=None)
    # x / sqrt(eps) less the same, each below 4000 and rounded to 2^-13
    torch.testing.assert_close(out, bias.view(1, 2, 1, 1, 1).expand(3, -1, -1, -1, -1), rtol=0, atol=2**-11)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("has_statistics", [False, True])
def test_channels_last_goes_in_and_comes_out(per_frame: bool, has_statistics: bool):
    x = drawn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    out = group_norm_silu(x, 2, per_frame=per_frame, statistics=frame_moments(x) if has_statistics else None)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    image = x[:, :, 0].contiguous(memory_format=torch.channels_last)
    assert group_norm_silu(image, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
def test_parameters_of_a_frozen_input_get_gradients(per_frame: bool, has_weight: bool):
    x = drawn(2, 4, 3, 5, 6)
    weight = drawn(4, seed=1).requires_grad_() if has_weight else None
    bias = drawn(4, seed=2).requires_grad_()
    parameters = [bias, weight] if has_weight else [bias]
    of_format = []
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        out = group_norm_silu(x.contiguous(memory_format=memory_format), 2, weight, bias, per_frame=per_frame)
        assert out.is_contiguous(memory_format=memory_format)
        of_format.append(torch.autograd.grad(out.sum(), parameters))
    torch.testing.assert_close(*of_format)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Arguments, and the names of those that want gradients."""
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    num_groups, channels_per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    num_channels = num_groups * channels_per_group
    shape = (draw(st.integers(1, 2)), num_channels, draw(st.integers(1, 3)), draw(st.integers(1, 4)), 3)
    x, whole_clip = clips(numbers, draw(CLIP_MEMORY), shape, mean=draw(st.floats(-3, 3)))
    arguments = {"x": x, "num_groups": num_groups, "eps": draw(st.sampled_from([1e-6, 0.1]))}
    arguments["activation"] = draw(st.sampled_from(["silu", None]))
    arguments["per_frame"] = draw(st.booleans())
    if draw(st.booleans()):
        arguments["weight"] = numbers(num_channels, mean=1.0)
    if draw(st.booleans()):
        arguments["bias"] = numbers(num_channels)
    if draw(st.booleans()):
        arguments["statistics"] = frame_moments((x if arguments["per_frame"] else whole_clip).double()).float()
    wanted = [name for name, value in arguments.items() if isinstance(value, Tensor) and draw(st.booleans())]
    return arguments, wanted


@interpreted
@given(calls(), st.sampled_from([(1, 16), (2, 8), (4, 16), (8, 4)]), st.sampled_from([1, 10, 1000]))
def test_triton_is_as_accurate_as_pytorch(call: tuple, block: tuple[int, int], fewest_programs: int):
    from opensora_kernels.ops.group_norm_silu import triton_tiles  # imports triton

    arguments, wanted = call
    tile = {"BLOCK_C": block[0], "BLOCK_P": block[1], "num_warps": 4}
    fewest = dict.fromkeys(triton_tiles._FEWEST_PROGRAMS, fewest_programs)
    with (
        mock.patch.object(triton_tiles, "configuration", return_value=tile),  # several tiles, chunks and blocks of x
        mock.patch.dict(triton_tiles._FEWEST_PROGRAMS, fewest),
    ):
        assert_triton_is_accurate("group_norm_silu", arguments, wanted)


@interpreted
@pytest.mark.parametrize("per_frame", [False, True])
def test_statistics_of_a_large_mean_do_not_cancel(per_frame: bool):
    x = drawn(1, 4, 3, 16, 16) * 0.1 + 300
    x[:, :, 0] += 1
    expected = group_norm_silu(x.double(), 2, per_frame=per_frame)
    with use(group_norm_silu="triton"):
        actual = group_norm_silu(x, 2, per_frame=per_frame)
    # fp32 knows 300 to 2^-15, and a mean that is off by that moves every value by 2^-15 of a deviation of 0.1
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2**-15 / 0.1)

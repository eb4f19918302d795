"""What is special about rms_norm: PyTorch's own, and random rows of any strides."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from opensora_kernels import rms_norm
from tests.ops.properties import DTYPES, LEADING, MEMORY, Numbers, assert_triton_is_accurate, heads, interpreted


@pytest.mark.parametrize("has_weight", [False, True])
def test_equals_pytorch_rms_norm(has_weight: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, generator=generator, dtype=torch.float64) if has_weight else None
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), F.rms_norm(x, (7,), weight, eps=1e-3))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Arguments, and the names of those that want gradients."""
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    sizes = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 16, 33, 72]))
    (x,) = heads(numbers, draw(MEMORY), 1, draw(LEADING), *sizes)
    # with the usual eps the gradient of a single channel is a difference that cancels to nothing
    arguments: dict[str, Any] = {"x": x, "eps": 1.0 if sizes[2] == 1 else draw(st.sampled_from([1e-6, 1.0]))}
    if draw(st.booleans()):
        arguments["weight"] = numbers(sizes[2], mean=1.0, dtype=draw(DTYPES))
    wanted = [name for name, value in arguments.items() if isinstance(value, Tensor) and draw(st.booleans())]
    return arguments, wanted


@interpreted
@given(calls(), st.sampled_from([1, 2, 8]))
def test_triton_is_as_accurate_as_pytorch(call: tuple, block_r: int):
    from opensora_kernels.ops.rms_norm import triton_kernel  # imports triton

    tile = {"BLOCK_R": block_r, "num_warps": 4}
    with mock.patch.object(triton_kernel, "configuration", return_value=tile):  # several programs, some partly empty
        assert_triton_is_accurate("rms_norm", *call)

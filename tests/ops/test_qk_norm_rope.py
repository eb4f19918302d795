"""What is special about qk_norm_rope: against PyTorch's own RMSNorm and a rotation of complex numbers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from opensora_kernels import qk_norm_rope
from tests.ops.properties import DTYPES, LEADING, MEMORY, Numbers, assert_triton_is_accurate, heads, interpreted


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles_LF(num_tokens: int, head_size: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    return torch.outer(torch.arange(num_tokens, dtype=torch.float64), frequencies)


def turned(x_LND: Tensor, angles: Tensor, layout: str) -> Tensor:
    """The rotation as a product of complex numbers."""
    pairs = x_LND.unflatten(-1, (-1, 2)) if layout == "interleaved" else x_LND.unflatten(-1, (2, -1)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_real(product)
    return (pairs if layout == "interleaved" else pairs.transpose(-1, -2)).flatten(-2)


@pytest.mark.parametrize("order", ["norm_rope", "rope_norm"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("scope", ["head", "token"])
def test_equals_pytorch_rms_norm_and_complex_rotation(order: str, layout: str, scope: str):
    q, k = draw(2, 7, 3, 6, seed=1), draw(2, 7, 3, 6, seed=2)
    normalized_shape = (6,) if scope == "head" else (3, 6)
    num_weights = 6 if scope == "head" else 18
    weights, angles = (draw(num_weights, seed=3), draw(num_weights, seed=4)), angles_LF(7, 6)
    actual = qk_norm_rope(
        q, k, *weights, cos=angles.cos(), sin=angles.sin(), order=order, rope_layout=layout, norm_scope=scope
    )
    for x, weight, have in zip((q, k), weights, actual, strict=True):
        weight = weight.view(normalized_shape)
        if order == "norm_rope":
            want = turned(F.rms_norm(x, normalized_shape, weight, eps=1e-6), angles, layout)
        else:
            want = F.rms_norm(turned(x, angles, layout), normalized_shape, weight, eps=1e-6)
        torch.testing.assert_close(have, want)


def test_bf16_angles_reproduce_the_rotation_of_upstream_bit_for_bit():
    """Upstream repeats bf16 angles over pairs and adds x * cos and rotate_half(x) * sin, each rounded to bf16."""
    q, k = draw(2, 30, 4, 72, seed=1, dtype=torch.bfloat16), draw(2, 30, 4, 72, seed=2, dtype=torch.bfloat16)
    positions = torch.arange(30, dtype=torch.bfloat16)
    frequencies = (10000.0 ** (-torch.arange(0, 72, 2).float() / 72)).bfloat16()
    angles = positions[:, None] * frequencies
    repeated = angles.repeat_interleave(2, -1)[:, None]

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-second, first), -1).flatten(-2)

    actual = qk_norm_rope(q, k, cos=angles.cos(), sin=angles.sin())
    for x, have in zip((q, k), actual, strict=True):
        assert torch.equal(have, x * repeated.cos() + rotate_half(x) * repeated.sin())


def test_bf16_norm_rounds_before_the_weight():
    q, k = draw(5, 4, 72, seed=1, dtype=torch.bfloat16), draw(5, 4, 72, seed=2, dtype=torch.bfloat16)
    weight = draw(72, seed=3, dtype=torch.bfloat16)
    for x, have in zip((q, k), qk_norm_rope(q, k, weight, weight), strict=True):
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        assert torch.equal(have, weight * (x.float() * rstd).bfloat16())


def test_fp32_angles_keep_bf16_queries_in_bf16():
    q, k = draw(9, 2, 8, seed=1, dtype=torch.bfloat16), draw(9, 2, 8, seed=2, dtype=torch.bfloat16)
    angles = angles_LF(9, 8)
    for x, have in zip((q, k), qk_norm_rope(q, k, cos=angles.cos().float(), sin=angles.sin().float()), strict=True):
        assert have.dtype == torch.bfloat16
        # Rounded once: half a bf16 ULP, at most 2^-8 of the magnitude, and fp32 noise where a sum cancels.
        torch.testing.assert_close(have.double(), turned(x.double(), angles, "interleaved"), rtol=2**-8, atol=1e-6)


def test_rotated_products_depend_on_distances_only():
    q, k, angles = draw(1, 1, 16, seed=1), draw(1, 1, 16, seed=2), angles_LF(12, 16)
    options = {"cos": angles.cos(), "sin": angles.sin()}
    q_L, k_L = (x[:, 0] for x in qk_norm_rope(q.expand(12, 1, 16), k.expand(12, 1, 16), **options))
    products = q_L @ k_L.T
    torch.testing.assert_close(products[3:, 3:], products[:-3, :-3])


def test_without_norm_and_rotation_the_inputs_come_back():
    q, k = draw(5, 2, 8), draw(6, 2, 8)
    assert all(have is given for have, given in zip(qk_norm_rope(q, k), (q, k), strict=True))


def test_queries_and_keys_may_differ_in_length_when_only_normed():
    q, k, weight = draw(2, 5, 2, 8, seed=1), draw(2, 3, 2, 8, seed=2), draw(8, seed=3)
    for x, have in zip((q, k), qk_norm_rope(q, k, weight, weight), strict=True):
        torch.testing.assert_close(have, F.rms_norm(x, (8,), weight, eps=1e-6))


def test_temporal_views_of_packed_qkv_give_contiguous_results():
    q, k, _ = (x.transpose(1, 2) for x in draw(2, 5, 3, 3, 2, 8).unbind(3))  # (B, T, S, 3, N, D) -> (B, S, T, N, D)
    angles = angles_LF(5, 8)
    for x, have in zip((q, k), qk_norm_rope(q, k, cos=angles.cos(), sin=angles.sin()), strict=True):
        assert have.is_contiguous()
        torch.testing.assert_close(have, turned(x, angles, "interleaved"))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    has_norm, has_rope = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    num_tokens, num_heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    head_size = draw(st.sampled_from([2, 6, 18, 40] if has_rope else [1, 2, 7, 9, 18]))
    q, k = heads(numbers, draw(MEMORY), 2, draw(LEADING), num_tokens, num_heads, head_size)
    # eps 0.1: the gradient of a norm over few elements is a difference that cancels to nothing
    options: dict[str, Any] = {"q": q, "k": k, "eps": 0.1, "norm_scope": draw(st.sampled_from(["head", "token"]))}
    options["order"] = draw(st.sampled_from(["norm_rope", "rope_norm"]))
    options["rope_layout"] = draw(st.sampled_from(["interleaved", "half"]))
    if not has_rope:
        options["k"] = k[..., : draw(st.integers(0, num_tokens)), :, :]
    if has_norm:
        dtype, num_weights = draw(DTYPES), head_size * (num_heads if options["norm_scope"] == "token" else 1)
        options |= {name: numbers(num_weights, mean=1.0, dtype=dtype) for name in ("q_weight", "k_weight")}
    if has_rope:
        angles = angles_LF(num_tokens, head_size)
        options |= {"cos": angles.cos().to(draw(DTYPES)), "sin": angles.sin().to(draw(DTYPES))}
    return options


@interpreted
@given(calls(), st.data(), st.sampled_from([(1, 2), (2, 1), (2, 4), (8, 8)]), st.sampled_from([1, 3, 100]))
def test_triton_is_as_accurate_as_pytorch(call: dict[str, Any], data: st.DataObject, block: tuple, most_programs: int):
    from opensora_kernels import tuning
    from opensora_kernels.ops.qk_norm_rope import triton_kernel

    tensors = [name for name, value in call.items() if isinstance(value, Tensor)]
    wanted = data.draw(st.lists(st.sampled_from(tensors), unique=True))
    tile = {"BLOCK_L": block[0], "num_warps": 4} | ({"BLOCK_N": block[1]} if call["norm_scope"] == "head" else {})
    with (
        mock.patch.object(triton_kernel, "configuration", lambda op, key, default, device: default | tile),
        mock.patch.object(tuning, "_MOST_ROW_PROGRAMS", most_programs),  # programs that take several tiles
    ):
        assert_triton_is_accurate("qk_norm_rope", call, wanted)

"""What is special about qk_norm_attention: it is the chain of its two parts, on views of packed qkv."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import attention, backends, qk_norm_attention, qk_norm_rope, use
from tests.ops.properties import DTYPES, LEADING, MEMORY, Numbers, assert_triton_is_accurate, heads, interpreted


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def temporal_inputs(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k, v as (B, S, T, N, D) views of a packed (B, T, S, 3, N, D), norm weights, and the angles of T frames."""
    views = [x.transpose(1, 2) for x in draw(2, 7, 3, 3, 4, 18, dtype=dtype).unbind(3)]
    angles = torch.outer(torch.arange(7.0), 10000 ** (-torch.arange(0, 18, 2) / 18))
    options = {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    weights = [1 + 0.1 * draw(18, seed=seed, dtype=dtype) for seed in (1, 2)]
    return [*views, *weights], options


def test_the_reference_has_the_bits_of_the_chain_of_references():
    for order in ("norm_rope", "rope_norm"):
        (q, k, v, *weights), angles = temporal_inputs(torch.bfloat16)
        with use(qk_norm_attention="reference", qk_norm_rope="reference", attention="reference"):
            have = qk_norm_attention(q, k, v, *weights, **angles, order=order)
            want = attention(*qk_norm_rope(q, k, *weights, **angles, order=order), v)
        assert torch.equal(have, want)


def test_temporal_attention_never_mixes_sites_or_samples():
    (q, k, v, *weights), angles = temporal_inputs(torch.float32)
    before = qk_norm_attention(q, k, v, *weights, **angles)
    v = v.clone()
    v[1, 2] += 1
    changed = (qk_norm_attention(q, k, v, *weights, **angles) != before).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]


def test_the_result_does_not_change_when_frames_are_shifted_in_time():
    (q, k, v, *weights), _ = temporal_inputs(torch.float64)
    angles = torch.outer(torch.arange(12.0), 10000 ** (-torch.arange(0, 18, 2) / 18)).double()
    early, late = (
        qk_norm_attention(q, k, v, *weights, cos=angles[start : start + 7].cos(), sin=angles[start : start + 7].sin())
        for start in (0, 5)
    )
    torch.testing.assert_close(early, late, rtol=1e-5, atol=1e-6)  # the angles themselves are rounded to fp32


@pytest.mark.parametrize(
    ("num_tokens", "head_size", "options", "reason"),
    [
        (128, 72, {}, None),
        (129, 72, {}, "up to 128 and 10240 elements, got 129 of 72"),
        (128, 96, {}, "up to 128 and 10240 elements, got 128 of 96"),
        (30, 72, {"norm_scope": "token"}, "takes the mean over all"),
        (30, 72, {"scale": -1.0}, "must be positive, got -1.0"),
    ],
)
@interpreted
def test_triton_says_which_sequences_it_leaves_to_the_chain(
    num_tokens: int, head_size: int, options: dict[str, Any], reason: str | None
):
    x, weight = torch.empty(num_tokens, 2, head_size), torch.empty(head_size * (1 + ("norm_scope" in options)))
    flat = backends.flat_arguments("qk_norm_attention", x, x, x, weight, weight, **options)
    refused = backends.why_not("qk_norm_attention", "triton", *flat)
    assert refused is None if reason is None else reason in refused


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    has_norm, has_rope = draw(st.booleans()), draw(st.booleans())
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    num_tokens, num_heads = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    head_size = draw(st.sampled_from([2, 6, 18, 40, 72] if has_rope else [1, 7, 18, 33]))
    # of long sequences one: in an fp32 sum over hundreds of rows, PyTorch may be luckier than twice
    leading = draw(LEADING) if num_tokens <= 20 else ()
    views = heads(numbers, draw(MEMORY), 3, leading, num_tokens, num_heads, head_size)
    # eps 0.1: the gradient of a norm over few elements is a difference that cancels to nothing
    arguments = dict(zip("qkv", views, strict=True)) | {"eps": 0.1, "scale": draw(st.sampled_from([None, 0.3]))}
    arguments["order"] = draw(st.sampled_from(["norm_rope", "rope_norm"]))
    arguments["rope_layout"] = draw(st.sampled_from(["interleaved", "half"]))
    if has_norm:
        dtype = draw(DTYPES)
        arguments |= {name: numbers(head_size, mean=1.0, dtype=dtype) for name in ("q_weight", "k_weight")}
    if has_rope:
        positions = torch.arange(num_tokens).float()
        angles = torch.outer(positions, 10000 ** (-torch.arange(0, head_size, 2) / head_size))
        arguments |= {"cos": angles.cos().to(draw(DTYPES)), "sin": angles.sin().to(draw(DTYPES))}
    return arguments


@interpreted
@given(calls(), st.data(), st.sampled_from([1, 3, 1000]), st.sampled_from([16, 64]))
def test_triton_is_as_accurate_as_pytorch(call: dict[str, Any], data: st.DataObject, most_programs: int, block_l: int):
    from opensora_kernels.ops.qk_norm_attention import triton_kernel

    tensors = [name for name, value in call.items() if isinstance(value, Tensor)]
    wanted = data.draw(st.lists(st.sampled_from(tensors), unique=True))

    def configuration(op: str, key: str, default: dict[str, int], device: torch.device) -> dict[str, int]:
        return {name: min(block_l, value) if name == "BLOCK_L" else value for name, value in default.items()}

    with (
        mock.patch.object(triton_kernel, "_MOST_PROGRAMS", most_programs),  # programs that take several heads
        mock.patch.object(triton_kernel, "configuration", configuration),  # and several blocks of queries
    ):
        assert_triton_is_accurate("qk_norm_attention", call, wanted)

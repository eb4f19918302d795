"""What is special about qk_norm_attention: it is the chain of its two parts, on views of packed qkv."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels import attention, qk_norm_attention, qk_norm_rope, use


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

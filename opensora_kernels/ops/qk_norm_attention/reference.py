"""QK-norm self-attention in plain PyTorch. Axes: L tokens, N heads, D head size, F = D/2 angles."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    order: str,
    rope_layout: str,
    norm_scope: str,
    scale: float,
) -> Tensor:
    if order == "norm_rope":
        q, k = _rms_norm(q, q_weight, eps, norm_scope), _rms_norm(k, k_weight, eps, norm_scope)
    q, k = _rotate(q, cos, sin, rope_layout), _rotate(k, cos, sin, rope_layout)
    if order == "rope_norm":
        q, k = _rms_norm(q, q_weight, eps, norm_scope), _rms_norm(k, k_weight, eps, norm_scope)
    q_NLD, k_NLD, v_NLD = (x.transpose(-3, -2) for x in (q, k, v))
    scores = (q_NLD * scale) @ k_NLD.transpose(-1, -2)
    weights = torch.softmax(scores.to(torch.promote_types(q.dtype, torch.float32)), -1).to(q.dtype)
    return (weights @ v_NLD).transpose(-3, -2).contiguous()


def _rms_norm(x_LND: Tensor, weight: Tensor | None, eps: float, norm_scope: str) -> Tensor:
    if weight is None:
        return x_LND
    wide = x_LND.to(torch.promote_types(x_LND.dtype, torch.float32))  # fp32, or fp64 for the truth of the tests
    axes = (-1,) if norm_scope == "head" else (-2, -1)
    normed = (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)).to(x_LND.dtype)
    return normed * weight.to(x_LND.dtype).reshape((-1,) if norm_scope == "head" else x_LND.shape[-2:])


def _rotate(x_LND: Tensor, cos_LF: Tensor | None, sin_LF: Tensor | None, rope_layout: str) -> Tensor:
    if cos_LF is None:
        return x_LND
    cos, sin = cos_LF[:, None], sin_LF[:, None]
    is_interleaved = rope_layout == "interleaved"
    first, second = (x_LND[..., 0::2], x_LND[..., 1::2]) if is_interleaved else x_LND.chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if is_interleaved else torch.cat(turned, -1)
    return joined.to(x_LND.dtype)

"""RMSNorm and rotation of queries and keys in plain PyTorch. Axes: L tokens, N heads, D head size."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    order: str,
    rope_layout: str,
    norm_scope: str,
) -> tuple[Tensor, Tensor]:
    results = []
    for x_LND, weight in ((q, q_weight), (k, k_weight)):
        if order == "norm_rope":
            x_LND = _rotate(_rms_norm(x_LND, weight, eps, norm_scope), cos, sin, rope_layout)
        else:
            x_LND = _rms_norm(_rotate(x_LND, cos, sin, rope_layout), weight, eps, norm_scope)
        results.append(x_LND.contiguous())
    return results[0], results[1]


def _rms_norm(x_LND: Tensor, weight: Tensor | None, eps: float, norm_scope: str) -> Tensor:
    if weight is None:
        return x_LND
    wide = x_LND.to(torch.promote_types(x_LND.dtype, torch.float32))  # fp32, or fp64 for the truth of the tests
    axes = (-1,) if norm_scope == "head" else (-2, -1)
    normed = (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)).to(x_LND.dtype)
    if norm_scope == "token":
        weight = weight.unflatten(0, x_LND.shape[-2:])
    return normed * weight.to(x_LND.dtype)


def _rotate(x_LND: Tensor, cos_LF: Tensor | None, sin_LF: Tensor | None, rope_layout: str) -> Tensor:
    if cos_LF is None:
        return x_LND
    cos, sin = cos_LF[:, None], sin_LF[:, None]  # (L, 1, D/2): all heads turn by the same angles
    if rope_layout == "interleaved":
        first, second = x_LND[..., 0::2], x_LND[..., 1::2]
    else:
        first, second = x_LND.chunk(2, -1)
    # Two products and a sum, each rounded to the promoted dtype: bf16 angles give upstream's bf16 rotation bit for bit.
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if rope_layout == "interleaved" else torch.cat(turned, -1)
    return joined.to(x_LND.dtype)

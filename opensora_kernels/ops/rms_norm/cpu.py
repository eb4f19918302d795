"""RMSNorm by the compiled CPU library: that of qk_norm_rope, whose one head is the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._cpu import dense, dense_rows

_NO_ROTATION = (False, True, False)


def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    heads, (weight,) = _as_heads(x), dense(weight)
    out = torch.ops.opensora_kernels.qk_norm_rope_cpu_forward(
        heads, None, weight, None, None, None, True, eps, *_NO_ROTATION
    )[0]
    out = out.view(x.shape)
    if x.is_contiguous() or torch.empty_like(x, device="meta").stride() == out.stride():
        return out
    return torch.empty_like(x).copy_(out)  # in x's order of axes, as PyTorch's own operators


def backward(
    grads: list[Tensor | None], wanted: list[bool], saved: list[Tensor], x: Tensor, weight: Tensor | None, eps: float
) -> list[Tensor | None]:
    heads, grad, (dense_weight,) = _as_heads(x), _as_heads(grads[0]), dense(weight)
    grad_x, of_weights, _ = torch.ops.opensora_kernels.qk_norm_rope_cpu_backward(
        grad, None, wanted[1], False, heads, None, dense_weight, None, None, None, True, eps, *_NO_ROTATION
    )
    return [grad_x.view(x.shape), of_weights[0].to(weight.dtype) if wanted[1] else None, None]


def _as_heads(x: Tensor) -> Tensor:
    """x (*, L, C) as (*, L, 1, C)."""
    return dense_rows(x)[0].unsqueeze(-2) if x.dim() > 1 else dense_rows(x)[0].view(1, 1, -1)

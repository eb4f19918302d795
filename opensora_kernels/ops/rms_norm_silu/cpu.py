"""RMS over channels and SiLU by the compiled CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels.cpu_norms import apply_rms_norm
from opensora_kernels.norms import memory_format


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    out = torch.empty_like(x, memory_format=memory_format(x))
    apply_rms_norm(x, weight, bias, eps, activation == "silu", out)
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> list[Tensor | None]:
    """In PyTorch's own passes: with u = x / |x| and g the gradient of u, grad_x = (g - u sum(g u)) / |x|."""
    root, shape = x.shape[1] ** 0.5, (-1, 1, 1, 1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    unit = (x / length.clamp_min(eps)).to(x.dtype)
    normed, grad = unit * root, grads[0]
    if activation == "silu":
        before = normed if weight is None else normed * weight.view(shape)
        grad = torch.ops.aten.silu_backward(grad, before if bias is None else before + bias.view(shape))
    axes = (0, 2, 3, 4)
    grad_weight = (grad.float() * normed).sum(axes).to(weight.dtype) if wanted[1] else None
    grad_bias = grad.float().sum(axes).to(bias.dtype) if wanted[2] else None
    grad_x = None
    if wanted[0]:
        of_unit = grad.float() * root if weight is None else grad.float() * (weight.float().view(shape) * root)
        along = (of_unit * unit).sum(1, keepdim=True)
        # a vector shorter than eps is divided by eps, which does not depend on it
        grad_x = ((of_unit - unit * torch.where(length > eps, along, 0.0)) / length.clamp_min(eps)).to(x.dtype)
        grad_x = grad_x.contiguous(memory_format=memory_format(x))
    return [grad_x, grad_weight, grad_bias, None, None]

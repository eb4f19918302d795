"""RMSNorm and rotation of queries and keys by the compiled CPU library, one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._cpu import dense, dense_rows, norm_rope_options, parameter_gradients


def forward(
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
    q, k = dense_rows(q, k)
    parameters = dense(q_weight, k_weight, cos, sin)
    options = norm_rope_options(q_weight, eps, order, rope_layout, norm_scope)
    return tuple(torch.ops.opensora_kernels.qk_norm_rope_cpu_forward(q, k, *parameters, *options))


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
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
) -> list[Tensor | None]:
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip((q, k), grads, strict=True)]
    rows = dense_rows(*grads, q, k)
    grad_q, grad_k, of_weights, of_angles = torch.ops.opensora_kernels.qk_norm_rope_cpu_backward(
        *rows[:2],
        any(wanted[2:4]),
        any(wanted[4:6]),
        *rows[2:],
        *dense(q_weight, k_weight, cos, sin),
        *norm_rope_options(q_weight, eps, order, rope_layout, norm_scope),
    )
    found = parameter_gradients(of_weights, of_angles, (q_weight, k_weight, cos, sin), wanted[2:6])
    return [grad_q, grad_k, *found, None, None, None, None]

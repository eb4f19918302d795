"""QK-norm self-attention of short sequences by the compiled CPU library, without writing normalised q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._cpu import dense, dense_rows, norm_rope_options, parameter_gradients


def forward(
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
    options = norm_rope_options(q_weight, eps, order, rope_layout, norm_scope)
    return torch.ops.opensora_kernels.attention_cpu_forward(
        *dense_rows(q, k, v), None, scale, *dense(q_weight, k_weight, cos, sin), *options
    )


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
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
) -> list[Tensor | None]:
    grad, q, k, v = dense_rows(grads[0], q, k, v)
    parameters = (q_weight, k_weight, cos, sin)
    grad_q, grad_k, grad_v, of_weights, of_angles = torch.ops.opensora_kernels.attention_cpu_backward(
        grad,
        any(wanted[3:5]),
        any(wanted[5:7]),
        *(q, k, v, None, scale, *dense(*parameters)),
        *norm_rope_options(q_weight, eps, order, rope_layout, norm_scope),
    )
    found = parameter_gradients(of_weights, of_angles, parameters, wanted[3:7])
    return [grad_q, grad_k, grad_v, *found, None, None, None, None, None]

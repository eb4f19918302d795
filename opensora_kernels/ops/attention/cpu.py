"""Attention by the compiled CPU library in fp32, for sequences of keys that stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._cpu import dense_rows

_NOTHING_BEFORE = (None, None, None, None, False, 0.0, False, True, False)  # no norm, no rotation


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> Tensor:
    q, k, v = dense_rows(q, k, v)
    return torch.ops.opensora_kernels.attention_cpu_forward(q, k, v, _lengths(key_lengths), scale, *_NOTHING_BEFORE)


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor | None,
) -> list[Tensor | None]:
    grad, q, k, v = dense_rows(grads[0], q, k, v)
    grad_q, grad_k, grad_v, _, _ = torch.ops.opensora_kernels.attention_cpu_backward(
        grad, False, False, q, k, v, _lengths(key_lengths), scale, *_NOTHING_BEFORE
    )
    return [grad_q, grad_k, grad_v, None, None]


def _lengths(key_lengths: Tensor | None) -> Tensor | None:
    return None if key_lengths is None else key_lengths.to("cpu", torch.int64).reshape(-1).contiguous()

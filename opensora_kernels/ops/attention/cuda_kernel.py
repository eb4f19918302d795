"""Softmax attention on Hopper; the backward pass is Triton's, which makes the scores anew from the same log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opensora_kernels._triton.heads import views

from . import reference
from .triton_kernel import backward, lengths_and_ends

__all__ = ["backward", "forward"]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> list[Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_queries, num_heads, _ = q.shape[-3:]
    # copies of what begins elsewhere than at a multiple of 16 bytes; `why_not` can't tell, since no trace knows
    q, k, v = (x.clone() if x.data_ptr() % 16 else x for x in (q, k, v))
    lse_BNL = q.new_empty(math.prod(q.shape[:-3]), num_heads, num_queries, dtype=torch.float32)
    if reference.is_packed(q, k):
        q_OPLND, k_OPKND, v_OPKND = *views(q), k[None, None], v[None, None]
    else:
        q_OPLND, k_OPKND, v_OPKND = views(q, k, v)
    lengths, ends = (None if x is None else x.long() for x in lengths_and_ends(q, k, key_lengths))
    torch.ops.opensora_kernels.attention_cuda_forward(
        q_OPLND, k_OPKND, v_OPKND, lengths, ends, scale, out.view(q_OPLND.shape), lse_BNL
    )
    return [out, lse_BNL]

"""QK-norm self-attention as a chain of the public operators, each on its own best backend."""

from __future__ import annotations

from torch import Tensor

from opensora_kernels.ops.attention import attention
from opensora_kernels.ops.qk_norm_rope import qk_norm_rope


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
    q, k = qk_norm_rope(
        q,
        k,
        q_weight,
        k_weight,
        cos=cos,
        sin=sin,
        eps=eps,
        order=order,
        rope_layout=rope_layout,
        norm_scope=norm_scope,
    )
    return attention(q, k, v, scale=scale)

"""Self-attention of a sequence whose tokens are spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_kernels.checks import check_float, check_same_device, check_shape
from opensora_kernels.ops.attention import attention
from opensora_kernels.ops.qk_norm_rope import NormScope, Order, RopeLayout, check_qk_norm_rope, qk_norm_rope

from .all_to_all import Flight, plan_exchange, sequence_all_to_all
from .ranks import check_share, rank_and_size

_TOKENS, _HEADS = -3, -2


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    sequence_length: int,
    group: dist.ProcessGroup | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    order: Order = "norm_rope",
    rope_layout: RopeLayout = "interleaved",
    norm_scope: NormScope = "head",
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """attention(*qk_norm_rope(q, k, ...), v) of a sequence whose tokens are spread over the ranks of `group`.

    Each rank norms and rotates q and k of its tokens; one exchange of q, k and v gives it all tokens of its share of
    the heads, another brings the result back to its tokens. Any sequence_length and any number of heads will do.

        x = split_sequence(x, dim=1, group=group)  # (B, L, C) -> (B, L_local, C)
        q, k, v = to_qkv(x).unflatten(-1, (3, num_heads, -1)).unbind(-3)
        out = ulysses_attention(q, k, v, q_weight, k_weight, sequence_length=length, group=group)

    Shapes: q, k, v (*, L_local, N, D), this rank's share of `sequence_length` as `torch.tensor_split` cuts it, any
    strides; cos, sin (L_local, D/2) of its tokens (`split_sequence(cos, dim=0)`); weights and options as in
    `qk_norm_rope`. key_lengths: (*), the tokens of the whole sequence that are no padding. Returns (*, L_local, N, D).
    A group of one rank, or None: the sequence is whole.
    overlap: v travels while q and k are normed and rotated, in an exchange of its own; the same numbers. Gradients of
    gradients need False, and under torch.compile it is False.
    Attention to text, or along an axis that is not cut, needs no exchange: call `attention` with this rank's queries.
    Numbers: those of `qk_norm_rope` and `attention`. Gradients: every tensor's own; gradients of weights are of this
    rank's tokens, to be added up over the ranks. All ranks must run backward.
    Errors: those of `qk_norm_rope` and `attention`; ValueError for a tensor that is not this rank's share, or a group
    without this process. A rank that raises leaves the others waiting until the group's timeout.
    Source: DeepSpeed-Ulysses (arXiv 2309.14509); Open-Sora v1.2.0, opensora/models/layers/blocks.py,
    SeqParallelAttention.
    """
    op = "ulysses_attention"
    check_qk_norm_rope(op, q, k, q_weight, k_weight, cos, sin, order, rope_layout, norm_scope)
    for name, tensor in (("k", k), ("v", v)):
        check_float(op, name, tensor)
        check_shape(op, name, tensor, q.shape, "that of q, (*, L_local, N, D)")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    check_same_device(op, q=q, v=v)
    rank, num_ranks = rank_and_size(op, group)
    check_share(op, "q", q, q.dim() + _TOKENS, sequence_length, rank, num_ranks)

    num_heads = q.shape[_HEADS]
    to_heads = {"scatter": _HEADS, "gather": _TOKENS, "length": sequence_length, "group": group}
    options = {"cos": cos, "sin": sin, "eps": eps, "order": order, "rope_layout": rope_layout, "norm_scope": norm_scope}
    if overlap and not torch.compiler.is_compiling() and num_ranks > 1:
        flight = Flight(plan_exchange(op, [v], **to_heads)).start([v])
        q, k = sequence_all_to_all(qk_norm_rope(q, k, q_weight, k_weight, **options), **to_heads)
        (v,) = flight.finish()
    else:
        q, k = qk_norm_rope(q, k, q_weight, k_weight, **options)
        q, k, v = sequence_all_to_all([q, k, v], **to_heads)
    out = attention(q, k, v, scale=scale, key_lengths=key_lengths)
    return sequence_all_to_all(out, scatter=_TOKENS, gather=_HEADS, length=num_heads, group=group)

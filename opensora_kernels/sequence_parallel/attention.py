"""Self-attention of a sequence whose tokens are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_kernels.checks import check_float, check_same_device, check_shape
from opensora_kernels.ops.attention import attention
from opensora_kernels.ops.qk_norm_rope import NormScope, Order, RopeLayout, check_qk_norm_rope, qk_norm_rope

from .all_to_all import Flight, Route, plan_exchange, sequence_all_to_all
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
    route: Route = "auto",
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
    gradients need False; under torch.compile and with route="peer" it is False.
    route: how the exchanges travel, see `sequence_all_to_all`.
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

    options = {"cos": cos, "sin": sin, "eps": eps, "order": order, "rope_layout": rope_layout, "norm_scope": norm_scope}
    lengths = sequence_length, sequence_length
    num_heads = q.shape[_HEADS]
    travel = {"group": group, "route": route}
    q, k, v = by_heads(op, q, k, v, q_weight, k_weight, lengths=lengths, overlap=overlap, **travel, **options)
    out = attention(q, k, v, scale=scale, key_lengths=key_lengths)
    return by_tokens(out, num_heads=num_heads, **travel)


def by_heads(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    lengths: tuple[int, int],
    group: dist.ProcessGroup | None,
    overlap: bool,
    route: Route,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """qk_norm_rope of this rank's tokens, then the exchange: all `lengths` of queries and of keys, for its heads."""
    to_heads = {"scatter": _HEADS, "gather": _TOKENS, "group": group, "route": route}
    num_queries, num_keys = lengths
    # a rank's exchanges with its peers come one after another: none is under way beside another
    can_overlap = route != "peer" and not torch.compiler.is_compiling()
    if overlap and can_overlap and rank_and_size(op, group)[1] > 1:
        flight = Flight(plan_exchange(op, [v], **to_heads, length=num_keys)).start([v])
        q, k = qk_norm_rope(q, k, q_weight, k_weight, **options)
        q, k = _exchanged([q], [k], num_queries, num_keys, to_heads)
        return q, k, *flight.finish()
    q, k = qk_norm_rope(q, k, q_weight, k_weight, **options)
    return tuple(_exchanged([q], [k, v], num_queries, num_keys, to_heads))


def by_tokens(out: Tensor, *, num_heads: int, group: dist.ProcessGroup | None, route: Route) -> Tensor:
    """All heads of this rank's tokens: the exchange back."""
    return sequence_all_to_all(out, scatter=_TOKENS, gather=_HEADS, length=num_heads, group=group, route=route)


def _exchanged(
    queries: list[Tensor], others: list[Tensor], num_queries: int, num_keys: int, to_heads: dict[str, Any]
) -> list[Tensor]:
    """In one exchange where queries and keys are as many."""
    if num_queries == num_keys:
        return sequence_all_to_all([*queries, *others], **to_heads, length=num_queries)
    queries = sequence_all_to_all(queries, **to_heads, length=num_queries)
    return [*queries, *sequence_all_to_all(others, **to_heads, length=num_keys)]

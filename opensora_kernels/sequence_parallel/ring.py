"""Attention to keys and values that travel round a ring of ranks, and its gradient.

A rank attends to its own keys while the next ones arrive, and so on round the ring; what it got from each rank's keys
is put together by the logarithms of the sums of exponentials (lse). In the backward pass weights are made anew from the
lse of all keys, and the gradients of keys and values travel with them until they are home.
Axes: B samples, L queries, K keys, N heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ranks import rank_and_size
from .ring_parts import attend, gradients


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_sizes: Sequence[int],
    key_lengths: Sequence[Tensor] | Sequence[None],
    group: dist.ProcessGroup,
) -> Tensor:
    """attention(q, k, v) of this rank's queries to the keys of all ranks of `group`.

    Shapes: q (*, L, N, D), of any L on each rank; k, v (*, K, N, D) of this rank, K = key_sizes[rank]; key_lengths[r]
    (*), how many of the keys of rank r are attended to, or None for all. A sample without any gives zeros. Returns
    (*, L, N, D), contiguous. Under autocast q, k and v are brought to its dtype, as `attention` does.
    Numbers: computed and added up in fp32 and rounded once; flash attention on CUDA rounds for each rank's keys.
    Gradients: of q, k and v, and none of theirs; those of keys travel in fp32.
    Source: ring attention (arXiv 2310.01889), with FlashAttention-2's lse (arXiv 2307.08691).
    """
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype is not torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    batch = math.prod(q.shape[:-3])
    lengths = tuple(None if one is None else one.reshape(batch) for one in key_lengths)
    ring = _Ring(rank_and_size("ring_attention", group)[0], tuple(key_sizes), lengths, scale, group)
    heads_first = (x.reshape(batch, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    return _RingAttention.apply(*heads_first, ring).transpose(1, 2).reshape(q.shape).contiguous()


@dataclass(frozen=True)
class _Ring:
    """Where a rank stands in the ring, and how many keys each has."""

    rank: int
    key_sizes: tuple[int, ...]
    key_lengths: tuple[Tensor | None, ...]
    scale: float
    group: dist.ProcessGroup

    @property
    def num_ranks(self) -> int:
        return len(self.key_sizes)

    def owner(self, step: int) -> int:
        """The rank whose keys are here after so many steps."""
        return (self.rank - step) % self.num_ranks

    def pass_on(self, x: Tensor, step: int) -> _Passing:
        """Keys and values, or their gradients, (2, B, N, K, D) to the next rank: those of step + 1 come."""
        shape = (*x.shape[:3], self.key_sizes[self.owner(step + 1)], x.shape[4])
        return _Passing(x, shape, self.group, *(self._neighbour(offset) for offset in (1, -1)))

    def _neighbour(self, offset: int) -> int:
        return dist.get_global_rank(self.group, (self.rank + offset) % self.num_ranks)


class _Passing:
    """A tensor under way to the rank `after`, while one of `shape` comes from the rank `before`."""

    def __init__(self, sent: Tensor, shape: tuple[int, ...], group: dist.ProcessGroup, after: int, before: int) -> None:
        self.shape = shape
        # Empty ones travel as one element, so that every rank takes part in every call.
        self.sent = sent.reshape(-1) if sent.numel() else sent.new_zeros(1)
        self.received = sent.new_empty(max(1, math.prod(shape)))
        send = dist.P2POp(dist.isend, self.sent, after, group)
        self.works = dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, self.received, before, group)])

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received[: math.prod(self.shape)].view(self.shape)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _forward(q, k, v, ring)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            found = _backward(grad.contiguous(), q, k, v, out, lse, ctx.ring)
        return *(x.to(q.dtype) for x in found), None


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    """out (B, N, L, D) and lse (B, N, L) over all keys, in fp32."""
    keys_values, wide = torch.stack((k, v)), torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q, dtype=wide), torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for step in range(ring.num_ranks):
        arriving = ring.pass_on(keys_values, step) if step + 1 < ring.num_ranks else None
        out, lse = _merged(out, lse, *attend(q, *keys_values, ring.scale, ring.key_lengths[ring.owner(step)]))
        if arriving is not None:
            keys_values = arriving.wait()
    return out, lse


def _merged(out: Tensor, lse: Tensor, part: Tensor, lse_of_part: Tensor) -> tuple[Tensor, Tensor]:
    """What attention to both parts of the keys gives, from what attention to each gave."""
    total = torch.logaddexp(lse, lse_of_part)
    finite = total.clamp(min=torch.finfo(lse.dtype).min)  # -inf for queries that have met no key yet
    share, share_of_part = ((x - finite).exp().unsqueeze(-1) for x in (lse, lse_of_part))
    return out * share + part * share_of_part, total


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ring: _Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B, N, *, D), in fp32."""
    keys_values, grad_q = torch.stack((k, v)), torch.zeros_like(q, dtype=lse.dtype)
    returning = None
    for step in range(ring.num_ranks):
        arriving = ring.pass_on(keys_values, step) if step + 1 < ring.num_ranks else None
        lengths = ring.key_lengths[ring.owner(step)]
        of_q, *of_keys_values = gradients(grad, q, *keys_values, out, lse, ring.scale, lengths)
        grad_q += of_q
        grad_keys_values = torch.stack([x.to(lse.dtype) for x in of_keys_values])
        if returning is not None:
            grad_keys_values += returning.wait()
        returning = ring.pass_on(grad_keys_values, step)
        if arriving is not None:
            keys_values = arriving.wait()
    return grad_q, *returning.wait()

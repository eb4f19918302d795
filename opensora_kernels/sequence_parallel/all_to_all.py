"""Tokens-sharded to heads-sharded and back: one all-to-all between ranks, with its gradient.

Each rank sends every other its part of one axis (`scatter`) and receives from each a part of another (`gather`). The
inverse exchange is the same function with the two swapped, and is its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora_kernels.checks import check_choice
from opensora_kernels.ops.pack_shards import pack_shards
from opensora_kernels.ops.unpack_shards import unpack_shards
from opensora_kernels.shards import check_alike, check_dim, shard_sizes

from . import peers
from .ranks import check_share, rank_and_size

Route = Literal["auto", "collective", "peer"]


@overload
def sequence_all_to_all(
    x: Tensor, *, scatter: int, gather: int, length: int, group: dist.ProcessGroup | None, route: Route = "auto"
) -> Tensor: ...
@overload
def sequence_all_to_all(
    x: Sequence[Tensor],
    *,
    scatter: int,
    gather: int,
    length: int,
    group: dist.ProcessGroup | None,
    route: Route = "auto",
) -> list[Tensor]: ...
def sequence_all_to_all(
    x: Tensor | Sequence[Tensor],
    *,
    scatter: int,
    gather: int,
    length: int,
    group: dist.ProcessGroup | None,
    route: Route = "auto",
) -> Tensor | list[Tensor]:
    """The same tensor cut along axis `scatter` instead of axis `gather`, by one exchange between the ranks of `group`.

    Every rank calls it with its share of axis `gather`, `length` in all, and gets the whole of it and a share of axis
    `scatter`. Shares are those of `torch.tensor_split`: sizes differ by one at most, the first ranks have the longer
    ones, and a rank's share may be empty; so any length and any number of heads will do, and nothing is padded.

        # 3 ranks, 10 tokens, 16 heads: (B, 4 or 3, 16, D) -> (B, 10, 6 or 5, D), and back
        q = sequence_all_to_all(q, scatter=-2, gather=-3, length=10, group=group)
        out = sequence_all_to_all(out, scatter=-3, gather=-2, length=16, group=group)

    Shapes: x of any dtype, device and strides; a sequence of tensors of one shape, such as [q, k, v], travels in one
    exchange and comes back as a list. Results are contiguous; a group of one rank, or None, returns x itself.
    route: "collective" is `all_to_all_single` of the group, NCCL's or gloo's. With "peer", inside one node, the packing
    kernel writes straight into the other ranks' memory, and two buffers as large as the largest share stay with the
    group until `release_peer_buffers`; not under torch.compile or in a CUDA graph, and all ranks must agree. "auto" is
    the collective, since "peer" has not been measured on GPUs yet.
    Numbers: elements are moved, none is changed. Gradients: the inverse exchange; all ranks must run backward.
    Errors: ValueError for a tensor that is not this rank's share, axes that are equal or that x lacks, a group without
    this process, tensors of different shapes or devices, or, on all ranks, "peer" where `why_not_peer_to_peer` has a
    reason against it; TypeError for different dtypes. A rank that raises alone leaves the others waiting until the
    group's timeout.
    Source: DeepSpeed-Ulysses (arXiv 2309.14509); Open-Sora v1.2.0, opensora/acceleration/communications.py, all_to_all.
    """
    op = "sequence_all_to_all"
    tensors = [x] if isinstance(x, Tensor) else list(x)
    check_alike(op, tensors)
    exchange = plan_exchange(op, tensors, scatter, gather, length, group, route)
    if exchange.num_ranks > 1:
        if exchange.is_to_peers:
            peers.prepare(op, exchange, tensors[0])
        tensors = list(_AllToAll.apply(exchange, *tensors))
    return tensors[0] if isinstance(x, Tensor) else tensors


@dataclass(frozen=True)
class Exchange:
    """What one rank sends and receives: `num_tensors` of `shape`, with its share of axis `gather`, `length` in all."""

    scatter: int
    gather: int
    shape: tuple[int, ...]
    length: int
    num_tensors: int
    rank: int
    num_ranks: int
    group: dist.ProcessGroup | None
    is_to_peers: bool = False  # the route

    @property
    def received_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.gather] = self.length
        shape[self.scatter] = self._scatter_sizes[self.rank]
        return tuple(shape)

    @property
    def send_sizes(self) -> list[int]:
        """Elements for each rank."""
        return _elements(self.num_tensors, self.shape, self.scatter, self.num_ranks)

    @property
    def receive_sizes(self) -> list[int]:
        """Elements from each rank."""
        return _elements(self.num_tensors, self.received_shape, self.gather, self.num_ranks)

    @property
    def places(self) -> list[int]:
        """Where the elements of this rank begin among those that each rank receives."""
        before = sum(shard_sizes(self.length, self.num_ranks)[: self.rank])
        return [self._cross_section * before * size for size in self._scatter_sizes]

    @property
    def most_received(self) -> int:
        """Elements that the first rank receives: none receives more."""
        return self._cross_section * self.length * self._scatter_sizes[0]

    @property
    def _cross_section(self) -> int:
        """Elements of all tensors at one position of both axes."""
        return self.num_tensors * math.prod(
            size for axis, size in enumerate(self.shape) if axis not in (self.scatter, self.gather)
        )

    @property
    def _scatter_sizes(self) -> list[int]:
        return shard_sizes(self.shape[self.scatter], self.num_ranks)

    def inverse(self) -> Exchange:
        length, shape = self.shape[self.scatter], self.received_shape
        return replace(self, scatter=self.gather, gather=self.scatter, shape=shape, length=length)


def _elements(num_tensors: int, shape: tuple[int, ...], dim: int, num_ranks: int) -> list[int]:
    """Of tensors cut along `dim`: how many fall to each rank."""
    each = num_tensors * math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
    return [each * size for size in shard_sizes(shape[dim], num_ranks)]


def plan_exchange(
    op: str,
    tensors: list[Tensor],
    scatter: int,
    gather: int,
    length: int,
    group: dist.ProcessGroup | None,
    route: Route = "auto",
) -> Exchange:
    """The exchange of `tensors`, which are alike. Raises ValueError where they are not this rank's share."""
    check_choice(op, "route", route, Route)
    rank, num_ranks = rank_and_size(op, group)
    num_axes = tensors[0].dim()
    scatter, gather = check_dim(op, "scatter", scatter, num_axes), check_dim(op, "gather", gather, num_axes)
    if scatter == gather:
        raise ValueError(f"{op}: scatter and gather must be different axes, got {scatter} for both")
    check_share(op, "x", tensors[0], gather, length, rank, num_ranks)
    shape = tuple(tensors[0].shape)
    return Exchange(scatter, gather, shape, length, len(tensors), rank, num_ranks, group, route == "peer")


class _AllToAll(torch.autograd.Function):
    """Pack, exchange, unpack."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        if exchange.is_to_peers:
            return tuple(_unpacked(peers.push(list(tensors), exchange), exchange, is_lent=True))
        received = _receive_buffer(tensors[0], exchange)
        _exchange(received, _packed(tensors, exchange), exchange)
        return tuple(_unpacked(received, exchange))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_AllToAll.apply(ctx.exchange.inverse(), *grads)


class Flight:
    """An exchange under way while other work goes on, and then the exchange of its gradients.

    `Flight(exchange).start(tensors)` sends; `.finish()` waits and unpacks. In the backward pass the two swap their
    parts: the gradients leave as soon as `finish` has them and are waited for where `start` was called, so that they
    travel during the backward pass of everything called between the two.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._sent: Tensor | None = None  # kept alive until the exchange is done
        self._received: Tensor | None = None
        self._work: dist.Work | None = None
        self._arriving: Tensor | None = None

    def start(self, tensors: Sequence[Tensor]) -> Flight:
        self._arriving = _Start.apply(self, *tensors)
        return self

    def finish(self) -> list[Tensor]:
        arriving, self._arriving = self._arriving, None  # it holds its graph, which holds this flight
        return list(_Finish.apply(self, arriving))

    def send(self, packed: Tensor, exchange: Exchange) -> Tensor:
        self._sent, self._received = packed, _receive_buffer(packed, exchange)
        self._work = _exchange(self._received, packed, exchange, async_op=True)
        return self._received

    def wait(self) -> Tensor:
        self._work.wait()
        received, self._sent, self._received, self._work = self._received, None, None, None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.send(_packed(tensors, flight.exchange), flight.exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # grad is what _Finish.backward returned: it is on its way already
        return None, *_unpacked(ctx.flight.wait(), ctx.flight.exchange.inverse())


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return tuple(_unpacked(flight.wait(), flight.exchange))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        inverse = ctx.flight.exchange.inverse()
        packed = _packed(grads, inverse)  # the gradient of what arrived, and what the inverse exchange sends
        ctx.flight.send(packed, inverse)
        return None, packed


def _packed(tensors: Sequence[Tensor], exchange: Exchange) -> Tensor:
    """What `exchange` sends."""
    if _is_in_order(exchange.shape, exchange.scatter, len(tensors)):
        return tensors[0].contiguous()
    return pack_shards(tensors, num_shards=exchange.num_ranks, dim=exchange.scatter)


def _receive_buffer(like: Tensor, exchange: Exchange) -> Tensor:
    if _is_in_order(exchange.received_shape, exchange.gather, exchange.num_tensors):
        return like.new_empty(exchange.received_shape)
    return like.new_empty(sum(exchange.receive_sizes))


def _unpacked(received: Tensor, exchange: Exchange, *, is_lent: bool = False) -> list[Tensor]:
    """What `received` holds; in other memory, if it is lent."""
    shape = exchange.received_shape
    if _is_in_order(shape, exchange.gather, exchange.num_tensors):
        return [received.view(shape).clone() if is_lent else received]
    options = {"num_shards": exchange.num_ranks, "dim": exchange.gather, "num_tensors": exchange.num_tensors}
    return unpack_shards(received, shape=shape, **options)


def _is_in_order(shape: tuple[int, ...], dim: int, num_tensors: int) -> bool:
    """Whether shards along `dim` already follow one another in a contiguous tensor: then packing is free."""
    return num_tensors == 1 and math.prod(shape[:dim]) == 1


def _exchange(received: Tensor, packed: Tensor, exchange: Exchange, *, async_op: bool = False) -> dist.Work | None:
    sizes = exchange.receive_sizes, exchange.send_sizes
    return dist.all_to_all_single(received.view(-1), packed.view(-1), *sizes, group=exchange.group, async_op=async_op)

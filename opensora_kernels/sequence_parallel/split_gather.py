"""A tensor cut into the ranks' shares, shares put together on every rank, and sums over ranks, with their gradients."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_kernels.checks import check_choice
from opensora_kernels.ops.pack_shards import pack_shards
from opensora_kernels.ops.unpack_shards import unpack_shards
from opensora_kernels.shards import check_dim, shard_sizes

from .ranks import check_share, rank_and_size

GradScale = Literal["none", "up", "down"]


def split_sequence(x: Tensor, *, dim: int, group: dist.ProcessGroup | None, grad_scale: GradScale = "none") -> Tensor:
    """This rank's share of `x` along `dim`; every rank of `group` holds the same x.

        x = split_sequence(x, dim=2, group=group, grad_scale="down")  # (B, T, S, C) -> (B, T, S_local, C)
        x = gather_sequence(blocks(x), dim=2, length=num_sites, group=group, grad_scale="up")

    Shapes: x (*, L, *), any dtype; returns (*, L_local, *), contiguous, as `torch.tensor_split` cuts: the first ranks
    get one more where L does not divide evenly. No communication. A group of one rank, or None, returns x itself.
    Gradients: all ranks' gradients gathered, so that each rank has that of all of x; all ranks must run backward.
    grad_scale "up" multiplies it by the number of ranks, "down" divides it. Between "down" here and "up" in
    `gather_sequence`, parameters see gradients of their rank's tokens times the number of ranks, so that the average
    over all ranks, which data parallelism takes, is that of one process; parameters outside already agree on all ranks.
    Errors: ValueError for an axis that x lacks, another grad_scale, or a group without this process.
    Source: Open-Sora v1.2.0, opensora/acceleration/communications.py, split_forward_gather_backward.
    """
    op = "split_sequence"
    cut = _Cut(check_dim(op, "dim", dim, x.dim()), x.shape[dim], *rank_and_size(op, group), group)
    check_choice(op, "grad_scale", grad_scale, GradScale)
    return x if cut.num_ranks == 1 else _Split.apply(x, cut, cut.factor(grad_scale))


def gather_sequence(
    x: Tensor, *, dim: int, length: int, group: dist.ProcessGroup | None, grad_scale: GradScale = "none"
) -> Tensor:
    """The shares of all ranks of `group` along `dim`, put together on each of them; the inverse of `split_sequence`.

    Shapes: x (*, L_local, *), this rank's share of `length`, any dtype; returns (*, length, *), contiguous. Nothing is
    padded: a rank sends its share to each other. A group of one rank, or None, returns x itself.
    Gradients: this rank's share of its own gradient, which is right where all ranks compute the same from the result
    (the gradients of ranks that do not are not added up). grad_scale as in `split_sequence`.
    Errors: ValueError for a tensor that is not this rank's share, an axis that it lacks, another grad_scale, or a group
    without this process.
    Source: Open-Sora v1.2.0, opensora/acceleration/communications.py, gather_forward_split_backward.
    """
    op = "gather_sequence"
    cut = _Cut(check_dim(op, "dim", dim, x.dim()), length, *rank_and_size(op, group), group)
    check_choice(op, "grad_scale", grad_scale, GradScale)
    check_share(op, "x", x, cut.dim, length, cut.rank, cut.num_ranks)
    return x if cut.num_ranks == 1 else _Gather.apply(x, cut, cut.factor(grad_scale))


def sum_sequence(x: Tensor, *, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's share along `dim` of the sum of all ranks' x: a reduce-scatter, for any length.

    Shapes: x (*, L, *), of one shape on all ranks; returns (*, L_local, *), contiguous. Summed in fp32 (fp64 for fp64),
    rounded once. A group of one rank, or None, returns x itself. Gradients: all ranks' gradients gathered.
    Errors: ValueError for an axis that x lacks, or a group without this process.
    """
    op = "sum_sequence"
    cut = _Cut(check_dim(op, "dim", dim, x.dim()), x.shape[dim], *rank_and_size(op, group), group)
    return x if cut.num_ranks == 1 else _Sum.apply(x, cut)


class _Cut:
    """An axis `dim` of `length` that is cut across the ranks of `group`."""

    def __init__(self, dim: int, length: int, rank: int, num_ranks: int, group: dist.ProcessGroup | None) -> None:
        self.dim, self.length, self.rank, self.num_ranks, self.group = dim, length, rank, num_ranks, group
        self.sizes = shard_sizes(length, num_ranks)

    def factor(self, grad_scale: GradScale) -> float:
        return {"none": 1.0, "up": float(self.num_ranks), "down": 1.0 / self.num_ranks}[grad_scale]

    def split(self, x: Tensor) -> Tensor:
        # a copy: a view would keep all of x in memory
        return x.split(self.sizes, self.dim)[self.rank].clone(memory_format=torch.contiguous_format)

    def sum(self, x: Tensor) -> Tensor:
        sent = pack_shards([x], num_shards=self.num_ranks, dim=self.dim)
        shape = (*x.shape[: self.dim], self.sizes[self.rank], *x.shape[self.dim + 1 :])
        each = math.prod(shape[: self.dim]) * math.prod(shape[self.dim + 1 :])
        received = x.new_empty(self.num_ranks, *shape)
        sizes = [math.prod(shape)] * self.num_ranks, [each * size for size in self.sizes]
        dist.all_to_all_single(received.view(-1), sent.view(-1), *sizes, group=self.group)
        return received.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

    def gather(self, x: Tensor) -> Tensor:
        # gloo's all_gather takes shares of one size only; a copy for each rank costs one write, and nothing on the wire
        sent = x.contiguous().view(-1).repeat(self.num_ranks)
        shape = (*x.shape[: self.dim], self.length, *x.shape[self.dim + 1 :])
        each = math.prod(shape[: self.dim]) * math.prod(shape[self.dim + 1 :])
        received = x.new_empty(each * self.length)
        receive_sizes = [each * size for size in self.sizes]
        dist.all_to_all_single(received, sent, receive_sizes, [x.numel()] * self.num_ranks, group=self.group)
        return unpack_shards(received, shape=shape, num_shards=self.num_ranks, dim=self.dim)[0]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut, factor: float) -> Tensor:
        ctx.cut, ctx.factor = cut, factor
        return cut.split(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.cut, 1.0) * ctx.factor, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut, factor: float) -> Tensor:
        ctx.cut, ctx.factor = cut, factor
        return cut.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Split.apply(grad, ctx.cut, 1.0) * ctx.factor, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(grad, ctx.cut), None


class _Gathered(torch.autograd.Function):
    """Shares put together on ranks that do not compute the same from them: their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.cut), None

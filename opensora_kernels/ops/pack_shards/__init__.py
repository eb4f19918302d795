"""Tensors cut along an axis and laid out as an all-to-all sends them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels.registration import call, register_op
from opensora_kernels.shards import check_alike, check_dim

from . import reference

__all__ = ["pack_shards"]


def pack_shards(tensors: Sequence[Tensor], *, num_shards: int, dim: int) -> Tensor:
    """Shards of `tensors` along `dim`, one after another in memory: the first shard of every tensor, then the second.

    Shapes: tensors of one shape, dtype and device, any dtype, any strides; returns (number of all elements,). A shard
    is what `torch.tensor_split(tensor, num_shards, dim)` makes it: sizes differ by one at most, nothing is padded, and
    there are empty shards where the axis is shorter than num_shards.
    Numbers: elements are moved, none is changed. Gradients: `unpack_shards` of the gradient.
    Errors: TypeError for what is no tensor, or dtypes that differ; ValueError for no tensors, shapes or devices that
    differ, fewer than one shard, or an axis that the tensors lack.
    Source: the send buffer of torch.distributed.all_to_all_single.
    """
    op = "pack_shards"
    tensors = list(tensors)
    check_alike(op, tensors)
    dim = check_dim(op, "dim", dim, tensors[0].dim())
    if num_shards < 1:
        raise ValueError(f"{op}: num_shards must be at least 1, got {num_shards}")
    return call(op, tensors, num_shards, dim)


register_op("pack_shards", "(Tensor[] tensors, int num_shards, int dim) -> Tensor", reference.pack_shards)
_triton.register("pack_shards")
_extension.register("pack_shards", "cuda", why_slower=lambda *values: _extension.NOT_MEASURED)

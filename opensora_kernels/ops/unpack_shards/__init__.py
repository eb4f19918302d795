"""Tensors put together from the shards that an all-to-all received."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels.registration import call, register_op
from opensora_kernels.shards import check_dim

from . import reference

__all__ = ["unpack_shards"]


def unpack_shards(
    packed: Tensor, *, shape: Sequence[int], num_shards: int, dim: int, num_tensors: int = 1
) -> list[Tensor]:
    """The `num_tensors` tensors of `shape` of which `packed` is pack_shards(tensors, num_shards=num_shards, dim=dim).

    Shapes: packed (num_tensors * product of shape,), any dtype; returns contiguous tensors in a list.
    Numbers: elements are moved, none is changed. Gradients: `pack_shards` of the gradients.
    Errors: TypeError for what is no tensor; ValueError for a packed tensor of another size, fewer than one shard or
    tensor, or an axis that the shape lacks.
    Source: the receive buffer of torch.distributed.all_to_all_single.
    """
    op = "unpack_shards"
    if not isinstance(packed, Tensor):
        raise TypeError(f"{op}: packed must be a tensor, got {type(packed).__name__}")
    dim = check_dim(op, "dim", dim, len(shape))
    if num_shards < 1 or num_tensors < 1:
        raise ValueError(f"{op}: num_shards and num_tensors must be at least 1, got {num_shards} and {num_tensors}")
    num_elements = num_tensors * math.prod(shape)
    if packed.dim() != 1 or packed.shape[0] != num_elements:
        meaning = f"{num_tensors} tensors of shape {tuple(shape)}"
        raise ValueError(f"{op}: packed must have shape ({num_elements},) for {meaning}, got {tuple(packed.shape)}")
    return call(op, packed, list(shape), num_shards, dim, num_tensors)


register_op(
    "unpack_shards",
    "(Tensor packed, SymInt[] shape, int num_shards, int dim, int num_tensors) -> Tensor[]",
    reference.unpack_shards,
)
_triton.register("unpack_shards")
_extension.register("unpack_shards", "cuda", why_slower=lambda *values: _extension.NOT_MEASURED)

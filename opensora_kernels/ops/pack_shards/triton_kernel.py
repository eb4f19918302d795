"""The send buffer of an all-to-all in Triton: one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._triton.shards import pack, unpack


def forward(tensors: list[Tensor], num_shards: int, dim: int) -> Tensor:
    return pack(tensors, num_shards, dim)


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    tensors: list[Tensor],
    num_shards: int,
    dim: int,
) -> list[list[Tensor] | None]:
    like = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
    return [unpack(grads[0].contiguous(), like, num_shards, dim), None, None]

"""The receive buffer of an all-to-all, put together in Triton: one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._triton.shards import pack, unpack


def forward(packed: Tensor, shape: list[int], num_shards: int, dim: int, num_tensors: int) -> list[Tensor]:
    tensors = [torch.empty(shape, dtype=packed.dtype, device=packed.device) for _ in range(num_tensors)]
    return unpack(packed.contiguous(), tensors, num_shards, dim)


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    packed: Tensor,
    shape: list[int],
    num_shards: int,
    dim: int,
    num_tensors: int,
) -> list[Tensor | None]:
    filled = [packed.new_zeros(shape) if grad is None else grad for grad in grads]
    return [pack(filled, num_shards, dim), None, None, None, None]

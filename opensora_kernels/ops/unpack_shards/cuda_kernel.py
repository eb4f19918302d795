"""The receive buffer of an all-to-all, put together in CUDA: one launch for up to eight tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(packed: Tensor, shape: list[int], num_shards: int, dim: int, num_tensors: int) -> list[Tensor]:
    return torch.ops.opensora_kernels.unpack_shards_cuda_forward(
        packed.contiguous(), shape, num_shards, dim, num_tensors
    )


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
    return [torch.ops.opensora_kernels.pack_shards_cuda_forward(filled, num_shards, dim), None, None, None, None]

"""The send buffer of an all-to-all in CUDA: one launch for up to eight tensors, one read and one write."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(tensors: list[Tensor], num_shards: int, dim: int) -> Tensor:
    return torch.ops.opensora_kernels.pack_shards_cuda_forward(tensors, num_shards, dim)


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    tensors: list[Tensor],
    num_shards: int,
    dim: int,
) -> list[list[Tensor] | None]:
    unpack = torch.ops.opensora_kernels.unpack_shards_cuda_forward
    return [unpack(grads[0].contiguous(), tensors[0].shape, num_shards, dim, len(tensors)), None, None]

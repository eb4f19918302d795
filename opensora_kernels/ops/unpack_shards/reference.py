"""The receive buffer of an all-to-all, put together in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opensora_kernels.shards import shard_sizes


def unpack_shards(packed: Tensor, shape: list[int], num_shards: int, dim: int, num_tensors: int) -> list[Tensor]:
    shapes = [(*shape[:dim], size, *shape[dim + 1 :]) for size in shard_sizes(shape[dim], num_shards)]
    pieces = packed.split([math.prod(shape) for shape in shapes for _ in range(num_tensors)])
    return [
        torch.cat([piece.reshape(shape) for piece, shape in zip(pieces[first::num_tensors], shapes, strict=True)], dim)
        for first in range(num_tensors)
    ]

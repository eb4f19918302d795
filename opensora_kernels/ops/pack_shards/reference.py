"""The send buffer of an all-to-all in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels.shards import shard_sizes


def pack_shards(tensors: list[Tensor], num_shards: int, dim: int) -> Tensor:
    sizes = shard_sizes(tensors[0].shape[dim], num_shards)
    shards_of_ranks = zip(*(tensor.split(sizes, dim) for tensor in tensors), strict=True)
    return torch.cat([shard.reshape(-1) for shards in shards_of_ranks for shard in shards])

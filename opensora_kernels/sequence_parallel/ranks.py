"""Where this process stands in a process group, and whether a tensor is its share."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from opensora_kernels.shards import shard_sizes


def rank_and_size(op: str, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in `group` and the number of ranks; without a group it is on its own.

    Raises ValueError for a group without this process.
    """
    if group is None:  # never the default group: that of a sequence is one of several axes of a mesh
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: group must hold this process, global rank {dist.get_rank()}, and it does not")
    return rank, dist.get_world_size(group)


def check_share(op: str, name: str, x: Tensor, dim: int, length: int, rank: int, num_ranks: int) -> None:
    """Raise ValueError unless `x` holds the share of `rank` of an axis of `length`."""
    share = shard_sizes(length, num_ranks)[rank]
    if x.shape[dim] != share:
        raise ValueError(
            f"{op}: {name} must hold {share} of {length} at axis {dim} on rank {rank} of {num_ranks}, as "
            f"torch.tensor_split cuts, got shape {tuple(x.shape)}"
        )

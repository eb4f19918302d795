"""Who holds what of an axis that is cut across ranks: as even as whole numbers allow, the first ranks get one more.

This is how `torch.tensor_split` cuts. Every rank knows the sizes of all others by this rule, so none is communicated.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def shard_sizes(total: int, num_shards: int) -> list[int]:
    """Sizes of the shards of an axis of `total`: shard_sizes(10, 4) is [3, 3, 2, 2]."""
    size, num_longer = total // num_shards, total % num_shards
    return [size + 1] * num_longer + [size] * (num_shards - num_longer)


def check_dim(op: str, name: str, dim: int, num_axes: int) -> int:
    """`dim` counted from the front. Raises ValueError unless a tensor of `num_axes` has that axis."""
    if not -num_axes <= dim < num_axes:
        raise ValueError(f"{op}: {name} must be one of the {num_axes} axes, got {dim}")
    return dim % num_axes


def check_alike(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError unless `tensors` are tensors of one shape, dtype and device, at least one."""
    for index, tensor in enumerate(tensors):
        name = f"tensors[{index}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        first = tensors[0]
        if tensor.shape != first.shape:
            raise ValueError(
                f"{op}: {name} must have tensors[0]'s shape {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have tensors[0]'s dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: all tensors must be on one device, got {first.device} and {tensor.device}")
    if not tensors:
        raise ValueError(f"{op}: tensors must hold at least one tensor, got none")

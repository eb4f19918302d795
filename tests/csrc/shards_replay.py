"""The CUDA kernels of pack_shards and unpack_shards replayed on the CPU: same plan, same work of every thread.

What is not replayed is the launch itself and the few lines that hand tensors to it.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_kernels._extension import why_not_loaded
from tests.csrc import host


def copy_by_threads(
    tensors: list[Tensor],
    num_shards: int,
    dim: int,
    packed: Tensor | None = None,
    *,
    is_packing: bool = True,
    targets: list[int] | None = None,
    force_wide: bool = False,
) -> int:
    """What a launch does to these tensors. Returns the bytes of its vectors; 0 where it asks for contiguous tensors."""
    if tensors[0].numel() == 0:
        return 16

    def numbers(values: list[int]) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    strides = [stride for tensor in tensors for stride in tensor.stride()]
    return library().replay_copy(
        int(is_packing), numbers([tensor.data_ptr() for tensor in tensors]), numbers(strides),
        numbers(list(tensors[0].shape)), *map(ctypes.c_int64, (
            len(tensors), tensors[0].dim(), dim, tensors[0].element_size(), num_shards,
            0 if packed is None else packed.data_ptr(),
        )), None if targets is None else numbers(targets), int(force_wide),
    )  # fmt: skip


class OnCPU(TorchDispatchMode):
    """Meanwhile the CUDA library's operators run by replay on CPU tensors, with arguments that fit their schemas."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.removeprefix("opensora_kernels::")
        return _INSTEAD.get(name, func)(*args, **(kwargs or {}))


def why_not_on_cpu() -> str | None:
    """The schemas are those of the CPU library."""
    return host.why_not() or why_not_loaded("cpu")


def pack(tensors: list[Tensor], num_shards: int, dim: int, *, force_wide: bool = False) -> Tensor:
    packed = _poisoned(sum(tensor.numel() for tensor in tensors), like=tensors[0])
    if not copy_by_threads(tensors, num_shards, dim, packed, force_wide=force_wide):
        dense = [tensor.contiguous() for tensor in tensors]
        assert copy_by_threads(dense, num_shards, dim, packed, force_wide=force_wide)
    return packed


def unpack(
    packed: Tensor, shape: list[int], num_shards: int, dim: int, num_tensors: int, *, force_wide: bool = False
) -> list[Tensor]:
    tensors = [_poisoned(*shape, like=packed) for _ in range(num_tensors)]
    assert copy_by_threads(tensors, num_shards, dim, packed, is_packing=False, force_wide=force_wide)
    return tensors


def push(tensors: list[Tensor], num_shards: int, dim: int, targets: list[int]) -> None:
    if not copy_by_threads(tensors, num_shards, dim, targets=targets):
        assert copy_by_threads([tensor.contiguous() for tensor in tensors], num_shards, dim, targets=targets)


def _poisoned(*shape: int, like: Tensor) -> Tensor:
    """Bytes that a copy which leaves something out would leave."""
    empty = torch.empty(shape, dtype=like.dtype)
    empty.view(-1).view(torch.uint8).fill_(0xA5)
    return empty


_INSTEAD: dict[str, Callable[..., Any]] = {
    "pack_shards_cuda_forward": pack,
    "unpack_shards_cuda_forward": unpack,
    "pack_shards_cuda_push": push,
}


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(host.library("pack_shards_replay.cpp", Path(_folder().name), level="-O1")))

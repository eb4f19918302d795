"""Copies between tensors and their shards in Triton, for pack_shards and unpack_shards.

A tensor cut along axis M is, to the kernel, A rows of M * I elements: A the product of the axes before, I of those
after. A shard is a run of columns; in the packed buffer its rows follow one another without gaps.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import launch
from opensora_kernels.tuning import configuration


def pack(tensors: list[Tensor], num_shards: int, dim: int) -> Tensor:
    """The shards of all `tensors`, one after another in a new (E,)."""
    first = tensors[0]
    packed = torch.empty(len(tensors) * first.numel(), dtype=first.dtype, device=first.device)
    for index, tensor in enumerate(tensors):
        _copy(packed, tensor, num_shards, dim, index, len(tensors), "pack")
    return packed


def unpack(packed: Tensor, tensors: list[Tensor], num_shards: int, dim: int) -> list[Tensor]:
    """Fill `tensors`, contiguous ones, from contiguous `packed`."""
    for index, tensor in enumerate(tensors):
        _copy(packed, tensor, num_shards, dim, index, len(tensors), "unpack")
    return tensors


def _copy(
    packed: Tensor, tensor: Tensor, num_shards: int, dim: int, index: int, num_tensors: int, direction: str
) -> None:
    """One launch for each tensor: they may lie anywhere, such as q, k, v, and stacking them would cost a pass."""
    if tensor.numel() == 0:
        return
    rows = _as_rows(tensor, dim)
    num_rows, inner = rows.shape[0], rows.shape[1] // tensor.shape[dim]
    vector = _vector(inner, rows.stride(0), tensor.element_size())
    size, num_longer = divmod(tensor.shape[dim], num_shards)  # the rule of shard_sizes
    widest = (size + (num_longer > 0)) * inner
    tile = _tile(direction, widest, tensor)
    num_column_blocks = triton.cdiv(widest, tile["BLOCK_C"])
    launch(
        _copy_shards_kernel,
        (triton.cdiv(num_rows, tile["BLOCK_R"]) * num_column_blocks * num_shards,),
        rows, packed, num_rows, inner // vector, rows.stride(0) // vector, num_column_blocks,
        num_shards, size, num_longer, index, num_tensors,
        IS_PACKING=direction == "pack", VECTOR=vector, **tile,
    )  # fmt: skip


def _as_rows(tensor: Tensor, dim: int) -> Tensor:
    """(A, M * I) with columns side by side: a view of dense tensors and of q, k and v in one packed projection."""
    shape = (math.prod(tensor.shape[:dim]), math.prod(tensor.shape[dim:]))
    rows = tensor.reshape(shape)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _vector(inner: int, stride: int, element_size: int) -> int:
    """How many elements, up to 16 bytes, divide every address: with it the compiler moves as many at once."""
    vector = 16 // element_size
    while inner % vector or stride % vector:
        vector //= 2
    return vector


def _tile(direction: str, widest: int, tensor: Tensor) -> dict[str, int]:
    elements = 8192 // tensor.element_size()  # each of 128 threads has four loads of 16 bytes under way
    block_c = min(triton.next_power_of_2(widest), elements)
    default = {"BLOCK_R": elements // block_c, "num_warps": 4}
    key = f"{direction} width={block_c} {tensor.dtype}"
    return {"BLOCK_C": block_c, **configuration("pack_shards", key, default, tensor.device)}


@triton.jit
def _copy_shards_kernel(
    rows_ptr, packed_ptr, num_rows, inner_vectors, stride_vectors, num_column_blocks,
    num_shards, size, num_longer, index, num_tensors,
    IS_PACKING: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Neighbouring programs take the shards of the same rows, which lie side by side in memory."""
    shard = (tl.program_id(0) % num_shards).to(tl.int64)
    block = tl.program_id(0) // num_shards
    start = shard * size + tl.minimum(shard, num_longer)
    own_size = size + tl.where(shard < num_longer, 1, 0).to(tl.int64)

    width = own_size * inner_vectors * VECTOR
    offs_r = (block // num_column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = (block % num_column_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < num_rows)[:, None] & (offs_c < width)[None, :]
    first_packed = (start * num_tensors + index * own_size) * num_rows * inner_vectors * VECTOR
    offs_packed = first_packed + offs_r[:, None] * width + offs_c[None, :]
    offs_rows = offs_r[:, None] * stride_vectors * VECTOR + start * inner_vectors * VECTOR + offs_c[None, :]
    if IS_PACKING:
        tl.store(packed_ptr + offs_packed, tl.load(rows_ptr + offs_rows, mask=mask), mask=mask)
    else:
        tl.store(rows_ptr + offs_rows, tl.load(packed_ptr + offs_packed, mask=mask), mask=mask)

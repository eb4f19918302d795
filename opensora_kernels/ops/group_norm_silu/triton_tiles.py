"""How group_norm_silu divides x between Triton programs.

Axes: B batch, C channels, T frames (one, unless statistics are per frame), P positions, G groups,
K chunks of positions.
Both memory formats are tiles [BLOCK_C, BLOCK_P], which differ in shape and strides alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import power_of_two
from opensora_kernels.tuning import configuration

# For 8 programs at a time on each of an H200's 132 multiprocessors: eight rounds, so that the last, half-empty one
# matters little; two with channels last, where each program leaves sums of 256 channels behind, not of one.
_FEWEST_PROGRAMS = {torch.contiguous_format: 8448, torch.channels_last_3d: 2112}


def tile_of(kernel: str, x_BCTP: Tensor, layout: torch.memory_format, num_elements: int) -> dict[str, int]:
    """About `num_elements`, with whole cache lines along the axis whose elements lie side by side."""
    num_channels, num_positions = x_BCTP.shape[1], x_BCTP.shape[3]
    if layout is torch.channels_last_3d:
        block_c = power_of_two(num_channels, most=256)
        block_p = power_of_two(num_positions, most=num_elements // block_c)
        name = "channels_last"
    else:
        block_p = power_of_two(num_positions, most=num_elements)
        block_c = power_of_two(num_channels, most=num_elements // block_p)
        name = "contiguous"
    default = {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": 4}
    key = f"{kernel} {name} C={num_channels} {x_BCTP.dtype}"
    return configuration("group_norm_silu", key, default, x_BCTP.device)


def num_tiles_of(x_BCTP: Tensor, layout: torch.memory_format, tile: dict[str, int]) -> int:
    """Tiles that one program reads where it leaves sums behind: more while programs are plenty, 16 at most."""
    (num_programs,), _, _ = grid_of(x_BCTP, tile, 1)
    num_tiles = 1
    while (
        num_tiles < 16
        and num_tiles * tile["BLOCK_P"] < x_BCTP.shape[3]
        and num_programs >= 2 * num_tiles * _FEWEST_PROGRAMS[layout]
    ):
        num_tiles *= 2
    return num_tiles


def fold_of(tile: dict[str, int]) -> int:
    """Pieces of a tile's positions, so that one has 8 elements, 16 bytes of bf16, for each of 128 threads."""
    return max(1, min(tile["BLOCK_P"], tile["BLOCK_C"] * tile["BLOCK_P"] // 1024))


def grid_of(x_BCTP: Tensor, tile: dict[str, int], num_tiles: int) -> tuple[tuple[int], int, int]:
    """The grid, the blocks of channels and the chunks of `num_tiles` tiles of positions."""
    num_samples, num_channels, num_frames, num_positions = x_BCTP.shape
    num_c_blocks = triton.cdiv(num_channels, tile["BLOCK_C"])
    num_chunks = triton.cdiv(num_positions, num_tiles * tile["BLOCK_P"])
    return (num_samples * num_frames * num_c_blocks * num_chunks,), num_c_blocks, num_chunks


@triton.jit
def place(program, num_c_blocks, num_chunks, BLOCK_C: tl.constexpr):
    """(sample * T + frame, channels, chunk) of a program; chunks go by first, so that neighbours read neighbours.

    Divides in int32, which takes a fifth of the instructions of int64: as many programs as a grid can have fit.
    """
    rest = program // num_chunks
    offs_c = (rest % num_c_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return rest // num_c_blocks, offs_c, (program % num_chunks).to(tl.int64)


@triton.jit
def start_of(ptr, plane, num_frames, stride_b, stride_t):
    """The first element of a sample's frame."""
    return ptr + (plane // num_frames).to(tl.int64) * stride_b + (plane % num_frames).to(tl.int64) * stride_t


@triton.jit
def folded(x, FOLD: tl.constexpr):
    """(BLOCK_C, BLOCK_P) to (BLOCK_C, BLOCK_P / FOLD): the sum of FOLD pieces; a thread has its part of each.

    A running sum in fewer registers, where summing whole rows would make warps wait for each other at every tile.
    """
    return tl.sum(tl.reshape(x, [x.shape[0], FOLD, x.shape[1] // FOLD]), 1)


@triton.jit
def load_channels(ptr, offs_c, mask_c, OTHERWISE: tl.constexpr, IS_GIVEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """A number of each channel in fp32, `OTHERWISE` where none are given."""
    values = tl.full([BLOCK_C], OTHERWISE, tl.float32)
    if IS_GIVEN:
        values = tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return values


@triton.jit
def load_pairs(ptr, plane, offs_c, mask_c, num_channels, num_groups):
    """For each channel the pair (, 2) that a table (B, T, G, 2) holds for its group."""
    group = offs_c.to(tl.int32) // (num_channels // num_groups)
    offs = (plane.to(tl.int64) * num_groups + group) * 2
    return tl.load(ptr + offs, mask=mask_c, other=0.0), tl.load(ptr + offs + 1, mask=mask_c, other=0.0)

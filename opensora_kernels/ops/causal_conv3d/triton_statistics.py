"""Means and deviations of channels and groups, merged from those of tiles of positions.

A table (B, T, K, C, 2) in fp32 holds the mean and the sum of squared deviations of every tile k of every frame; all
tiles have the same number of positions but a frame's last. Axes: B, C, T, H, W; P the H * W positions of a frame,
K tiles, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import launch, planes, power_of_two
from opensora_kernels.tuning import configuration

from .triton_call import Call


def frame_statistics(table: Tensor, tile_size: int, num_positions: int) -> Tensor:
    """(B, C, T, 2): mean and sum of squared deviations over each frame."""
    num_samples, num_frames, _, num_channels, _ = table.shape
    merged = torch.empty(num_samples, num_channels, num_frames, 2, dtype=torch.float32, device=table.device)
    _merge(table, merged.permute(0, 2, 1, 3), tile_size, num_positions, channels_per_block=32, merges_channels=False)
    return merged


def moments(call: Call) -> Tensor:
    """Mean and 1 / deviation of every group, of the clip or of each frame: (B, T or 1, G, 2) in fp32."""
    num_positions = call.x.shape[3] * call.x.shape[4]
    if call.statistics is not None:
        table, tile_size = call.statistics.permute(0, 2, 1, 3).unsqueeze(2), num_positions
    else:
        table, tile_size = _table(call)
    num_planes = table.shape[1] if call.per_frame else 1
    merged = torch.empty(table.shape[0], num_planes, call.num_groups, 2, dtype=torch.float32, device=table.device)
    channels_per_group = table.shape[3] // call.num_groups
    _merge(table, merged, tile_size, num_positions, channels_per_group, merges_channels=True, eps=call.eps)
    return merged


def tile_of(
    direction: str, num_positions: int, num_channels: int, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """Positions by channels of one program of a pass over a clip: 64 positions fill a line of memory in either order
    of axes."""
    block_c = power_of_two(num_channels, 64)
    default = {"BLOCK_P": power_of_two(num_positions, 4096 // block_c), "BLOCK_C": block_c}
    return configuration("causal_conv3d", f"{direction} C={num_channels} {dtype}", default | {"num_warps": 4}, device)


def _table(call: Call) -> tuple[Tensor, int]:
    x_BCTP = planes(call.x, call.layout, per_frame=True)
    num_samples, num_channels, num_frames, num_positions = x_BCTP.shape
    tile = tile_of("statistics", num_positions, num_channels, x_BCTP.dtype, x_BCTP.device)
    num_tiles = triton.cdiv(num_positions, tile["BLOCK_P"])
    table = torch.empty(num_samples, num_frames, num_tiles, num_channels, 2, dtype=torch.float32, device=x_BCTP.device)
    launch(
        _tile_statistics_kernel,
        (num_samples * num_frames * num_tiles, triton.cdiv(num_channels, tile["BLOCK_C"])),
        x_BCTP, table, num_frames, num_tiles, num_channels, num_positions, *x_BCTP.stride(), **tile,
    )  # fmt: skip
    return table, tile["BLOCK_P"]


def _merge(
    table: Tensor,
    merged_BTG2: Tensor,
    tile_size: int,
    num_positions: int,
    channels_per_block: int,
    *,
    merges_channels: bool,
    eps: float = 0.0,
) -> None:
    num_samples, num_frames, num_tiles, num_channels, _ = table.shape
    num_planes = merged_BTG2.shape[1]
    num_blocks = triton.cdiv(num_channels, channels_per_block)
    block_c = triton.next_power_of_2(channels_per_block)
    launch(
        _merge_kernel,
        (num_samples * num_planes * num_blocks,),
        table, merged_BTG2, num_planes, num_frames // max(num_planes, 1), num_tiles, tile_size, num_positions,
        num_blocks, channels_per_block, num_channels, eps, *table.stride(), *merged_BTG2.stride()[:3],
        MERGES_CHANNELS=merges_channels, BLOCK_C=block_c, BLOCK_K=max(1, 2048 // block_c), num_warps=4,
    )  # fmt: skip


@triton.jit
def _tile_statistics_kernel(
    x_ptr, table_ptr, num_frames, num_tiles, num_channels, num_positions,
    stride_xb, stride_xc, stride_xt, stride_xp, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Memory bound: reads x once. The deviations come from the tile's own mean, in registers, so nothing cancels."""
    plane_tile = tl.program_id(0).to(tl.int64)
    plane, tile = plane_tile // num_tiles, plane_tile % num_tiles
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_p, mask_c = offs_p < num_positions, offs_c < num_channels
    x_ptr += plane // num_frames * stride_xb + plane % num_frames * stride_xt
    mask = mask_p[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_p[:, None] * stride_xp + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
    x = x.to(tl.float32)
    mean_C = tl.sum(x, 0) / tl.minimum(num_positions - tile * BLOCK_P, BLOCK_P).to(tl.float32)
    deviation = tl.where(mask, x - mean_C[None, :], 0.0)
    table_ptrs = table_ptr + (plane_tile * num_channels + offs_c) * 2
    tl.store(table_ptrs, mean_C, mask=mask_c)
    tl.store(table_ptrs + 1, tl.sum(deviation * deviation, 0), mask=mask_c)


@triton.jit
def _merge_kernel(
    table_ptr, merged_ptr, num_planes, frames_per_plane, num_tiles, tile_size, num_positions,
    num_blocks, channels_per_block, num_channels, eps,
    stride_b, stride_t, stride_k, stride_c, stride_2, stride_mb, stride_mt, stride_mc,
    MERGES_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles of frames_per_plane frames, and with MERGES_CHANNELS those of a block of channels, into one.

    Chan's formula for many parts, squares = sum(squares_i) + sum(count_i (mean_i - mean)^2), never cancels. Gives the
    sum of squared deviations of each channel, or 1 / deviation of the group.
    """
    block = tl.program_id(0) % num_blocks
    plane = tl.program_id(0) // num_blocks % num_planes
    sample = (tl.program_id(0) // num_blocks // num_planes).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    channel = block * channels_per_block + offs_c
    mask_c = (offs_c < channels_per_block) & (channel < num_channels)
    table_ptr += sample * stride_b + plane.to(tl.int64) * frames_per_plane * stride_t
    channel_ptrs = table_ptr + channel.to(tl.int64) * stride_c
    num_entries = frames_per_plane * num_tiles
    # sums of differences from some value of the mean's size lose fewer digits
    shift_C = tl.load(channel_ptrs, mask=mask_c & (num_entries > 0), other=0.0).to(tl.float32)
    if MERGES_CHANNELS:
        shift_C = tl.zeros([BLOCK_C], tl.float32) + tl.sum(tl.where(offs_c == 0, shift_C, 0.0), 0)
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for start in range(0, num_entries, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        mask = (entry < num_entries)[:, None] & mask_c[None, :]
        count = tl.minimum(num_positions - entry % num_tiles * tile_size, tile_size).to(tl.float32)
        offs_e = (entry // num_tiles).to(tl.int64) * stride_t + (entry % num_tiles).to(tl.int64) * stride_k
        mean = tl.load(channel_ptrs[None, :] + offs_e[:, None], mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, count[:, None] * (mean - shift_C[None, :]), 0.0)
    size = tl.maximum(tl.cast(frames_per_plane, tl.float32) * tl.cast(num_positions, tl.float32), 1.0)
    total_C = tl.sum(total, 0)
    if MERGES_CHANNELS:
        size *= tl.cast(channels_per_block, tl.float32)
        total_C = tl.zeros([BLOCK_C], tl.float32) + tl.sum(total_C, 0)
    mean_C = shift_C + total_C / size

    squares = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for start in range(0, num_entries, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        mask = (entry < num_entries)[:, None] & mask_c[None, :]
        count = tl.minimum(num_positions - entry % num_tiles * tile_size, tile_size).to(tl.float32)
        offs_e = (entry // num_tiles).to(tl.int64) * stride_t + (entry % num_tiles).to(tl.int64) * stride_k
        table_ptrs = channel_ptrs[None, :] + offs_e[:, None]
        mean = tl.load(table_ptrs, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, mean - mean_C[None, :], 0.0)
        squares += tl.load(table_ptrs + stride_2, mask=mask, other=0.0).to(tl.float32)
        squares += count[:, None] * deviation * deviation
    squares_C = tl.sum(squares, 0)
    merged_ptr += sample * stride_mb + plane.to(tl.int64) * stride_mt
    if MERGES_CHANNELS:
        rstd = 1.0 / tl.sqrt(tl.sum(squares_C, 0) / size + eps)
        tl.store(merged_ptr + block.to(tl.int64) * stride_mc, tl.sum(tl.where(offs_c == 0, mean_C, 0.0), 0))
        tl.store(merged_ptr + block.to(tl.int64) * stride_mc + 1, rstd)
    else:
        tl.store(merged_ptr + channel.to(tl.int64) * stride_mc, mean_C, mask=mask_c)
        tl.store(merged_ptr + channel.to(tl.int64) * stride_mc + 1, squares_C, mask=mask_c)

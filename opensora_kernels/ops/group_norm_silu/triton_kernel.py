"""GroupNorm and SiLU in Triton: statistics of chunks, their merge, one pass that normalises.

Axes: B batch, C channels, T frames (one, unless statistics are per frame), P positions, G groups,
K chunks of positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, planes
from opensora_kernels._triton.silu import silu
from opensora_kernels.norms import memory_format

from .triton_backward import backward
from .triton_tiles import fold_of, folded, grid_of, load_channels, load_pairs, num_tiles_of, place, start_of, tile_of

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    activation: str,
    statistics: Tensor | None,
) -> list[Tensor]:
    """The result, and the mean and 1 / deviation of each group: (B, T, G, 2) in fp32."""
    layout = memory_format(x)
    x_BCTP = planes(x, layout, per_frame=per_frame)
    if statistics is None:
        moments_BTG2 = _moments(x_BCTP, layout, num_groups, eps)
    else:
        moments_BTG2 = _moments_from(statistics, num_groups, eps, per_frame, x.shape[3] * x.shape[4])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    tile = tile_of("forward", x_BCTP, layout, num_elements=4096)
    grid, num_c_blocks, num_chunks = grid_of(x_BCTP, tile, num_tiles=1)
    _, num_channels, num_frames, num_positions = x_BCTP.shape
    launch(
        _group_norm_silu_forward_kernel, grid,
        x_BCTP, dense(weight), dense(bias), moments_BTG2, out,
        num_channels, num_frames, num_positions, num_groups, num_c_blocks, num_chunks,
        *x_BCTP.stride(), *planes(out, layout, per_frame=per_frame).stride(),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SILU=activation == "silu", **tile,
    )  # fmt: skip
    return [out, moments_BTG2]


def _moments(x_BCTP: Tensor, layout: torch.memory_format, num_groups: int, eps: float) -> Tensor:
    num_samples, num_channels, num_frames, num_positions = x_BCTP.shape
    tile = tile_of("statistics", x_BCTP, layout, num_elements=4096)
    num_tiles = num_tiles_of(x_BCTP, layout, tile)
    grid, num_c_blocks, num_chunks = grid_of(x_BCTP, tile, num_tiles)
    partial_BTKC2 = torch.empty(
        num_samples, num_frames, num_chunks, num_channels, 2, dtype=torch.float32, device=x_BCTP.device
    )
    launch(
        _group_norm_statistics_kernel, grid,
        x_BCTP, partial_BTKC2, num_channels, num_frames, num_positions, num_c_blocks, num_chunks, num_tiles,
        *x_BCTP.stride(), FOLD=fold_of(tile), **tile,
    )  # fmt: skip
    return _merged(partial_BTKC2.permute(0, 1, 3, 2, 4), num_tiles * tile["BLOCK_P"], num_positions, num_groups, eps)


def _moments_from(statistics: Tensor, num_groups: int, eps: float, per_frame: bool, frame_size: int) -> Tensor:
    """From mean and sum of squared deviations over the `frame_size` positions of each frame, of x's or more frames."""
    table_BTCK2 = statistics.transpose(1, 2).unsqueeze(3) if per_frame else statistics.unsqueeze(1)
    return _merged(table_BTCK2, frame_size, frame_size * table_BTCK2.shape[3], num_groups, eps)


def _merged(table_BTCK2: Tensor, chunk_size: int, num_positions: int, num_groups: int, eps: float) -> Tensor:
    num_samples, num_frames, num_channels, num_chunks, _ = table_BTCK2.shape
    moments_BTG2 = torch.empty(num_samples, num_frames, num_groups, 2, dtype=torch.float32, device=table_BTCK2.device)
    launch(
        _group_norm_merge_kernel, (num_samples * num_frames * num_groups,),
        table_BTCK2, moments_BTG2, num_frames, num_groups, num_channels // num_groups, num_chunks,
        chunk_size, num_positions, eps, *table_BTCK2.stride(), BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return moments_BTG2


@triton.jit
def _group_norm_statistics_kernel(
    x_ptr, partial_ptr, num_channels, num_frames, num_positions, num_c_blocks, num_chunks, num_tiles,
    stride_xb, stride_xc, stride_xt, stride_xp,
    FOLD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a chunk of `num_tiles` tiles of positions.

    Summed as differences from the first tile's mean m: among n tiles of one size, (m - mean)^2 is at most n - 1
    variances, so that the subtraction at the end loses no more than log2(n) bits, 4 of 24 for a chunk of 16.
    """
    plane, offs_c, chunk = place(tl.program_id(0), num_c_blocks, num_chunks, BLOCK_C)
    mask_c = offs_c < num_channels
    start = chunk * num_tiles * BLOCK_P
    offs_p = start + tl.arange(0, BLOCK_P)
    x_ptrs = start_of(x_ptr, plane, num_frames, stride_xb, stride_xt) + offs_c[:, None] * stride_xc
    mask = mask_c[:, None] & (offs_p < num_positions)[None, :]
    x = tl.load(x_ptrs + offs_p[None, :] * stride_xp, mask=mask, other=0.0).to(tl.float32)
    shift_C = tl.sum(x, 1) / tl.minimum(num_positions - start, BLOCK_P).to(tl.float32)
    x = tl.where(mask, x - shift_C[:, None], 0.0)
    total, squares = folded(x, FOLD), folded(x * x, FOLD)
    for tile in range(1, num_tiles):
        offs_p = start + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = mask_c[:, None] & (offs_p < num_positions)[None, :]
        x = tl.load(x_ptrs + offs_p[None, :] * stride_xp, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - shift_C[:, None], 0.0)
        total += folded(x, FOLD)
        squares += folded(x * x, FOLD)
    count = tl.minimum(num_positions - start, num_tiles * BLOCK_P).to(tl.float32)
    total_C = tl.sum(total, 1)
    partial_ptrs = partial_ptr + ((plane.to(tl.int64) * num_chunks + chunk) * num_channels + offs_c) * 2
    tl.store(partial_ptrs, shift_C + total_C / count, mask=mask_c)
    tl.store(partial_ptrs + 1, tl.sum(squares, 1) - total_C * total_C / count, mask=mask_c)


@triton.jit
def _group_norm_merge_kernel(
    table_ptr, moments_ptr, num_frames, num_groups, channels_per_group, num_chunks, chunk_size, num_positions, eps,
    stride_b, stride_t, stride_c, stride_k, stride_2, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group from (mean, sum of squared deviations) of its channels' chunks, the last of which may be shorter.

    Chan's formula for many parts: squares = sum(squares_i) + sum(count_i (mean_i - mean)^2), which never cancels.
    """
    program = tl.program_id(0)
    plane = program // num_groups
    first_ptr = start_of(table_ptr, plane, num_frames, stride_b, stride_t)
    first_ptr += (program % num_groups).to(tl.int64) * channels_per_group * stride_c
    has_entries = channels_per_group * num_chunks > 0
    # of the order of the mean: sums of differences round less
    shift = tl.load(first_ptr, mask=has_entries, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels_per_group * num_chunks, BLOCK):
        offs, mask, count = _entries(
            start, channels_per_group, num_chunks, chunk_size, num_positions, stride_c, stride_k, BLOCK
        )
        mean = tl.load(first_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, count * (mean - shift), 0.0)
    num_elements = tl.cast(channels_per_group, tl.float32) * tl.cast(num_positions, tl.float32)
    group_mean = shift + tl.sum(total, 0) / num_elements

    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels_per_group * num_chunks, BLOCK):
        offs, mask, count = _entries(
            start, channels_per_group, num_chunks, chunk_size, num_positions, stride_c, stride_k, BLOCK
        )
        off_mean = tl.load(first_ptr + offs, mask=mask, other=0.0).to(tl.float32) - group_mean
        within = tl.load(first_ptr + offs + stride_2, mask=mask, other=0.0).to(tl.float32)
        squares += tl.where(mask, within + count * off_mean * off_mean, 0.0)
    moments_ptr += program.to(tl.int64) * 2
    tl.store(moments_ptr, group_mean)
    tl.store(moments_ptr + 1, 1.0 / tl.sqrt(tl.sum(squares, 0) / num_elements + eps))


@triton.jit
def _entries(
    start, channels_per_group, num_chunks, chunk_size, num_positions, stride_c, stride_k, BLOCK: tl.constexpr
):  # fmt: skip
    """Where the table holds the entries from `start` on, which exist, and how many positions each counts."""
    index = start + tl.arange(0, BLOCK)
    channel, chunk = (index % channels_per_group).to(tl.int64), (index // channels_per_group).to(tl.int64)
    count = tl.minimum(num_positions - chunk * chunk_size, chunk_size).to(tl.float32)
    return channel * stride_c + chunk * stride_k, index < channels_per_group * num_chunks, count


@triton.jit
def _group_norm_silu_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, moments_ptr, out_ptr,
    num_channels, num_frames, num_positions, num_groups, num_c_blocks, num_chunks,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_ob, stride_oc, stride_ot, stride_op,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # From x's end to its start: what the pass before this one, or the convolution, left in the cache is the end.
    plane, offs_c, chunk = place(tl.num_programs(0) - 1 - tl.program_id(0), num_c_blocks, num_chunks, BLOCK_C)
    mask_c = offs_c < num_channels
    offs_p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = mask_c[:, None] & (offs_p < num_positions)[None, :]
    x_ptrs = start_of(x_ptr, plane, num_frames, stride_xb, stride_xt) + offs_c[:, None] * stride_xc
    x = tl.load(x_ptrs + offs_p[None, :] * stride_xp, mask=mask, other=0.0)
    mean_C, rstd_C = load_pairs(moments_ptr, plane, offs_c, mask_c, num_channels, num_groups)
    weight_C = load_channels(weight_ptr, offs_c, mask_c, 1.0, HAS_WEIGHT, BLOCK_C)
    bias_C = load_channels(bias_ptr, offs_c, mask_c, 0.0, HAS_BIAS, BLOCK_C)
    out = (x.to(tl.float32) - mean_C[:, None]) * (rstd_C * weight_C)[:, None] + bias_C[:, None]
    out = out.to(x.dtype)
    if HAS_SILU:
        wide = out.to(tl.float32)  # of the rounded value, as the unfused chain
        out = silu(wide).to(x.dtype)
    out_ptrs = start_of(out_ptr, plane, num_frames, stride_ob, stride_ot) + offs_c[:, None] * stride_oc
    tl.store(out_ptrs + offs_p[None, :] * stride_op, out, mask=mask)

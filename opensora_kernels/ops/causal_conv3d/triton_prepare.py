"""One pass that writes what a convolution reads: norm, SiLU, channels last and, on request, the padding and the state.

Axes: B batch, C channels, T frames, H height, W width, P positions of a frame, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, planes, power_of_two
from opensora_kernels._triton.convolution import Source, channels_last
from opensora_kernels._triton.silu import silu
from opensora_kernels.tuning import configuration

from .triton_call import Call
from .triton_statistics import tile_of


def prepared(call: Call, moments_BTG2: Tensor | None, *, padded: bool) -> Tensor:
    """(B, T, H, W, C), contiguous: x after norm and activation; with `padded`, behind the state or the frames in front
    of it, and within the borders that PyTorch's convolution does not add itself."""
    num_samples, num_channels, num_frames, height, width = call.x.shape
    num_front = call.num_front if padded else 0
    left, right, top, bottom = call.written_space_pad if padded else (0,) * 4
    sizes = [num_frames + num_front, height + top + bottom, width + left + right]
    out = torch.empty(num_samples, *sizes, num_channels, dtype=call.x.dtype, device=call.x.device)
    x_BCTP = planes(call.x, call.layout, per_frame=True)
    state = call.state if padded else None
    state_BCTP = None if state is None else planes(state, call.layout, per_frame=True)
    tile = _tile(call, sizes[1] * sizes[2])
    launch(
        _prepare_kernel,
        (
            num_samples * sizes[0] * triton.cdiv(sizes[1] * sizes[2], tile["BLOCK_P"]),
            triton.cdiv(num_channels, tile["BLOCK_C"]),
        ),
        x_BCTP, state_BCTP, moments_BTG2, dense(call.norm_weight), dense(call.norm_bias), out,
        num_channels, call.num_groups, num_front, height, width, *sizes, top, left,
        *x_BCTP.stride(), *(state_BCTP.stride() if state is not None else (0,) * 4), call.eps, num_channels**0.5,
        **norm_constants(call, moments_BTG2), PADS=any((left, right, top, bottom)), TIME_PADDING=call.time_padding,
        SPACE_PADDING=call.space_padding, HAS_STATE=state is not None, **tile,
    )  # fmt: skip
    return out


def source_of(call: Call, moments_BTG2: Tensor | None) -> Source:
    """What the convolution reads, without padding."""
    if call.reads_x_itself and call.layout is torch.channels_last_3d:
        x_BTHWC = channels_last(call.x)
    else:
        x_BTHWC = prepared(call, moments_BTG2, padded=False)
    state_BTHWC = None if call.state is None else call.state.permute(0, 2, 3, 4, 1).contiguous()
    return Source(x_BTHWC, state_BTHWC, call.time_padding, call.space_padding)


def norm_constants(call: Call, moments_BTG2: Tensor | None) -> dict[str, object]:
    return {
        "NORM": call.norm,
        "HAS_WEIGHT": call.norm_weight is not None,
        "HAS_BIAS": call.norm_bias is not None,
        "HAS_SILU": call.activation == "silu",
        "PER_FRAME": moments_BTG2 is not None and call.per_frame,
    }


def _tile(call: Call, num_positions: int) -> dict[str, int]:
    num_channels, dtype, device = call.x.shape[1], call.x.dtype, call.x.device
    if call.norm != "rms":
        return tile_of("prepare", num_positions, num_channels, dtype, device)
    block_c = triton.next_power_of_2(num_channels)  # all of them: their length is a sum over channels
    block_p = power_of_two(num_positions, max(8192 // block_c, 8))
    default = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8}
    return configuration("causal_conv3d", f"prepare rms C={num_channels} {dtype}", default, device)


@triton.jit
def group_affine(
    moments_ptr, weight_ptr, bias_ptr, sample, frame, num_frames, offs_c, mask_c, num_channels, num_groups,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PER_FRAME: tl.constexpr,
):  # fmt: skip
    """Mean, 1 / deviation, weight and bias of each channel, in fp32."""
    plane = sample * num_frames + frame if PER_FRAME else sample
    ptrs = moments_ptr + (plane * num_groups + offs_c // (num_channels // num_groups)) * 2
    mean_C = tl.load(ptrs, mask=mask_c, other=0.0)
    rstd_C = tl.load(ptrs + 1, mask=mask_c, other=0.0)
    weight_C, bias_C = channel_weights(weight_ptr, bias_ptr, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS)
    return mean_C, rstd_C, weight_C, bias_C


@triton.jit
def channel_weights(weight_ptr, bias_ptr, offs_c, mask_c, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    weight_C = tl.where(mask_c, 1.0, 0.0)
    bias_C = tl.where(mask_c, 0.0, 0.0)
    if HAS_WEIGHT:
        weight_C = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return weight_C, bias_C


@triton.jit
def unit_rms(x, eps, root):
    """Unit vectors over channels, times root(C), each rounded to x's dtype; and the lengths, at least eps."""
    wide = x.to(tl.float32)
    length_P = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), eps)
    unit = (wide / length_P[:, None]).to(x.dtype)
    return unit, (unit.to(tl.float32) * root).to(x.dtype), length_P


@triton.jit
def rms_affine(scaled, weight_C, bias_C, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """PyTorch rounds after the product and after the sum."""
    if HAS_WEIGHT:
        scaled = (scaled.to(tl.float32) * weight_C[None, :]).to(scaled.dtype)
    if HAS_BIAS:
        scaled = (scaled.to(tl.float32) + bias_C[None, :]).to(scaled.dtype)
    return scaled


@triton.jit
def _prepare_kernel(
    x_ptr, state_ptr, moments_ptr, weight_ptr, bias_ptr, out_ptr,
    num_channels, num_groups, num_front, height, width, num_frames_out, height_out, width_out, top, left,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_sb, stride_sc, stride_st, stride_sp, eps, root,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    PER_FRAME: tl.constexpr, PADS: tl.constexpr, TIME_PADDING: tl.constexpr, SPACE_PADDING: tl.constexpr,
    HAS_STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Memory bound: reads x once (a second time where it is repeated in the padding) and writes the result once."""
    num_tiles = tl.cdiv(height_out * width_out, BLOCK_P)
    plane_tile = tl.program_id(0).to(tl.int64)
    plane, tile = plane_tile // num_tiles, plane_tile % num_tiles
    sample, frame = plane // num_frames_out, plane % num_frames_out - num_front
    offs_out = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_out, mask_c = offs_out < height_out * width_out, offs_c < num_channels
    offs_p, mask_p = offs_out, mask_out
    if PADS:
        row, column = offs_out // width_out - top, offs_out % width_out - left
        if SPACE_PADDING == "zeros":
            mask_p &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
        else:
            if SPACE_PADDING == "reflect":
                row, column = tl.abs(row), tl.abs(column)
                row, column = height - 1 - tl.abs(height - 1 - row), width - 1 - tl.abs(width - 1 - column)
            row = tl.minimum(tl.maximum(row, 0), height - 1)
            column = tl.minimum(tl.maximum(column, 0), width - 1)
        offs_p = row * width + column
    mask = mask_p[:, None] & mask_c[None, :]
    out_ptrs = out_ptr + (plane * (height_out * width_out) + offs_out)[:, None] * num_channels + offs_c[None, :]
    mask_stored = mask_out[:, None] & mask_c[None, :]

    if HAS_STATE and frame < 0:
        state_ptr += sample * stride_sb + (frame + num_front) * stride_st
        x = tl.load(state_ptr + offs_p[:, None] * stride_sp + offs_c[None, :] * stride_sc, mask=mask, other=0.0)
        tl.store(out_ptrs, x, mask=mask_stored)
    else:
        if TIME_PADDING != "replicate":
            mask &= frame >= 0
        frame = tl.maximum(frame, 0)
        x_ptr += sample * stride_xb + frame * stride_xt
        x = tl.load(x_ptr + offs_p[:, None] * stride_xp + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
        if NORM == "group":
            mean_C, rstd_C, weight_C, bias_C = group_affine(
                moments_ptr, weight_ptr, bias_ptr, sample, frame, num_frames_out - num_front, offs_c, mask_c,
                num_channels, num_groups, HAS_WEIGHT, HAS_BIAS, PER_FRAME,
            )  # fmt: skip
            normed = (x.to(tl.float32) - mean_C[None, :]) * (rstd_C * weight_C)[None, :] + bias_C[None, :]
            x = normed.to(x.dtype)
        if NORM == "rms":
            weight_C, bias_C = channel_weights(weight_ptr, bias_ptr, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS)
            _, scaled, _ = unit_rms(x, eps, root)
            x = rms_affine(scaled, weight_C, bias_C, HAS_WEIGHT, HAS_BIAS)
        if HAS_SILU:
            x = silu(x.to(tl.float32)).to(x.dtype)
        tl.store(out_ptrs, tl.where(mask, x, 0.0).to(x.dtype), mask=mask_stored)

"""3-D convolution in Triton as one matrix product: rows are output positions, the sum runs over taps and channels.

The padding is folded into the loads: each tap computes which input row and column, and which frame of the clip or of
the state before it, a position reads. Axes: B batch, C input and O output channels (of all groups), T frames, H height,
W width, P the H * W positions of a frame, K taps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, power_of_two
from opensora_kernels.tuning import configuration


class Taps(NamedTuple):
    """Along one axis, output i reads the inputs i * step + start + k * dilation for k < count."""

    count: int
    step: int = 1
    start: int = 0
    dilation: int = 1


class Source(NamedTuple):
    """What a convolution reads: channels last, every frame dense, and what lies around it.

    state_BTHWC: frames before x; input frame 0 is then the state's first. Frames before x or state, and rows and
    columns outside, are zeros, copies of the nearest, or (rows and columns) mirrored.
    """

    x_BTHWC: Tensor
    state_BTHWC: Tensor | None = None
    time_padding: str = "zeros"
    space_padding: str = "zeros"

    @property
    def num_state(self) -> int:
        return 0 if self.state_BTHWC is None else self.state_BTHWC.shape[1]


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, T, H, W) as (B, T, H, W, C) with dense frames: a view where x is so in memory, else a copy."""
    x_BTHWC = x.permute(0, 2, 3, 4, 1)
    width, num_channels = x_BTHWC.shape[3:]
    wanted = (width * num_channels, num_channels, 1)
    pairs = zip(x_BTHWC.shape[2:], x_BTHWC.stride()[2:], wanted, strict=True)
    return x_BTHWC if all(size == 1 or stride == want for size, stride, want in pairs) else x_BTHWC.contiguous()


def convolve(
    op: str,
    source: Source,
    weight_OKC: Tensor,
    taps: tuple[Taps, Taps, Taps],
    out: Tensor,
    *,
    groups: int = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shares: Tensor | None = None,
    wants_statistics: bool = False,
) -> tuple[Tensor, int] | None:
    """Fill out (B, O, T', H', W'), of any strides, with the sums over `taps` (T, H, W), plus bias, plus residual.

    weight_OKC (O, kt * kh * kw, C / groups). Rounds to out's dtype after the bias and after the residual.
    With `shares` (2,) the result is shares[0] * residual + shares[1] * (sums + bias), each term rounded.
    With `wants_statistics`, returns mean and sum of squared deviations of each channel over the tiles that a frame of
    the result is made of, (B, T', tiles, O, 2) in fp32, and the size of all tiles but a frame's last.
    """
    x_BTHWC, state_BTHWC, weight_OKC = source.x_BTHWC, source.state_BTHWC, weight_OKC.contiguous()
    num_samples, num_out, num_frames, height, width = out.shape
    num_channels = weight_OKC.shape[2]
    tile = _tile(op, x_BTHWC, weight_OKC, height * width, groups)
    num_tiles = triton.cdiv(height * width, tile["BLOCK_P"])
    num_blocks = groups * triton.cdiv(num_out // groups, tile["BLOCK_O"])
    partial = None
    if wants_statistics:
        partial = torch.empty(num_samples, num_frames, num_tiles, num_out, 2, dtype=torch.float32, device=out.device)
    launch(
        _convolution_kernel,
        (num_samples * num_frames * num_tiles * num_blocks,),
        x_BTHWC, state_BTHWC, weight_OKC, dense(bias), residual, shares, out, partial,
        *x_BTHWC.shape[1:4], source.num_state, num_frames, height * width, width, num_channels, num_out // groups,
        *(axis.start for axis in taps), *x_BTHWC.stride()[:2],
        *(residual.stride() if residual is not None else (0,) * 5), *out.stride(),
        **_constants(source, taps), GROUPS=groups, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        MIXES=shares is not None, WANTS_STATISTICS=wants_statistics, **_addresses(out, residual),
        NUM_C_BLOCKS=triton.cdiv(num_channels, tile["BLOCK_C"]), **tile,
    )  # fmt: skip
    return None if partial is None else (partial, tile["BLOCK_P"])


def block(size: int, most: int) -> int:
    """The smallest power of two that holds `size`, at least what a matrix product takes and at most `most`."""
    return max(16, power_of_two(size, most))


def channel_block(num_channels: int, most: int) -> int:
    """Channels read at once: a divisor of their number if that is not small, since 96 of 128 would waste a quarter."""
    size = block(num_channels, most)
    while size > 32 and num_channels % size:
        size //= 2
    return size


def _tile(op: str, x: Tensor, weight_OKC: Tensor, num_positions: int, groups: int) -> dict[str, Any]:
    num_out, num_taps, num_channels = weight_OKC.shape
    # Without tensor cores a thread holds its share of both factors in registers as well.
    most, most_channels = (64, 32) if x.dtype is torch.float32 else (128, 64)
    default = {
        "BLOCK_P": block(num_positions, most),
        "BLOCK_O": block(num_out // groups, most),
        "BLOCK_C": channel_block(num_channels, most_channels),
    }
    default["num_warps"] = 8 if default["BLOCK_P"] * default["BLOCK_O"] > 64 * 64 else 4
    default["num_stages"] = 3
    key = f"forward O={num_out} C={num_channels} K={num_taps} {x.dtype}"
    return configuration(op, key, default, x.device)


def _addresses(*tensors: Tensor | None) -> dict[str, bool]:
    """Whether positions of a frame of all (B, O, T, H, W) lie evenly spaced, and whether a frame and its channels span
    more than 32 bits can count: one address in 64 bits for each of a thread's 64 results would fill its registers."""
    given = [tensor for tensor in tensors if tensor is not None]
    spans = [sum((tensor.shape[axis] - 1) * tensor.stride(axis) for axis in (1, 3, 4)) for tensor in given]
    is_dense = all(tensor.shape[3] == 1 or tensor.stride(3) == tensor.shape[4] * tensor.stride(4) for tensor in given)
    return {"IS_DENSE": is_dense, "IS_WIDE": max(spans) >= 2**31}


def _constants(source: Source, taps: tuple[Taps, Taps, Taps]) -> dict[str, Any]:
    named = {}
    for name, axis in zip("THW", taps, strict=True):
        named |= {f"K{name}": axis.count, f"STEP_{name}": axis.step, f"DILATION_{name}": axis.dilation}
    return named | {
        "TIME_PADDING": source.time_padding,
        "SPACE_PADDING": source.space_padding,
        "HAS_STATE": source.state_BTHWC is not None,
    }


@triton.jit
def frame_pointer(
    x_ptr, state_ptr, sample, frame, num_state, frame_size, stride_xb, stride_xt, HAS_STATE: tl.constexpr
):  # fmt: skip
    """Where input `frame` begins, of the clip or of the dense state before it; frames before both are the first."""
    frame_ptr = x_ptr + sample * stride_xb + tl.maximum(frame - num_state, 0).to(tl.int64) * stride_xt
    if HAS_STATE:
        state_frame = tl.minimum(frame, num_state - 1).to(tl.int64)
        frame_ptr = tl.where(frame < num_state, state_ptr + (sample * num_state + state_frame) * frame_size, frame_ptr)
    return frame_ptr


@triton.jit
def folded(index, size, PADDING: tl.constexpr):
    """The row or column inside that one outside copies."""
    if PADDING == "reflect":
        index = tl.abs(index)
        index = size - 1 - tl.abs(size - 1 - index)
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def _convolution_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, residual_ptr, shares_ptr, out_ptr, partial_ptr,
    num_frames_in, height_in, width_in, num_state, num_frames, num_positions, width, num_channels, num_out,
    start_t, start_h, start_w, stride_xb, stride_xt,
    stride_rb, stride_ro, stride_rt, stride_rh, stride_rw, stride_ob, stride_oo, stride_ot, stride_oh, stride_ow,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEP_T: tl.constexpr, STEP_H: tl.constexpr,
    STEP_W: tl.constexpr, DILATION_T: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TIME_PADDING: tl.constexpr, SPACE_PADDING: tl.constexpr, HAS_STATE: tl.constexpr, GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MIXES: tl.constexpr, WANTS_STATISTICS: tl.constexpr,
    IS_DENSE: tl.constexpr, IS_WIDE: tl.constexpr, NUM_C_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P positions of one output frame by BLOCK_O output channels of one group.

    A program never leaves its frame: the frame that a tap reads is then one number, so that padding in time costs no
    compare per position, and frames of zeros no turn of the loop. Programs of one tile follow one another: they read
    the same input.
    """
    num_o_blocks = tl.cdiv(num_out, BLOCK_O)
    o_block = tl.program_id(0) % (GROUPS * num_o_blocks)
    group = o_block // num_o_blocks
    plane_tile = tl.program_id(0) // (GROUPS * num_o_blocks)
    num_tiles = tl.cdiv(num_positions, BLOCK_P)
    plane = plane_tile // num_tiles
    tile = plane_tile % num_tiles
    sample = (plane // num_frames).to(tl.int64)
    frame = plane % num_frames

    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_o = (o_block % num_o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_c = tl.arange(0, BLOCK_C)
    mask_p, mask_o = offs_p < num_positions, offs_o < num_out
    row, column = offs_p // width, offs_p % width
    first_row, first_column = row * STEP_H + start_h, column * STEP_W + start_w
    frame_size = tl.cast(height_in, tl.int64) * width_in * (GROUPS * num_channels)
    offs_first = (first_row * width_in + first_column).to(tl.int64) * (GROUPS * num_channels)
    x_ptr += group * num_channels
    if HAS_STATE:
        state_ptr += group * num_channels
    o_in_all = group * num_out + offs_o
    weight_ptrs = weight_ptr + (o_in_all.to(tl.int64) * (KT * KH * KW * num_channels))[:, None] + offs_c[None, :]

    first_frame = frame * STEP_T + start_t
    first_tap, end_tap = 0, KT
    if TIME_PADDING != "replicate":  # taps on frames of zeros are left out
        first_tap = tl.cdiv(tl.maximum(-first_frame, 0), DILATION_T)
        num_frames_left = tl.maximum(num_state + num_frames_in - first_frame, 0)
        end_tap = tl.minimum(tl.cdiv(num_frames_left, DILATION_T), KT)

    acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for turn in range(first_tap * (KH * KW * NUM_C_BLOCKS), end_tap * (KH * KW * NUM_C_BLOCKS)):
        tap = turn // NUM_C_BLOCKS
        start_c = (turn % NUM_C_BLOCKS) * BLOCK_C
        tap_t = tap // (KH * KW)
        tap_h = tap // KW % KH
        tap_w = tap % KW
        mask_c = offs_c < num_channels - start_c
        frame_ptr = frame_pointer(
            x_ptr, state_ptr, sample, first_frame + tap_t * DILATION_T, num_state, frame_size, stride_xb, stride_xt,
            HAS_STATE,
        )  # fmt: skip
        read_row, read_column = first_row + tap_h * DILATION_H, first_column + tap_w * DILATION_W
        if SPACE_PADDING == "zeros":
            is_inside = (read_row >= 0) & (read_row < height_in) & (read_column >= 0) & (read_column < width_in)
            mask_x = (mask_p & is_inside)[:, None] & mask_c[None, :]
            step = (tap_h * DILATION_H * width_in + tap_w * DILATION_W).to(tl.int64) * (GROUPS * num_channels)
            x_ptrs = (frame_ptr + step + start_c) + offs_first[:, None] + offs_c[None, :]
        else:
            mask_x = mask_p[:, None] & mask_c[None, :]
            pixel = folded(read_row, height_in, SPACE_PADDING) * width_in
            pixel += folded(read_column, width_in, SPACE_PADDING)
            x_ptrs = (frame_ptr + start_c) + (pixel.to(tl.int64) * (GROUPS * num_channels))[:, None] + offs_c[None, :]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        weight = tl.load(
            weight_ptrs + (tap * num_channels + start_c), mask=mask_o[:, None] & mask_c[None, :], other=0.0
        )
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_in_all, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    out = acc.to(out_ptr.dtype.element_ty)  # the reference rounds here
    mask = mask_p[:, None] & mask_o[None, :]
    if IS_WIDE:
        o_in_all, offs_p, row, column = (
            o_in_all.to(tl.int64),
            offs_p.to(tl.int64),
            row.to(tl.int64),
            column.to(tl.int64),
        )
    if HAS_RESIDUAL:
        residual_ptr += sample * stride_rb + frame.to(tl.int64) * stride_rt
        offs_r = offs_p * stride_rw if IS_DENSE else row * stride_rh + column * stride_rw
        offs_r = offs_r[:, None] + (o_in_all * stride_ro)[None, :]
        residual = tl.load(residual_ptr + offs_r, mask=mask, other=0.0).to(tl.float32)
        if MIXES:
            residual = (residual * tl.load(shares_ptr).to(tl.float32)).to(out.dtype).to(tl.float32)
            out = (out.to(tl.float32) * tl.load(shares_ptr + 1).to(tl.float32)).to(out.dtype)
        out = (out.to(tl.float32) + residual).to(out.dtype)
    out_ptr += sample * stride_ob + frame.to(tl.int64) * stride_ot
    offs_out = offs_p * stride_ow if IS_DENSE else row * stride_oh + column * stride_ow
    tl.store(out_ptr + offs_out[:, None] + (o_in_all * stride_oo)[None, :], out, mask=mask)
    if WANTS_STATISTICS:
        wide = out.to(tl.float32)
        count = tl.minimum(num_positions - tile * BLOCK_P, BLOCK_P).to(tl.float32)
        mean_O = tl.sum(tl.where(mask_p[:, None], wide, 0.0), 0) / count
        # what the first sum lost: a gradient of these sums adds (out - mean) up again, where it would not cancel
        mean_O += tl.sum(tl.where(mask_p[:, None], wide - mean_O[None, :], 0.0), 0) / count
        deviation = tl.where(mask_p[:, None], wide - mean_O[None, :], 0.0)
        partial_ptrs = partial_ptr + (plane_tile.to(tl.int64) * (GROUPS * num_out) + o_in_all) * 2
        tl.store(partial_ptrs, mean_O, mask=mask_o)
        tl.store(partial_ptrs + 1, tl.sum(deviation * deviation, 0), mask=mask_o)

"""Gradients of `convolution.convolve` with respect to its input and its weight, and of the padding.

The gradient of the input is a convolution of the result's gradient with the taps in reverse, one for each residue of
the input's position modulo the stride. Axes as in convolution; G gradient of the result, S splits of a sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import launch
from opensora_kernels._triton.convolution import Source, Taps, block, convolve, folded, frame_pointer
from opensora_kernels.tuning import configuration

# Four programs for each of an H200's 132 multiprocessors; with blocks of 128 x 128 their sums take 35 MB.
_NUM_WEIGHT_PROGRAMS = 528


def input_gradient(
    op: str,
    grad: Source,
    weight: Tensor,
    taps: tuple[Taps, Taps, Taps],
    out: Tensor,
    origin: list[int],
    groups: int,
    convolve: Callable[..., Any] = convolve,
) -> None:
    """Fill out (B, C, T, H, W), of any strides: the gradient at each input position from `origin` on.

    Positions outside the clip (negative ones, say) get the gradient of the padding there. weight is the convolution's
    own (O, C / groups, kt, kh, kw), `taps` are the convolution's. `convolve`: Triton's, or one that takes the same.
    """
    phases = [_phases(*given) for given in zip(taps, origin, out.shape[2:], strict=True)]
    flipped = weight.flip(2, 3, 4)
    for combined in itertools.product(*phases):
        where = tuple(slice(phase.first, None, axis.step) for phase, axis in zip(combined, taps, strict=True))
        part = out[(slice(None), slice(None), *where)]
        if any(phase.taps.count == 0 for phase in combined):
            part.zero_()
            continue
        turned = flipped[(slice(None), slice(None), *(phase.weights for phase in combined))]
        turned = turned.unflatten(0, (groups, -1)).permute(0, 2, 3, 4, 5, 1).flatten(0, 1).flatten(1, 3)
        convolve(op, grad, turned, tuple(phase.taps for phase in combined), part, groups=groups)


class _Phase(NamedTuple):
    """Along one axis, the input positions that share a residue modulo the stride, and the taps that read them."""

    first: int
    weights: slice  # of the reversed taps
    taps: Taps


def _phases(axis: Taps, origin: int, size: int) -> list[_Phase]:
    """Position p is read by output i through tap k where i * step + start + k * dilation = p."""
    found = []
    for residue in range(axis.step):
        first = (residue + axis.start - origin) % axis.step
        if first >= size:
            continue
        readers = [k for k in reversed(range(axis.count)) if (residue - k * axis.dilation) % axis.step == 0]
        if not readers:
            found.append(_Phase(first, slice(0, 0), Taps(0)))
            continue
        apart = readers[0] - readers[1] if len(readers) > 1 else axis.count
        start = (first + origin - axis.start - readers[0] * axis.dilation) // axis.step
        dilation = max(1, apart * axis.dilation // axis.step) if len(readers) > 1 else 1
        weights = slice(axis.count - 1 - readers[0], None, apart)
        found.append(_Phase(first, weights, Taps(len(readers), 1, start, dilation)))
    return found


def weight_gradient(
    op: str, source: Source, grad_BTHWG: Tensor, taps: tuple[Taps, Taps, Taps], groups: int, dtype: torch.dtype
) -> Tensor:
    """Of the weight (O, C / groups, kt, kh, kw), for grad_BTHWG (B, T', H', W', O) with channels side by side.

    Summed in fp32 in a fixed order: each program sums a share of the positions for one block of one tap, PyTorch the
    shares.
    """
    num_out, num_channels = grad_BTHWG.shape[4] // groups, source.x_BTHWC.shape[4] // groups
    num_samples, num_frames, height, width = grad_BTHWG.shape[:4]
    num_taps = taps[0].count * taps[1].count * taps[2].count
    tile = _weight_tile(op, source.x_BTHWC, num_out, num_channels, num_taps)
    num_programs = (
        num_taps * groups * triton.cdiv(num_out, tile["BLOCK_O"]) * triton.cdiv(num_channels, tile["BLOCK_C"])
    )
    num_chunks = num_samples * num_frames * triton.cdiv(height * width, tile["BLOCK_P"])
    num_splits = max(1, min(num_chunks, _NUM_WEIGHT_PROGRAMS // num_programs))
    partial_SOKC = torch.empty(
        num_splits, groups * num_out, num_taps, num_channels, dtype=torch.float32, device=grad_BTHWG.device
    )
    launch(
        _weight_gradient_kernel,
        (num_programs, num_splits),
        source.x_BTHWC, source.state_BTHWC, grad_BTHWG, partial_SOKC,
        *source.x_BTHWC.shape[1:4], source.num_state, num_frames, height, width, num_channels, num_out, num_chunks,
        *(axis.start for axis in taps), *source.x_BTHWC.stride()[:2], *grad_BTHWG.stride()[:4],
        *(axis.step for axis in taps), *(axis.dilation for axis in taps),
        KT=taps[0].count, KH=taps[1].count, KW=taps[2].count, TIME_PADDING=source.time_padding,
        SPACE_PADDING=source.space_padding, HAS_STATE=source.state_BTHWC is not None, GROUPS=groups, **tile,
    )  # fmt: skip
    sizes = [axis.count for axis in taps]
    return partial_SOKC.sum(0).unflatten(1, sizes).permute(0, 4, 1, 2, 3).to(dtype)


def _weight_tile(op: str, x: Tensor, num_out: int, num_channels: int, num_taps: int) -> dict[str, Any]:
    most, most_positions = (64, 32) if x.dtype is torch.float32 else (128, 64)
    default = {"BLOCK_O": block(num_out, most), "BLOCK_C": block(num_channels, most), "BLOCK_P": most_positions}
    default["num_warps"] = 8 if default["BLOCK_O"] * default["BLOCK_C"] > 64 * 64 else 4
    default["num_stages"] = 3
    key = f"weight O={num_out} C={num_channels} K={num_taps} {x.dtype}"
    return configuration(op, key, default, x.device)


def fold_space(grad: Tensor, space_pad: list[int], space_padding: str) -> Tensor:
    """The gradient of the clip inside grad (B, C, T, H, W), that of the padded one, which is overwritten.

    space_pad: (left, right, top, bottom). What was copied into the border gets the gradients of its copies.
    """
    left, right, top, bottom = space_pad
    for axis, before, after in ((4, left, right), (3, top, bottom)):
        size = grad.shape[axis] - before - after
        inside = grad.narrow(axis, before, size)
        lower, upper = grad.narrow(axis, 0, before), grad.narrow(axis, before + size, after)
        if space_padding == "replicate":
            if before:
                inside.narrow(axis, 0, 1).add_(lower.sum(axis, keepdim=True))
            if after:
                inside.narrow(axis, size - 1, 1).add_(upper.sum(axis, keepdim=True))
        elif space_padding == "reflect":
            if before:
                inside.narrow(axis, 1, before).add_(lower.flip(axis))
            if after:
                inside.narrow(axis, size - 1 - after, after).add_(upper.flip(axis))
        grad = inside
    return grad


def fold_time(grad: Tensor, time_pad: int, time_padding: str) -> Tensor:
    """As `fold_space`, for `time_pad` frames in front."""
    inside = grad.narrow(2, time_pad, grad.shape[2] - time_pad)
    if time_padding == "replicate" and time_pad:
        inside.narrow(2, 0, 1).add_(grad.narrow(2, 0, time_pad).sum(2, keepdim=True))
    return inside


@triton.jit
def _weight_gradient_kernel(
    x_ptr, state_ptr, grad_ptr, partial_ptr,
    num_frames_in, height_in, width_in, num_state, num_frames, height, width, num_channels, num_out, num_chunks,
    start_t, start_h, start_w, stride_xb, stride_xt, stride_gb, stride_gt, stride_gh, stride_gw,
    step_t, step_h, step_w, dilation_t, dilation_h, dilation_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TIME_PADDING: tl.constexpr, SPACE_PADDING: tl.constexpr,
    HAS_STATE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tap, BLOCK_O by BLOCK_C channels of one group, summed over a share of the chunks of BLOCK_P positions."""
    num_o_blocks, num_c_blocks = tl.cdiv(num_out, BLOCK_O), tl.cdiv(num_channels, BLOCK_C)
    tap = tl.program_id(0) % (KT * KH * KW)
    part = tl.program_id(0) // (KT * KH * KW)
    group = part // (num_o_blocks * num_c_blocks)
    o_block = part // num_c_blocks % num_o_blocks
    c_block = part % num_c_blocks
    offs_o = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_o, mask_c = offs_o < num_out, offs_c < num_channels
    x_ptr += group * num_channels
    if HAS_STATE:
        state_ptr += group * num_channels
    grad_ptr += group * num_out
    shift_t = start_t + tap // (KH * KW) * dilation_t
    shift_h = start_h + tap // KW % KH * dilation_h
    shift_w = start_w + tap % KW * dilation_w
    frame_size = tl.cast(height_in, tl.int64) * width_in * (GROUPS * num_channels)
    chunks_per_frame = tl.cdiv(height * width, BLOCK_P)
    share = tl.cdiv(num_chunks, tl.num_programs(1))
    first = tl.program_id(1) * share

    acc = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for chunk in range(first, tl.minimum(first + share, num_chunks)):
        plane = chunk // chunks_per_frame
        sample = (plane // num_frames).to(tl.int64)
        frame = plane % num_frames
        offs_p = chunk % chunks_per_frame * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < height * width
        row, column = offs_p // width, offs_p % width
        offs_g = row.to(tl.int64) * stride_gh + column.to(tl.int64) * stride_gw
        grad_frame_ptr = grad_ptr + sample * stride_gb + frame.to(tl.int64) * stride_gt
        grad = tl.load(
            grad_frame_ptr + offs_g[:, None] + offs_o[None, :], mask=mask_p[:, None] & mask_o[None, :], other=0.0
        )
        read_frame = frame * step_t + shift_t
        read_row, read_column = row * step_h + shift_h, column * step_w + shift_w
        mask_x = mask_p
        if SPACE_PADDING == "zeros":
            mask_x &= (read_row >= 0) & (read_row < height_in) & (read_column >= 0) & (read_column < width_in)
        else:
            read_row = folded(read_row, height_in, SPACE_PADDING)
            read_column = folded(read_column, width_in, SPACE_PADDING)
        if TIME_PADDING != "replicate":
            mask_x &= read_frame >= 0
        frame_ptr = frame_pointer(
            x_ptr, state_ptr, sample, read_frame, num_state, frame_size, stride_xb, stride_xt, HAS_STATE
        )
        offs_x = (read_row * width_in + read_column).to(tl.int64) * (GROUPS * num_channels)
        x = tl.load(frame_ptr + offs_x[:, None] + offs_c[None, :], mask=mask_x[:, None] & mask_c[None, :], other=0.0)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision="ieee")

    o_in_all = (group * num_out + offs_o).to(tl.int64)
    partial_ptr += tl.program_id(1).to(tl.int64) * (GROUPS * num_out) * (KT * KH * KW) * num_channels
    partial_ptrs = partial_ptr + ((o_in_all * (KT * KH * KW) + tap) * num_channels)[:, None] + offs_c[None, :]
    tl.store(partial_ptrs, acc, mask=mask_o[:, None] & mask_c[None, :])

"""Convolution of a clip with twice the rows and columns, without that clip, in Triton.

Row y = 2 q + r of the result reads upsampled rows y + k - top, which are rows q + (r + k - top) // 2 of the small clip:
the taps k that meet there are summed, in fp32. That leaves 2 x 2 taps of 3 x 3 for each phase r, s of rows and columns.
Axes: B batch, C channels, T frames, H height, W width; O output channels, K taps.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, power_of_two
from opensora_kernels._triton.convolution import Source, Taps, channels_last, convolve
from opensora_kernels._triton.convolution_gradients import fold_space, fold_time, weight_gradient

from .triton_call import Call

_OP = "upsample_conv3d"


def space_forward(call: Call, shares: Tensor | None, out: Tensor) -> None:
    """Fill out; with `shares`, mixed with the upsampled clip, whose every phase is the small one."""
    source = _source(call)
    for phase in _phases(call):
        residual = None if shares is None else call.x
        convolve(
            _OP, source, _summed(call.weight, phase), phase.taps(call), phase.of(out), bias=call.bias,
            residual=residual, shares=shares,
        )  # fmt: skip


def space_weight_gradient(call: Call, grad_BTHWO: Tensor) -> Tensor:
    """Each tap gets the gradients of the sums it is part of, one in each phase. In fp32."""
    source, total = _source(call), 0
    for phase in _phases(call):
        grad = phase.of(grad_BTHWO.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        of_sums = weight_gradient(_OP, source, grad, phase.taps(call), 1, torch.float32)
        for dim, axis in zip((3, 4), phase.axes, strict=True):
            of_sums = of_sums.repeat_interleave(2, dim).narrow(dim, -axis.first_of_sum, axis.count)
        total = total + of_sums
    return total


def space_input_gradient(call: Call, grad_BTHWO: Tensor) -> Tensor:
    """Small row i is upsampled rows 2 i and 2 i + 1: a convolution of stride 2, its taps sums of two neighbours."""
    left, _, top, _ = call.space_pad
    border = [(pad + 1) // 2 for pad in call.space_pad] if call.space_padding != "zeros" else [0] * 4
    front = call.time_pad if call.time_padding == "replicate" else 0
    num_samples, num_channels, num_frames, height, width = call.x.shape
    shape = [num_samples, num_frames + front, height + sum(border[2:]), width + sum(border[:2]), num_channels]
    padded = torch.empty(shape, dtype=call.x.dtype, device=call.x.device).permute(0, 4, 1, 2, 3)
    turned = call.weight.to(torch.float32).flip(2, 3, 4)
    turned = F.pad(turned, (0, 1)) + F.pad(turned, (1, 0))
    turned = F.pad(turned, (0, 0, 0, 1)) + F.pad(turned, (0, 0, 1, 0))
    weight_CKO = turned.permute(1, 2, 3, 4, 0).flatten(1, 3).to(call.x.dtype).contiguous()
    last_t, last_h, last_w = (size - 1 for size in call.weight.shape[2:])
    taps = (
        Taps(last_t + 1, 1, call.time_pad - last_t - front),
        Taps(last_h + 2, 2, top - last_h - 2 * border[2]),
        Taps(last_w + 2, 2, left - last_w - 2 * border[0]),
    )
    convolve(_OP, Source(grad_BTHWO), weight_CKO, taps, padded)
    return fold_time(fold_space(padded, border, call.small_space_padding), front, call.time_padding)


def _source(call: Call) -> Source:
    return Source(channels_last(call.x), None, call.time_padding, call.small_space_padding)


class _Axis(NamedTuple):
    """Along one axis, the positions 2 q + residue of the result and the taps of the small clip that they read."""

    residue: int
    count: int  # of the original taps
    pad: int

    @property
    def taps(self) -> Taps:
        first, last = ((self.residue + tap - self.pad) // 2 for tap in (0, self.count - 1))
        return Taps(last - first + 1, 1, first)

    @property
    def first_of_sum(self) -> int:
        """The first of the two original taps that the first sum is made of; -1 where only the second exists."""
        return -((self.residue - self.pad) % 2)


class _Phase(NamedTuple):
    axes: tuple[_Axis, _Axis]

    def of(self, tensor: Tensor) -> Tensor:
        """The rows and columns of this phase."""
        return tensor[..., self.axes[0].residue :: 2, self.axes[1].residue :: 2]

    def taps(self, call: Call) -> tuple[Taps, Taps, Taps]:
        return (Taps(call.weight.shape[2], 1, -call.time_pad), self.axes[0].taps, self.axes[1].taps)


def _phases(call: Call) -> list[_Phase]:
    left, _, top, _ = call.space_pad
    height, width = call.weight.shape[3:]
    return [
        _Phase((_Axis(row, height, top), _Axis(column, width, left)))
        for row, column in itertools.product(range(2), range(2))
    ]


def _summed(weight: Tensor, phase: _Phase) -> Tensor:
    """(O, K, C), contiguous, in the weight's dtype.

    Computed for every call: one pass over the weight, a thousandth of a decoder layer's time, and no cache that a
    checkpoint loaded through `.data`, which leaves the weight's version as it was, or a CUDA graph would make stale.
    """
    num_out, num_channels, *sizes = weight.shape
    rows, columns = phase.axes
    num_taps = sizes[0] * rows.taps.count * columns.taps.count
    summed = torch.empty(num_out, num_taps, num_channels, dtype=weight.dtype, device=weight.device)
    block_c = power_of_two(num_channels, 256)
    launch(
        _sum_taps_kernel,
        (num_out * num_taps, triton.cdiv(num_channels, block_c)),
        dense(weight), summed, num_channels, rows.first_of_sum, columns.first_of_sum,
        KT=sizes[0], KH=sizes[1], KW=sizes[2], SUMS_H=rows.taps.count, SUMS_W=columns.taps.count, BLOCK_C=block_c,
        num_warps=4,
    )  # fmt: skip
    return summed


@triton.jit
def _sum_taps_kernel(
    weight_ptr, out_ptr, num_channels, first_h, first_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SUMS_H: tl.constexpr, SUMS_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    o = (program // (KT * SUMS_H * SUMS_W)).to(tl.int64)
    tap_t = program // (SUMS_H * SUMS_W) % KT
    row, column = program // SUMS_W % SUMS_H * 2 + first_h, program % SUMS_W * 2 + first_w
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_channels
    weight_ptrs = weight_ptr + (o * num_channels + offs_c) * (KT * KH * KW) + tap_t * (KH * KW)
    total = tl.zeros([BLOCK_C], tl.float32)
    for tap_h in tl.static_range(2):
        for tap_w in tl.static_range(2):
            h, w = row + tap_h, column + tap_w
            mask = mask_c & (h >= 0) & (h < KH) & (w >= 0) & (w < KW)
            total += tl.load(weight_ptrs + (h * KW + w), mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + program.to(tl.int64) * num_channels + offs_c, total.to(out_ptr.dtype.element_ty), mask=mask_c)

"""Twice the rows and columns, or twice the frames, followed by a causal 3-D convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opensora_kernels import _triton, backends
from opensora_kernels.backends import Implementation
from opensora_kernels.causal_padding import SpacePadding, TimePadding, resolve_space_pad, resolve_time_pad
from opensora_kernels.checks import check_choice, check_float, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import library, reference

__all__ = ["upsample_conv3d"]

Mode = Literal["nearest_space", "linear_time"]


def upsample_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: Mode = "nearest_space",
    time_padding: TimePadding = "zeros",
    space_padding: SpacePadding = "zeros",
    time_pad: int | None = None,
    space_pad: Sequence[int] | None = None,
    mix_factor: Tensor | None = None,
) -> Tensor:
    """conv3d(pad(up(x))) + bias, or with `mix_factor` s * up(x) + (1 - s) * (that), s = sigmoid(mix_factor).

    mode="nearest_space" repeats every pixel in a 2 x 2 square. mode="linear_time" keeps the first frame and
    interpolates the others linearly among themselves (3/4 of a frame, 1/4 of its neighbour, the ends clamped): T frames
    become 2 T - 1, one frame stays one.
    Shapes: x (B, C, T, H, W), weight (O, C, kt, kh, kw), bias (O,), mix_factor one element;
    returns (B, O, T, 2 H, 2 W) or (B, O, 2 T - 1, H, W) at the default padding. channels_last_3d is kept.
    Padding, counted on the upsampled clip: as in `causal_conv3d`.
    Numbers: accumulated in fp32; the upsampled clip, the convolution and each term of the mix are rounded to x's dtype.
    In space the Triton and library backends sum the taps that meet on one pixel of x in fp32 and round the sums to x's
    dtype.
    Errors: TypeError for dtypes that are not floating-point or differ; ValueError for shapes, devices, choices and
    sizes that break the rules above, or a mix of different shapes.
    Source: Open-Sora-Plan v1.1.0, SpatialUpsample2x, TimeUpsample2x and TimeUpsampleRes2x
    (opensora/models/ae/videobase/modules/updownsample.py), with time_padding="replicate".
    """
    op = "upsample_conv3d"
    check_float(op, "x", x)
    check_shape(op, "x", x, (None,) * 5, "(B, C, T, H, W)")
    check_float(op, "weight", weight)
    check_shape(op, "weight", weight, (None, x.shape[1], None, None, None), "(O, C, kt, kh, kw)")
    # under autocast PyTorch brings the convolution's inputs to one dtype itself
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "(O,)")
    check_same_device(op, x=x, weight=weight, bias=bias, mix_factor=mix_factor)
    check_choice(op, "mode", mode, Mode)
    check_choice(op, "time_padding", time_padding, TimePadding)
    check_choice(op, "space_padding", space_padding, SpacePadding)

    size = _upsampled_size(x, mode)
    span = list(weight.shape[2:])
    num_front = resolve_time_pad(op, time_pad, time_padding, span[0], 1)
    margins = resolve_space_pad(op, space_pad, space_padding, size[1:], span[1:])
    padded_size = [size[0] + num_front, size[1] + margins[2] + margins[3], size[2] + margins[0] + margins[1]]
    if any(have < need for have, need in zip(padded_size, span, strict=True)):
        raise ValueError(
            f"{op}: x must hold at least one window of T x H x W = {' x '.join(map(str, span))} once upsampled and "
            f"padded, got {' x '.join(map(str, padded_size))}"
        )
    if mix_factor is not None:
        result = (weight.shape[0], *(have - need + 1 for have, need in zip(padded_size, span, strict=True)))
        if mix_factor.numel() != 1 or result != (x.shape[1], *size):
            raise ValueError(
                f"{op}: mix_factor must be one number, and the convolution keep (C, T, H, W) = {(x.shape[1], *size)}, "
                f"got {mix_factor.numel()} and {result}"
            )
    return call(op, x, weight, bias, mode, time_padding, space_padding, num_front, margins, mix_factor)


def _upsampled_size(x: Tensor, mode: Mode) -> list[int]:
    num_frames, height, width = x.shape[2:]
    return [num_frames, 2 * height, 2 * width] if mode == "nearest_space" else [2 * num_frames - 1, height, width]


register_op(
    "upsample_conv3d",
    "(Tensor x, Tensor weight, Tensor? bias, str mode, str time_padding, str space_padding, int time_pad, "
    "int[] space_pad, Tensor? mix_factor) -> Tensor",
    reference.upsample_conv3d,
    casts=("x", "weight", "bias", "mix_factor"),
)
backends.register(
    "upsample_conv3d",
    "library",
    Implementation(library.upsample_conv3d, why_not=library.why_not, is_plain=True, why_slower=library.why_slower),
)


def _why_not_triton(*values: Any) -> str | None:
    x, mix_factor = values[0], values[-1]
    if mix_factor is not None and mix_factor.dim() and mix_factor.dtype != x.dtype:
        return f"the Triton kernels mix in x's dtype {x.dtype}, got a mix_factor of {mix_factor.dtype}"
    return None


def _why_slower_triton(*values: Any) -> str | None:
    x, mode = values[0], values[3]
    if x.dtype is torch.float32:
        return "PyTorch's convolution of fp32 may use TF32, Triton's kernels multiply in fp32"
    if mode == "linear_time":
        return "twice the frames save no multiplication, and no measurement says that Triton's convolution is faster"
    return None


_triton.register("upsample_conv3d", why_not=_why_not_triton, why_slower=_why_slower_triton)

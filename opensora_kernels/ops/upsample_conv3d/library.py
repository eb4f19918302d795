"""Twice the rows and columns, then a convolution of 3 x 3, on a CPU: four convolutions of 2 x 2 on the small clip.

Row 2 i + r of the upsampled clip is row i, so that of the 3 taps around it two meet on one row of x and are summed.
That leaves 16 of 36 multiplications, and neither an upsampled clip nor a padded copy of it. Where frames are
interpolated the convolution runs by the steps of `causal_conv3d`.
Axes: B batch, C channels, T frames, H height, W width, O output channels.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels.causal_padding import pad_time
from opensora_kernels.cpu_convolution import clip_of, conv3d, pictures_of
from opensora_kernels.cpu_steps import frames_at_once
from opensora_kernels.norms import memory_format
from opensora_kernels.ops.causal_conv3d import causal_conv3d

from . import reference


def upsample_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    time_padding: str,
    space_padding: str,
    time_pad: int,
    space_pad: list[int],
    mix_factor: Tensor | None,
) -> Tensor:
    if mode == "linear_time":
        upsampled = reference.upsample_time(x)
        out = causal_conv3d(
            upsampled, weight, bias, time_padding=time_padding, time_pad=time_pad if time_padding != "none" else None,
            space_padding=space_padding, space_pad=space_pad,
        )  # fmt: skip
        return out if mix_factor is None else reference.mix(torch.sigmoid(mix_factor), upsampled, out)
    weights = _summed(weight)
    num_samples, _, num_frames, height, width = x.shape
    num_more = weight.shape[2] - 1  # frames of x that a result reads before its own
    num_results = num_frames + time_pad - num_more
    shape = (num_samples, weight.shape[0], num_results, 2 * height, 2 * width)
    frame_bytes = prod(shape) // num_results * x.itemsize
    each = frames_at_once(frame_bytes)
    out = None
    for start in range(0, num_results, each):
        stop = min(start + each, num_results)
        window = x[:, :, max(0, start - time_pad) : max(1, stop + num_more - time_pad)]
        if start < time_pad:
            window = pad_time(window, time_pad - start, time_padding, None)[:, :, : stop + num_more - start]
        if space_padding != "zeros":  # the pixel that is reflected is the one that is repeated, once it is two
            window = F.pad(window, (1, 1, 1, 1, 0, 0), mode="replicate")
        for row, column, phase in weights:
            results = _convolve(window, phase, bias, 1 if space_padding == "zeros" else 0)
            if out is None:  # autocast chooses its dtype
                out = torch.empty(shape, dtype=results.dtype, device=x.device, memory_format=memory_format(x))
            out[:, :, start:stop, row::2, column::2] = results[..., row : row + height, column : column + width]
    return out


def _summed(weight: Tensor) -> list[tuple[int, int, Tensor]]:
    """(row, column, weights (O, C, kt, 2, 2)) of the four phases, summed in fp32.

    As matrix products with zeros and ones, which take a CPU a third to a sixth of the time of sums of strided taps.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    axis = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=wide, device=weight.device)
    taps = weight.to(wide).flatten(3).flatten(0, 2)
    with torch.autocast("cpu", enabled=False):
        return [
            (row, column, (taps @ torch.kron(axis[row], axis[column]).T).view(*weight.shape[:3], 2, 2).to(weight.dtype))
            for row in range(2)
            for column in range(2)
        ]


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, pad: int) -> Tensor:
    if weight.shape[2] > 1 or window.dtype is torch.float32:
        return conv3d(window, weight, bias, padding=(0, pad, pad))
    # PyTorch's 2-D convolution takes less time than its 3-D one
    return clip_of(F.conv2d(pictures_of(window), weight[:, :, 0], bias, padding=pad), window)


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    mode: str,
    time_padding: Any,
    space_padding: Any,
    time_pad: int,
    space_pad: list[int],
    mix_factor: Any,
) -> str | None:
    if x.device.type not in ("cpu", "meta"):  # on meta tensors memory is planned
        return f"it is made for the CPU's convolution, got tensors on {x.device.type}"
    if not x.numel():
        return "an empty clip has no step"
    if mode == "linear_time":
        return None
    if mix_factor is not None:
        return "it is made for twice the rows and columns without a mix"
    if tuple(weight.shape[3:]) != (3, 3) or list(space_pad) != [1, 1, 1, 1]:
        return f"it is made for 3 x 3 taps with a border of one pixel, got {tuple(weight.shape[3:])} and {space_pad}"
    return None


def why_slower(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile plans the memory of the reference itself"
    wants_gradients = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if torch.is_grad_enabled() and wants_gradients:
        return "gradients keep what every step makes, so that steps save no memory"
    return None

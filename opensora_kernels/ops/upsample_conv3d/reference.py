"""Upsample x2, then causal 3-D convolution, in plain PyTorch: two steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels.causal_padding import pad_for_convolution
from opensora_kernels.norms import like


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
    if mode == "nearest_space":
        upsampled = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
    else:
        upsampled = upsample_time(x)
    padded, padding = pad_for_convolution(upsampled, time_pad, space_pad, time_padding, space_padding, None)
    out = F.conv3d(padded, weight, bias, 1, padding)
    if mix_factor is not None:
        share = torch.sigmoid(mix_factor)
        out = share * upsampled + (1 - share) * out
    return like(x, out)


def upsample_time(x: Tensor) -> Tensor:
    """T frames to 2 T - 1: the first stays, the others are interpolated linearly among themselves."""
    if x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")], 2)

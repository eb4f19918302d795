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
    del padded  # not held while the two are mixed
    if mix_factor is not None:
        out = mix(torch.sigmoid(mix_factor), upsampled, out)
    return like(x, out)


def mix(share: Tensor, plain: Tensor, learned: Tensor) -> Tensor:
    """share * plain + (1 - share) * learned, in the memory of `learned` without gradients."""
    if torch.is_grad_enabled() or share.dtype != learned.dtype:
        return share * plain + (1 - share) * learned
    # the same roundings, without two clips more
    return learned.mul_(1 - share).add_(share * plain)


def upsample_time(x: Tensor) -> Tensor:
    """T frames to 2 T - 1: the first stays, the others are interpolated linearly among themselves."""
    if x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")], 2)

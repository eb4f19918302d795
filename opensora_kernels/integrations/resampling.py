"""Forwards of the layers that resample between other people's blocks: what an upsampling repeats is never written.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora_kernels.ops.causal_conv3d import causal_conv3d
from opensora_kernels.ops.upsample_conv3d import upsample_conv3d


def upsample_frames(self: nn.Sequential, x: Tensor) -> Tensor:
    """Twice the rows and columns of frames (B, C, H, W), then a 3 x 3 convolution."""
    conv = self[1]
    return upsample_conv3d(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, time_padding="none").squeeze(2)


def downsample_frames(self: nn.Sequential, x: Tensor) -> Tensor:
    """Zeros on the right and at the bottom of frames (B, C, H, W), then a 3 x 3 convolution of stride 2."""
    conv = self[1]
    return causal_conv3d(
        x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, stride=(1, 2, 2), time_padding="none",
        space_pad=(0, 1, 0, 1),
    ).squeeze(2)  # fmt: skip


def upsample_after_first(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """HunyuanVideo: every frame but the first twice, rows and columns twice, then a causal convolution."""
    x = _repeat_after_first(hidden_states) if self.upsample_factor[0] == 2 else hidden_states
    *pads, num_front, _ = self.conv.time_causal_padding
    return upsample_conv3d(
        x, self.conv.conv.weight, self.conv.conv.bias, time_padding="replicate", time_pad=num_front,
        space_padding="replicate", space_pad=pads,
    )  # fmt: skip


def upsample_then_frames(self: nn.Module, inputs: Tensor) -> Tensor:
    """CogVideoX: an odd number of frames begins with one that stays alone; then a convolution of each frame."""
    x = inputs
    if self.compress_time and x.shape[2] > 1:
        x = _repeat_after_first(x) if x.shape[2] % 2 else x.repeat_interleave(2, 2)
    return upsample_conv3d(x, self.conv.weight.unsqueeze(2), self.conv.bias, time_padding="none")


def upsample_then_remember(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """EasyAnimate (Magvit): rows and columns twice, a convolution that keeps its last frames; then, but for the first
    chunk, twice the frames."""
    x, conv = hidden_states, self.conv
    num_front, front = conv.temporal_padding, conv.prev_features
    if front is None:
        front = x[:, :, :1].expand(-1, -1, num_front, -1, -1)
    else:
        front = front[..., ::2, ::2]  # as it keeps them, every pixel is there four times
    x = torch.cat([front, x], 2)
    last = x[:, :, x.shape[2] - num_front :]
    conv.prev_features = last.repeat_interleave(2, 3).repeat_interleave(2, 4)
    x = upsample_conv3d(x, conv.weight, conv.bias, time_padding="none")
    if not self.temporal_upsample:
        return x
    if self.prev_features is None:
        self.prev_features = x
        return x
    if self.spatial_group_norm:
        return x.repeat_interleave(2, 2)
    return nn.functional.interpolate(x, scale_factor=(2, 1, 1), mode="trilinear")


def _repeat_after_first(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, 2)], 2)

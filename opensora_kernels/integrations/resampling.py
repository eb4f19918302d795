"""Forwards of the layers that resample between other people's blocks: what an upsampling repeats is never written.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora_kernels.ops.causal_conv3d import causal_conv3d
from opensora_kernels.ops.upsample_conv3d import upsample_conv3d

from .steps import is_on_cpu, may_write


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
        # as the module itself keeps them, every pixel is there four times
        front = front if front.shape[3:] == x.shape[3:] else front[..., ::2, ::2]
    x = torch.cat([front, x], 2)
    conv.prev_features = x[:, :, x.shape[2] - num_front :].clone()
    x = upsample_conv3d(x, conv.weight, conv.bias, time_padding="none")
    if not self.temporal_upsample:
        return x
    if self.prev_features is None:
        self.prev_features = x
        return x
    if self.spatial_group_norm:
        return x.repeat_interleave(2, 2)
    return nn.functional.interpolate(x, scale_factor=(2, 1, 1), mode="trilinear")


def upsample_with_shortcut(self: nn.Module, x: Tensor) -> Tensor:
    """HunyuanVideo 1.5: channels of a convolution and of x itself become frames, rows and columns; the two are added.

    On a CPU one pixel of each block of pixels at a time, with the weights of its channels alone: the library reorders
    weights, which are larger than the clip. Where frames are doubled the first stays one, of every other part.
    """
    if not is_on_cpu(x) or not may_write(x):
        return type(self).forward(self, x)
    num_times, out = 2 if self.add_temporal_upsample else 1, None
    first, conv = num_times - 1, self.conv.conv
    num_channels = conv.out_channels // (4 * num_times)
    for part in range(4 * num_times):
        hidden = _part_of_channels(self.conv, x, slice(part * num_channels, (part + 1) * num_channels))
        if out is None:
            out = hidden.new_empty(
                x.shape[0], num_channels, num_times * x.shape[2] - first, *(2 * n for n in x.shape[3:])
            )
        if first and part % 2 == 0:
            out[:, :, 0, part // 4 :: 2, part // 2 % 2 :: 2] = hidden[:, :, 0]
        out[:, :, first + part // 4 :: num_times, part // 2 % 2 :: 2, part % 2 :: 2] = hidden[:, :, first:]
    if first:
        _add_channels(out[:, :, :1], x[:, :, :1], 1)
    _add_channels(out[:, :, first:], x[:, :, first:], num_times)
    return out


def _part_of_channels(module: nn.Module, x: Tensor, channels: slice) -> Tensor:
    """The convolution of `module`, as `convolutions.run_causal_padding` runs it, for some of its output channels."""
    *pads, num_front, _ = module.time_causal_padding
    bias = None if module.conv.bias is None else module.conv.bias[channels]
    return causal_conv3d(
        x, module.conv.weight[channels], bias, time_padding="replicate", time_pad=num_front, space_padding="replicate",
        space_pad=pads,
    )  # fmt: skip


def _add_channels(out: Tensor, x: Tensor, num_times: int) -> None:
    """out (B, C, T, H, W) += x, whose channels stand in the order (times, 2, 2, c): each serves neighbouring ones."""
    view = out.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, num_times))
    x = x.unflatten(1, (num_times, 2, 2, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)
    view.unflatten(1, (x.shape[1], -1)).add_(x.unsqueeze(2))


def _repeat_after_first(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, 2)], 2)

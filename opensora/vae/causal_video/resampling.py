"""What halves and doubles height and width, or the number of frames, in CausalVideoVAE.

Axes: B batch, C channels, T frames, H height, W width. Space: n becomes n // 2, or 2 n. Time: n frames become
ceil(n / 2), or 2 n - 1, and the first frame depends on the first frame alone.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/modules/updownsample.py (behaviour and parameter names).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.vae.causal_video.layers import CausalConv3d, Conv2d, Conv3d, GroupNorm, ResnetBlock3D, TemporalAttnBlock
from opensora_kernels import causal_conv3d, upsample_conv3d


class Downsample(nn.Module):
    """A 3 x 3 convolution of every second row and column, zeros at the right and bottom only; every frame alone."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, stride=2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return causal_conv3d(
            x_BCTHW, self.conv.kernel(), self.conv.bias, stride=(1, 2, 2), time_pad=0, space_pad=(0, 1, 0, 1)
        )


class SpatialDownsample2x(Downsample):
    """`Downsample` with the keys of a 3-D convolution."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        nn.Module.__init__(self)
        self.conv = CausalConv3d(chan_in, chan_out, (1, 3, 3), stride=(1, 2, 2))


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a 3 x 3 convolution; every frame alone."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return upsample_conv3d(x_BCTHW, self.conv.kernel(), self.conv.bias, time_pad=0)


class SpatialUpsample2x(Upsample):
    """`Upsample` with the keys of a 3-D convolution."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        nn.Module.__init__(self)
        self.conv = CausalConv3d(chan_in, chan_out, (1, 3, 3), padding=1)


class TimeDownsample2x(nn.Module):
    """The mean of frames 2 t - 2, 2 t - 1 and 2 t; the first frame stands in for those before it."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        super().__init__()

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        first = x_BCTHW[:, :, :1]
        if x_BCTHW.shape[2] < 3:
            return first
        wide = torch.promote_types(x_BCTHW.dtype, torch.float32)  # rounded once, as a pooling kernel does
        mean = x_BCTHW[:, :, :-2:2].to(wide) + x_BCTHW[:, :, 1:-1:2]
        mean = mean.add_(x_BCTHW[:, :, 2::2]).div_(3)
        return torch.cat([first, mean.to(x_BCTHW.dtype)], 2)


class TimeUpsample2x(nn.Module):
    """The first frame, and the others interpolated linearly to twice as many."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        super().__init__()

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if x_BCTHW.shape[2] == 1:
            return x_BCTHW
        others = F.interpolate(x_BCTHW[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")
        return torch.cat([x_BCTHW[:, :, :1], others], 2)


class TimeDownsampleRes2x(nn.Module):
    """s * (mean of three frames) + (1 - s) * (causal 3 x 3 x 3 convolution), s = sigmoid(mix_factor).

    The mean is a convolution too, with s / 3 at the centre of each frame of the diagonal: both run as one.
    """

    def __init__(self, in_channels: int, out_channels: int, mix_factor: float = 2.0) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        dtype = self.conv.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # the kernel is rounded once, as late as can be
        share = torch.sigmoid(self.mix_factor.to(wide))
        kernel = self.conv.weight.to(wide) * (1 - share)
        kernel.diagonal(dim1=0, dim2=1)[:, 1, 1].add_(share / 3)
        bias = self.conv.bias * (1 - share)
        return causal_conv3d(
            x_BCTHW, kernel.to(dtype), bias.to(dtype), stride=(2, 1, 1), time_padding="replicate", time_pad=2
        )


class TimeUpsampleRes2x(nn.Module):
    """s * up + (1 - s) * (causal 3 x 3 x 3 convolution of up), up as `TimeUpsample2x`, s = sigmoid(mix_factor)."""

    def __init__(self, in_channels: int, out_channels: int, mix_factor: float = 2.0) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels, 3, padding=1)
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return upsample_conv3d(
            x_BCTHW,
            self.conv.kernel(),
            self.conv.bias,
            mode="linear_time",
            time_padding="replicate",
            time_pad=2,
            mix_factor=self.mix_factor,
        )


class TimeDownsampleResAdv2x(nn.Module):
    """`TimeDownsampleRes2x` with a residual block and attention along time before the convolution. In no release."""

    def __init__(self, in_channels: int, out_channels: int, mix_factor: float = 1.5) -> None:
        super().__init__()
        self.attn = TemporalAttnBlock(in_channels)
        self.res = ResnetBlock3D(in_channels=in_channels, out_channels=in_channels)
        self.conv = Conv3d(in_channels, out_channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        # upstream repeats the first frame before the block, whose norms then see it three times
        padded = torch.cat([x_BCTHW[:, :, :1].expand(-1, -1, 2, -1, -1), x_BCTHW], 2)
        hidden = self.attn(self.res(padded))
        learned = causal_conv3d(
            hidden, self.conv.weight, self.conv.bias, stride=(2, 1, 1), time_padding="none", space_pad=(1, 1, 1, 1)
        )
        return _mix(self.mix_factor, TimeDownsample2x(0, 0)(x_BCTHW), learned)


class TimeUpsampleResAdv2x(nn.Module):
    """`TimeUpsampleRes2x` with a residual block and attention along time before the convolution. In no release."""

    def __init__(self, in_channels: int, out_channels: int, mix_factor: float = 1.5) -> None:
        super().__init__()
        self.res = ResnetBlock3D(in_channels=in_channels, out_channels=in_channels)
        self.attn = TemporalAttnBlock(in_channels)
        self.norm = GroupNorm(in_channels)  # in the checkpoints, and unused
        self.conv = CausalConv3d(in_channels, out_channels, 3, padding=1)
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        upsampled = TimeUpsample2x(0, 0)(x_BCTHW)
        return _mix(self.mix_factor, upsampled, self.conv(self.attn(self.res(upsampled))))


def _mix(mix_factor: Tensor, plain: Tensor, learned: Tensor) -> Tensor:
    share = torch.sigmoid(mix_factor)
    return share * plain + (1 - share) * learned

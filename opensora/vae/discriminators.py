"""Discriminators that judge patches: of frames one by one, or of clips.

Axes: B batch, C channels, T frames, H height, W width; N = B * T frames.
Source: Open-Sora-Plan v1.0.0 and v1.1.0, opensora/models/ae/videobase/losses/discriminator.py (behaviour and parameter
names), after Isola et al. 2017.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DiscriminatorKind = Literal["2d", "3d", "3d-v1.0"]
AXES = {2: "height and width", 3: "frames, height and width"}


class PatchDiscriminator(nn.Module):
    """Logits of patches: large where a patch looks real.

    kind "2d": every frame by itself, kernels of 4. "3d": clips, kernels of 3, halves time twice; the one of release
    1.1. "3d-v1.0": clips, kernels of 4, halves time once; of the code of 1.0, whose release did without. Each of
    `num_layers` levels halves height and width; the first has `channels`, later ones up to 8 times as many.
    `use_actnorm` ("2d" alone) takes ActNorm for BatchNorm.

    Shapes: x (B, in_channels, T, H, W) in [-1, 1], or (N, in_channels, H, W) where kind is "2d"; logits
    (N, 1, h, w) or (B, 1, t, h, w).
    Errors: ValueError for options that no discriminator has, and for an x smaller than `min_size`.
    """

    def __init__(
        self,
        kind: DiscriminatorKind,
        *,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = 3,
        use_actnorm: bool = False,
    ) -> None:
        super().__init__()
        if kind not in get_args(DiscriminatorKind):
            raise ValueError(
                f"discriminator: kind must be one of {', '.join(get_args(DiscriminatorKind))}, got {kind!r}"
            )
        if num_layers < 1 or channels < 1:
            raise ValueError(f"discriminator: num_layers and channels must be at least 1, got {num_layers}, {channels}")
        if use_actnorm and kind != "2d":
            raise ValueError(f"discriminator: use_actnorm must be false unless kind is '2d', got kind {kind!r}")
        self.kind = kind
        self.num_axes = 2 if kind == "2d" else 3
        widths = [channels * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [self._conv(in_channels, widths[0], self._stride(0)), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = self._stride(level) if level < num_layers else (1,) * self.num_axes
            layers.append(self._conv(widths[level - 1], widths[level], stride, bias=use_actnorm))
            layers.append(ActNorm(widths[level]) if use_actnorm else self._batch_norm(widths[level]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(self._conv(widths[-1], 1, (1,) * self.num_axes))
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "2d" and x.ndim == 5:
            x = x.transpose(1, 2).flatten(0, 1)
        has_axes = x.ndim == 2 + self.num_axes
        if not has_axes or any(size < least for size, least in zip(x.shape[2:], self.min_size, strict=True)):
            raise ValueError(
                f"discriminator: x must have at least {', '.join(map(str, self.min_size))} {AXES[self.num_axes]} "
                f"for kind {self.kind!r}, got {tuple(x.shape)}"
            )
        return self.main(x)

    @property
    def min_size(self) -> tuple[int, ...]:
        """The smallest ([frames,] height, width) that leaves it one patch."""
        size = (1,) * self.num_axes
        for layer in reversed(self.main):
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                parts = zip(size, layer.stride, layer.kernel_size, layer.padding, strict=True)
                size = tuple(max(1, (n - 1) * stride + kernel - 2 * pad) for n, stride, kernel, pad in parts)
        return size

    def _stride(self, level: int) -> tuple[int, ...]:
        if self.kind == "2d":
            return (2, 2)
        num_levels_in_time = 2 if self.kind == "3d" else 1
        return (2 if level < num_levels_in_time else 1, 2, 2)

    def _conv(self, in_channels: int, out_channels: int, stride: tuple[int, ...], *, bias: bool = True) -> nn.Module:
        kernel_size = 3 if self.kind == "3d" else 4
        convolution = nn.Conv2d if self.num_axes == 2 else _ClipConv
        layer = convolution(in_channels, out_channels, kernel_size, stride=stride, padding=1, bias=bias)
        nn.init.normal_(layer.weight, 0.0, 0.02)
        return layer

    def _batch_norm(self, channels: int) -> nn.Module:
        layer = nn.BatchNorm2d(channels) if self.num_axes == 2 else nn.BatchNorm3d(channels)
        nn.init.normal_(layer.weight, 1.0, 0.02)
        return layer


class _ClipConv(nn.Conv3d):
    """Of a single frame the middle tap alone, which is all that reads it.

    With padding around one frame and an odd number of channels, a bf16 convolution on a CPU with AMX reads memory that
    nobody wrote (torch 2.13, oneDNN).
    """

    def forward(self, x: Tensor) -> Tensor:
        middle, *padding = self.padding
        if x.shape[2] > 1 or self.kernel_size[0] != 2 * middle + 1:
            return super().forward(x)
        return F.conv3d(x, self.weight[:, :, middle : middle + 1], self.bias, self.stride, (0, *padding))


class ActNorm(nn.Module):
    """scale * (x + loc) for each channel, trained; the first batch in training mode makes it mean 0 and deviation 1.

    Each process would take its first values from a batch of its own: for one process alone.
    Source: Kingma and Dhariwal 2018.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.training and not self.initialized:
            with torch.no_grad():
                x_CN = x_NCHW.transpose(0, 1).flatten(1).float()
                self.loc.copy_(-x_CN.mean(1).view_as(self.loc))
                self.scale.copy_((1 / (x_CN.std(1) + 1e-6)).view_as(self.scale))
                self.initialized.fill_(1)
        return self.scale * (x_NCHW + self.loc)

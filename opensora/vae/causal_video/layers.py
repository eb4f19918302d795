"""Convolutions, residual blocks and attention of CausalVideoVAE, under upstream's names and keys.

Axes: B batch, C channels, T frames, H height, W width, L tokens, N heads. Every module takes and returns
(B, C, T, H, W); the 2-D ones treat frames one by one, without folding them into the batch. The memory format of x,
channels_last_3d or contiguous, is kept throughout.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/modules (behaviour and parameter names).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_kernels import Norm, attention, causal_conv3d, group_norm_silu

NUM_GROUPS = 32


class Conv2d(nn.Conv2d):
    """A 2-D convolution of every frame."""

    is_per_frame = True

    def kernel(self) -> Tensor:
        return self.weight.unsqueeze(2)

    def forward(self, x_BCTHW: Tensor, norm: GroupNorm | None = None, residual: Tensor | None = None) -> Tensor:
        return _convolve(self, x_BCTHW, norm, residual)


class Conv3d(nn.Conv3d):
    """A plain 3-D convolution, of which only single-frame kernels are run by themselves."""

    is_per_frame = False

    def kernel(self) -> Tensor:
        return self.weight

    def forward(self, x_BCTHW: Tensor, norm: GroupNorm | None = None, residual: Tensor | None = None) -> Tensor:
        return _convolve(self, x_BCTHW, norm, residual)


class CausalConv3d(nn.Module):
    """A 3-D convolution that repeats the first frame in front and sees no later frame; `padding` is that of space."""

    is_per_frame = False

    def __init__(
        self,
        chan_in: int,
        chan_out: int,
        kernel_size: int | tuple[int, int, int],
        init_method: Literal["random", "avg", "zero"] = "random",
        *,
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
    ) -> None:
        super().__init__()
        space_padding = (padding, padding) if isinstance(padding, int) else padding[1:]
        self.conv = nn.Conv3d(chan_in, chan_out, kernel_size, stride=stride, padding=(0, *space_padding))
        nn.init.zeros_(self.conv.bias)
        if init_method != "random":
            nn.init.zeros_(self.conv.weight)
        if init_method == "avg":
            kernel_t, *space = self.conv.kernel_size
            if space != [1, 1]:
                raise ValueError(f"CausalConv3d: init_method 'avg' needs a kernel of (kt, 1, 1), got {kernel_size}")
            with torch.no_grad():
                self.conv.weight.copy_((torch.eye(chan_out, chan_in) / kernel_t)[:, :, None, None, None])

    @property
    def bias(self) -> Tensor:
        return self.conv.bias

    def kernel(self) -> Tensor:
        return self.conv.weight

    def forward(self, x_BCTHW: Tensor, norm: GroupNorm | None = None, residual: Tensor | None = None) -> Tensor:
        return _convolve(self, x_BCTHW, norm, residual)


Convolution = Conv2d | Conv3d | CausalConv3d


def _convolve(layer: Convolution, x: Tensor, norm: GroupNorm | None, residual: Tensor | None) -> Tensor:
    """conv(silu(norm(x))) + residual; with no `norm`, conv(x) + residual."""
    settings = layer.conv if isinstance(layer, CausalConv3d) else layer
    *_, step_h, step_w = settings.stride
    *_, pad_h, pad_w = settings.padding
    kernel = layer.kernel()
    return causal_conv3d(
        x,
        kernel,
        layer.bias,
        stride=(settings.stride[0] if len(settings.stride) == 3 else 1, step_h, step_w),
        time_padding="replicate",
        time_pad=kernel.shape[2] - 1,
        space_pad=(pad_w, pad_w, pad_h, pad_h),
        norm=None if norm is None else norm.as_argument(),
        activation=None if norm is None else "silu",
        residual=residual,
    )


class GroupNorm(nn.GroupNorm):
    """32 groups, over the clip or, in 2-D blocks, over each frame. It is applied by what reads its output."""

    def __init__(self, channels: int, *, per_frame: bool = False) -> None:
        if channels % NUM_GROUPS:
            raise ValueError(f"CausalVideoVAE: widths must be multiples of {NUM_GROUPS}, got {channels}")
        super().__init__(NUM_GROUPS, channels, eps=1e-6)
        self.per_frame = per_frame

    def as_argument(self) -> Norm:
        return Norm("group", self.weight, self.bias, self.num_groups, self.eps, self.per_frame)


class _ResnetBlock(nn.Module):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x)))))))."""

    convolution: type[Conv2d] | type[CausalConv3d]

    def __init__(
        self, *, in_channels: int, out_channels: int | None = None, conv_shortcut: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        convolution, per_frame = self.convolution, self.convolution.is_per_frame
        self.norm1 = GroupNorm(in_channels, per_frame=per_frame)
        self.conv1 = convolution(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, per_frame=per_frame)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(out_channels, out_channels, 3, padding=1)
        self._shortcut = ""
        if in_channels != out_channels:
            self._shortcut = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            kernel_size, padding = (3, 1) if conv_shortcut else (1, 0)
            self.add_module(self._shortcut, convolution(in_channels, out_channels, kernel_size, padding=padding))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        hidden = self.conv1(x_BCTHW, norm=self.norm1)
        shortcut = self.get_submodule(self._shortcut)(x_BCTHW) if self._shortcut else x_BCTHW
        if not (self.training and self.dropout.p):
            return self.conv2(hidden, norm=self.norm2, residual=shortcut)
        norm = self.norm2
        hidden = group_norm_silu(
            hidden, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, per_frame=norm.per_frame
        )
        return self.conv2(self.dropout(hidden), residual=shortcut)


class ResnetBlock2D(_ResnetBlock):
    convolution = Conv2d


class ResnetBlock3D(_ResnetBlock):
    convolution = CausalConv3d


class _Attention(nn.Module):
    """x + proj_out(attention(q, k, v of norm(x))), one head over all channels."""

    convolution: type[Conv2d] | type[Conv3d] | type[CausalConv3d]

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(in_channels, per_frame=self.convolution.is_per_frame)
        self.q, self.k, self.v, self.proj_out = (self.convolution(in_channels, in_channels, 1) for _ in range(4))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        layers = (self.q, self.k, self.v)
        # one convolution reads and normalises x once for all three
        qkv = causal_conv3d(
            x_BCTHW,
            torch.cat([layer.kernel() for layer in layers]),
            torch.cat([layer.bias for layer in layers]),
            norm=self.norm.as_argument(),
        )
        q, k, v = (self.tokens(part) for part in qkv.chunk(3, 1))
        out_BCTHW = self.frames(attention(q, k, v), x_BCTHW.shape)
        return self.proj_out(_in_format_of(x_BCTHW, out_BCTHW), residual=x_BCTHW)

    def tokens(self, x_BCTHW: Tensor) -> Tensor:
        """(*, L, N = 1, C), a view where the memory format allows."""
        return x_BCTHW.permute(0, 2, 3, 4, 1).flatten(2, 3).unsqueeze(-2)

    def frames(self, x_BTLNC: Tensor, shape: Sequence[int]) -> Tensor:
        return x_BTLNC.squeeze(-2).unflatten(2, tuple(shape[3:])).permute(0, 4, 1, 2, 3)


class AttnBlock(_Attention):
    """Attention inside every frame, 2-D."""

    convolution = Conv2d


class AttnBlock3DFix(_Attention):
    """Attention inside every frame; the norm spans the clip. CausalVideoVAE 1.1."""

    convolution = CausalConv3d


class AttnBlock3D(_Attention):
    """Attention of CausalVideoVAE 1.0, which reads (B, C, T, H, W) in memory as (B T, C, H W).

    For more than one frame that mixes channels and frames. Released weights were trained that way.
    """

    convolution = CausalConv3d

    def tokens(self, x_BCTHW: Tensor) -> Tensor:
        batch, channels, num_frames, height, width = x_BCTHW.shape
        mixed = x_BCTHW.contiguous().view(batch * num_frames, channels, height * width)
        return mixed.transpose(1, 2).unsqueeze(-2)

    def frames(self, x_XLNC: Tensor, shape: Sequence[int]) -> Tensor:
        return x_XLNC.squeeze(-2).transpose(1, 2).contiguous().view(tuple(shape))


class TemporalAttnBlock(_Attention):
    """Attention along the frames of every pixel."""

    convolution = Conv3d

    def tokens(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW.permute(0, 3, 4, 2, 1).unsqueeze(-2)

    def frames(self, x_BHWTNC: Tensor, shape: Sequence[int]) -> Tensor:
        return x_BHWTNC.squeeze(-2).permute(0, 4, 3, 1, 2)


def _in_format_of(x: Tensor, tensor: Tensor) -> Tensor:
    is_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return tensor.contiguous(memory_format=torch.channels_last_3d if is_last else torch.contiguous_format)

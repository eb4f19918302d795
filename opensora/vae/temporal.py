"""The causal temporal VAE of Open-Sora 1.2: compresses 2-D latents by 4 in time, never in space.

Axes: B batch, C channels, T frames, H height, W width.
Source: hpcaitech/Open-Sora v1.2.0, opensora/models/vae/vae_temporal.py (behaviour and parameter names).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opensora.vae.distributions import DiagonalGaussian
from opensora_kernels import Norm, causal_conv3d


class TemporalVAE(nn.Module):
    """Encoder and decoder over time of 2-D latents.

    Shapes: encode (B, in_out_channels, T, H, W) -> posterior over (B, embed_dim, ceil(T / time_factor), H, W);
    decode reverses it. T is padded with zero frames in front to a multiple of `time_factor`, and as many decoded frames
    are dropped. GroupNorm statistics span all frames of a call: decode a clip in the chunks it was encoded in.
    """

    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise ValueError(
                "TemporalVAE: temporal_downsample must have one entry less than channel_multipliers, "
                f"got {tuple(temporal_downsample)} and {tuple(channel_multipliers)}"
            )
        widths = [filters * multiplier for multiplier in channel_multipliers]
        strides = [2 if halves else 1 for halves in temporal_downsample]
        self.time_factor = prod(strides)
        self.embed_dim = embed_dim
        self.encoder = Encoder(in_out_channels, latent_embed_dim * 2, widths, strides, num_res_blocks, num_groups)
        self.quant_conv = CausalConv3d(latent_embed_dim * 2, embed_dim * 2, 1)
        self.post_quant_conv = CausalConv3d(embed_dim, latent_embed_dim, 1)
        self.decoder = Decoder(in_out_channels, latent_embed_dim, widths, strides, num_res_blocks, num_groups)

    def latent_frames(self, num_frames: int) -> int:
        return -(-num_frames // self.time_factor)

    def encode(self, x_BCTHW: Tensor) -> DiagonalGaussian:
        padding = -x_BCTHW.shape[2] % self.time_factor
        if padding:
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, padding, 0))
        return DiagonalGaussian(self.quant_conv(self.encoder(x_BCTHW)))

    def decode(self, z_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Decode to `num_frames` frames, at most time_factor per latent frame."""
        x_BCTHW = self.decoder(self.post_quant_conv(z_BCTHW))
        return x_BCTHW[:, :, x_BCTHW.shape[2] - num_frames :]


class Encoder(nn.Module):
    gradient_checkpointing = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        strides: list[int],
        num_res_blocks: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            self.block_res_blocks.append(_res_blocks(channels, width, num_res_blocks, groups))
            channels = width
            if level < len(strides):
                stride = strides[level]
                self.conv_blocks.append(CausalConv3d(width, width, 3, stride=stride) if stride > 1 else nn.Identity())
        self.res_blocks = _res_blocks(channels, channels, num_res_blocks, groups)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = CausalConv3d(channels, out_channels, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        run = _checkpointed if self.gradient_checkpointing else _plainly
        x_BCTHW = self.conv_in(x_BCTHW)
        for level, blocks in enumerate(self.block_res_blocks):
            for block in blocks:
                x_BCTHW = run(block, x_BCTHW)
            if level < len(self.conv_blocks):
                x_BCTHW = self.conv_blocks[level](x_BCTHW)
        for block in self.res_blocks:
            x_BCTHW = run(block, x_BCTHW)
        return self.conv2(x_BCTHW, norm=self.norm1)


class Decoder(nn.Module):
    gradient_checkpointing = False

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        widths: list[int],
        strides: list[int],
        num_res_blocks: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.strides = strides
        channels = widths[-1]
        self.conv1 = CausalConv3d(in_channels, channels, 3)
        self.res_blocks = _res_blocks(channels, channels, num_res_blocks, groups)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):  # built from the deepest level out, stored from the outermost in
            self.block_res_blocks.insert(0, _res_blocks(channels, widths[level], num_res_blocks, groups))
            channels = widths[level]
            if level > 0:
                stride = strides[level - 1]
                upsampler = CausalConv3d(channels, channels * stride, 3) if stride > 1 else nn.Identity()
                self.conv_blocks.insert(0, upsampler)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv_out = CausalConv3d(channels, out_channels, 3)

    def forward(self, z_BCTHW: Tensor) -> Tensor:
        run = _checkpointed if self.gradient_checkpointing else _plainly
        x_BCTHW = self.conv1(z_BCTHW)
        for block in self.res_blocks:
            x_BCTHW = run(block, x_BCTHW)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x_BCTHW = run(block, x_BCTHW)
            if level > 0 and self.strides[level - 1] > 1:
                x_BCTHW = _depth_to_time(self.conv_blocks[level - 1](x_BCTHW), self.strides[level - 1])
        return self.conv_out(x_BCTHW, norm=self.norm1)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1x1 shortcut when the width changes; no biases."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        shortcut_BCTHW = x_BCTHW if self.conv3 is None else self.conv3(x_BCTHW)
        x_BCTHW = self.conv1(x_BCTHW, norm=self.norm1)
        return self.conv2(x_BCTHW, norm=self.norm2, residual=shortcut_BCTHW)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame, optionally behind GroupNorm and SiLU and in front of a residual."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=(stride, 1, 1), bias=bias)

    def forward(self, x_BCTHW: Tensor, norm: nn.GroupNorm | None = None, residual: Tensor | None = None) -> Tensor:
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        tensors = (x_BCTHW, self.conv.weight, self.conv.bias, *affine, residual)
        device = x_BCTHW.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return self._fused(norm, *tensors)
        # autocast knows single PyTorch operators only: bring all inputs of the fused one to its dtype here
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self._fused(norm, *(None if tensor is None else tensor.to(dtype) for tensor in tensors))

    def _fused(
        self,
        norm: nn.GroupNorm | None,
        x_BCTHW: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        return causal_conv3d(
            x_BCTHW,
            weight,
            bias,
            stride=self.conv.stride,
            norm=None if norm is None else Norm("group", norm_weight, norm_bias, norm.num_groups, norm.eps),
            activation=None if norm is None else "silu",
            residual=residual,
        )


def _res_blocks(in_channels: int, out_channels: int, count: int, num_groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * (count - 1)
    return nn.ModuleList(ResBlock(width, out_channels, num_groups) for width in widths)


def _depth_to_time(x_BCTHW: Tensor, stride: int) -> Tensor:
    """Channel c * stride + s of frame t becomes channel c of frame t * stride + s."""
    batch, channels, frames, height, width = x_BCTHW.shape
    x = x_BCTHW.reshape(batch, channels // stride, stride, frames, height, width)
    return x.transpose(2, 3).reshape(batch, channels // stride, frames * stride, height, width)


def _plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)

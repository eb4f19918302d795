"""Encoder and decoder of CausalVideoVAE: modules named by the configuration, level by level.

Axes: B batch, C channels, T frames, H height, W width. Level 0 has the full resolution in both.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/causal_vae/modeling_causalvae.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.config import CausalVideoVAEConfig
from opensora.vae.causal_video import layers, resampling
from opensora.vae.causal_video.layers import Convolution, GroupNorm

_CONVOLUTIONS = {kind.__name__: kind for kind in (layers.CausalConv3d, layers.Conv2d)}
_BLOCKS = {kind.__name__: kind for kind in (layers.ResnetBlock2D, layers.ResnetBlock3D)}
_ATTENTION = {
    kind.__name__: kind
    for kind in (layers.AttnBlock, layers.AttnBlock3D, layers.AttnBlock3DFix, layers.TemporalAttnBlock)
}
_RESAMPLING = {
    "spatial_downsample": (resampling.Downsample, resampling.SpatialDownsample2x),
    "spatial_upsample": (resampling.Upsample, resampling.SpatialUpsample2x),
    "temporal_downsample": (
        resampling.TimeDownsample2x,
        resampling.TimeDownsampleRes2x,
        resampling.TimeDownsampleResAdv2x,
    ),
    "temporal_upsample": (
        resampling.TimeUpsample2x,
        resampling.TimeUpsampleRes2x,
        resampling.TimeUpsampleResAdv2x,
    ),
}


class Encoder(nn.Module):
    """Pixels to the moments of z_channels latents; the frames of 4 n + 1 become n + 1."""

    gradient_checkpointing = False

    def __init__(self, config: CausalVideoVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden_size * multiplier for multiplier in config.hidden_size_mult]
        blocks, spatial, temporal, attention, middle = _classes(config, "encoder", "downsample")
        self.conv_in = convolution("encoder_conv_in", config.encoder_conv_in, config.in_channels, config.hidden_size, 3)
        self.down = nn.ModuleList()
        resolution = config.resolution
        for level, (width_in, width) in enumerate(pairwise([config.hidden_size, *widths])):
            has_attention = resolution in config.attn_resolutions
            self.down.append(
                _Level(
                    blocks[level],
                    [width_in] + [width] * config.num_res_blocks,
                    attention if has_attention else None,
                    config.dropout,
                    {"downsample": spatial[level], "time_downsample": temporal[level]},
                )
            )
            resolution = resolution // 2 if spatial[level] else resolution
        self.mid = _Middle(middle, attention, width, config)
        self.norm_out = GroupNorm(width)
        num_moments = 2 * config.z_channels if config.double_z else config.z_channels
        self.conv_out = convolution("encoder_conv_out", config.encoder_conv_out, width, num_moments, 3)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        run = _checkpointed if self.gradient_checkpointing else _plainly
        x_BCTHW = self.conv_in(x_BCTHW)
        for index, level in enumerate(self.down):
            # the middle follows the last blocks: upstream computes a resampling of the last level and drops it
            x_BCTHW = level(x_BCTHW, run, resample=index < len(self.down) - 1)
        return self.conv_out(self.mid(x_BCTHW, run), norm=self.norm_out)

    def result_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(T, H, W) of the moments of a clip of `size`."""
        num_frames, height, width = size
        for level in self.down[:-1]:
            if level.downsample is not None:
                height, width = height // 2, width // 2
            if level.time_downsample is not None:
                num_frames = -(-num_frames // 2)
        return num_frames, height, width


class Decoder(nn.Module):
    """z_channels latents to pixels; n + 1 frames become 4 n + 1."""

    gradient_checkpointing = False

    def __init__(self, config: CausalVideoVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden_size * multiplier for multiplier in config.hidden_size_mult]
        blocks, spatial, temporal, attention, middle = _classes(config, "decoder", "upsample")
        self.conv_in = convolution("decoder_conv_in", config.decoder_conv_in, config.z_channels, widths[-1], 3)
        self.mid = _Middle(middle, attention, widths[-1], config)
        self.up = nn.ModuleList()
        resolution = config.resolution // 2 ** (len(widths) - 1)
        width_in = widths[-1]
        for level in reversed(range(len(widths))):  # run from the deepest level out, stored from the outermost in
            width = widths[level]
            has_attention = resolution in config.attn_resolutions
            self.up.insert(
                0,
                _Level(
                    blocks[level],
                    [width_in] + [width] * (config.num_res_blocks + 1),
                    attention if has_attention else None,
                    config.dropout,
                    {"upsample": spatial[level], "time_upsample": temporal[level]},
                ),
            )
            resolution = resolution * 2 if spatial[level] else resolution
            width_in = width
        self.norm_out = GroupNorm(width_in)
        self.conv_out = convolution("decoder_conv_out", config.decoder_conv_out, width_in, config.out_channels, 3)

    def forward(self, z_BCTHW: Tensor) -> Tensor:
        run = _checkpointed if self.gradient_checkpointing else _plainly
        x_BCTHW = self.mid(self.conv_in(z_BCTHW), run)
        for level in reversed(self.up):
            x_BCTHW = level(x_BCTHW, run)
        return self.conv_out(x_BCTHW, norm=self.norm_out)

    def result_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(T, H, W) of the clip of latents of `size`."""
        num_frames, height, width = size
        for level in reversed(self.up):
            if level.upsample is not None:
                height, width = 2 * height, 2 * width
            if level.time_upsample is not None:
                num_frames = 2 * num_frames - 1
        return num_frames, height, width


def convolution(field: str, name: str, in_channels: int, out_channels: int, kernel_size: int) -> Convolution:
    """The convolution class `name`, which `field` of the configuration asks for, at an unchanged size."""
    return _named(field, name, _CONVOLUTIONS)(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class _Level(nn.Module):
    """Residual blocks, each followed by attention where there is any; then resampling in space, then in time."""

    def __init__(
        self,
        block: type[nn.Module],
        widths: Sequence[int],
        attention: type[nn.Module] | None,
        dropout: float,
        resampling: dict[str, type[nn.Module] | None],
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            block(in_channels=before, out_channels=after, dropout=dropout) for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList(attention(width) for width in widths[1:] if attention is not None)
        self._resampling = tuple(resampling)
        for name, kind in resampling.items():
            self.add_module(name, None if kind is None else kind(widths[-1], widths[-1]))

    def forward(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], *, resample: bool = True) -> Tensor:
        for index, block in enumerate(self.block):
            x = run(block, x)
            if self.attn:
                x = run(self.attn[index], x)
        for name in self._resampling if resample else ():
            layer = getattr(self, name)
            x = x if layer is None else run(layer, x)
        return x


class _Middle(nn.Module):
    def __init__(
        self, block: type[nn.Module], attention: type[nn.Module], width: int, config: CausalVideoVAEConfig
    ) -> None:
        super().__init__()
        self.block_1 = block(in_channels=width, out_channels=width, dropout=config.dropout)
        self.attn_1 = attention(width)
        self.block_2 = block(in_channels=width, out_channels=width, dropout=config.dropout)

    def forward(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        return run(self.block_2, run(self.attn_1, run(self.block_1, x)))


class _Classes(NamedTuple):
    """What a configuration names: one class for each level (None for no module), attention, and the middle's blocks."""

    blocks: list[type]
    spatial: list[type | None]
    temporal: list[type | None]
    attention: type
    middle: type


def _classes(config: CausalVideoVAEConfig, half: str, direction: str) -> _Classes:
    def one(part: str, kinds: dict[str, type]) -> type:
        return _named(f"{half}_{part}", getattr(config, f"{half}_{part}"), kinds)

    def per_level(part: str, kinds: dict[str, type], *, is_optional: bool = True) -> list[type | None]:
        field = f"{half}_{part}"
        names = getattr(config, field)
        if len(names) != len(config.hidden_size_mult):
            num_levels = len(config.hidden_size_mult)
            raise ValueError(
                f"CausalVideoVAE: {field} must name one module for each of {num_levels} levels, got {names}"
            )
        return [None if is_optional and not name else _named(field, name, kinds) for name in names]

    spatial, temporal = (
        {kind.__name__: kind for kind in _RESAMPLING[f"{axis}_{direction}"]} for axis in ("spatial", "temporal")
    )
    return _Classes(
        per_level("resnet_blocks", _BLOCKS, is_optional=False),
        per_level(f"spatial_{direction}", spatial),
        per_level(f"temporal_{direction}", temporal),
        one("attention", _ATTENTION),
        one("mid_resnet", _BLOCKS),
    )


def _named(field: str, name: str, kinds: dict[str, type]) -> type:
    if name not in kinds:
        raise ValueError(f"CausalVideoVAE: {field} must be one of {', '.join(kinds)}, got {name!r}")
    return kinds[name]


def _plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)

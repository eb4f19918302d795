"""Video VAEs, under the argument names of their upstreams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

VAEKind = Literal["frames", "stacked", "causal"]
"""An image VAE for every frame (Open-Sora 1.0, 1.1), 1.2's stacked VAE, Open-Sora-Plan's CausalVideoVAE."""


@dataclass(frozen=True)
class SpatialVAEConfig:
    """The 2-D image VAE, with the argument names of diffusers' `AutoencoderKL`."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215


@dataclass(frozen=True)
class TemporalVAEConfig:
    """The causal temporal VAE on top of the 2-D latents, with upstream's argument names."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32


@dataclass(frozen=True)
class VideoVAEConfig:
    """Open-Sora 1.2's stacked VAE: chunks of `micro_frame_size` frames, `micro_batch_size` frames at a time in 2-D."""

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    scale: tuple[float, ...] | float = (3.85, 2.32, 2.33, 3.06)
    shift: tuple[float, ...] | float = (-0.10, 0.34, 0.27, 0.98)
    micro_frame_size: int | None = 17
    micro_batch_size: int | None = 4


@dataclass(frozen=True)
class CausalVideoVAEConfig:
    """Open-Sora-Plan's CausalVideoVAE, with upstream's argument names and defaults; "" stands for no module.

    Lists hold one name of a module class for each level, full resolution first. The class cannot be told from the
    weights: AttnBlock3D and AttnBlock3DFix, or average pooling at other levels, have the same keys. `resolution` only
    decides at which levels `attn_resolutions` puts attention. `lr`, `loss_type` and `loss_params` speak of training.
    `scaling_factor` is none of upstream's fields: its samplers multiply latents by that number.
    """

    in_channels: int = 3
    out_channels: int = 3
    hidden_size: int = 128
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_channels: int = 4
    embed_dim: int = 4
    double_z: bool = True
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    resolution: int = 256
    q_conv: str = "CausalConv3d"
    encoder_conv_in: str = "CausalConv3d"
    encoder_conv_out: str = "CausalConv3d"
    encoder_attention: str = "AttnBlock3D"
    encoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    encoder_spatial_downsample: tuple[str, ...] = ("SpatialDownsample2x",) * 3 + ("",)
    encoder_temporal_downsample: tuple[str, ...] = ("", "TimeDownsample2x", "TimeDownsample2x", "")
    encoder_mid_resnet: str = "ResnetBlock3D"
    decoder_conv_in: str = "CausalConv3d"
    decoder_conv_out: str = "CausalConv3d"
    decoder_attention: str = "AttnBlock3D"
    decoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    decoder_spatial_upsample: tuple[str, ...] = ("",) + ("SpatialUpsample2x",) * 3
    decoder_temporal_upsample: tuple[str, ...] = ("", "", "TimeUpsample2x", "TimeUpsample2x")
    decoder_mid_resnet: str = "ResnetBlock3D"
    lr: float = 1e-5
    loss_type: str = "opensora.models.ae.videobase.losses.LPIPSWithDiscriminator"
    loss_params: dict[str, Any] = field(default_factory=dict)
    scaling_factor: float = 0.18215


VAEConfig = VideoVAEConfig | CausalVideoVAEConfig
"""A VAE that can be trained."""

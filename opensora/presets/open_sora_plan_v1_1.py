"""Open-Sora-Plan 1.1: the causal video VAE.

Source: PKU-YuanGroup/Open-Sora-Plan, the configuration of 1.1.0 in its later document on VAE training; the tag v1.1.0
holds that of 1.0.0.
"""

from __future__ import annotations

from opensora.config import CausalVideoVAEConfig


def vae() -> CausalVideoVAEConfig:
    """As released: an encoder that is 2-D at its first two levels, and resampling in time that is trained."""
    return CausalVideoVAEConfig(
        encoder_conv_in="Conv2d",
        encoder_attention="AttnBlock3DFix",
        encoder_resnet_blocks=("ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"),
        encoder_spatial_downsample=("Downsample", "Downsample", "Downsample", ""),
        encoder_temporal_downsample=("", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""),
        decoder_attention="AttnBlock3DFix",
        decoder_temporal_upsample=("", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"),
        loss_type="opensora.models.ae.videobase.losses.LPIPSWithDiscriminator3D",
    )

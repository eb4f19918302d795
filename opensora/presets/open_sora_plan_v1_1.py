"""Open-Sora-Plan 1.1: the causal video VAE, the diffusion transformers, how they are sampled and trained.

Source: PKU-YuanGroup/Open-Sora-Plan v1.1.0, scripts/text_condition; for the VAE, the configuration of 1.1.0 in the
later document on VAE training, since the tag v1.1.0 holds that of 1.0.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from opensora.config import CausalVideoVAEConfig, LatteT2VConfig, Preset, TrainConfig, TrainVAEConfig
from opensora.presets import open_sora_plan

Clip = Literal["65x512x512", "221x512x512", "513x512x512"]


def preset(clip: Clip = "65x512x512") -> Preset:
    """How a release is sampled. Of 513x512x512 upstream published the configuration, its training was not finished."""
    stages = {stage: training(stage) for stage in _CLIPS}
    vae_stages = {stage: vae_training(stage) for stage in _VAE_STAGES}
    return open_sora_plan.preset(
        "1.1", clip, transformer(clip), stages, vae_stages, is_default=clip == get_args(Clip)[0]
    )


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


def transformer(clip: Clip = "65x512x512") -> LatteT2VConfig:
    """LatteT2V-XL/122 for clips of frames x height x width in pixels; each length has weights of its own."""
    if clip not in _CLIPS:
        raise ValueError(f"transformer: clip must be one of {', '.join(_CLIPS)}, got {clip!r}")
    return LatteT2VConfig(sample_size=(64, 64), video_length=_CLIPS[clip], version="1.1")


# Frames of latents.
_CLIPS = {"65x512x512": 17, "221x512x512": 56, "513x512x512": 129}


def training(clip: Clip = "65x512x512") -> TrainConfig:
    """Each length begins from the one before. Batches are for one 80 GB accelerator, with four images for each clip."""
    before = {"65x512x512": None, "221x512x512": "65x512x512", "513x512x512": "221x512x512"}[clip]
    batch_size = 2 if clip == "65x512x512" else 1
    return open_sora_plan.training("1.1", clip, transformer(clip), before=before, batch_size=batch_size, num_images=4)


def vae_training(stage: str = "stage1") -> TrainVAEConfig:
    """`stage1`: 9 frames, from an image VAE, given as `image_vae`; `stage2`: 25 frames; `stage3`: resampling in time
    starts again from equal shares; `gan2d`, `gan3d`: against a discriminator of frames, then of clips.

    Each begins from the one before. The report gives the steps of the first and of the last two; the others take the
    trainer's default.
    """
    if stage not in _VAE_STAGES:
        raise ValueError(f"vae_training: stage must be one of {', '.join(_VAE_STAGES)}, got {stage!r}")
    before, num_frames, steps, kind = _VAE_STAGES[stage]
    config = open_sora_plan.vae_training(
        "1.1", stage, vae(), before=before, num_frames=num_frames, steps=steps, kind=kind
    )
    return replace(config, mix_factor=0.5) if stage == "stage3" else config


# The stage before, frames, steps, discriminator.
_VAE_STAGES = {
    "stage1": (None, 9, 100_000, "none"),
    "stage2": ("stage1", 25, 100_000, "none"),
    "stage3": ("stage2", 25, 100_000, "none"),
    "gan2d": ("stage3", 25, 80_000, "2d"),
    "gan3d": ("gan2d", 25, 80_000, "3d"),
}

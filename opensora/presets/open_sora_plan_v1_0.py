"""Open-Sora-Plan 1.0: the causal video VAE, the diffusion transformers and how they are sampled.

Source: PKU-YuanGroup/Open-Sora-Plan v1.0.0, scripts/causalvae and scripts/text_condition.
"""

from __future__ import annotations

from typing import Literal, get_args

from opensora.config import CausalVideoVAEConfig, LatteT2VConfig, Preset, TrainVAEConfig
from opensora.presets import open_sora_plan

Clip = Literal["65x512x512", "65x256x256", "17x256x256"]


def preset(clip: Clip = "65x512x512") -> Preset:
    is_default = clip == get_args(Clip)[0]
    return open_sora_plan.preset(
        "1.0", clip, transformer(clip), is_default=is_default, vae_training={"stage1": vae_training()}
    )


def vae() -> CausalVideoVAEConfig:
    """As released: 3-D throughout, and attention that mixes channels and frames. It came without temporal windows."""
    return CausalVideoVAEConfig(encoder_temporal_downsample=("TimeDownsample2x", "TimeDownsample2x", "", ""))


def vae_training(stage: str = "stage1") -> TrainVAEConfig:
    """`stage1`, the only one: 17 frames against a 2-D discriminator, from an image VAE, given as `image_vae`.

    Upstream trains parameters with "time" in their names ten times faster; its release has none.
    """
    return open_sora_plan.vae_training("1.0", stage, vae(), num_frames=17, steps=100_000, kind="2d")


def transformer(clip: Clip = "65x512x512") -> LatteT2VConfig:
    """LatteT2V-XL/122 for clips of frames x height x width in pixels; each size has weights of its own."""
    if clip not in _CLIPS:
        raise ValueError(f"transformer: clip must be one of {', '.join(_CLIPS)}, got {clip!r}")
    video_length, side = _CLIPS[clip]
    return LatteT2VConfig(sample_size=(side, side), video_length=video_length, version="1.0")


# Frames, and height and width, of latents.
_CLIPS = {"65x512x512": (17, 64), "65x256x256": (17, 32), "17x256x256": (5, 32)}

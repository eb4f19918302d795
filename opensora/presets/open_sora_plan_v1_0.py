"""Open-Sora-Plan 1.0: the causal video VAE, the diffusion transformers, how they are sampled and trained.

Source: PKU-YuanGroup/Open-Sora-Plan v1.0.0, scripts/causalvae and scripts/text_condition.
"""

from __future__ import annotations

from typing import Literal, get_args

from opensora.config import CausalVideoVAEConfig, LatteT2VConfig, Preset, TrainConfig, TrainVAEConfig
from opensora.presets import open_sora_plan

Clip = Literal["65x512x512", "65x256x256", "17x256x256"]


def preset(clip: Clip = "65x512x512") -> Preset:
    stages = {stage: training(stage) for stage in _BATCHES}
    vae_stages = {"stage1": vae_training()}
    return open_sora_plan.preset(
        "1.0", clip, transformer(clip), stages, vae_stages, is_default=clip == get_args(Clip)[0]
    )


def vae() -> CausalVideoVAEConfig:
    """As released: 3-D throughout, and attention that mixes channels and frames. It came without temporal windows."""
    return CausalVideoVAEConfig(encoder_temporal_downsample=("TimeDownsample2x", "TimeDownsample2x", "", ""))


def transformer(clip: Clip = "65x512x512") -> LatteT2VConfig:
    """LatteT2V-XL/122 for clips of frames x height x width in pixels; each size has weights of its own."""
    if clip not in _CLIPS:
        raise ValueError(f"transformer: clip must be one of {', '.join(_CLIPS)}, got {clip!r}")
    video_length, side = _CLIPS[clip]
    return LatteT2VConfig(sample_size=(side, side), video_length=video_length, version="1.0")


# Frames, and height and width, of latents.
_CLIPS = {"65x512x512": (17, 64), "65x256x256": (17, 32), "17x256x256": (5, 32)}


def training(clip: Clip = "65x512x512") -> TrainConfig:
    """65 frames of 256 x 256 begin from 17 of them, and 512 x 512 from those. Batches are for one 80 GB accelerator."""
    before = {"17x256x256": None, "65x256x256": "17x256x256", "65x512x512": "65x256x256"}[clip]
    batch_size, num_images = _BATCHES[clip]
    return open_sora_plan.training(
        "1.0", clip, transformer(clip), before=before, batch_size=batch_size, num_images=num_images
    )


def vae_training(stage: str = "stage1") -> TrainVAEConfig:
    """`stage1`, the only one: 17 frames against a 2-D discriminator, from an image VAE, given as `image_vae`.

    Upstream trains parameters with "time" in their names ten times faster; its release has none.
    """
    return open_sora_plan.vae_training("1.0", stage, vae(), before=None, num_frames=17, steps=100_000, kind="2d")


# Clips, and images beside each.
_BATCHES: dict[Clip, tuple[int, int]] = {"65x512x512": (2, 16), "65x256x256": (4, 4), "17x256x256": (4, 4)}

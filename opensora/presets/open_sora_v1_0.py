"""Open-Sora 1.0: the transformer of each release, and how it is sampled.

Source: hpcaitech/Open-Sora v1.0.0, configs/opensora/inference.
"""

from __future__ import annotations

from typing import Literal, get_args

from opensora.config import IDDPMConfig, Preset, SampleConfig, STDiTConfig

ClipName = Literal["16x256x256", "16x512x512", "64x512x512"]
"""Frames, height and width in pixels."""

VAE = "stabilityai/sd-vae-ft-ema"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset(clip: ClipName = "16x256x256") -> Preset:
    """How a release is sampled. Of 64x512x512 upstream published the configuration, no weights."""
    num_frames, height, width = map(int, clip.split("x"))
    return Preset(
        name="open-sora-v1.0" if clip == get_args(ClipName)[0] else f"open-sora-v1.0-{clip}",
        description=f"Open-Sora 1.0: {num_frames} frames of {height} x {width}, every third of 24 a second",
        vae=VAE,
        transformer=f"hpcai-tech/Open-Sora:OpenSora-v1-HQ-{clip}.pth",
        text_encoder=TEXT_ENCODER,
        vae_kind="frames",
        transformer_config=transformer(clip),
        scheduler=IDDPMConfig(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3, table_dtype="float64"),
        sample=SampleConfig(
            num_frames=str(num_frames),
            resolution=None,
            aspect_ratio=None,
            image_size=(height, width),
            frame_interval=3,
            condition_frame_length=num_frames // 4,
            align=None,
            aes=None,
            dtype="fp16",
        ),
    )


def transformer(clip: ClipName = "16x256x256") -> STDiTConfig:
    """As released for that clip: 256 pixels at half the distance between sites, 64 frames at 1.5 times that of 16."""
    configs = {
        "16x256x256": STDiTConfig(input_size=(16, 32, 32), space_scale=0.5),
        "16x512x512": STDiTConfig(input_size=(16, 64, 64)),
        "64x512x512": STDiTConfig(input_size=(64, 64, 64), time_scale=2 / 3),
    }
    if clip not in configs:
        raise ValueError(f"clip: must be one of {', '.join(configs)}, got {clip!r}")
    return configs[clip]

"""Open-Sora 1.1: the transformer of the release, and how it is sampled.

Source: hpcaitech/Open-Sora v1.1.0, configs/opensora-v1-1.
"""

from __future__ import annotations

from opensora.config import IDDPMConfig, Preset, SampleConfig, STDiT2Config

VAE = "stabilityai/sd-vae-ft-ema"
TRANSFORMER = "hpcai-tech/OpenSora-STDiT-v2-stage3"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset() -> Preset:
    return Preset(
        name="open-sora-v1.1",
        description="Open-Sora 1.1: 144p to 720p, images and clips of any length, every third of 24 frames a second",
        vae=VAE,
        transformer=TRANSFORMER,
        text_encoder=TEXT_ENCODER,
        vae_kind="frames",
        transformer_config=transformer(),
        scheduler=IDDPMConfig(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3),
        sample=SampleConfig(
            num_frames="16",
            resolution=None,
            aspect_ratio=None,
            image_size=(240, 426),
            frame_interval=3,
            condition_frame_length=4,
            align=None,
            aes=None,
        ),
    )


def transformer() -> STDiT2Config:
    """As released: queries and keys of temporal attention are rotated before they are normalised."""
    return STDiT2Config(input_sq_size=512, model_max_length=200, qk_norm=True, qk_norm_legacy=True)

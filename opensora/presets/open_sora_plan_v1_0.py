"""Open-Sora-Plan 1.0: the causal video VAE, the diffusion transformers and how they are sampled.

Source: PKU-YuanGroup/Open-Sora-Plan v1.0.0, scripts/causalvae/release.json and scripts/text_condition.
"""

from __future__ import annotations

from typing import Literal, get_args

from opensora.config import CausalVideoVAEConfig, DiffusersSamplerConfig, LatteT2VConfig, Preset, SampleConfig

Clip = Literal["65x512x512", "65x256x256", "17x256x256"]
REPOSITORY = "LanguageBind/Open-Sora-Plan-v1.0.0"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset(clip: Clip = "65x512x512") -> Preset:
    num_frames, height, width = map(int, clip.split("x"))
    return Preset(
        name="open-sora-plan-v1.0" if clip == get_args(Clip)[0] else f"open-sora-plan-v1.0-{clip}",
        description=f"Open-Sora-Plan 1.0: images and clips of {num_frames} frames of {height} x {width}",
        vae=f"{REPOSITORY}:vae",
        transformer=f"{REPOSITORY}:{clip}",
        text_encoder=TEXT_ENCODER,
        vae_kind="causal",
        transformer_config=transformer(clip),
        scheduler=DiffusersSamplerConfig(sample_method="PNDM", num_sampling_steps=50, cfg_scale=7.5),
        sample=SampleConfig(
            num_frames=str(num_frames),
            resolution=None,
            aspect_ratio=None,
            image_size=(height, width),
            condition_frame_length=1,
            align=None,
            aes=None,
            negative_prompt="",
            cut_negative=True,
            dtype="fp16",
            text_dtype="fp16",
        ),
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

"""How Open-Sora-Plan 1.0 and 1.1 are sampled alike.

Source: PKU-YuanGroup/Open-Sora-Plan v1.1.0, opensora/sample/sample_t2v.py.
"""

from __future__ import annotations

from opensora.config import DiffusersSamplerConfig, LatteT2VConfig, Preset, SampleConfig

TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset(version: str, clip: str, transformer: LatteT2VConfig, *, is_default: bool) -> Preset:
    """The preset of weights for clips of "frames x height x width"; the default's name has no size in it."""
    num_frames, height, width = map(int, clip.split("x"))
    name, repository = f"open-sora-plan-v{version}", f"LanguageBind/Open-Sora-Plan-v{version}.0"
    return Preset(
        name=name if is_default else f"{name}-{clip}",
        description=f"Open-Sora-Plan {version}: images and clips of {num_frames} frames of {height} x {width}",
        vae=f"{repository}:vae",
        transformer=f"{repository}:{clip}",
        text_encoder=TEXT_ENCODER,
        vae_kind="causal",
        transformer_config=transformer,
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

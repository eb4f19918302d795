"""Each of the five systems with small models of random weights, sampled as its preset says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora import presets
from opensora.checkpoints import save_model
from opensora.config import LatteT2VConfig, SampleConfig, STDiT2Config, STDiT3Config, STDiTConfig, TransformerConfig
from opensora.loading import MODEL_OF
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1
from opensora.sampler import Sampler
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import CausalVideoVAE, VideoVAE
from tests.tiny_models import CAPTIONS, VAE

TEXT_LENGTH = 12
_STDIT = {"hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 64, "model_max_length": TEXT_LENGTH}
_LATTE = LatteT2VConfig(
    num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, caption_channels=64,
    sample_size=(4, 4), video_length=3, model_max_length=TEXT_LENGTH,
)  # fmt: skip
_CAUSAL = {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1}


@dataclass(frozen=True)
class TinySystem:
    """A preset's name, and what takes the place of its models and sizes. num_frames: of a clip; pixels: its sides."""

    preset: str
    transformer: TransformerConfig
    save_vae: Callable[[Path], None]
    num_frames: int
    pixels: int
    steps: int = 3
    condition_frame_length: int = 1


def _save_image_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**types, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2).save_pretrained(folder)


def _save_stacked(folder: Path) -> None:
    save_model(folder, VideoVAE(VAE), VAE)


def _save_causal(config: Any) -> Callable[[Path], None]:
    small = replace(config, **_CAUSAL)
    return lambda folder: save_model(folder, CausalVideoVAE(small), small)


SYSTEMS = {
    "open-sora-v1.0": TinySystem(
        "open-sora-v1.0", STDiTConfig(input_size=(4, 8, 8), **_STDIT), _save_image_vae, 4, 16
    ),
    "open-sora-v1.1": TinySystem(
        "open-sora-v1.1", STDiT2Config(qk_norm=True, qk_norm_legacy=True, **_STDIT), _save_image_vae, 4, 16
    ),
    "open-sora-v1.2": TinySystem("open-sora-v1.2", STDiT3Config(input_sq_size=16, **_STDIT), _save_stacked, 17, 16),
    "open-sora-plan-v1.0": TinySystem(
        "open-sora-plan-v1.0", replace(_LATTE, version="1.0"), _save_causal(open_sora_plan_v1_0.vae()), 9, 32, steps=4
    ),
    "open-sora-plan-v1.1": TinySystem(
        "open-sora-plan-v1.1", _LATTE, _save_causal(open_sora_plan_v1_1.vae()), 9, 32, steps=4
    ),
}  # fmt: skip


def save_system(name: str, folder: Path) -> dict[str, Path]:
    """Write the models of a system below `folder`; returns them under the names that `Sampler.from_preset` has."""
    system = SYSTEMS[name]
    torch.manual_seed(0)
    system.save_vae(folder / "vae")
    transformer = MODEL_OF[type(system.transformer)](system.transformer)
    for parameter in transformer.parameters():  # zero-initialised layers would hide whole blocks from every test
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    save_model(folder / "transformer", transformer, system.transformer)
    build_tiny_text_encoder(CAPTIONS, model_max_length=TEXT_LENGTH).save_pretrained(folder / "text_encoder")
    return {part: folder / part for part in ("vae", "transformer", "text_encoder")}


def sampling(name: str) -> SampleConfig:
    """The preset's, at the size of the small models."""
    system = SYSTEMS[name]
    return replace(
        presets.get(name).sample,
        num_frames=str(system.num_frames),
        resolution=None,
        aspect_ratio=None,
        image_size=(system.pixels, system.pixels),
        condition_frame_length=system.condition_frame_length,
        align=None,
        dtype="fp32",
        text_dtype="fp32",
    )


def load_system(name: str, folder: Path) -> Sampler:
    """A sampler of `save_system`'s models, with the preset's scheduler and few steps.

    Latents are means: those that an encoder of random weights draws are noise above all.
    """
    sampler = Sampler.from_preset(name, **save_system(name, folder), config=sampling(name))
    sampler.scheduler = replace(sampler.scheduler, num_sampling_steps=SYSTEMS[name].steps)
    encode = sampler.vae.encode
    sampler.vae.encode = lambda x, **options: encode(x, sample_posterior=False)
    return sampler

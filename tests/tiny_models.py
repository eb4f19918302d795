"""A whole model of random weights in a folder, small enough that a test samples from it in well under a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from opensora.checkpoints import save_model
from opensora.config import SampleConfig, SpatialVAEConfig, STDiT3Config, TemporalVAEConfig, VideoVAEConfig
from opensora.models.stdit3 import STDiT3
from opensora.presets import tiny
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import VideoVAE

CAPTIONS = ["a red circle moving left", "a blue square moving down", "a green triangle moving up"]

VAE = VideoVAEConfig(
    spatial=SpatialVAEConfig(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    ),
    temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, channel_multipliers=(1, 1, 1, 1), num_groups=2),
    scale=1.0,
    shift=0.0,
    micro_frame_size=17,
    micro_batch_size=None,
)
TRANSFORMER = STDiT3Config(
    input_sq_size=16, in_channels=4, hidden_size=24, depth=1, num_heads=2, caption_channels=64, model_max_length=12
)
SAMPLE: SampleConfig = replace(tiny.sampling(), image_size=(16, 16))


def save_tiny_models(folder: Path) -> Path:
    """Write vae/, transformer/ and text_encoder/ below `folder`."""
    torch.manual_seed(0)
    transformer = STDiT3(TRANSFORMER)
    # Zero-initialised layers would hide the temporal blocks from every test.
    for parameter in transformer.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    save_model(folder / "transformer", transformer, TRANSFORMER)
    save_model(folder / "vae", VideoVAE(VAE), VAE)
    build_tiny_text_encoder(CAPTIONS, model_max_length=TRANSFORMER.model_max_length).save_pretrained(
        folder / "text_encoder"
    )
    return folder

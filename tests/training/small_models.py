"""The real trainers on models and clips as small as they can be."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opensora.config import (
    DataConfig,
    OptimizerConfig,
    RectifiedFlowConfig,
    RunConfig,
    SampleConfig,
    SpatialVAEConfig,
    STDiT3Config,
    TemporalVAEConfig,
    TrainConfig,
    TrainVAEConfig,
    VideoVAEConfig,
)
from opensora.data.shapes import generate
from opensora.presets import open_sora_plan_v1_1
from opensora.training import TrainingResult
from opensora.video import write_mp4

NUM_CLIPS = 6
VAE = VideoVAEConfig(
    spatial=SpatialVAEConfig(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ),
    temporal=TemporalVAEConfig(
        filters=8, num_res_blocks=1, channel_multipliers=(1, 1), temporal_downsample=(True,), num_groups=4
    ),
    scale=1.0,
    shift=0.0,
    micro_frame_size=None,
)
# Time and space halved once, 0.2 M parameters.
CAUSAL_VAE = replace(
    open_sora_plan_v1_1.vae(),
    hidden_size=32,
    hidden_size_mult=(1, 1),
    num_res_blocks=1,
    encoder_resnet_blocks=("ResnetBlock2D", "ResnetBlock3D"),
    encoder_spatial_downsample=("Downsample", ""),
    encoder_temporal_downsample=("TimeDownsampleRes2x", ""),
    decoder_resnet_blocks=("ResnetBlock3D",) * 2,
    decoder_spatial_upsample=("", "SpatialUpsample2x"),
    decoder_temporal_upsample=("", "TimeUpsampleRes2x"),
)
TRANSFORMER = STDiT3Config(
    input_sq_size=16, hidden_size=16, depth=1, num_heads=2, caption_channels=64, model_max_length=8
)


def write_clips(folder: Path) -> Path:
    """Moving shapes, 5 frames of 16 x 16; returns the manifest."""
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "num_frames", "height", "width", "fps"))
        for index in range(NUM_CLIPS):
            caption, frames = generate(index * 5, num_frames=5, height=16, width=16)
            write_mp4(folder / f"{index}.mp4", frames, fps=8)
            writer.writerow((f"{index}.mp4", caption, 5, 16, 16, 8))
    return folder / "clips.csv"


def train_small(kind: str, folder: Path, output: Path, *, resume: bool = False, **changes: Any) -> TrainingResult:
    """Trains the VAE ("vae") or the transformer ("flow") on `folder`/clips.csv; `changes` replace configured parts."""
    if kind == "vae":
        from opensora.vae_trainer import run_train_vae

        return run_train_vae(replace(vae_config(folder, output), **changes), resume=resume)
    from opensora.trainer import run_train

    return run_train(replace(flow_config(folder, output), **changes), resume=resume)


def vae_config(folder: Path, output: Path) -> TrainVAEConfig:
    data, optimizer, run = _common(folder, output)
    return TrainVAEConfig(vae=VAE, data=data, optimizer=optimizer, run=run, mixed="random")


def flow_config(folder: Path, output: Path) -> TrainConfig:
    data, optimizer, run = _common(folder, output)
    return TrainConfig(
        transformer=TRANSFORMER,
        scheduler=RectifiedFlowConfig(num_sampling_steps=2, use_timestep_transform=False),
        data=data,
        optimizer=optimizer,
        run=run,
        mask_ratios={"random": 0.3, "image_head": 0.3},
        vae=str(folder / "vae"),
        train_text_encoder=True,
        sample=SampleConfig(
            num_frames="5",
            resolution=None,
            aspect_ratio=None,
            image_size=(16, 16),
            fps=8.0,
            align=None,
            aes=None,
            dtype="fp32",
        ),
    )


def save_untrained_vae(folder: Path) -> None:
    from opensora.checkpoints import save_model
    from opensora.vae import VideoVAE

    torch.manual_seed(0)
    save_model(folder / "vae", VideoVAE(VAE), VAE)


def _common(folder: Path, output: Path) -> tuple[DataConfig, OptimizerConfig, RunConfig]:
    return (
        DataConfig(manifest=str(folder / "clips.csv"), image_size=(16, 16), num_frames=5, batch_size=2),
        OptimizerConfig(lr=1e-3, eps=1e-8, ema_decay=0.9, accumulation_steps=2),
        RunConfig(
            output=str(output),
            steps=7,
            dtype="fp32",
            device="cpu",
            log_every=1,
            checkpoint_every=3,
            tensorboard=False,
            num_threads=1,
        ),
    )

"""Open-Sora 1.0: the transformer of each release, how it is sampled, and its training stages.

Source: hpcaitech/Open-Sora v1.0.0, configs/opensora.
"""

from __future__ import annotations

from typing import Literal, get_args

from opensora.config import (
    DataConfig,
    IDDPMConfig,
    OptimizerConfig,
    Preset,
    RunConfig,
    SampleConfig,
    STDiTConfig,
    TrainConfig,
)

ClipName = Literal["16x256x256", "16x512x512", "64x512x512"]
"""Frames, height and width in pixels."""

VAE = "stabilityai/sd-vae-ft-ema"
IMAGE_MODEL = "PixArt-alpha/PixArt-alpha:PixArt-XL-2-512x512.pth"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"
STAGES: dict[str, ClipName] = {"stage1": "16x256x256", "stage2": "16x512x512", "stage3": "64x512x512"}
_DEFAULT = get_args(ClipName)[0]


def preset(clip: ClipName = "16x256x256") -> Preset:
    """How a release is sampled. Of 64x512x512 upstream published the configuration, no weights."""
    num_frames, height, width = map(int, clip.split("x"))
    return Preset(
        name="open-sora-v1.0" if clip == _DEFAULT else f"open-sora-v1.0-{clip}",
        description=f"Open-Sora 1.0: {num_frames} frames of {height} x {width}, every third of 24 a second",
        vae=VAE,
        transformer=f"hpcai-tech/Open-Sora:OpenSora-v1-HQ-{clip}.pth",
        text_encoder=TEXT_ENCODER,
        vae_kind="frames",
        transformer_config=transformer(clip),
        scheduler=scheduler(),
        sample=sampling(clip),
        training={stage: training(stage) for stage, its_clip in STAGES.items() if clip in (its_clip, _DEFAULT)},
    )


def scheduler() -> IDDPMConfig:
    return IDDPMConfig(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3, table_dtype="float64")


def sampling(clip: ClipName = "16x256x256") -> SampleConfig:
    num_frames, height, width = map(int, clip.split("x"))
    return SampleConfig(
        num_frames=str(num_frames),
        resolution=None,
        aspect_ratio=None,
        image_size=(height, width),
        frame_interval=3,
        condition_frame_length=num_frames // 4,
        align=None,
        aes=None,
        dtype="fp16",
    )


def training(stage: str = "stage1") -> TrainConfig:
    """`stage1`: 16 frames of 256 x 256, from PixArt-alpha; `stage2`: of 512 x 512; `stage3`: 64 of them.

    Batches are for one 80 GB accelerator. Each stage begins from the one before. Upstream ran until it was stopped (its
    report names no steps); it kept averages of decay 0.9999, its default.
    """
    clip = STAGES[stage]
    num_frames, height, width = map(int, clip.split("x"))
    before = list(STAGES)[list(STAGES).index(stage) - 1]
    return TrainConfig(
        transformer=transformer(clip),
        scheduler=scheduler(),
        data=DataConfig(
            image_size=(height, width),
            num_frames=num_frames,
            frame_interval=3,
            batch_size=4 if stage == "stage3" else 8,
            num_workers=4,
            fit="center",
            flip=True,
        ),
        optimizer=OptimizerConfig(lr=2e-5, eps=1e-8, ema_decay=0.9999),
        run=RunConfig(
            output=_output(stage),
            steps=100_000,
            checkpoint_every={"stage1": 1000, "stage2": 500, "stage3": 250}[stage],
            grad_checkpoint=stage != "stage2",
        ),
        vae=VAE,
        vae_kind="frames",
        text_encoder=TEXT_ENCODER,
        initial_transformer=IMAGE_MODEL if stage == "stage1" else f"{_output(before)}/model/transformer",
        sample=sampling(clip),
    )


def _output(stage: str) -> str:
    return f"outputs/open-sora-v1-0-{stage}"


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

"""Open-Sora 1.1: the transformer of the release, how it is sampled, and its training stages.

Source: hpcaitech/Open-Sora v1.1.0, configs/opensora-v1-1; numbers of steps of docs/report_02.md.
"""

from __future__ import annotations

from opensora.config import (
    DataConfig,
    IDDPMConfig,
    OptimizerConfig,
    Preset,
    RunConfig,
    SampleConfig,
    STDiT2Config,
    TrainConfig,
)
from opensora.data.recipes import BUCKETS_V1_1, MASK_RATIOS_V1_1

VAE = "stabilityai/sd-vae-ft-ema"
IMAGE_MODEL = "PixArt-alpha/PixArt-alpha:PixArt-XL-2-1024-MS.pth"
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
        scheduler=scheduler(),
        sample=sampling(),
        training={stage: training(stage) for stage in ("stage1", "stage2", "stage3", "images")},
    )


def scheduler() -> IDDPMConfig:
    return IDDPMConfig(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3)


def sampling() -> SampleConfig:
    return SampleConfig(
        num_frames="16",
        resolution=None,
        aspect_ratio=None,
        image_size=(240, 426),
        frame_interval=3,
        condition_frame_length=4,
        align=None,
        aes=None,
    )


def transformer() -> STDiT2Config:
    """As released: queries and keys of temporal attention are rotated before they are normalised."""
    return STDiT2Config(input_sq_size=512, model_max_length=200, qk_norm=True, qk_norm_legacy=True)


def training(stage: str = "stage1") -> TrainConfig:
    """`images`: still images of all sizes, from PixArt-alpha; `stage1`: mostly 144p; `stage2`: mostly 240p and 480p;
    `stage3`: up to 720p.

    Batch sizes are for 80 GB accelerators. Each stage begins from the one before, stage1 from `images`. Of stage1's
    81,000 steps upstream ran the first 24,000 on stage2's buckets and all but the last 17,000 with the weights of
    iddpm-speed; it used no averages.
    """
    before = {"stage1": "images", "stage2": "stage1", "stage3": "stage2"}
    start = IMAGE_MODEL if stage == "images" else f"{_output(before[stage])}/model/transformer"
    return TrainConfig(
        transformer=transformer(),
        scheduler=IDDPMConfig(
            num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3, is_speed_weighted=stage == "images"
        ),
        data=DataConfig(buckets=BUCKETS_V1_1[stage], frame_interval=3, file_fps=True, num_workers=8),
        optimizer=OptimizerConfig(lr=2e-5, eps=1e-8, ema_decay=0.0),
        run=RunConfig(
            output=_output(stage), steps=_STEPS[stage], checkpoint_every=500, grad_checkpoint=stage != "stage1"
        ),
        mask_ratios={} if stage == "images" else MASK_RATIOS_V1_1,
        vae=VAE,
        vae_kind="frames",
        text_encoder=TEXT_ENCODER,
        initial_transformer=start,
        sample=sampling(),
    )


def _output(stage: str) -> str:
    return f"outputs/open-sora-v1-1-{stage}"


_STEPS = {"images": 6_000, "stage1": 81_000, "stage2": 22_000, "stage3": 4_000}

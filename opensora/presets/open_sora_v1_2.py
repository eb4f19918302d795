"""Open-Sora 1.2: the released weights, upstream's sampling defaults and its training stages.

Source: hpcaitech/Open-Sora v1.2.0, configs/opensora-v1-2 and configs/vae; steps of the adaptation of docs/report_03.md.
"""

from __future__ import annotations

from dataclasses import replace

from opensora.config import (
    DataConfig,
    IDDPMConfig,
    OptimizerConfig,
    Preset,
    RectifiedFlowConfig,
    RunConfig,
    SampleConfig,
    STDiT3Config,
    TrainConfig,
    TrainVAEConfig,
    VAELossConfig,
    VideoVAEConfig,
)
from opensora.data.recipes import BUCKETS, BUCKETS_IMAGES, MASK_RATIOS

VAE = "hpcai-tech/OpenSora-VAE-v1.2"
TRANSFORMER = "hpcai-tech/OpenSora-STDiT-v3"
IMAGE_MODEL = "PixArt-alpha/PixArt-Sigma:PixArt-Sigma-XL-2-2K-MS.pth"
IMAGE_VAE = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers:vae"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset() -> Preset:
    return Preset(
        name="open-sora-v1.2",
        description="Open-Sora 1.2: 144p to 720p, images and clips of 2 to 16 seconds at 24 fps",
        vae=VAE,
        transformer=TRANSFORMER,
        text_encoder=TEXT_ENCODER,
        sample=SampleConfig(),
        scheduler=RectifiedFlowConfig(),
        training={stage: training(stage) for stage in _STEPS} | {step: adaptation(step) for step in _ADAPTATION},
        vae_training={stage: vae_training(stage) for stage in _VAE_STEPS},
    )


def training(stage: str = "stage1") -> TrainConfig:
    """`stage1`: 144p to 360p of 30 M clips; `stage2`: up to 720p; `stage3`: high quality, first frame often given.

    Batch sizes are for 80 GB accelerators. Each stage begins from the one before, stage1 from the last step of the
    adaptation; the released weights can take its place as `initial_transformer`.
    """
    before = {"stage1": list(_ADAPTATION)[-1], "stage2": "stage1", "stage3": "stage2"}[stage]
    return TrainConfig(
        transformer=STDiT3Config(freeze_y_embedder=True),
        scheduler=RectifiedFlowConfig(),
        data=DataConfig(buckets=BUCKETS[stage], num_workers=8),
        optimizer=OptimizerConfig(lr=1e-4, eps=1e-15, warmup_steps=0 if stage == "stage2" else 1000, ema_decay=0.99),
        run=RunConfig(output=_output(stage), steps=_STEPS[stage], grad_checkpoint=True),
        mask_ratios=MASK_RATIOS[stage],
        vae=VAE,
        text_encoder=TEXT_ENCODER,
        initial_transformer=f"{_output(before)}/model/transformer",
    )


def adaptation(step: str = "adapt-1-images") -> TrainConfig:
    """From PixArt-Sigma, an image model of DDPM, to a video model of rectified flow: eight steps before `stage1`.

    1 images of all sizes, 2 norms of queries and keys, 3 rectified flow, 4 logit-normal times that follow the size,
    5 a smaller epsilon of Adam, 6 the video VAE and the frame rate, 7 temporal blocks, on images, 8 temporal blocks
    alone, on clips with given frames. Until step 7 temporal blocks have no effect and stay so, as if they were not
    there. Upstream published configurations of steps 1, 6 and 8 in its history and names the others; what it does not
    say of them is as in the step before.
    """
    number = list(_ADAPTATION).index(step) + 1
    flow = RectifiedFlowConfig(sample_method="uniform", use_timestep_transform=False)
    frozen: tuple[str, ...] = ("temporal_blocks.",) if number < 7 else ()
    if number < 6:
        frozen += ("fps_embedder.",)
    return TrainConfig(
        transformer=STDiT3Config(qk_norm=number > 1, only_train_temporal=number == 8),
        scheduler=IDDPMConfig() if number < 3 else flow if number == 3 else RectifiedFlowConfig(),
        data=DataConfig(buckets=BUCKETS["adapt"] if number == 8 else BUCKETS_IMAGES, num_workers=4),
        optimizer=OptimizerConfig(lr=2e-5 if number == 1 else 1e-4, eps=1e-8 if number < 5 else 1e-15, ema_decay=0.99),
        run=RunConfig(output=_output(step), steps=_ADAPTATION[step], checkpoint_every=500),
        mask_ratios=MASK_RATIOS["adapt"] if number == 8 else {},
        vae=IMAGE_VAE if number < 6 else VAE,
        vae_kind="frames" if number < 6 else "stacked",
        text_encoder=TEXT_ENCODER,
        initial_transformer=(
            IMAGE_MODEL if number == 1 else f"{_output(list(_ADAPTATION)[number - 2])}/model/transformer"
        ),
        frozen=frozen,
        sample=SampleConfig() if number == 8 else replace(SampleConfig(), num_frames="1"),
    )


def _output(stage: str) -> str:
    return f"outputs/open-sora-v1-2-{stage}"


def vae_training(stage: str = "stage1") -> TrainVAEConfig:
    """`stage1`: the temporal half against the frozen image VAE; `stage2`: both; `stage3`: both, in pixels.

    Each begins from the one before. Stage 3 cuts every clip to a random length of up to 33 frames, which zeros in front
    fill up to whole latents, and adds 0.1 x LPIPS: set `loss.perceptual_path` to its weights, or
    `loss.perceptual_weight` to 0.
    """
    in_pixels = stage == "stage3"
    before = {"stage1": None, "stage2": "stage1", "stage3": "stage2"}[stage]
    return TrainVAEConfig(
        vae=VideoVAEConfig(),
        loss=VAELossConfig(
            use_real_rec_loss=in_pixels,
            use_z_rec_loss=not in_pixels,
            use_image_identity_loss=stage == "stage1",
            perceptual_weight=0.1 if in_pixels else 0.0,
        ),
        data=DataConfig(
            image_size=(256, 256), num_frames=33 if in_pixels else 17, batch_size=1, num_workers=8, fit="center"
        ),
        optimizer=OptimizerConfig(lr=1e-5, eps=1e-8),
        run=RunConfig(
            output=f"outputs/open-sora-v1-2-vae-{stage}",
            steps=_VAE_STEPS[stage],
            checkpoint_every=1000,
            grad_checkpoint=True,
        ),
        image_vae=IMAGE_VAE if before is None else None,
        initial_vae=None if before is None else f"outputs/open-sora-v1-2-vae-{before}/model/vae",
        freeze_spatial=stage == "stage1",
        mixed="random" if in_pixels else "image",
        mixed_image_ratio=0.2,
    )


_ADAPTATION = {
    "adapt-1-images": 20_000,
    "adapt-2-qk-norm": 18_000,
    "adapt-3-flow": 10_000,
    "adapt-4-times": 33_000,
    "adapt-5-epsilon": 8_000,
    "adapt-6-vae": 25_000,
    "adapt-7-temporal": 3_000,
    "adapt-8-video": 38_000,
}
_STEPS = {"stage1": 30_000, "stage2": 23_000, "stage3": 15_000}
_VAE_STEPS = {"stage1": 380_000, "stage2": 260_000, "stage3": 540_000}

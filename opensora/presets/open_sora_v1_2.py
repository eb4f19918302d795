"""Open-Sora 1.2: the released weights, upstream's sampling defaults and its training stages.

Source: hpcaitech/Open-Sora v1.2.0, configs/opensora-v1-2 and configs/vae.
"""

from __future__ import annotations

from opensora.config import (
    BucketTable,
    DataConfig,
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

VAE = "hpcai-tech/OpenSora-VAE-v1.2"
TRANSFORMER = "hpcai-tech/OpenSora-STDiT-v3"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset() -> Preset:
    return Preset(
        name="open_sora_v1_2",
        description="Open-Sora 1.2: 144p to 720p, images and clips of 2 to 16 seconds at 24 fps",
        vae=VAE,
        transformer=TRANSFORMER,
        text_encoder=TEXT_ENCODER,
        sample=SampleConfig(),
        flow=RectifiedFlowConfig(),
        training={stage: training(stage) for stage in _STEPS},
        vae_training={stage: vae_training(stage) for stage in _VAE_STEPS},
    )


def training(stage: str = "stage1") -> TrainConfig:
    """`stage1`: 144p to 360p of 30 M clips; `stage2`: up to 720p; `stage3`: high quality, first frame often given.

    Each stage begins from the one before: pass its model folder, or the released weights, as `initial_transformer`.
    """
    return TrainConfig(
        transformer=STDiT3Config(freeze_y_embedder=True),
        flow=RectifiedFlowConfig(),
        data=DataConfig(buckets=_BUCKETS[stage], num_workers=8),
        optimizer=OptimizerConfig(lr=1e-4, eps=1e-15, warmup_steps=0 if stage == "stage2" else 1000, ema_decay=0.99),
        run=RunConfig(output=f"outputs/open-sora-v1-2-{stage}", steps=_STEPS[stage], grad_checkpoint=True),
        mask_ratios=_MASK_RATIOS[stage],
        vae=VAE,
        text_encoder=TEXT_ENCODER,
    )


def vae_training(stage: str = "stage1") -> TrainVAEConfig:
    """`stage1`: the temporal half against the frozen image VAE; `stage2`: both; `stage3`: both, in pixels.

    Upstream adds 0.1 x LPIPS in stage 3; set `loss.perceptual_weight` and `loss.perceptual_path` to do the same.
    """
    in_pixels = stage == "stage3"
    return TrainVAEConfig(
        vae=VideoVAEConfig(),
        loss=VAELossConfig(
            use_real_rec_loss=in_pixels, use_z_rec_loss=not in_pixels, use_image_identity_loss=stage == "stage1"
        ),
        data=DataConfig(image_size=(256, 256), num_frames=33 if in_pixels else 17, batch_size=1, num_workers=8),
        optimizer=OptimizerConfig(lr=1e-5, eps=1e-8),
        run=RunConfig(
            output=f"outputs/open-sora-v1-2-vae-{stage}",
            steps=_VAE_STEPS[stage],
            checkpoint_every=1000,
            grad_checkpoint=True,
        ),
        freeze_spatial=stage == "stage1",
        mixed="random" if in_pixels else "image",
        mixed_image_ratio=0.2,
    )


_STEPS = {"stage1": 30_000, "stage2": 23_000, "stage3": 15_000}
_VAE_STEPS = {"stage1": 380_000, "stage2": 260_000, "stage3": 540_000}

# Batch sizes per 80 GB accelerator.
_BUCKETS: dict[str, BucketTable] = {
    "stage1": {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13), 408: ((1.0, 0.1), 6)},
        "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 0.1), 5), 408: ((0.5, 0.1), 2)},
        "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 0.1), 5), 408: ((0.4, 0.1), 2)},
        "360p": {1: (0.2, 141), 51: (0.15, 8), 102: ((0.15, 0.33), 4), 204: ((0.15, 0.1), 2), 408: ((0.15, 0.1), 1)},
        "512": {1: (0.1, 141)},
        "480p": {1: (0.1, 89)},
        "720p": {1: (0.05, 36)},
        "1024": {1: (0.05, 36)},
        "1080p": {1: (0.1, 5)},
        "2048": {1: (0.1, 5)},
    },
    "stage2": {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13), 408: ((1.0, 0.1), 6)},
        "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 1.0), 5), 408: ((0.5, 1.0), 2)},
        "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 1.0), 5), 408: ((0.4, 1.0), 2)},
        "360p": {1: (0.5, 141), 51: (0.15, 8), 102: ((0.3, 0.5), 4), 204: ((0.3, 1.0), 2), 408: ((0.5, 0.5), 1)},
        "512": {1: (0.4, 141), 51: (0.15, 8), 102: ((0.2, 0.4), 4), 204: ((0.2, 1.0), 2), 408: ((0.4, 0.5), 1)},
        "480p": {1: (0.5, 89), 51: (0.2, 5), 102: (0.2, 2), 204: (0.1, 1)},
        "720p": {1: (0.1, 36), 51: (0.03, 1)},
        "1024": {1: (0.1, 36), 51: (0.02, 1)},
        "1080p": {1: (0.01, 5)},
        "2048": {1: (0.01, 5)},
    },
    "stage3": {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: (1.0, 27), 204: (1.0, 13), 408: (1.0, 6)},
        "256": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.5), 2)},
        "240p": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.4), 2)},
        "360p": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.3), 1)},
        "512": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.2), 1)},
        "480p": {1: (1.0, 89), 51: (0.5, 5), 102: (0.5, 3), 204: ((0.5, 0.5), 1), 408: (0.0, None)},
        "720p": {1: (0.3, 36), 51: (0.2, 2), 102: (0.1, 1), 204: (0.0, None)},
        "1024": {1: (0.3, 36), 51: (0.1, 2), 102: (0.1, 1), 204: (0.0, None)},
        "1080p": {1: (0.1, 5)},
        "2048": {1: (0.05, 5)},
    },
}

_MASK_RATIOS: dict[str, dict[str, float]] = {
    "stage1": {
        "random": 0.05,
        "intepolate": 0.005,
        "quarter_random": 0.005,
        "quarter_head": 0.005,
        "quarter_tail": 0.005,
        "quarter_head_tail": 0.005,
        "image_random": 0.025,
        "image_head": 0.05,
        "image_tail": 0.025,
        "image_head_tail": 0.025,
    },
    "stage2": {
        "random": 0.05,
        "intepolate": 0.005,
        "quarter_random": 0.005,
        "quarter_head": 0.005,
        "quarter_tail": 0.005,
        "quarter_head_tail": 0.005,
        "image_random": 0.025,
        "image_head": 0.05,
        "image_tail": 0.025,
        "image_head_tail": 0.025,
    },
    "stage3": {
        "random": 0.01,
        "intepolate": 0.002,
        "quarter_random": 0.002,
        "quarter_head": 0.002,
        "quarter_tail": 0.002,
        "quarter_head_tail": 0.002,
        "image_random": 0.0,
        "image_head": 0.22,
        "image_tail": 0.005,
        "image_head_tail": 0.005,
    },
}

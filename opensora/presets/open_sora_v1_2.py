"""Open-Sora 1.2: the released weights, upstream's sampling defaults and its training stages.

Source: hpcaitech/Open-Sora v1.2.0, configs/opensora-v1-2 and configs/vae.
"""

from __future__ import annotations

from opensora.config import (
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
from opensora.data.recipes import BUCKETS, MASK_RATIOS

VAE = "hpcai-tech/OpenSora-VAE-v1.2"
TRANSFORMER = "hpcai-tech/OpenSora-STDiT-v3"
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
        training={stage: training(stage) for stage in _STEPS},
        vae_training={stage: vae_training(stage) for stage in _VAE_STEPS},
    )


def training(stage: str = "stage1") -> TrainConfig:
    """`stage1`: 144p to 360p of 30 M clips; `stage2`: up to 720p; `stage3`: high quality, first frame often given.

    Batch sizes are for 80 GB accelerators. Each stage begins from the one before: pass its model folder, or the
    released weights, as `initial_transformer`.
    """
    return TrainConfig(
        transformer=STDiT3Config(freeze_y_embedder=True),
        flow=RectifiedFlowConfig(),
        data=DataConfig(buckets=BUCKETS[stage], num_workers=8),
        optimizer=OptimizerConfig(lr=1e-4, eps=1e-15, warmup_steps=0 if stage == "stage2" else 1000, ema_decay=0.99),
        run=RunConfig(output=f"outputs/open-sora-v1-2-{stage}", steps=_STEPS[stage], grad_checkpoint=True),
        mask_ratios=MASK_RATIOS[stage],
        vae=VAE,
        text_encoder=TEXT_ENCODER,
    )


def vae_training(stage: str = "stage1") -> TrainVAEConfig:
    """`stage1`: the temporal half against the frozen image VAE; `stage2`: both; `stage3`: both, in pixels.

    Stage 3 cuts every clip to a random length of up to 33 frames, which zeros in front fill up to whole latents, and
    adds 0.1 x LPIPS: set `loss.perceptual_path` to its weights, or `loss.perceptual_weight` to 0.
    """
    in_pixels = stage == "stage3"
    return TrainVAEConfig(
        vae=VideoVAEConfig(),
        loss=VAELossConfig(
            use_real_rec_loss=in_pixels,
            use_z_rec_loss=not in_pixels,
            use_image_identity_loss=stage == "stage1",
            perceptual_weight=0.1 if in_pixels else 0.0,
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

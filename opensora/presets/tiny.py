"""The embedded model: clips of 17 frames, 64 x 64 pixels, 8 per second; the recipe that made it.

opensora make-tiny-data data/tiny
opensora train-vae --preset tiny --stage spatial
opensora train-vae --preset tiny --stage temporal
opensora train-vae --preset tiny --stage clips
opensora train --preset tiny --stage uniform
opensora train --preset tiny --stage shifted
opensora train --preset tiny --stage motion
opensora pack assets --vae outputs/tiny-vae-spatial outputs/tiny-vae-temporal outputs/tiny-vae \\
    --transformer outputs/tiny-uniform outputs/tiny-shifted outputs/tiny
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from opensora.config import (
    DataConfig,
    OptimizerConfig,
    Preset,
    RectifiedFlowConfig,
    RunConfig,
    SampleConfig,
    SpatialVAEConfig,
    STDiT3Config,
    TemporalVAEConfig,
    TrainConfig,
    TrainVAEConfig,
    VAELossConfig,
    VideoVAEConfig,
)

ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
DATA = "data/tiny"
FRAME_CHANNELS = 8
LATENT_CHANNELS = 16


def preset() -> Preset:
    return Preset(
        name="tiny",
        description="the embedded model: moving shapes and a few street scenes, 17 frames of 64 x 64 at 8 fps",
        vae=str(ASSETS / "vae"),
        transformer=str(ASSETS / "transformer"),
        text_encoder=str(ASSETS / "text_encoder"),
        sample=sampling(),
        scheduler=flow(),
        transformer_config=transformer(),
        training={"uniform": training_uniform(), "shifted": training_shifted(), "motion": training_motion()},
        vae_training={
            "spatial": vae_training_spatial(),
            "temporal": vae_training_temporal(),
            "clips": vae_training_clips(),
        },
    )


def sampling() -> SampleConfig:
    return SampleConfig(
        num_frames="17",
        resolution=None,
        aspect_ratio=None,
        image_size=(64, 64),
        fps=8.0,
        condition_frame_length=1,
        align=None,
        aes=None,
        dtype="fp32",
    )


def flow() -> RectifiedFlowConfig:
    """Times shifted towards noise by a ratio of 6 for clips, where upstream's formula gives 64 x 64 pixels 0.28.

    With 16 channels for each patch of 4 x 4 pixels, a shape shows through much noise: below t = 0.95 all its places can
    be seen, and the caption says nothing new about where it goes. Of 30 uniform steps, 2 lie above.
    """
    return RectifiedFlowConfig(num_sampling_steps=30, cfg_scale=3.0, transform_scale=21.5)


def vae() -> VideoVAEConfig:
    """Factor 4 in time and in each direction of space: 17 x 64 x 64 pixels become 5 x 16 x 16 latents."""
    return VideoVAEConfig(
        spatial=SpatialVAEConfig(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=FRAME_CHANNELS,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=1.0,
        ),
        temporal=TemporalVAEConfig(
            in_out_channels=FRAME_CHANNELS,
            latent_embed_dim=LATENT_CHANNELS,
            embed_dim=LATENT_CHANNELS,
            filters=32,
            num_res_blocks=1,
            channel_multipliers=(1, 2, 2, 2),
            num_groups=4,
        ),
        scale=1.0,
        shift=0.0,
        micro_frame_size=17,
        micro_batch_size=None,
    )


def transformer() -> STDiT3Config:
    return STDiT3Config(
        input_sq_size=64,
        in_channels=LATENT_CHANNELS,
        hidden_size=144,
        depth=3,
        num_heads=6,
        caption_channels=64,
        model_max_length=24,
    )


def vae_training_spatial() -> TrainVAEConfig:
    """From nothing, the 2-D part alone on single frames: what the temporal part then learns on has detail in it."""
    return TrainVAEConfig(
        vae=vae(),
        loss=VAELossConfig(kl_weight=1e-6),
        data=replace(_clips("vae_train", batch_size=64), num_frames=1),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-8, warmup_steps=50, ema_decay=0.98),
        run=RunConfig(output="outputs/tiny-vae-spatial", steps=800, checkpoint_every=100, sample_every=100),
        spatial_only=True,
        initial_log_variance=-4.0,
        num_statistics_clips=64,
    )


def vae_training_temporal() -> TrainVAEConfig:
    """The temporal part alone, on the latents of the 2-D one: five times the clips a second of training both."""
    spatial = vae_training_spatial()
    return replace(
        spatial,
        loss=VAELossConfig(use_real_rec_loss=False, use_z_rec_loss=True),
        data=_clips("vae_train", batch_size=8),
        run=replace(spatial.run, output="outputs/tiny-vae-temporal", steps=1000),
        spatial_only=False,
        freeze_spatial=True,
        initial_vae=f"{spatial.run.output}/model/vae",
    )


def vae_training_clips() -> TrainVAEConfig:
    """The decoders of both parts on pixels, the rate falling to nothing. Latents stay as the temporal stage left them.

    Training the encoders too, at batches of 4, cost half a dB of held-out PSNR.
    """
    temporal = vae_training_temporal()
    return replace(
        temporal,
        loss=VAELossConfig(kl_weight=1e-6),
        data=_clips("vae_train", batch_size=4),
        optimizer=OptimizerConfig(lr=3e-4, eps=1e-8, warmup_steps=20, decay="cosine", ema_decay=0.98),
        run=replace(temporal.run, output="outputs/tiny-vae", steps=300),
        freeze_spatial=False,
        freeze_encoder=True,
        initial_vae=f"{temporal.run.output}/model/vae",
    )


def training_uniform() -> TrainConfig:
    """From nothing, at all times alike: colours, sharpness, and shapes that do not yet stay one."""
    return TrainConfig(
        transformer=transformer(),
        scheduler=replace(flow(), use_timestep_transform=False, transform_scale=1.0),
        data=_clips("train", batch_size=16),
        optimizer=OptimizerConfig(
            lr=1e-3, eps=1e-8, warmup_steps=200, decay="cosine", final_lr_ratio=0.02, ema_decay=0.998
        ),
        run=RunConfig(output="outputs/tiny-uniform", steps=3750, checkpoint_every=250, sample_every=500),
        mask_ratios={
            "random": 0.02,
            "quarter_head": 0.01,
            "quarter_tail": 0.01,
            "quarter_head_tail": 0.01,
            "image_random": 0.02,
            "image_head": 0.09,
            "image_tail": 0.02,
            "image_head_tail": 0.02,
        },
        vae="outputs/tiny-vae/model/vae",
        train_text_encoder=True,
        cache_latents=True,
        image_ratio=0.1,
        sample=sampling(),
        sample_prompts=(
            "a red circle moving left",
            "a blue square moving down",
            "a green triangle moving right",
            "a yellow circle moving up",
        ),
    )


def training_shifted() -> TrainConfig:
    """Towards noise, by a ratio of 6: shapes that stay one and in their place."""
    uniform = training_uniform()
    return replace(
        uniform,
        scheduler=flow(),
        run=replace(uniform.run, output="outputs/tiny-shifted", steps=2000),
        initial_transformer=f"{uniform.run.output}/model/transformer",
        text_encoder=f"{uniform.run.output}/model/text_encoder",
    )


def training_motion() -> TrainConfig:
    """At the times that decide where a shape goes, a ratio of 30, and with the first frame given in three of ten clips.

    Within 750 steps, the loss at t = 0.98 came to tell a caption from one with the opposite direction by 0.11; after
    2000 steps of the stage before it told them by 0.001.
    """
    shifted = training_shifted()
    return replace(
        shifted,
        scheduler=replace(flow(), transform_scale=107.0),
        mask_ratios={**shifted.mask_ratios, "image_head": 0.3},
        run=replace(shifted.run, output="outputs/tiny", steps=3600),
        initial_transformer=f"{shifted.run.output}/model/transformer",
        text_encoder=f"{shifted.run.output}/model/text_encoder",
    )


def _clips(manifest: str, *, batch_size: int) -> DataConfig:
    return DataConfig(
        manifest=f"{DATA}/{manifest}.csv",
        validation=f"{DATA}/heldout.csv",
        image_size=(64, 64),
        num_frames=17,
        batch_size=batch_size,
        cache_in_memory=True,
    )

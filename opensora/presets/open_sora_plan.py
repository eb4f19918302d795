"""How Open-Sora-Plan 1.0 and 1.1 are sampled and trained alike.

Source: PKU-YuanGroup/Open-Sora-Plan v1.0.0 and v1.1.0, opensora/sample/sample_t2v.py, opensora/train and
scripts/text_condition.
"""

from __future__ import annotations

from opensora.config import (
    AdversaryConfig,
    CausalVideoVAEConfig,
    DataConfig,
    DiffusersSamplerConfig,
    IDDPMConfig,
    LatteT2VConfig,
    OptimizerConfig,
    Preset,
    RunConfig,
    SampleConfig,
    TrainConfig,
    TrainVAEConfig,
    VAELossConfig,
)

TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"
# Latte's text-to-video model, from which the first stage starts.
VIDEO_MODEL = "maxin-cn/Latte-1:transformer"


def preset(
    version: str,
    clip: str,
    transformer: LatteT2VConfig,
    training: dict[str, TrainConfig],
    vae_training: dict[str, TrainVAEConfig],
    *,
    is_default: bool,
) -> Preset:
    """The preset of weights for clips of "frames x height x width"; the default's name has no size in it and it has
    all stages of `training`, which are named by their clips, and of `vae_training`."""
    name, repository = f"open-sora-plan-v{version}", f"LanguageBind/Open-Sora-Plan-v{version}.0"
    return Preset(
        name=name if is_default else f"{name}-{clip}",
        description=f"Open-Sora-Plan {version}: images and clips of {clip}, frames x height x width",
        vae=f"{repository}:vae",
        transformer=f"{repository}:{clip}",
        text_encoder=TEXT_ENCODER,
        vae_kind="causal",
        transformer_config=transformer,
        scheduler=DiffusersSamplerConfig(sample_method="PNDM", num_sampling_steps=50, cfg_scale=7.5),
        sample=sampling(clip),
        training={stage: config for stage, config in training.items() if is_default or stage == clip},
        vae_training=vae_training if is_default else {},
    )


def sampling(clip: str) -> SampleConfig:
    num_frames, height, width = map(int, clip.split("x"))
    return SampleConfig(
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
    )


def training(
    version: str, clip: str, transformer: LatteT2VConfig, *, before: str | None, batch_size: int, num_images: int
) -> TrainConfig:
    """The stage of clips of "frames x height x width", which begins from the stage `before`.

    Each clip has images beside it: of a list in 1.1, `data.image_manifest`, and of its own frames in 1.0. Upstream's
    averages never moved, so there are none. 50,000 steps are what it reports for its best checkpoint.
    """
    num_frames, height, width = map(int, clip.split("x"))
    return TrainConfig(
        transformer=transformer,
        scheduler=IDDPMConfig(num_sampling_steps=50, cfg_scale=7.5, table_dtype="float64"),
        data=DataConfig(
            image_size=(height, width),
            num_frames=num_frames,
            batch_size=batch_size,
            num_workers=10,
            fit="square",
            use_image_num=num_images,
        ),
        optimizer=OptimizerConfig(lr=2e-5, eps=1e-8, weight_decay=1e-2, ema_decay=0.0),
        run=RunConfig(output=_output(version, clip), steps=50_000, checkpoint_every=500, grad_checkpoint=True),
        vae=f"LanguageBind/Open-Sora-Plan-v{version}.0:vae",
        vae_kind="causal",
        tile_vae=version != "1.0",
        text_encoder=TEXT_ENCODER,
        initial_transformer=VIDEO_MODEL if before is None else f"{_output(version, before)}/model/transformer",
        sample=sampling(clip),
    )


def vae_training(
    version: str,
    stage: str,
    vae: CausalVideoVAEConfig,
    *,
    before: str | None,
    num_frames: int,
    steps: int,
    kind: str = "none",
) -> TrainVAEConfig:
    """The stage of clips of 256 x 256 pixels, cut out of the middle, one for each of 8 accelerators, LPIPS at full
    weight and a discriminator of `kind`, which begins from the stage `before`.

    Set `loss.perceptual_path` to the weights of LPIPS, or `loss.perceptual_weight` to 0. Upstream averaged no weights
    before 1.2, where it did with a decay of 0.999: set `optimizer.ema_decay` to do the same.
    """
    optimizer = OptimizerConfig(lr=vae.lr, betas=(0.5, 0.9), eps=1e-8, ema_decay=0.0)
    return TrainVAEConfig(
        vae=vae,
        loss=VAELossConfig(perceptual_weight=1.0, kl_weight=1e-6),
        adversary=AdversaryConfig(kind=kind, start=2001, weight=0.5, optimizer=optimizer),
        data=DataConfig(image_size=(256, 256), num_frames=num_frames, batch_size=1, num_workers=8, fit="crop"),
        optimizer=optimizer,
        run=RunConfig(
            output=_output(version, f"vae-{stage}"),
            steps=steps,
            seed=1006,
            checkpoint_every=2000,
            grad_checkpoint=True,
        ),
        initial_vae=None if before is None else f"{_output(version, f'vae-{before}')}/model/vae",
    )


def _output(version: str, stage: str) -> str:
    return f"outputs/open-sora-plan-v{version.replace('.', '-')}-{stage}"

"""How Open-Sora-Plan 1.0 and 1.1 are sampled alike, and how their VAEs are trained alike.

Source: PKU-YuanGroup/Open-Sora-Plan v1.1.0, opensora/sample/sample_t2v.py and opensora/train/train_causalvae.py.
"""

from __future__ import annotations

from opensora.config import (
    AdversaryConfig,
    CausalVideoVAEConfig,
    DataConfig,
    DiffusersSamplerConfig,
    LatteT2VConfig,
    OptimizerConfig,
    Preset,
    RunConfig,
    SampleConfig,
    TrainVAEConfig,
    VAELossConfig,
)

TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"


def preset(
    version: str,
    clip: str,
    transformer: LatteT2VConfig,
    *,
    is_default: bool,
    vae_training: dict[str, TrainVAEConfig],
) -> Preset:
    """The preset of weights for clips of "frames x height x width"; the default's name has no size in it.

    All sizes share a VAE, so the default alone has the stages of its training.
    """
    num_frames, height, width = map(int, clip.split("x"))
    name, repository = f"open-sora-plan-v{version}", f"LanguageBind/Open-Sora-Plan-v{version}.0"
    return Preset(
        name=name if is_default else f"{name}-{clip}",
        description=f"Open-Sora-Plan {version}: images and clips of {num_frames} frames of {height} x {width}",
        vae=f"{repository}:vae",
        transformer=f"{repository}:{clip}",
        text_encoder=TEXT_ENCODER,
        vae_kind="causal",
        transformer_config=transformer,
        scheduler=DiffusersSamplerConfig(sample_method="PNDM", num_sampling_steps=50, cfg_scale=7.5),
        sample=SampleConfig(
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
        ),
        vae_training=vae_training if is_default else {},
    )


def vae_training(
    version: str, stage: str, vae: CausalVideoVAEConfig, *, num_frames: int, steps: int, kind: str = "none"
) -> TrainVAEConfig:
    """Clips of 256 x 256 pixels, one for each of 8 accelerators, LPIPS at full weight, a discriminator of `kind`.

    Set `loss.perceptual_path` to the weights of LPIPS, or `loss.perceptual_weight` to 0. Upstream averaged no weights
    before 1.2, where it did with a decay of 0.999: set `optimizer.ema_decay` to do the same.
    """
    optimizer = OptimizerConfig(lr=vae.lr, betas=(0.5, 0.9), eps=1e-8, ema_decay=0.0)
    return TrainVAEConfig(
        vae=vae,
        loss=VAELossConfig(perceptual_weight=1.0, kl_weight=1e-6),
        adversary=AdversaryConfig(kind=kind, start=2001, weight=0.5, optimizer=optimizer),
        data=DataConfig(image_size=(256, 256), num_frames=num_frames, batch_size=1, num_workers=8),
        optimizer=optimizer,
        run=RunConfig(
            output=f"outputs/open-sora-plan-v{version.replace('.', '-')}-vae-{stage}",
            steps=steps,
            seed=1006,
            checkpoint_every=2000,
            grad_checkpoint=True,
        ),
    )

"""Training of video VAEs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from opensora.config.data import DataConfig
from opensora.config.runs import OptimizerConfig, ParallelConfig, RunConfig
from opensora.config.vaes import VAEConfig, VideoVAEConfig


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms of a VAE's loss; a zero switches its term off.

    `perceptual_path` is a file, or a folder of files, with the weights of LPIPS on VGG16, which nothing downloads; see
    `LPIPS.from_weights` for the layouts. `use_z_rec_loss` and `use_image_identity_loss` are of the stacked VAE alone.
    """

    use_real_rec_loss: bool = True
    use_z_rec_loss: bool = False
    use_image_identity_loss: bool = False
    perceptual_weight: float = 0.0
    perceptual_path: str | None = None
    kl_weight: float = 1e-6
    logvar: float = 0.0


@dataclass(frozen=True)
class AdversaryConfig:
    """The discriminator that a VAE is trained against; "none" trains without. `PatchDiscriminator` describes the kinds.

    `start` counts as upstream's trainer does, whose counter moves with the steps of either optimizer, so twice for each
    batch: with 2001, the discriminator learns from the 1001st batch on and the VAE heeds it from the 1002nd on.
    `weight` is the adversarial gradient's size in terms of the reconstruction's, at the decoder's last layer; `factor`
    multiplies both sides' losses.
    """

    kind: Literal["none", "2d", "3d", "3d-v1.0"] = "none"
    start: int = 2001
    weight: float = 0.5
    factor: float = 1.0
    loss: Literal["hinge", "vanilla", "non-saturating"] = "hinge"
    channels: int = 64
    num_layers: int = 3
    use_actnorm: bool = False
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, betas=(0.5, 0.9), eps=1e-8, ema_decay=0.0)
    )


@dataclass(frozen=True)
class TrainVAEConfig:
    """`opensora train-vae`: the stacked VAE of Open-Sora 1.2 or the CausalVideoVAE of Open-Sora-Plan, as `vae` says.

    `initial_vae` is where weights start; without it they are drawn, with posteriors of `initial_log_variance` (at 0, a
    VAE trained from nothing drowns its small first latents in noise). `image_vae` has the weights of a 2-D VAE: for the
    stacked VAE an AutoencoderKL of diffusers, its 2-D half; for a CausalVideoVAE the first stage of a latent diffusion
    model, whose kernels become the last frames of its own. `mix_factor`, when given, is what each trained resampling in
    time of a CausalVideoVAE starts from.

    Some clips become single frames (`mixed` "image"), or all get a random length that the VAE takes ("random").
    `freeze_encoder` trains the decoder alone: latents, and transformers trained on them, stay what they are. Of the
    stacked VAE, `freeze_spatial` keeps the 2-D half, and `spatial_only` trains it without the temporal one.

    Every `run.validate_every` steps, up to `num_validation_clips` clips of `data.validation` are compared with their
    reconstructions. `num_statistics_clips` clips give the stacked VAE its scale and shift.
    """

    vae: VAEConfig = field(default_factory=VideoVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    initial_vae: str | None = None
    image_vae: str | None = None
    mix_factor: float | None = None
    freeze_spatial: bool = False
    freeze_encoder: bool = False
    spatial_only: bool = False
    initial_log_variance: float = 0.0
    mixed: Literal["none", "image", "random"] = "none"
    mixed_image_ratio: float = 0.2
    num_validation_clips: int = 32
    num_statistics_clips: int = 256

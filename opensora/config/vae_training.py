"""Training of video VAEs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from opensora.config.data import DataConfig
from opensora.config.runs import OptimizerConfig, ParallelConfig, RunConfig
from opensora.config.vaes import VideoVAEConfig


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms of the stacked VAE's loss; a zero switches its term off."""

    use_real_rec_loss: bool = True
    use_z_rec_loss: bool = False
    use_image_identity_loss: bool = False
    perceptual_weight: float = 0.0
    perceptual_path: str | None = None
    kl_weight: float = 1e-6
    discriminator_start: int = -1


@dataclass(frozen=True)
class TrainVAEConfig:
    """`opensora train-vae`: the stacked VAE; `mixed` makes some clips single frames or of random length.

    `spatial_only` trains the 2-D VAE without the temporal one. `freeze_encoder` trains the decoders alone: latents, and
    transformers trained on them, stay what they are. `initial_log_variance` is where posteriors of a new VAE
    start: at 0, a VAE trained from nothing drowns its small first latents in noise.
    """

    vae: VideoVAEConfig = field(default_factory=VideoVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    initial_vae: str | None = None
    freeze_spatial: bool = False
    freeze_encoder: bool = False
    spatial_only: bool = False
    initial_log_variance: float = 0.0
    mixed: Literal["none", "image", "random"] = "none"
    mixed_image_ratio: float = 0.2
    num_statistics_clips: int = 256

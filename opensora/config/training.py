"""Data, optimizer and run of a training, of diffusion transformers and of VAEs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from opensora.config.sampling import Precision, SampleConfig
from opensora.config.schedulers import RectifiedFlowConfig
from opensora.config.transformers import STDiT3Config
from opensora.config.vaes import VideoVAEConfig

# {resolution: {num_frames: (keep_probability or (keep, frame_probability), batch_size)}}
BucketTable = dict[str, dict[int, tuple[float | tuple[float, float], int]]]


@dataclass(frozen=True)
class DataConfig:
    """Which clips to read and how. `manifest` is a CSV, JSONL or Parquet file with columns path and text."""

    manifest: str = ""
    buckets: BucketTable = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    num_frames: int = 51
    frame_interval: int = 1
    batch_size: int = 1
    num_workers: int = 0
    cache_in_memory: bool = False
    validation: str = ""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and the averaged copy of the weights.

    The rate rises over `warmup_steps` and then stays, or falls on a cosine to `final_lr_ratio` of itself at the last
    step. `grad_clip` is the largest global norm of the gradient; 0 clips nothing.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0
    accumulation_steps: int = 1
    ema_decay: float = 0.99


@dataclass(frozen=True)
class RunConfig:
    """How long a training runs and what it leaves behind in `output`."""

    output: str = "outputs"
    steps: int = 1000
    seed: int = 42
    dtype: Precision = "bf16"
    device: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    sample_every: int = 0
    grad_checkpoint: bool = False
    tensorboard: bool = True
    num_threads: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """`opensora train`: a diffusion transformer on encoded clips, with frame masks of the given probabilities.

    `text_encoder` "" makes a small one from the captions, to be trained with `train_text_encoder`. `cache_latents`
    encodes every clip once, to its posterior mean. `image_ratio` is the share of batches cut to the first frame of each
    clip, which a causal VAE encodes by itself: still images from clips of one length. `sample` is how `sample_prompts`
    are sampled every `run.sample_every` steps.
    """

    transformer: STDiT3Config = field(default_factory=STDiT3Config)
    flow: RectifiedFlowConfig = field(default_factory=RectifiedFlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mask_ratios: dict[str, float] = field(default_factory=dict)
    vae: str = ""
    text_encoder: str = ""
    initial_transformer: str | None = None
    train_text_encoder: bool = False
    cache_latents: bool = False
    image_ratio: float = 0.0
    sample_prompts: tuple[str, ...] = ()
    sample: SampleConfig = field(default_factory=SampleConfig)


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
    initial_vae: str | None = None
    freeze_spatial: bool = False
    freeze_encoder: bool = False
    spatial_only: bool = False
    initial_log_variance: float = 0.0
    mixed: Literal["none", "image", "random"] = "none"
    mixed_image_ratio: float = 0.2
    num_statistics_clips: int = 256

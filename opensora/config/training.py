"""Training of diffusion transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from opensora.config.data import DataConfig
from opensora.config.runs import OptimizerConfig, ParallelConfig, RunConfig
from opensora.config.sampling import SampleConfig
from opensora.config.schedulers import RectifiedFlowConfig, TrainingSchedulerConfig
from opensora.config.transformers import STDiT3Config, TransformerConfig
from opensora.config.vaes import VAEKind


@dataclass(frozen=True)
class TrainConfig:
    """`opensora train`: a diffusion transformer on encoded clips, with frame masks of the given probabilities.

    `vae` is of the kind `vae_kind`; "" will do where latents are read. `tile_vae` encodes as CausalVideoVAE's samplers
    decode, in tiles and windows. `text_encoder` "" makes a small one from the captions, to be trained with
    `train_text_encoder`, and will do where embeddings are read. `initial_transformer` is where weights start: of the
    same model, or of an earlier one that `opensora.adaptation` knows. `frozen` names parameters that stay as they are,
    by how their names begin.

    `cache_latents` encodes every clip once, to its posterior mean. `image_ratio` is the share of batches cut to the
    first frame of each clip, which a causal VAE encodes by itself: still images from clips of one length.

    Every `run.validate_every` steps, and before the first, the loss on up to `num_validation_clips` clips of
    `data.validation` is measured in each bucket. `sample` is how `sample_prompts` are sampled every `run.sample_every`.
    """

    transformer: TransformerConfig = field(default_factory=STDiT3Config)
    scheduler: TrainingSchedulerConfig = field(default_factory=RectifiedFlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    mask_ratios: dict[str, float] = field(default_factory=dict)
    vae: str = ""
    vae_kind: VAEKind = "stacked"
    tile_vae: bool = False
    text_encoder: str = ""
    initial_transformer: str | None = None
    frozen: tuple[str, ...] = ()
    train_text_encoder: bool = False
    cache_latents: bool = False
    image_ratio: float = 0.0
    num_validation_clips: int = 100
    sample_prompts: tuple[str, ...] = ()
    sample: SampleConfig = field(default_factory=SampleConfig)

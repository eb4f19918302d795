"""Training of diffusion transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from opensora.config.data import DataConfig
from opensora.config.runs import OptimizerConfig, ParallelConfig, RunConfig
from opensora.config.sampling import SampleConfig
from opensora.config.schedulers import RectifiedFlowConfig
from opensora.config.transformers import STDiT3Config


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    mask_ratios: dict[str, float] = field(default_factory=dict)
    vae: str = ""
    text_encoder: str = ""
    initial_transformer: str | None = None
    train_text_encoder: bool = False
    cache_latents: bool = False
    image_ratio: float = 0.0
    sample_prompts: tuple[str, ...] = ()
    sample: SampleConfig = field(default_factory=SampleConfig)

"""A release as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from opensora.config.sampling import SampleConfig
from opensora.config.schedulers import RectifiedFlowConfig, SchedulerConfig
from opensora.config.training import TrainConfig
from opensora.config.transformers import STDiT3Config, TransformerConfig
from opensora.config.vae_training import TrainVAEConfig
from opensora.config.vaes import VAEKind


@dataclass(frozen=True)
class Preset:
    """A release: where its weights are (folders, files or hub ids), how it samples, and its training stages.

    `transformer_config` says which model it is, and its sizes where the weights come without a config.json.
    """

    name: str
    description: str
    vae: str
    transformer: str
    text_encoder: str
    vae_kind: VAEKind = "stacked"
    transformer_config: TransformerConfig = field(default_factory=STDiT3Config)
    scheduler: SchedulerConfig = field(default_factory=RectifiedFlowConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    training: dict[str, TrainConfig] = field(default_factory=dict)
    vae_training: dict[str, TrainVAEConfig] = field(default_factory=dict)

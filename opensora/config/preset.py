"""A release as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from opensora.config.sampling import SampleConfig
from opensora.config.schedulers import RectifiedFlowConfig
from opensora.config.training import TrainConfig, TrainVAEConfig


@dataclass(frozen=True)
class Preset:
    """A release: where its weights are (folders or hub ids), what it samples by default, and its training stages."""

    name: str
    description: str
    vae: str
    transformer: str
    text_encoder: str
    sample: SampleConfig = field(default_factory=SampleConfig)
    flow: RectifiedFlowConfig = field(default_factory=RectifiedFlowConfig)
    training: dict[str, TrainConfig] = field(default_factory=dict)
    vae_training: dict[str, TrainVAEConfig] = field(default_factory=dict)

"""Every option of every part, as frozen dataclasses; presets fill them in, commands override single fields.

Units: frames and pixels unless a name says `latent`; seconds for durations; timesteps from 0 (clean) to 1000 (noise).
"""

from opensora.config.preset import Preset, VAEKind
from opensora.config.sampling import Precision, SampleConfig
from opensora.config.schedulers import (
    DiffusersSamplerConfig,
    DPMSolverConfig,
    IDDPMConfig,
    RectifiedFlowConfig,
    SampleMethod,
    SchedulerConfig,
)
from opensora.config.training import (
    BucketTable,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    TrainVAEConfig,
    VAELossConfig,
)
from opensora.config.transformers import (
    LatteT2VConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from opensora.config.vaes import CausalVideoVAEConfig, SpatialVAEConfig, TemporalVAEConfig, VideoVAEConfig

__all__ = [
    "BucketTable",
    "CausalVideoVAEConfig",
    "DPMSolverConfig",
    "DataConfig",
    "DiffusersSamplerConfig",
    "IDDPMConfig",
    "LatteT2VConfig",
    "OptimizerConfig",
    "Precision",
    "Preset",
    "RectifiedFlowConfig",
    "RunConfig",
    "STDiT2Config",
    "STDiT3Config",
    "STDiTConfig",
    "SampleConfig",
    "SampleMethod",
    "SchedulerConfig",
    "SpatialVAEConfig",
    "TemporalVAEConfig",
    "TrainConfig",
    "TrainVAEConfig",
    "TransformerConfig",
    "VAEKind",
    "VAELossConfig",
    "VideoVAEConfig",
]

"""Every option of every part, as frozen dataclasses; presets fill them in, commands override single fields.

Units: frames and pixels unless a name says `latent`; seconds for durations; timesteps from 0 (clean) to 1000 (noise).
"""

from opensora.config.data import BucketTable, DataConfig, Fit
from opensora.config.encoding import EncodeConfig
from opensora.config.preset import Preset
from opensora.config.runs import OptimizerConfig, ParallelConfig, RunConfig
from opensora.config.sampling import Precision, SampleConfig
from opensora.config.schedulers import (
    DiffusersSamplerConfig,
    DPMSolverConfig,
    IDDPMConfig,
    RectifiedFlowConfig,
    SampleMethod,
    SchedulerConfig,
    TrainingSchedulerConfig,
)
from opensora.config.training import TrainConfig
from opensora.config.transformers import (
    LatteT2VConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from opensora.config.vae_training import AdversaryConfig, TrainVAEConfig, VAELossConfig
from opensora.config.vaes import (
    CausalVideoVAEConfig,
    SpatialVAEConfig,
    TemporalVAEConfig,
    VAEConfig,
    VAEKind,
    VideoVAEConfig,
)

__all__ = [
    "AdversaryConfig",
    "BucketTable",
    "CausalVideoVAEConfig",
    "DPMSolverConfig",
    "DataConfig",
    "DiffusersSamplerConfig",
    "EncodeConfig",
    "Fit",
    "IDDPMConfig",
    "LatteT2VConfig",
    "OptimizerConfig",
    "ParallelConfig",
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
    "TrainingSchedulerConfig",
    "TransformerConfig",
    "VAEConfig",
    "VAEKind",
    "VAELossConfig",
    "VideoVAEConfig",
]

"""How noise becomes a clip: timesteps from 0 (clean) to 1000 (noise)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RectifiedFlowConfig:
    """Open-Sora 1.2's rectified flow: sampling steps, guidance, and how training times are drawn.

    `min_latent_frames` bounds the latent length (frames // 17) * 5 in the timestep transform from below; at 0, as
    upstream, videos of 2 to 16 frames are refused there.
    """

    num_sampling_steps: int = 30
    num_timesteps: int = 1000
    cfg_scale: float = 7.0
    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = True
    sample_method: Literal["uniform", "logit-normal"] = "logit-normal"
    loc: float = 0.0
    scale: float = 1.0
    transform_scale: float = 1.0
    min_latent_frames: int = 0


@dataclass(frozen=True)
class IDDPMConfig:
    """Improved DDPM with a learned range of variances, as Open-Sora 1.0 and 1.1 and Open-Sora-Plan train and sample it.

    `timestep_respacing` says which timesteps sampling takes, in place of `num_sampling_steps`: "ddimN" every k-th,
    "10,15,20" that many of each third, "" all; training takes all. `cfg_channel` counts the channels of the output that
    are guided; None guides all of the predicted noise. `sampler`: "ddpm" draws noise at every step, "ddim" draws `eta`
    times as much. `is_speed_weighted` is upstream's iddpm-speed, which changes training alone. `table_dtype`: betas are
    rounded to float32 in Open-Sora 1.1, and to float64 in Open-Sora 1.0 and Open-Sora-Plan.
    """

    num_sampling_steps: int = 100
    num_timesteps: int = 1000
    timestep_respacing: str | None = None
    cfg_scale: float = 7.0
    cfg_channel: int | None = None
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    eta: float = 0.0
    is_speed_weighted: bool = False
    table_dtype: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True)
class DPMSolverConfig:
    """DPM-Solver++ as Open-Sora 1.0 and 1.1 offer it: multistep, of second order, uniform in time."""

    num_sampling_steps: int = 20
    num_timesteps: int = 1000
    cfg_scale: float = 7.0


SampleMethod = Literal[
    "DDIM",
    "EulerDiscrete",
    "DDPM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "PNDM",
    "HeunDiscrete",
    "EulerAncestralDiscrete",
    "DEISMultistep",
    "KDPM2AncestralDiscrete",
]


@dataclass(frozen=True)
class DiffusersSamplerConfig:
    """One of diffusers' schedulers, with the name and the defaults with which Open-Sora-Plan offers it."""

    sample_method: SampleMethod = "PNDM"
    num_sampling_steps: int = 50
    num_timesteps: int = 1000
    cfg_scale: float = 7.5


TrainingSchedulerConfig = RectifiedFlowConfig | IDDPMConfig
SchedulerConfig = RectifiedFlowConfig | IDDPMConfig | DPMSolverConfig | DiffusersSamplerConfig

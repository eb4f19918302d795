"""How noise becomes a clip: training losses and samplers, one file per upstream system."""

from opensora.config import (
    DiffusersSamplerConfig,
    DPMSolverConfig,
    IDDPMConfig,
    RectifiedFlowConfig,
    SchedulerConfig,
)
from opensora.schedulers.diffusers_samplers import DiffusersSampler
from opensora.schedulers.dpm_solver import DPMSolver
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.interface import Scheduler, TrainingScheduler
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.schedulers.regions import KnownRegion, with_given_frames

__all__ = [
    "IDDPM",
    "DPMSolver",
    "DiffusersSampler",
    "KnownRegion",
    "RectifiedFlow",
    "Scheduler",
    "TrainingScheduler",
    "build",
    "with_given_frames",
]

_SCHEDULERS = {
    RectifiedFlowConfig: RectifiedFlow,
    IDDPMConfig: IDDPM,
    DPMSolverConfig: DPMSolver,
    DiffusersSamplerConfig: DiffusersSampler,
}


def build(config: SchedulerConfig) -> Scheduler:
    """The scheduler that a configuration describes. Raises TypeError for anything else."""
    if type(config) not in _SCHEDULERS:
        names = ", ".join(kind.__name__ for kind in _SCHEDULERS)
        raise TypeError(f"build: config must be one of {names}, got {type(config).__name__}")
    return _SCHEDULERS[type(config)](config)

"""What tests of several schedulers take as parameters, and the model that fits each."""

from __future__ import annotations

from functools import cache

from opensora.config import DiffusersSamplerConfig, SchedulerConfig
from opensora.schedulers import Scheduler, build
from opensora.schedulers.diffusers_samplers import METHODS
from tests.schedulers.gaussian import ExactNoise

DIFFUSERS = [DiffusersSamplerConfig(sample_method=method) for method in METHODS]


def name(config: SchedulerConfig) -> str:
    kind = type(config).__name__.removesuffix("Config")
    return config.sample_method if isinstance(config, DiffusersSamplerConfig) else kind


def model_for(config: SchedulerConfig) -> ExactNoise:
    has_other_betas = getattr(config, "sample_method", None) in ("HeunDiscrete", "KDPM2AncestralDiscrete")
    return ExactNoise((0.00085, 0.012) if has_other_betas else (1e-4, 0.02))


@cache
def scheduler_for(config: SchedulerConfig) -> Scheduler:
    """One for all tests, since sampling leaves nothing behind, and one of diffusers' constructors takes a second."""
    return build(config)

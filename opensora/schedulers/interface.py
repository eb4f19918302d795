"""What every scheduler offers, whatever it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from opensora.config import SchedulerConfig
from opensora.schedulers.denoising import Model, Noise, StepCallback
from opensora.schedulers.regions import KnownRegion


@runtime_checkable
class Scheduler(Protocol):
    """Made from one configuration, without a state of its own: a sampling run leaves nothing behind."""

    @property
    def config(self) -> SchedulerConfig: ...

    def sample(
        self,
        model: Model,
        z: Tensor,
        y: Tensor,
        null_y: Tensor | None = None,
        mask_text: Tensor | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        frame_mask: Tensor | None = None,
        region: KnownRegion | None = None,
        cfg_scale: float | None = None,
        num_sampling_steps: int | None = None,
        generator: Generator | None = None,
        draw_noise: Noise | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Standard-normal noise z (B, C, T, H, W) to clean latents, fp32. Each class says what its arguments do."""
        ...

    def sampling_timesteps(
        self, batch: int, arguments: Mapping[str, Any], num_sampling_steps: int | None = None
    ) -> Tensor:
        """What the model is told at each of its I calls, (I, B) on the CPU, descending from noise to clean. Raises
        ValueError for numbers of steps, and for sizes among the arguments, with which sampling would make no sense."""
        ...


@runtime_checkable
class TrainingScheduler(Scheduler, Protocol):
    """A scheduler that models are trained with, too: RectifiedFlow and IDDPM."""

    def training_timesteps(
        self,
        batch: int,
        device: torch.device,
        arguments: Mapping[str, Any] | None = None,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Random timesteps (B,) as models are trained at them; `arguments` may hold the clip's sizes."""
        ...

    def timesteps_at(self, share: float, batch: int, device: torch.device) -> Tensor:
        """(B,) times the timestep that lies `share` of the way from clean to noise, as `training_losses` takes it."""
        ...

    def training_losses(
        self,
        model: Model,
        x0: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        noise: Tensor | None = None,
        frame_mask: Tensor | None = None,
        weights: Tensor | None = None,
        t: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """How wrong the model is about clean latents x0 (B, C, T, H, W), one value for each sample (B,), fp32."""
        ...

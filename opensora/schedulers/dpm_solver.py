"""DPM-Solver++ as Open-Sora 1.0 and 1.1 offer it (hpcaitech/Open-Sora, tag v1.2.0, opensora/schedulers/dpms; Lu et al.
2022): multistep, of second order, for models that predict noise.

diffusers' DPMSolverMultistepScheduler takes other times: it rounds them to integers and ends at 0 noise.

Axes: B batch, C latent channels, T latent frames, H height, W width, I sampling steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from opensora.config import DPMSolverConfig
from opensora.schedulers.denoising import (
    Model,
    Noise,
    StepCallback,
    check_inputs,
    denoiser,
    guidance_scale,
    guided_noise,
    noise_source,
    step_count,
)
from opensora.schedulers.gaussian_diffusion import linear_betas
from opensora.schedulers.regions import KnownRegion, with_given_frames

# Below this number of steps the last one is of first order: a second one would overshoot.
FEW_STEPS = 10


class Level(NamedTuple):
    """x = alpha x_0 + sigma noise at a timestep; log_ratio is log(alpha / sigma). Numbers."""

    timestep: float
    alpha: float
    sigma: float
    log_ratio: float


class DPMSolver:
    """Sampling with any model called as model(x, timestep, y=, mask=, x_mask=, **arguments).

    A model with a method `denoiser(y, mask, *, with_variance, **arguments)` is sampled through it. Timesteps are spaced
    evenly from num_timesteps - 1 (noise) to 0, without rounding.
    """

    def __init__(self, config: DPMSolverConfig | None = None) -> None:
        self.config = config or DPMSolverConfig()
        self._log_alphas_N = 0.5 * (1 - linear_betas(self.config.num_timesteps)).log().cumsum(0)

    @torch.no_grad()
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
        """From noise `z` at the last timestep to a clean clip, deterministically.

        Shapes: z (B, C, T, H, W), noise, or on frames with frame_mask < 1 the clean latents to start from; y (B, ...),
        null_y the same or broadcastable to it, mask_text (B, L) for both or (2B, L). `arguments` go to the model,
        tensors of them with a row for each clip. The rows of null_y come first. Guidance is
        eps_null + cfg_scale (eps_text - eps_null); channels after the first C are dropped.
        frame_mask (B, T) in [0, 1]: 1 generates a frame, 0 keeps it, a fraction keeps it while the timestep, as a share
        of all, lies above it. Upstream knows no masks: such frames, and `region`, are pasted over z, noised to its
        level with the noise of the start, before every step, and clean at the end. The noise of such frames is drawn
        once, by `draw_noise(z)` or from `generator`; nothing else is random.
        `on_step(i, num_steps, z)` is called after each step. Returns (B, C, T, H, W) in fp32.
        Errors: ValueError for tensors that do not fit each other and for numbers of steps that cannot be.
        """
        check_inputs(z, y, mask_text, frame_mask, region)
        levels = self._levels(num_sampling_steps)
        num_steps = len(levels) - 1
        scale = guidance_scale(null_y, cfg_scale, self.config.cfg_scale)
        denoise = denoiser(model, y, null_y, mask_text, dict(arguments or {}), null_first=True)
        timesteps_IB = self.sampling_timesteps(len(z), arguments, num_sampling_steps).to(z.device)

        region, noise = with_given_frames(region, z, frame_mask, noise_source(draw_noise, generator))
        z = noise
        before: tuple[Level, Tensor] | None = None
        for i, (here, there) in enumerate(pairwise(levels)):
            if region is not None:
                known = here.alpha * region.latents + here.sigma * noise
                z = region.paste(z, known, here.timestep / self.config.num_timesteps)
            predicted = guided_noise(denoise, z, timesteps_IB[i], scale)
            x0 = (z - here.sigma * predicted) / here.alpha
            is_first_order = i == 0 or (i == num_steps - 1 and num_steps < FEW_STEPS)
            z = _step(z, x0, here, there, None if is_first_order else before)
            before = here, x0
            if on_step is not None:
                on_step(i, num_steps, z)
        return z if region is None else region.paste_clean(z)

    def sampling_timesteps(
        self, batch: int, arguments: Mapping[str, Any] | None = None, num_sampling_steps: int | None = None
    ) -> Tensor:
        """Timesteps of every step and sample, (I, B) fp32 on the CPU, descending. Raises ValueError for numbers of
        steps that cannot be."""
        timesteps = [level.timestep for level in self._levels(num_sampling_steps)[:-1]]
        return torch.tensor(timesteps, dtype=torch.float32)[:, None].repeat(1, batch)

    def _levels(self, num_sampling_steps: int | None) -> list[Level]:
        """Of every step, and of where the last one ends: timestep 0, almost clean."""
        last = self.config.num_timesteps - 1
        count = step_count(num_sampling_steps, self.config.num_sampling_steps, most=last)
        timesteps = torch.linspace(last, 0, count + 1, dtype=torch.float64)
        below = timesteps.long().clamp(max=last - 1)
        log_alphas = torch.lerp(self._log_alphas_N[below], self._log_alphas_N[below + 1], timesteps - below)
        log_sigmas = 0.5 * torch.log(-torch.expm1(2 * log_alphas))
        columns = (timesteps, log_alphas.exp(), log_sigmas.exp(), log_alphas - log_sigmas)
        return [Level(*row) for row in torch.stack(columns, dim=1).tolist()]


def _step(z: Tensor, x0: Tensor, here: Level, there: Level, before: tuple[Level, Tensor] | None) -> Tensor:
    """The solution at `there`; of second order with the level and the clean clip predicted `before`."""
    length = there.log_ratio - here.log_ratio
    if before is not None:
        level, earlier_x0 = before
        share = length / (here.log_ratio - level.log_ratio)
        x0 = x0 + 0.5 * share * (x0 - earlier_x0)
    return there.sigma / here.sigma * z + there.alpha * -math.expm1(-length) * x0

"""The ten schedulers of diffusers that Open-Sora-Plan offers, each as its default constructor makes it
(PKU-YuanGroup/Open-Sora-Plan, tag v1.1.0, opensora/sample/sample_t2v.py, with diffusers 0.27.2).

Defaults that differ from what the models were trained with stay as they are: DDIM and DDPM clip predicted clean latents
to [-1, 1], HeunDiscrete and KDPM2AncestralDiscrete have other betas.

Axes: B batch, C latent channels, T latent frames, H height, W width, I calls of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from opensora.config import DiffusersSamplerConfig
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
from opensora.schedulers.regions import KnownRegion, with_given_frames


@dataclass(frozen=True)
class _Method:
    """How a scheduler is made, and what one must know to use it.

    fewest_steps: below it, timesteps would start at 0 instead of noise, or (PNDM) not suffice for its first steps.
    is_exploding: the state is x_0 + sigma noise, without a factor that keeps its variance at 1.
    is_two_calls: every step but the last has two model calls, and 0.27.2 drew noise at both, though it used one.
    """

    options: Mapping[str, Any]
    fewest_steps: int = 2
    is_exploding: bool = False
    is_two_calls: bool = False


_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_OTHER_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
METHODS = {
    "DDIM": _Method({**_BETAS, "clip_sample": True}),
    "EulerDiscrete": _Method(_BETAS, is_exploding=True),
    "DDPM": _Method({**_BETAS, "clip_sample": True}),
    "DPMSolverMultistep": _Method(_BETAS, fewest_steps=1),
    # The library sets lower_order_final by itself, with two warnings, since the last sigma is 0.
    "DPMSolverSinglestep": _Method({**_BETAS, "lower_order_final": True}, fewest_steps=1),
    "PNDM": _Method({**_BETAS, "skip_prk_steps": False}, fewest_steps=4),
    "HeunDiscrete": _Method(_OTHER_BETAS, is_exploding=True),
    "EulerAncestralDiscrete": _Method(_BETAS, is_exploding=True),
    "DEISMultistep": _Method(_BETAS, fewest_steps=1),
    "KDPM2AncestralDiscrete": _Method(_OTHER_BETAS, is_exploding=True, is_two_calls=True),
}


class DiffusersSampler:
    """Sampling with any model that predicts noise, called as model(x, timestep, y=, mask=, x_mask=, **arguments).

    A model with a method `denoiser(y, mask, *, with_variance, **arguments)` is sampled through it.
    """

    def __init__(self, config: DiffusersSamplerConfig | None = None) -> None:
        """Raises ValueError for a sample_method that is none of `METHODS`."""
        self.config = config or DiffusersSamplerConfig()
        if self.config.sample_method not in METHODS:
            raise ValueError(f"sample_method: must be one of {', '.join(METHODS)}, got {self.config.sample_method!r}")
        self._method = METHODS[self.config.sample_method]

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
        """From unit noise `z`, which is multiplied here by the scheduler's first sigma, to a clean clip.

        Shapes: z (B, C, T, H, W), noise, or on frames with frame_mask < 1 the clean latents to start from; y (B, ...),
        null_y the same or broadcastable to it, mask_text (B, L) for both or (2B, L). `arguments` go to the model,
        tensors of them with a row for each clip. The rows of null_y come first. Guidance is
        eps_null + cfg_scale (eps_text - eps_null); channels after the first C are dropped, before it: upstream drops
        them after it, with the same result.
        frame_mask (B, T) in [0, 1]: 1 generates a frame, 0 keeps it, a fraction keeps it while the timestep, as a share
        of all, lies above it. Upstream knows no masks: such frames, and `region`, are pasted over z, noised to its
        level with the noise of the start, before every call of the model, and clean at the end.
        Random numbers: noise for such frames, once, then what the scheduler draws (DDPM, EulerAncestralDiscrete,
        KDPM2AncestralDiscrete), all by `draw_noise(z)` or from `generator`.
        `on_step(i, num_calls, z)` follows each call of the model, of which some methods have more than steps.
        Returns (B, C, T, H, W) in fp32.
        Errors: ValueError for tensors that do not fit each other and for numbers of steps that cannot be; ImportError
        without diffusers.
        """
        check_inputs(z, y, mask_text, frame_mask, region)
        scheduler = self.scheduler(num_sampling_steps, z.device)
        scale = guidance_scale(null_y, cfg_scale, self.config.cfg_scale)
        denoise = denoiser(model, y, null_y, mask_text, dict(arguments or {}), null_first=True)
        draw_noise = noise_source(draw_noise, generator)
        region, noise = with_given_frames(region, z, frame_mask, draw_noise)
        z = noise * float(scheduler.init_noise_sigma)
        timesteps = scheduler.timesteps.tolist()
        for i, t in enumerate(scheduler.timesteps):
            if region is not None:
                signal, sigma = self._level(scheduler, i, timesteps[i])
                known = signal * region.latents + sigma * noise
                z = region.paste(z, known, timesteps[i] / self.config.num_timesteps)
            x = scheduler.scale_model_input(z, t)
            predicted = guided_noise(denoise, x, t.expand(len(z)), scale)
            if self._method.is_two_calls and i % 2 == 0:
                draw_noise(z)
            with _Drawing(draw_noise, z):
                z = scheduler.step(predicted, t, z, return_dict=False)[0]
            if on_step is not None:
                on_step(i, len(timesteps), z)
        return z if region is None else region.paste_clean(z)

    def sampling_timesteps(
        self, batch: int, arguments: Mapping[str, Any] | None = None, num_sampling_steps: int | None = None
    ) -> Tensor:
        """Timesteps of every call of the model and sample, (I, B) on the CPU, descending; integers or not, as the model
        gets them. Raises ValueError for numbers of steps that cannot be, ImportError without diffusers."""
        timesteps = self.scheduler(num_sampling_steps, torch.device("cpu")).timesteps
        return timesteps[:, None].repeat(1, batch)

    def scheduler(self, num_sampling_steps: int | None, device: torch.device) -> Any:
        """A fresh scheduler of diffusers, with its timesteps set."""
        count = step_count(
            num_sampling_steps,
            self.config.num_sampling_steps,
            fewest=self._method.fewest_steps,
            most=self.config.num_timesteps,
        )
        scheduler = copy.deepcopy(self._prototype)
        scheduler.set_timesteps(count, device=device)
        return scheduler

    @cached_property
    def _prototype(self) -> Any:
        """A scheduler to be copied: KDPM2AncestralDiscrete's constructor takes most of a second."""
        import diffusers  # takes two seconds, which nobody who samples otherwise should wait

        kind: Callable[..., Any] = getattr(diffusers, f"{self.config.sample_method}Scheduler")
        return kind(num_train_timesteps=self.config.num_timesteps, **self._method.options)

    def _level(self, scheduler: Any, call: int, timestep: float) -> tuple[float, float]:
        """What the state before a call of the model holds: signal x_0 + sigma noise."""
        if not hasattr(scheduler, "sigmas"):
            signal = float(scheduler.alphas_cumprod[int(timestep)]) ** 0.5
            return signal, (1 - signal**2) ** 0.5
        is_between = self._method.is_two_calls and call % 2 == 1
        sigma = float(scheduler.sigmas_interpol[call - 1] if is_between else scheduler.sigmas[call])
        signal = 1.0 if self._method.is_exploding else (1 + sigma**2) ** -0.5
        return signal, signal * sigma


class _Drawing(TorchFunctionMode):
    """Within it, torch.randn, by which the schedulers draw, gives a draw of ours for z."""

    def __init__(self, draw_noise: Noise, z: Tensor) -> None:
        super().__init__()
        self._draw_noise, self._z = draw_noise, z

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.randn:
            return self._draw_noise(self._z)
        return func(*args, **(kwargs or {}))

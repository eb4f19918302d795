"""Improved DDPM as Open-Sora 1.0 and 1.1 and Open-Sora-Plan train and sample it (hpcaitech/Open-Sora, tags v1.0.0 and
v1.2.0, opensora/schedulers/iddpm; PKU-YuanGroup/Open-Sora-Plan, tag v1.1.0, opensora/models/diffusion).

Models predict 2C channels: the noise in x_t, and where its variance lies between the two bounds of each timestep.

Axes: B batch, C latent channels, T latent frames, H height, W width, I sampling steps, N noise levels of a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from opensora.config import IDDPMConfig
from opensora.schedulers.denoising import (
    Model,
    Noise,
    StepCallback,
    check_inputs,
    denoiser,
    guidance_scale,
    guided,
    masked_mean,
    noise_source,
    per_frame,
    step_count,
)
from opensora.schedulers.gaussian_diffusion import (
    GaussianDiffusion,
    discretized_normal_nll,
    normal_kl,
    retained_timesteps,
)
from opensora.schedulers.regions import KnownRegion, beside_given_frames
from opensora.schedulers.speed import SpeedWeighting

# Predicted noise and share of variance, each (B, C, T, H, W) fp32, for a state and an index into the chain.
Predict = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


class LossTerms(NamedTuple):
    """Both (B,) fp32: the squared error of the noise, and the bound on the likelihood in bits per value."""

    mse: Tensor
    vb: Tensor


class IDDPM:
    """Training losses and sampling for any model called as model(x, timestep, y=, mask=, x_mask=, **arguments).

    A model with a method `denoiser(y, mask, *, with_variance, **arguments)` is sampled through it. Timesteps are
    integers from 0 (almost clean) to num_timesteps - 1 (noise).
    """

    def __init__(self, config: IDDPMConfig | None = None) -> None:
        self.config = config or IDDPMConfig()
        if not 0 <= self.config.eta <= 1:
            raise ValueError(f"eta: must lie in [0, 1], got {self.config.eta}")
        self.training_chain = self._chain("")
        self.speed = SpeedWeighting(self.training_chain) if self.config.is_speed_weighted else None

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
        """From noise `z` at the last timestep to a clean clip, by "ddpm" or "ddim" as the configuration says.

        Shapes: z (B, C, T, H, W), noise, or on frames with frame_mask < 1 the clean latents to start from; y (B, ...),
        null_y the same or broadcastable to it, mask_text (B, L) for both or (2B, L); frame_mask (B, T) in [0, 1]: 1
        generates a frame; others stay as they are until step int(N * fraction) from the end, where they are noised and
        go on, unlike in rectified flow with 0 too: such a frame takes the last step, in which little noise comes and
        goes. `arguments` go to the model, tensors of them with a row for each clip. Guidance is
        eps_null + cfg_scale (eps_text - eps_null) on the first `config.cfg_channel` channels; the others are the
        text's. `region`: latents that are pasted over z, noised with the noise of the start, before every step, and
        clean at the end; it has no say in frames with frame_mask < 1.
        Each step draws noise shaped as z for those frames, if there is a frame mask, then for itself ("ddim": if eta is
        above 0), by `draw_noise(z)` or from `generator`; upstream draws for null rows too. `on_step(i, num_steps, z)`
        is called after each step. Returns (B, C, T, H, W) in fp32.
        Errors: ValueError for tensors that do not fit each other and for numbers of steps that cannot be.
        """
        check_inputs(z, y, mask_text, frame_mask, region)
        chain = self.chain(num_sampling_steps)
        predict = self._predictor(chain, model, z, y, null_y, mask_text, arguments, cfg_scale)
        draw_noise = noise_source(draw_noise, generator)
        region = beside_given_frames(region, z, frame_mask)
        z = noise_of_start = z.float()
        starts_BT = None if frame_mask is None else (frame_mask.to(z.device).float() * len(chain)).long()
        earliest = len(chain) if starts_BT is None else int(starts_BT.min())  # asked once, for no step to wait
        for i in reversed(range(len(chain))):
            if region is not None:
                known = chain.add_noise(region.latents, noise_of_start, i)
                z = region.paste(z, known, int(chain.timesteps[i]) / chain.num_timesteps)
            x, x_mask = z, None
            if starts_BT is not None:
                noised = chain.add_noise(z, draw_noise(z), i)
                x = torch.where(per_frame(starts_BT == i), noised, z)
                x_mask = None if earliest > i else starts_BT > i
            x = self._step(chain, x, i, *predict(x, i, x_mask), draw_noise)
            z = x if starts_BT is None else torch.where(per_frame(starts_BT < i), z, x)
            if on_step is not None:
                on_step(len(chain) - 1 - i, len(chain), z)
        return z if region is None else region.paste_clean(z)

    @torch.no_grad()
    def invert(
        self,
        model: Model,
        x0: Tensor,
        y: Tensor,
        null_y: Tensor | None = None,
        mask_text: Tensor | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        cfg_scale: float | None = None,
        num_sampling_steps: int | None = None,
    ) -> Tensor:
        """The noise from which deterministic "ddim" sampling comes back to x0, nearly: DDIM in reverse.

        Shapes and errors as for `sample`; x0 (B, C, T, H, W) clean latents; returns noise of that shape, fp32. A model
        whose predictions do not change along the path is inverted exactly, others the better the more steps.
        Source: `ddim_reverse_sample` of upstream for all steps but the first, from the clean clip, which has no
        timestep of its own, to the lowest noise level.
        """
        check_inputs(x0, y, mask_text, None, None)
        chain = self.chain(num_sampling_steps)
        predict = self._predictor(chain, model, x0, y, null_y, mask_text, arguments, cfg_scale)
        x0 = x0.float()
        x = chain.add_noise(x0, predict(x0, 0, None)[0], 0)
        for i in range(len(chain) - 1):
            noise, _ = predict(x, i, None)
            x = chain.add_noise(chain.clean(x, noise, i), noise, i + 1)
        return x

    def sampling_timesteps(
        self, batch: int, arguments: Mapping[str, Any] | None = None, num_sampling_steps: int | None = None
    ) -> Tensor:
        """Timesteps of every step and sample, (I, B) int64 on the CPU, descending. Raises ValueError for numbers of
        steps that cannot be."""
        return self.chain(num_sampling_steps).timesteps.flip(0)[:, None].repeat(1, batch)

    def chain(self, num_sampling_steps: int | None = None) -> GaussianDiffusion:
        """The noise levels of one sampling run: `num_sampling_steps`, else what the configuration says."""
        config = self.config
        if num_sampling_steps is None and config.timestep_respacing is not None:
            return self._chain(config.timestep_respacing)
        # A single step would be the one of timestep 0, which removes hardly any noise.
        count = step_count(num_sampling_steps, config.num_sampling_steps, fewest=2, most=config.num_timesteps)
        return self._chain(str(count))

    def training_losses(
        self,
        model: Model,
        x0: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        noise: Tensor | None = None,
        frame_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        weights: Tensor | None = None,
        t: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Squared error of the predicted noise plus the variational bound, one value per sample (B,), fp32.

        Shapes: x0 (B, C, T, H, W) clean latents; frame_mask (B, T) bool, False where a frame is given with the noise of
        timestep 0 alone and left out of the loss (a sample with no True frame gives NaN, as upstream); loss_mask
        (B, T, H, W), 0 where latents are padding: they add nothing, but still count in the mean (Open-Sora-Plan; the
        model's own mask belongs into model_kwargs); weights (num_timesteps,) multiply the squared error at t; t (B,)
        int64 in [0, num_timesteps) is used when given, else drawn. `generator` draws t, then noise; it must be on x0's
        device. With `is_speed_weighted`, drawing and default weights are those of `SpeedWeighting`.
        Errors: ValueError for both masks together, and for other t.
        """
        if frame_mask is not None and loss_mask is not None:
            raise ValueError("loss_mask: cannot go together with frame_mask, got both")
        if t is not None and (t.dtype != torch.int64 or t.shape != x0.shape[:1]):
            raise ValueError(f"t: must be int64 of shape {tuple(x0.shape[:1])}, got {t.dtype} of {tuple(t.shape)}")
        chain, model_kwargs = self.training_chain, dict(model_kwargs or {})
        if t is None:
            t = self.training_timesteps(x0.shape[0], x0.device, generator=generator)
        if noise is None:
            noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        if weights is None and self.speed is not None:
            weights = self.speed.weights
        x_t = chain.add_noise(x0, noise, t)
        if frame_mask is not None:
            x_t = torch.where(per_frame(frame_mask), x_t, chain.add_noise(x0, noise, 0))
            model_kwargs["x_mask"] = frame_mask
        mse, vb = self.loss_terms(
            model(x_t, t, **model_kwargs),
            x0,
            x_t,
            noise,
            t,
            frame_mask=frame_mask,
            loss_mask=loss_mask,
            weights=weights,
        )
        return mse + vb

    def loss_terms(
        self,
        output: Tensor,
        x0: Tensor,
        x_t: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        frame_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> LossTerms:
        """Both parts of the loss for a model's output (B, 2C, T, H, W); other arguments as for `training_losses`.

        The bound reaches only the variance: the predicted noise is detached there. It is the KL divergence between the
        true and the predicted step, and at t = 0 the likelihood of the clip's values in 255 bins."""
        chain, x0 = self.training_chain, x0.float()
        predicted, share = _noise_and_share(output.float(), x0.shape[1])
        error = (predicted - noise.float()).square()
        if weights is not None:
            error = error * chain.at(weights, t)

        mean = chain.posterior_mean(chain.clean(x_t, predicted.detach(), t), x_t, t)
        log_variance = chain.log_variance(share, t)
        true_mean = chain.posterior_mean(x0, x_t, t)
        true_log_variance = chain.at(chain.posterior_log_variance_clipped, t)
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        likelihood = discretized_normal_nll(x0, mean, 0.5 * log_variance)
        bound = torch.where((t == 0).view(-1, 1, 1, 1, 1), likelihood, divergence) / math.log(2)
        return LossTerms(masked_mean(error, frame_mask, loss_mask), masked_mean(bound, frame_mask, loss_mask))

    def training_timesteps(
        self,
        batch: int,
        device: torch.device,
        arguments: Mapping[str, Any] | None = None,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Random timesteps (B,) int64, whatever the sizes in `arguments`."""
        if self.speed is not None:
            return self.speed.draw(batch, device, generator)
        return torch.randint(0, self.config.num_timesteps, (batch,), device=device, generator=generator)

    def timesteps_at(self, share: float, batch: int, device: torch.device) -> Tensor:
        """(B,) int64 times the timestep nearest to `share` of the way from clean to noise."""
        return torch.full((batch,), round(share * (self.config.num_timesteps - 1)), device=device)

    def _chain(self, respacing: str) -> GaussianDiffusion:
        total = self.config.num_timesteps
        dtype = getattr(torch, self.config.table_dtype)
        return GaussianDiffusion(retained_timesteps(total, respacing), num_timesteps=total, dtype=dtype)

    def _predictor(
        self,
        chain: GaussianDiffusion,
        model: Model,
        z: Tensor,
        y: Tensor,
        null_y: Tensor | None,
        mask_text: Tensor | None,
        arguments: Mapping[str, Any] | None,
        cfg_scale: float | None,
    ) -> Predict:
        scale = guidance_scale(null_y, cfg_scale, self.config.cfg_scale)
        denoise = denoiser(model, y, null_y, mask_text, dict(arguments or {}), with_variance=True)
        batch, channels = z.shape[:2]
        timesteps_NB = chain.timesteps[:, None].repeat(1, batch).to(z.device)  # no step waits for a copy
        num_guided = channels if self.config.cfg_channel is None else self.config.cfg_channel

        def predict(x: Tensor, i: int, x_mask: Tensor | None) -> tuple[Tensor, Tensor]:
            output = denoise(x, timesteps_NB[i], x_mask).float()
            if scale is not None:
                text, null = output.chunk(2)
                output = torch.cat(
                    [guided(text[:, :num_guided], null[:, :num_guided], scale), text[:, num_guided:]], dim=1
                )
            return _noise_and_share(output, channels)

        return predict

    def _step(
        self, chain: GaussianDiffusion, x: Tensor, i: int, noise: Tensor, share: Tensor, draw_noise: Noise
    ) -> Tensor:
        """x at index i - 1, of x at index i."""
        x0 = chain.clean(x, noise, i)
        if self.config.sampler == "ddpm":
            mean, drawn = chain.posterior_mean(x0, x, i), draw_noise(x)
            return mean if i == 0 else mean + (0.5 * chain.log_variance(share, i)).exp() * drawn
        before, here = chain.alphas_cumprod_prev[i], chain.alphas_cumprod[i]
        sigma = self.config.eta * ((1 - before) / (1 - here)).sqrt() * (1 - here / before).sqrt()
        x = before.sqrt().float() * x0 + (1 - before - sigma.square()).sqrt().float() * noise
        return x if self.config.eta == 0 else x + sigma.float() * draw_noise(x)


def _noise_and_share(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    if output.shape[1] != 2 * channels:
        raise ValueError(f"model: must predict noise and variance, {2 * channels} channels, got {output.shape[1]}")
    return output[:, :channels], output[:, channels:]

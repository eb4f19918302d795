"""Rectified flow as Open-Sora 1.2 trains and samples it (hpcaitech/Open-Sora, tag v1.2.0, opensora/schedulers/rf).

A clip at timestep t in [0, 1000] is x_t = (1 - t/1000) x_0 + (t/1000) noise; the model predicts v = x_0 - noise.

Axes: B batch, C latent channels, T latent frames, H height, W width, I sampling steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from opensora.config import RectifiedFlowConfig
from opensora.schedulers.denoising import (
    Model,
    Noise,
    StepCallback,
    check_inputs,
    denoiser,
    guidance_scale,
    masked_mean,
    noise_source,
    per_frame,
    step_count,
)
from opensora.schedulers.regions import KnownRegion, beside_given_frames
from opensora_kernels import guided_euler_step

SIZE_ARGUMENTS = ("height", "width", "num_frames")
# Ten steps for each training timestep; a slip of the finger should not fill the memory with a list of times.
MAX_STEPS = 10_000


class RectifiedFlow:
    """Training losses and sampling for any model called as model(x, timestep, y=, mask=, x_mask=, **arguments).

    A model with a method `denoiser(y, mask, *, with_variance, **arguments)` returning a function (x, timestep, x_mask)
    -> velocity of 2B rows is sampled through it, so that it can do per-prompt work once and both halves of the guided
    batch share x.
    """

    def __init__(self, config: RectifiedFlowConfig | None = None) -> None:
        self.config = config or RectifiedFlowConfig()

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
        """Integrate from noise `z` at t = 1000 to a clean clip.

        Shapes: z (B, C, T, H, W), noise, or on frames with frame_mask < 1 the clean latents to start from; y
        (B, 1, L, channels), null_y the same or broadcastable to it, mask_text (B, L) for both; frame_mask (B, T) in
        [0, 1]: 1 generates a frame, 0 keeps it, a fraction is the edit strength: the frame is kept while
        t > 1000 * fraction, then noised to t and generated on. `arguments` go to the model: fps, and for the timestep
        transform height, width (pixels) and num_frames (pixel frames), each (B,); their dtype is the precision of the
        transform, as upstream. Guidance v = v_null + cfg_scale (v_text - v_null); without null_y there is none.
        With a frame mask, noise shaped as z is drawn at every step, needed or not (upstream's random stream);
        `draw_noise(z)` replaces the draw. `region`: latents that are pasted over z, noised to t with the noise of the
        start, before every step, and clean at the end; it has no say in frames with frame_mask < 1.
        `on_step(i, num_steps, z)` is called after each step.
        Returns (B, C, T, H, W) in fp32. Errors: ValueError for tensors that do not fit each other, missing arguments or
        too short a video (see `check_video_length`).
        """
        check_inputs(z, y, mask_text, frame_mask, region)
        arguments = dict(arguments or {})
        batch, device = z.shape[0], z.device
        scale = guidance_scale(null_y, cfg_scale, self.config.cfg_scale)
        timesteps_IB = self.sampling_timesteps(batch, arguments, num_sampling_steps)
        lengths_IB = (timesteps_IB - torch.cat([timesteps_IB[1:], torch.zeros(1, batch)])) / self.config.num_timesteps
        active_IBT = self.active_frames(timesteps_IB, frame_mask)
        generate_BT = None if frame_mask is None else frame_mask.float().cpu() == 1
        denoise = denoiser(model, y, null_y, mask_text, arguments)
        draw_noise = noise_source(draw_noise, generator)
        region, noise_of_start = beside_given_frames(region, z, frame_mask), z

        # Everything a step needs crosses to the device here, so that no step waits for it.
        steps = list(zip(timesteps_IB.to(device), lengths_IB.to(device), strict=True))
        active = [None if active_BT is None or active_BT.all() else active_BT.to(device) for active_BT in active_IBT]
        started_BT = generate_BT
        for i, (t, dt) in enumerate(steps):
            if frame_mask is not None:
                noise = draw_noise(z)
                starting_BT = active_IBT[i] & ~started_BT
                if starting_BT.any():
                    z = torch.where(per_frame(starting_BT.to(device)), self.add_noise(z, noise, t), z)
                started_BT = started_BT | active_IBT[i]
            if region is not None:
                known = self.add_noise(region.latents, noise_of_start, t)
                z = region.paste(z, known, t / self.config.num_timesteps)
            velocity = denoise(z, t, active[i])
            z = guided_euler_step(z, velocity, dt, guidance_scale=scale, frame_mask=active[i])
            if on_step is not None:
                on_step(i, len(steps), z)
        z = z.float()
        return z if region is None else region.paste_clean(z)

    def sampling_timesteps(
        self, batch: int, arguments: Mapping[str, Any], num_sampling_steps: int | None = None
    ) -> Tensor:
        """Timesteps of every step and sample, (I, B) fp32 on the CPU, descending. transform_scale plays no part here
        (upstream). Raises ValueError for no steps, or for more than anybody can mean."""
        count = step_count(num_sampling_steps, self.config.num_sampling_steps, most=MAX_STEPS)
        times = [(1.0 - i / count) * self.config.num_timesteps for i in range(count)]
        if self.config.use_discrete_timesteps:
            times = [float(round(t)) for t in times]
        timesteps_IB = torch.tensor(times, dtype=torch.float32)[:, None].repeat(1, batch)
        if not self.config.use_timestep_transform:
            return timesteps_IB
        height, width, num_frames = self._sizes(arguments, torch.device("cpu"))
        return self.transform(timesteps_IB, height, width, num_frames)

    def active_frames(self, timesteps_IB: Tensor, frame_mask: Tensor | None) -> list[Tensor | None]:
        """Per step the frames (B, T) being generated: those whose edit strength has been reached."""
        if frame_mask is None:
            return [None] * len(timesteps_IB)
        strength_BT = frame_mask.to(device="cpu", dtype=torch.float32) * self.config.num_timesteps
        return [strength_BT >= t_B[:, None] for t_B in timesteps_IB]

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
        """Mean squared error of the predicted velocity, one value per sample (B,), fp32.

        Shapes: x0 (B, C, T, H, W) clean latents; frame_mask (B, T) bool, False where a frame is given clean and left
        out of the loss (a sample with no True frame gives NaN, as upstream); weights (num_timesteps,) multiply the
        error at integer t; t (B,) in [0, 1000] is used as it is when given, else drawn and transformed, which needs
        height, width and num_frames in model_kwargs. `generator` draws t, then noise; it must be on x0's device.
        Errors: ValueError for missing arguments or too short a video.
        """
        model_kwargs = dict(model_kwargs or {})
        if t is None:
            t = self.training_timesteps(x0.shape[0], x0.device, model_kwargs, generator=generator)
        if noise is None:
            noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        x_t = self.add_noise(x0, noise, t)
        if frame_mask is not None:
            x_t = torch.where(per_frame(frame_mask), x_t, x0.float())
            model_kwargs["x_mask"] = frame_mask
        velocity = model(x_t, t, **model_kwargs)[:, : x0.shape[1]]
        error = (velocity.float() - (x0.float() - noise.float())).square()
        if weights is not None:
            error = error * weights.to(error)[t.long().clamp(max=len(weights) - 1)].view(-1, 1, 1, 1, 1)
        return masked_mean(error, frame_mask)

    def training_timesteps(
        self,
        batch: int,
        device: torch.device,
        arguments: Mapping[str, Any] | None = None,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Random timesteps (B,): integers, uniform, or logit-normal, then the timestep transform by `arguments`."""
        config, options = self.config, {"device": device, "generator": generator}
        if config.use_discrete_timesteps:
            t = torch.randint(0, config.num_timesteps, (batch,), **options).float()
        elif config.sample_method == "uniform":
            t = torch.rand(batch, **options) * config.num_timesteps
        else:
            t = torch.sigmoid(torch.randn(batch, **options) * config.scale + config.loc) * config.num_timesteps
        if config.use_timestep_transform:
            height, width, num_frames = self._sizes(arguments or {}, device)
            t = self.transform(t, height, width, num_frames, scale=config.transform_scale)
        return t

    def timesteps_at(self, share: float, batch: int, device: torch.device) -> Tensor:
        """(B,) times the timestep `share` of the way from clean to noise, without the timestep transform."""
        return torch.full((batch,), share * self.config.num_timesteps, device=device)

    def transform(self, t: Tensor, height: Tensor, width: Tensor, num_frames: Tensor, *, scale: float = 1.0) -> Tensor:
        """`timestep_transform` with this flow's limits; raises ValueError where upstream would give NaN."""
        check_video_length(num_frames, self.config.min_latent_frames)
        return timestep_transform(
            t,
            height,
            width,
            num_frames,
            scale=scale,
            num_timesteps=self.config.num_timesteps,
            min_latent_frames=self.config.min_latent_frames,
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean x0 (B, ...) at t (B,), computed in fp32."""
        clean = (1 - t.float() / self.config.num_timesteps).view(-1, *[1] * (x0.ndim - 1))
        return clean * x0.float() + (1 - clean) * noise.float()

    def _sizes(self, arguments: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        missing = [name for name in SIZE_ARGUMENTS if arguments.get(name) is None]
        if missing:
            raise ValueError(
                f"RectifiedFlow: the timestep transform needs height, width and num_frames; {missing} missing"
            )
        return [torch.as_tensor(arguments[name], device=device).reshape(-1) for name in SIZE_ARGUMENTS]


def timestep_transform(
    t: Tensor,
    height: Tensor,
    width: Tensor,
    num_frames: Tensor,
    *,
    scale: float = 1.0,
    num_timesteps: int = 1000,
    min_latent_frames: int = 0,
) -> Tensor:
    """Shift timesteps towards noise for larger clips: r u / (1 + (r - 1) u), u = t/1000.

    r = sqrt(height width / 512^2) sqrt(n) scale; n = 1 when sample 0 is an image, else 5 for every full 17 frames, at
    least min_latent_frames. Upstream has no such limit: 2 to 16 frames then give 0, and NaN at t = 1000.
    Shapes: t (..., B); sizes (B,), whose dtype is the precision of r. Units: pixels and pixel frames.
    """
    ratio_space = (height * width / 512**2).sqrt()
    if num_frames[0] == 1:
        latent_frames = torch.ones_like(num_frames)
    else:
        latent_frames = (num_frames // 17 * 5).clamp(min=min_latent_frames)
    ratio = ratio_space * latent_frames.sqrt() * scale
    u = t / num_timesteps
    return ratio * u / (1 + (ratio - 1) * u) * num_timesteps


def check_video_length(num_frames: Tensor, min_latent_frames: int = 0) -> None:
    """ValueError for videos of 2 to 16 frames, on which upstream's timestep transform breaks, unless
    min_latent_frames gives it a value for them."""
    shortest = int(num_frames.min())
    if min_latent_frames == 0 and 1 <= shortest < 17 and int(num_frames.reshape(-1)[0]) != 1:
        raise ValueError(
            "RectifiedFlow: num_frames must be 1 or at least 17 for the timestep transform (it counts 5 latent frames "
            f"per 17), got {shortest}; set min_latent_frames=1 (as an image) or 5 (as 17 frames), or "
            "use_timestep_transform=False"
        )

"""What every sampler does around its own formula: asking a model, guiding it, drawing noise, and refusing bad input.

Axes: B batch, C latent channels, T latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from opensora.schedulers.regions import KnownRegion

Model = nn.Module | Callable[..., Tensor]
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Noise = Callable[[Tensor], Tensor]
StepCallback = Callable[[int, int, Tensor], None]


def denoiser(
    model: Model,
    y: Tensor,
    null_y: Tensor | None,
    mask_text: Tensor | None,
    arguments: Mapping[str, Any],
    *,
    with_variance: bool = False,
    null_first: bool = False,
) -> Denoise:
    """A function (x, timestep, x_mask) -> model output, with the prompt's work done once.

    It takes B rows and returns B, or with null_y 2B: those of y, then those of null_y, or the other way round with
    `null_first`. mask_text has B rows, which then serve both halves, or 2B: y's, then null_y's.
    A model with a method `denoiser(y, mask, *, with_variance, **arguments)` is asked for that function; any other is
    called as model(x, timestep, y=, mask=, x_mask=, **arguments) with all rows.
    """
    copies = 1
    if null_y is not None:
        halves = [y, null_y.to(y).expand_as(y)]
        if null_first:
            halves.reverse()
            if mask_text is not None and len(mask_text) == 2 * len(y):
                mask_text = torch.cat(mask_text.chunk(2)[::-1])
        y, copies = torch.cat(halves), 2
    if hasattr(model, "denoiser"):
        return model.denoiser(y, mask_text, with_variance=with_variance, **arguments)
    rows = {name: tiled(value, copies) for name, value in arguments.items()}
    if mask_text is not None:
        rows["mask"] = mask_text

    def denoise(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        return model(tiled(x, copies), tiled(t, copies), y=y, x_mask=tiled(x_mask, copies), **rows)

    return denoise


def guided(text: Tensor, null: Tensor, scale: float) -> Tensor:
    """The prediction for the text, exaggerated against the one for the null text."""
    return null + scale * (text - null)


def guided_noise(denoise: Denoise, x: Tensor, t: Tensor, scale: float | None) -> Tensor:
    """Predicted noise, fp32, of a model asked for null rows first; other channels than x's are dropped."""
    predicted = denoise(x, t, None).float()[:, : x.shape[1]]
    if scale is None:
        return predicted
    null, text = predicted.chunk(2)
    return guided(text, null, scale)


def guidance_scale(null_y: Tensor | None, asked: float | None, default: float) -> float | None:
    """None without a null text: there is nothing to guide with."""
    if null_y is None:
        return None
    return default if asked is None else asked


def noise_source(draw_noise: Noise | None, generator: Generator | None) -> Noise:
    """`draw_noise`, or standard-normal draws of the shape, dtype and device of what it is given."""
    if draw_noise is not None:
        return draw_noise
    return lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def step_count(asked: int | None, default: int, *, fewest: int = 1, most: int) -> int:
    """The number of sampling steps; ValueError outside [fewest, most]."""
    count = default if asked is None else asked
    if not fewest <= count <= most:
        raise ValueError(f"num_sampling_steps: must be from {fewest} to {most}, got {count}")
    return count


def check_inputs(
    z: Tensor, y: Tensor, mask_text: Tensor | None, frame_mask: Tensor | None, region: KnownRegion | None
) -> None:
    """ValueError for tensors that do not belong together, before a model runs."""
    if z.ndim != 5:
        raise ValueError(f"z: must have shape (B, C, T, H, W), got {tuple(z.shape)}")
    batch, frames = z.shape[0], z.shape[2]
    if y.shape[0] != batch:
        raise ValueError(f"y: must have a row for each of the {batch} clips of z, got {y.shape[0]}")
    if mask_text is not None and mask_text.shape[0] not in (batch, 2 * batch):
        raise ValueError(f"mask_text: must have {batch} or {2 * batch} rows, got {mask_text.shape[0]}")
    if frame_mask is not None:
        if frame_mask.shape != (batch, frames):
            raise ValueError(f"frame_mask: must have shape (B, T) = {(batch, frames)}, got {tuple(frame_mask.shape)}")
        _check_fractions("frame_mask", frame_mask)
    if region is not None:
        for name, value in (("region.latents", region.latents), ("region.strength", region.strength)):
            if value.ndim != 5 or any(ours not in (1, size) for ours, size in zip(value.shape, z.shape, strict=True)):
                raise ValueError(f"{name}: must broadcast to z's shape {tuple(z.shape)}, got {tuple(value.shape)}")
        _check_fractions("region.strength", region.strength)


def _check_fractions(name: str, value: Tensor) -> None:
    if value.numel() and not (float(value.min()) >= 0 and float(value.max()) <= 1):
        raise ValueError(f"{name}: must lie in [0, 1], got {float(value.min())} to {float(value.max())}")


def per_frame(mask_BT: Tensor) -> Tensor:
    """(B, T) to (B, 1, T, 1, 1)."""
    return mask_BT[:, None, :, None, None]


def tiled(value: Any, copies: int) -> Any:
    """`copies` repetitions of a tensor along the batch; anything else as it is."""
    if copies == 1 or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.repeat(copies, *[1] * (value.ndim - 1))


def masked_mean(value: Tensor, frame_mask: Tensor | None, loss_mask: Tensor | None = None) -> Tensor:
    """(B, C, T, H, W) to (B,): over everything, over chosen frames, or over everything with padding as 0."""
    if frame_mask is not None:
        per_frame_BT = value.mean(dim=(1, 3, 4))
        return (per_frame_BT * frame_mask).sum(dim=1) / frame_mask.sum(dim=1)
    if loss_mask is not None:
        value = value * loss_mask[:, None].to(value)
    return value.mean(dim=(1, 2, 3, 4))

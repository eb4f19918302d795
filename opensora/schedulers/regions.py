"""Parts of a clip that are known, and stay: what a model without a condition of its own can be made to keep.

Axes: B batch, C latent channels, T latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KnownRegion:
    """Clean latents (B, C, T, H, W) that take the place of the generated ones, noised to each step's time.

    strength (B, 1, T, H, W), or with axes of 1, in [0, 1]: 0 keeps a latent, 1 generates it; with a fraction it is kept
    while the timestep, as a share of all, lies above it. Generated latents beside them see them in every step.
    Source: the manner of diffusers' inpainting pipelines: the noise of a known latent is that of the start.
    """

    latents: Tensor
    strength: Tensor

    def paste(self, z: Tensor, noised: Tensor, time: float | Tensor) -> Tensor:
        """z with `noised`, the known latents at `time` in [0, 1], where they are kept there; 0 pastes nothing that
        is generated in the end. time: a number, or one for each sample (B,)."""
        if isinstance(time, Tensor):
            time = time.to(self.strength).reshape(-1, 1, 1, 1, 1)
        is_kept = (self.strength < time) | (self.strength == 0)
        return torch.where(is_kept.to(z.device), noised.to(z), z)

    def paste_clean(self, z: Tensor) -> Tensor:
        """z with the known latents themselves, at the end of sampling."""
        return self.paste(z, self.latents, 0.0)


def beside_given_frames(region: KnownRegion | None, z: Tensor, frame_mask: Tensor | None) -> KnownRegion | None:
    """`region`, on z's device and in fp32, with no say in frames whose frame_mask (B, T) is below 1: there z holds
    latents instead of noise, and the sampler's own rule for frames applies."""
    if region is None:
        return None
    latents, strength = region.latents.to(z.device, torch.float32), region.strength.to(z.device, torch.float32)
    if frame_mask is not None:
        strength = torch.where(_is_given(frame_mask, z), 1.0, strength)
    return KnownRegion(latents, strength)


def with_given_frames(
    region: KnownRegion | None, z: Tensor, frame_mask: Tensor | None, draw_noise: Callable[[Tensor], Tensor]
) -> tuple[KnownRegion | None, Tensor]:
    """`region` and the frames of z whose frame_mask (B, T) is below 1, as one region, for samplers without a rule of
    their own for frames; and z in fp32 with noise, drawn once, on those frames. None when nothing is known."""
    region = beside_given_frames(region, z, None)
    if frame_mask is None or bool((frame_mask == 1).all()):
        return region, z.float()
    is_given = _is_given(frame_mask, z)
    noise = torch.where(is_given, draw_noise(z).to(z), z).float()
    latents, strength = z.float(), frame_mask.to(z.device, torch.float32)[:, None, :, None, None]
    if region is not None:
        latents = torch.where(is_given, latents, region.latents)
        strength = torch.where(is_given, strength, region.strength)
    return KnownRegion(latents, strength), noise


def _is_given(frame_mask: Tensor, z: Tensor) -> Tensor:
    return (frame_mask.float() < 1).to(z.device)[:, None, :, None, None]

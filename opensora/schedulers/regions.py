"""Parts of a clip that are known, and stay: what a model without a condition of its own can be made to keep.

Axes: B batch, C latent channels, T latent frames, H height, W width.
"""

from __future__ import annotations

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

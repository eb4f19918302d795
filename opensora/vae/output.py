"""What a VAE gives a loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opensora.vae.distributions import DiagonalGaussian


@dataclass(frozen=True)
class VAEOutput:
    """The way of a clip through a VAE, (B, C, T, H, W) everywhere; None for what was not asked for or is not there.

    Pixels become z, a sample of `posteriors` (one for each chunk in time), and pixels x_rec again. The stacked VAE goes
    through latents of frames, x_z, on the way there and z_rec on the way back. Nothing is normalised or scaled.
    """

    x_rec: Tensor | None
    z: Tensor
    posteriors: list[DiagonalGaussian]
    x_z: Tensor | None = None
    z_rec: Tensor | None = None

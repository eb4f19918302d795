"""Video VAEs: Open-Sora 1.2's stacked VAE and the losses that train it."""

from opensora.vae.distributions import DiagonalGaussian, DrawNoise
from opensora.vae.losses import DiscriminatorLoss, GeneratorLoss, VAELoss, VAELossOutput
from opensora.vae.temporal import TemporalVAE
from opensora.vae.video_vae import VAEOutput, VideoVAE

__all__ = [
    "DiagonalGaussian",
    "DiscriminatorLoss",
    "DrawNoise",
    "GeneratorLoss",
    "TemporalVAE",
    "VAELoss",
    "VAELossOutput",
    "VAEOutput",
    "VideoVAE",
]

"""Video VAEs: Open-Sora 1.2's stacked VAE and the losses that train it; Open-Sora-Plan's causal VAE."""

from opensora.vae.causal_video import CausalVideoVAE, VAETiling, tail_initialize
from opensora.vae.distributions import DiagonalGaussian, DrawNoise
from opensora.vae.losses import DiscriminatorLoss, GeneratorLoss, VAELoss, VAELossOutput
from opensora.vae.temporal import TemporalVAE
from opensora.vae.video_vae import VAEOutput, VideoVAE

__all__ = [
    "CausalVideoVAE",
    "DiagonalGaussian",
    "DiscriminatorLoss",
    "DrawNoise",
    "GeneratorLoss",
    "TemporalVAE",
    "VAELoss",
    "VAELossOutput",
    "VAEOutput",
    "VAETiling",
    "VideoVAE",
    "tail_initialize",
]

"""Video VAEs: the image VAE of Open-Sora 1.0 and 1.1, the stacked VAE of 1.2 and its losses, Open-Sora-Plan's."""

from opensora.vae.causal_video import CausalVideoVAE, VAETiling, tail_initialize
from opensora.vae.distributions import DiagonalGaussian, DrawNoise
from opensora.vae.frame_vae import FrameVAE
from opensora.vae.losses import DiscriminatorLoss, GeneratorLoss, VAELoss, VAELossOutput
from opensora.vae.temporal import TemporalVAE
from opensora.vae.video_vae import VAEOutput, VideoVAE

__all__ = [
    "CausalVideoVAE",
    "DiagonalGaussian",
    "DiscriminatorLoss",
    "DrawNoise",
    "FrameVAE",
    "GeneratorLoss",
    "TemporalVAE",
    "VAELoss",
    "VAELossOutput",
    "VAEOutput",
    "VAETiling",
    "VideoVAE",
    "tail_initialize",
]

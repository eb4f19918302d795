"""Video VAEs: the image VAE of Open-Sora 1.0 and 1.1, the stacked VAE of 1.2, Open-Sora-Plan's; and their losses."""

from opensora.vae.adversarial import DiscriminatorLoss, GeneratorLoss
from opensora.vae.causal_video import CausalVideoVAE, VAETiling, tail_initialize
from opensora.vae.discriminators import DiscriminatorKind, PatchDiscriminator
from opensora.vae.distributions import DiagonalGaussian, DrawNoise
from opensora.vae.frame_vae import FrameVAE
from opensora.vae.losses import VAELoss, VAELossOutput
from opensora.vae.output import VAEOutput
from opensora.vae.temporal import TemporalVAE
from opensora.vae.video_vae import VideoVAE

__all__ = [
    "CausalVideoVAE",
    "DiagonalGaussian",
    "DiscriminatorKind",
    "DiscriminatorLoss",
    "DrawNoise",
    "FrameVAE",
    "GeneratorLoss",
    "PatchDiscriminator",
    "TemporalVAE",
    "VAELoss",
    "VAELossOutput",
    "VAEOutput",
    "VAETiling",
    "VideoVAE",
    "tail_initialize",
]

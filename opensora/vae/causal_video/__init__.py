"""Open-Sora-Plan's CausalVideoVAE, releases 1.0 and 1.1."""

from opensora.vae.causal_video.model import CausalVideoVAE
from opensora.vae.causal_video.tail_init import tail_initialize
from opensora.vae.causal_video.tiling import VAETiling

__all__ = ["CausalVideoVAE", "VAETiling", "tail_initialize"]

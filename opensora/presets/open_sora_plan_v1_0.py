"""Open-Sora-Plan 1.0: the causal video VAE.

Source: PKU-YuanGroup/Open-Sora-Plan v1.0.0, scripts/causalvae/release.json.
"""

from __future__ import annotations

from opensora.config import CausalVideoVAEConfig


def vae() -> CausalVideoVAEConfig:
    """As released: 3-D throughout, and attention that mixes channels and frames. It came without temporal windows."""
    return CausalVideoVAEConfig(encoder_temporal_downsample=("TimeDownsample2x", "TimeDownsample2x", "", ""))

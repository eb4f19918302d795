"""Open-Sora 1.1: the transformer of the release.

Source: hpcaitech/Open-Sora v1.1.0, configs/opensora-v1-1.
"""

from __future__ import annotations

from opensora.config import STDiT2Config


def transformer() -> STDiT2Config:
    """As released: queries and keys of temporal attention are rotated before they are normalised."""
    return STDiT2Config(input_sq_size=512, model_max_length=200, qk_norm=True, qk_norm_legacy=True)

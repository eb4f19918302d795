"""Open-Sora 1.0: the transformer of each release.

Source: hpcaitech/Open-Sora v1.0.0, configs/opensora/inference.
"""

from __future__ import annotations

from typing import Literal

from opensora.config import STDiTConfig

ClipName = Literal["16x256x256", "16x512x512", "64x512x512"]
"""Frames, height and width in pixels."""


def transformer(clip: ClipName = "16x256x256") -> STDiTConfig:
    """As released for that clip: 256 pixels at half the distance between sites, 64 frames at 1.5 times that of 16."""
    configs = {
        "16x256x256": STDiTConfig(input_size=(16, 32, 32), space_scale=0.5),
        "16x512x512": STDiTConfig(input_size=(16, 64, 64)),
        "64x512x512": STDiTConfig(input_size=(64, 64, 64), time_scale=2 / 3),
    }
    if clip not in configs:
        raise ValueError(f"clip: must be one of {', '.join(configs)}, got {clip!r}")
    return configs[clip]

"""How many frames of a clip a CPU convolves at a time. Axes: B batch, C channels, T frames, H height."""

from __future__ import annotations

import torch

STEP_BYTES = 8 << 20
"""Of frames that one step reads or makes. Smaller steps convolve frames one by one, where a window of three is
reordered three times; larger ones leave the cache."""

LEAST_ROWS = 20480
"""PyTorch gives an fp32 convolution of one clip to oneDNN if B*C*T*H is larger (ConvParams::use_mkldnn). Below it
unfolds the taps, 27 copies of the window: LTX's decoder of 32 channels then takes three times as long."""


def frames_at_once(
    num_frames: int, frame_bytes: int, num_rows: int | None, dtype: torch.dtype, num_more: int = 0
) -> int:
    """Frames in a step, of `num_frames` with `frame_bytes` each.

    num_rows: B*C*H of what a 3-D convolution reads, with `num_more` frames of the step before; None for a 2-D one.
    """
    each = max(1, STEP_BYTES // max(1, frame_bytes))
    if num_rows is None or dtype is not torch.float32:
        return each
    least = LEAST_ROWS // max(1, num_rows) + 1 - num_more
    if each < least <= num_frames:
        return -(-num_frames // (num_frames // least))  # steps alike, so that the last one is large enough too
    return each

"""How many frames of a clip a CPU convolves at a time."""

from __future__ import annotations

STEP_BYTES = 8 << 20
"""Of frames that one step reads or makes. Smaller steps convolve frames one by one, where a window of three is
reordered three times; larger ones leave the cache."""


def frames_at_once(frame_bytes: int) -> int:
    """Frames in a step, of `frame_bytes` each."""
    return max(1, STEP_BYTES // max(1, frame_bytes))

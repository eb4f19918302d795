"""How many frames of a clip a CPU convolves at a time."""

from __future__ import annotations

from opensora_kernels.flags import Flag

STEP_BYTES = 8 << 20
"""Of frames that one step reads or makes. Smaller steps convolve frames one by one, where a window of three is
reordered three times; larger ones leave the cache."""

counted = Flag("counted")
"""What runs inside only shows what it would take, and is not recorded for other frames: it takes its steps."""

frame_by_frame = Flag("frame_by_frame")
"""One frame in each step, however small: what a large clip runs, on one that costs nothing."""


def frames_at_once(frame_bytes: int) -> int:
    """Frames in a step, of `frame_bytes` each."""
    return 1 if frame_by_frame.is_on() else max(1, STEP_BYTES // max(1, frame_bytes))

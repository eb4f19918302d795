"""How many frames of a clip a CPU convolves at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

STEP_BYTES = 8 << 20
"""Of frames that one step reads or makes. Smaller steps convolve frames one by one, where a window of three is
reordered three times; larger ones leave the cache."""

_is_by_frame: ContextVar[bool] = ContextVar("is_by_frame", default=False)
_is_counted: ContextVar[bool] = ContextVar("is_counted", default=False)


@contextmanager
def counted() -> Iterator[None]:
    """What runs inside only shows what it would take, and is not recorded for other frames: it takes its steps."""
    token = _is_counted.set(True)
    try:
        yield
    finally:
        _is_counted.reset(token)


def is_counted() -> bool:
    return _is_counted.get()


@contextmanager
def frame_by_frame() -> Iterator[None]:
    """One frame in each step, however small: what a large clip runs, on one that costs nothing."""
    token = _is_by_frame.set(True)
    try:
        yield
    finally:
        _is_by_frame.reset(token)


def frames_at_once(frame_bytes: int) -> int:
    """Frames in a step, of `frame_bytes` each."""
    if not torch.compiler.is_compiling() and _is_by_frame.get():  # dynamo reads no context variables
        return 1
    return max(1, STEP_BYTES // max(1, frame_bytes))

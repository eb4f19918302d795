"""Recording a model for a shape, with errors that say which shapes it takes."""

from __future__ import annotations

import torch

from .clip import record
from .graph import Node
from .loops import Loop
from .strategies import Model

_NUM_CHANNELS = (*range(1, 33), 48, 64, 96, 128)


def recorded_for(
    caller: str, name: str, model: Model, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Node:
    """The recorded model; ValueError with what it takes instead if it does not take `shape`, called `name`."""
    try:
        return record(model, shape, dtype, device)
    except (ValueError, RuntimeError, IndexError) as error:
        taken = _what_it_takes(model, shape, dtype, device)
        raise ValueError(
            f"{caller}: {name} must have a shape that the model takes{taken}, got {shape}: {error}"
        ) from error


def first_step_of(
    caller: str, name: str, loop: Loop, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Node:
    """The first step of a loop over a clip of `shape`, recorded, with the errors of `recorded_for`."""
    first = (*shape[:2], loop.spans(shape[2])[0][1], *shape[3:])
    return recorded_for(caller, name, lambda frames: loop.step(frames, None)[0], first, dtype, device)


def _what_it_takes(model: Model, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> str:
    """Frame counts near that of `shape`, or else channel counts, with which the model does not fail."""

    def is_taken(axis: int, size: int) -> bool:
        try:
            record(model, (*shape[:axis], size, *shape[axis + 1 :]), dtype, device)
        except (ValueError, RuntimeError, IndexError, TypeError):
            return False
        return True

    near = range(max(1, shape[2] - 9), shape[2] + 10)
    if frames := [size for size in near if is_taken(2, size)]:
        return f" (frames near {shape[2]}: {', '.join(map(str, frames))})"
    if channels := [size for size in _NUM_CHANNELS if is_taken(1, size)]:
        return f" (channels: {', '.join(map(str, channels))})"
    return ""

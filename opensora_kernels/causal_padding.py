"""How a causal 3-D convolution pads: frames in front only, rows and columns on either side.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TimePadding = Literal["zeros", "replicate", "none"]
SpacePadding = Literal["zeros", "replicate", "reflect"]


def as_triple(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """`value` for (T, H, W), each at least 1."""
    triple = [value] * 3 if isinstance(value, int) else list(value)
    if len(triple) != 3 or min(triple) < 1:
        raise ValueError(f"{op}: {name} must be a positive integer or three of them (T, H, W), got {value}")
    return triple


def resolve_time_pad(op: str, time_pad: int | None, time_padding: TimePadding, span_t: int, stride_t: int) -> int:
    """Number of frames in front: as asked, or span_t - stride_t, which makes T frames T / stride_t."""
    if time_padding == "none":
        if time_pad:
            raise ValueError(f"{op}: time_pad must be None or 0 with time_padding='none', got {time_pad}")
        return 0
    if time_pad is None:
        return max(0, span_t - stride_t)
    if time_pad < 0:
        raise ValueError(f"{op}: time_pad must be at least 0, got {time_pad}")
    return time_pad


def resolve_space_pad(
    op: str,
    space_pad: Sequence[int] | None,
    space_padding: SpacePadding,
    size: Sequence[int],
    span: Sequence[int],
) -> list[int]:
    """(left, right, top, bottom): as asked, or half of what a window of `span` (H, W) overhangs, on each side."""
    if space_pad is None:
        vertical, horizontal = (span[0] - 1) // 2, (span[1] - 1) // 2
        pads = [horizontal, horizontal, vertical, vertical]
    else:
        pads = list(space_pad)
        if len(pads) != 4 or min(pads) < 0:
            raise ValueError(f"{op}: space_pad must be four sizes >= 0 (left, right, top, bottom), got {space_pad}")
    if space_padding == "reflect" and (max(pads[:2]) >= size[1] or max(pads[2:]) >= size[0]):
        raise ValueError(
            f"{op}: space_pad must be smaller than the frame with space_padding='reflect', "
            f"got (left, right, top, bottom) = {tuple(pads)} for H x W = {size[0]} x {size[1]}"
        )
    return pads


def pad_time(x: Tensor, time_pad: int, time_padding: TimePadding, state: Tensor | None) -> Tensor:
    """x with `state`, zeros or copies of its first frame in front."""
    if state is not None:
        return torch.cat([state, x], 2) if state.shape[2] else x
    if time_pad == 0:
        return x
    if time_padding == "zeros":
        return F.pad(x, (0, 0, 0, 0, time_pad, 0))
    return torch.cat([x[:, :, :1].expand(-1, -1, time_pad, -1, -1), x], 2)


def pad_for_convolution(
    x: Tensor,
    time_pad: int,
    space_pad: Sequence[int],
    time_padding: TimePadding,
    space_padding: SpacePadding,
    state: Tensor | None,
) -> tuple[Tensor, list[int]]:
    """x padded in one pass, and the padding (T, H, W) that is left for the convolution itself to add."""
    left, right, top, bottom = space_pad
    if space_padding == "replicate" and time_padding == "replicate" and state is None:
        return F.pad(x, (left, right, top, bottom, time_pad, 0), mode="replicate"), [0, 0, 0]
    if space_padding == "zeros":
        if left == right and top == bottom:
            return pad_time(x, time_pad, time_padding, state), [0, top, left]
        if time_padding == "zeros" and state is None:
            return F.pad(x, (left, right, top, bottom, time_pad, 0)), [0, 0, 0]
    x = pad_time(x, time_pad, time_padding, state)
    if any(space_pad):
        mode = "constant" if space_padding == "zeros" else space_padding
        x = F.pad(x, (left, right, top, bottom, 0, 0), mode=mode)
    return x, [0, 0, 0]

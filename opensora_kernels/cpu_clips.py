"""Clips and parameters in the forms that the compiled CPU library takes.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .norms import memory_format

_MODES = {"zeros": 0, "replicate": 1, "reflect": 2}


def why_not_dtype(x: Tensor) -> str | None:
    """None for a dtype that the library computes, else a sentence."""
    if x.dtype in (torch.float32, torch.bfloat16):
        return None
    return f"it computes float32 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"


def in_rows(x: Tensor) -> Tensor:
    """x, or a copy if its rows do not follow each other or neither positions nor channels lie side by side."""
    width = x.stride(4) if x.shape[4] > 1 else x.stride(3) if x.shape[3] > 1 else 1
    are_rows = min(x.shape[3:]) == 1 or x.stride(3) == x.shape[4] * width
    has_channels = memory_format(x) is torch.channels_last_3d
    is_ready = not x.numel() or (are_rows and (has_channels or width == 1))
    return x if is_ready else x.contiguous(memory_format=memory_format(x))


def border_of(space_pad: Sequence[int] | None, space_padding: str) -> tuple[int, ...]:
    """(left, right, top, bottom, mode)."""
    return (0, 0, 0, 0, 0) if space_pad is None else (*space_pad, _MODES[space_padding])


def wide(parameter: Tensor | None) -> Tensor | None:
    """A number of each channel in fp32."""
    return None if parameter is None else parameter.detach().float().contiguous()

"""The norms of the compiled CPU library, and clips and parameters in the forms that it takes.

On meta tensors memory is planned: everything is allocated that would be, and nothing runs.
Axes: B batch, C channels, T frames, H height, W width, G groups; F is T where statistics are per frame, else 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .norms import memory_format

_MODES = {"zeros": 0, "replicate": 1, "reflect": 2}


def in_rows(x: Tensor) -> Tensor:
    """x, or a copy if its rows do not follow each other, or neither positions nor channels lie side by side, or both,
    as in windows that overlap."""
    width = x.stride(4) if x.shape[4] > 1 else x.stride(3) if x.shape[3] > 1 else 1
    are_rows = min(x.shape[3:]) == 1 or x.stride(3) == x.shape[4] * width
    has_channels = memory_format(x) is torch.channels_last_3d
    has_order = has_channels != (width == 1) or x.shape[3:].numel() == 1
    is_ready = not x.numel() or (are_rows and has_order)
    return x if is_ready else x.contiguous(memory_format=memory_format(x))


def apply_group_norm(
    x: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    has_silu: bool,
    out: Tensor,
    space_pad: Sequence[int] = (0, 0, 0, 0),
    space_padding: str = "zeros",
) -> None:
    """Writes silu(norm(x)) to `out`, in x's order of axes, with `space_pad` (left, right, top, bottom) around it.

    moments: of each group, (B, F, G, 2), as `group_moments` gives them; None: no norm.
    """
    border = (*space_pad, _MODES[space_padding])
    given = (_in_order_of(out, x), moments, wide(weight), wide(bias), has_silu, border, out)
    if x.is_meta:
        out.zero_()  # it is written to, so that its memory counts
    else:
        torch.ops.opensora_kernels.group_norm_silu_cpu_apply(*given)


def apply_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    has_silu: bool,
    out: Tensor,
    space_pad: Sequence[int] = (0, 0, 0, 0),
    space_padding: str = "zeros",
) -> None:
    """The same with the RMS over channels."""
    border = (*space_pad, _MODES[space_padding])
    given = (_in_order_of(out, x), wide(weight), wide(bias), eps, has_silu, border, out)
    if x.is_meta:
        out.zero_()  # it is written to, so that its memory counts
    else:
        torch.ops.opensora_kernels.rms_norm_silu_cpu_apply(*given)


def group_moments(x: Tensor, num_groups: int, eps: float, per_frame: bool, statistics: Tensor | None) -> Tensor:
    """Mean and 1 / deviation of each group, (B, F, G, 2): of `statistics` or, without, of x itself."""
    if statistics is None:
        statistics = frame_statistics(x)
    table = statistics.float().contiguous()
    if x.is_meta:
        return x.new_empty((x.shape[0], x.shape[2] if per_frame else 1, num_groups, 2), dtype=torch.float32)
    frame_size = x.shape[3] * x.shape[4]
    return torch.ops.opensora_kernels.group_norm_silu_cpu_moments(table, num_groups, eps, per_frame, frame_size)


def frame_statistics(x: Tensor) -> Tensor:
    """As `norms.frame_statistics`, of x (B, C, T, H, W) in fp32 or bf16."""
    rows = in_rows(x)
    if x.is_meta:
        return x.new_empty((*x.shape[:3], 2), dtype=torch.float32)
    return torch.ops.opensora_kernels.group_norm_silu_cpu_statistics(rows)


def _in_order_of(out: Tensor, x: Tensor) -> Tensor:
    """x in rows and in the order of axes of `out`: a state may come in another one than the clip."""
    x, order = in_rows(x), memory_format(out)
    return x if memory_format(x) is order else x.contiguous(memory_format=order)


def wide(parameter: Tensor | None) -> Tensor | None:
    """A number of each channel in fp32."""
    return None if parameter is None else parameter.detach().float().contiguous()

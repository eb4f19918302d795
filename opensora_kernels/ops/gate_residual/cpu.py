"""Gated residual sum by the compiled CPU library, and in the same pass the modulation of the next branch."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._cpu import dense, dense_rows, in_their_dtypes


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    frame_mask: Tensor | None,
    gate0: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> list[Tensor]:
    values = dense_rows(x, y, gate, gate0, shift, shift0, scale, scale0)
    return torch.ops.opensora_kernels.modulate_cpu_forward(*values, *dense(frame_mask), True, eps)


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    frame_mask: Tensor | None,
    gate0: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> list[Tensor | None]:
    tables = (gate, shift, scale, gate0, shift0, scale0)
    wanted_tables = [wanted[index] for index in (2, 5, 6, 4, 7, 8)]
    grad_total, grad_out = grads[0], None if shift is None else grads[1]
    if grad_out is None:  # nothing used the modulation
        shift = scale = shift0 = scale0 = None
    values = dense_rows(grad_total, grad_out, x, y, gate, gate0, shift, shift0, scale, scale0)
    grad_x, grad_y, found = torch.ops.opensora_kernels.modulate_cpu_backward(
        *values[:2], *wanted[:2], any(wanted_tables), *values[2:], *dense(frame_mask), True, eps
    )
    of_tables = _in_order(found)
    if grad_out is None:
        of_tables = [grad if index % 3 == 0 else torch.zeros_like(grad) for index, grad in enumerate(of_tables)]
    of_gate, of_shift, of_scale, *of_others = in_their_dtypes(of_tables, tables, wanted_tables)
    return [grad_x, grad_y, of_gate, None, of_others[0], of_shift, of_scale, *of_others[1:], None]


def _in_order(found: Tensor) -> list[Tensor]:
    """Of (3, 2, B, C): gate, shift, scale, then those of the other frames."""
    return list(found.transpose(0, 1).flatten(0, 1))

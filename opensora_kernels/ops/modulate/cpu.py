"""LayerNorm and adaptive scale and shift by the compiled CPU library, one read and one write of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels._cpu import dense, dense_rows, in_their_dtypes


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    normalize: bool,
    eps: float,
    frame_mask: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> Tensor:
    x, *tables = (*dense_rows(x, shift, shift0, scale, scale0), *dense(frame_mask))
    return torch.ops.opensora_kernels.modulate_cpu_forward(x, None, None, None, *tables, normalize, eps)[0]


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    normalize: bool,
    eps: float,
    frame_mask: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> list[Tensor | None]:
    wants_tables = any(wanted[index] for index in (1, 2, 6, 7))
    grad, x, *tables = (*dense_rows(grads[0], x, shift, shift0, scale, scale0), *dense(frame_mask))
    grad_x, _, found = torch.ops.opensora_kernels.modulate_cpu_backward(
        None, grad, wanted[0], False, wants_tables, x, None, None, None, *tables, normalize, eps
    )
    of_shift, of_scale = found[1], found[2]  # each (2, B, C)
    grads = (of_shift[0], of_scale[0], of_shift[1], of_scale[1])
    typed = in_their_dtypes(grads, (shift, scale, shift0, scale0), [wanted[index] for index in (1, 2, 6, 7)])
    return [grad_x, *typed[:2], None, None, None, *typed[2:]]

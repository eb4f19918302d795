"""Gated residual sum, with the modulation of the next branch on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels._cpu import why_not_these, why_small_is_slower
from opensora_kernels.checks import check_float, check_mask, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["gate_residual"]


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    frame_mask: Tensor | None = None,
    gate0: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """x + gate * y; with shift and scale the pair (that sum, modulate(that sum, shift, scale)), made in one pass.

    Shapes: x, y (B, L, C), any strides, tokens time-major: L = T*S for T frames of S tokens. gate (B, C). frame_mask
    (B, T) booleans: frames with True take gate, the others gate0 (B, C); shift, scale, shift0, scale0 (B, C) and eps as
    in `modulate`, with the same mask. Returns (B, L, C) in x's dtype, or two of them.
    Numbers: the product and the sum are each rounded to the promoted dtype of their factors, the result to x's dtype.
    Errors: TypeError for dtypes that are not floating-point, or a mask that is not boolean; ValueError for shapes or
    devices that do not fit, L not a multiple of T, a mask without gate0 (or the reverse), shift without scale, or shift
    and a mask without shift0 and scale0 (or the reverse).
    Source: Open-Sora v1.2.0, opensora/models/stdit/stdit3.py, STDiT3Block (gates and t_mask_select).
    """
    op = "gate_residual"
    check_float(op, "x", x)
    check_float(op, "y", y)
    check_shape(op, "x", x, (None, None, None), "(B, L, C)")
    check_shape(op, "y", y, x.shape, "that of x, (B, L, C)")
    tables = {"gate": gate, "gate0": gate0, "shift": shift, "scale": scale, "shift0": shift0, "scale0": scale0}
    for name, table in tables.items():
        if table is not None:
            check_float(op, name, table)
            check_shape(op, name, table, (x.shape[0], x.shape[2]), "(B, C)")
    if frame_mask is not None:
        check_mask(op, "frame_mask", frame_mask)
        check_shape(op, "frame_mask", frame_mask, (x.shape[0], None), "(B, T)")
        if not frame_mask.shape[1] or x.shape[1] % frame_mask.shape[1]:
            raise ValueError(
                f"{op}: frame_mask must have as many frames T as divide L = {x.shape[1]}, got {frame_mask.shape[1]}"
            )
    if (frame_mask is None) != (gate0 is None):
        raise ValueError(f"{op}: frame_mask and gate0 must be given together, got only one")
    if (shift is None) != (scale is None):
        raise ValueError(f"{op}: shift and scale must be given together, got only one")
    has_choice = frame_mask is not None and shift is not None
    if (shift0 is not None) != has_choice or (scale0 is not None) != has_choice:
        raise ValueError(f"{op}: shift0 and scale0 must be given if both a frame_mask and shift are, and only then")
    check_same_device(op, x=x, y=y, frame_mask=frame_mask, **tables)
    outs = call(op, x, y, gate, frame_mask, gate0, shift, scale, shift0, scale0, eps)
    return outs[0] if shift is None else tuple(outs)


def _why_cpu_is_slower(x: Tensor, *others: Any) -> str | None:
    if torch.compiler.is_compiling():  # 0.92 of its speed, with the modulation 0.87 (bf16 on one core, 2026-11-30)
        return "torch.compile makes one loop of the reference, which takes less time"
    # bf16 on one core, 2026-11-30, without the modulation: 24,576 elements 21 us against 25, 122,880 49 against 36;
    # with gradients 245,760 207 us against 317, 737,280 619 against 572
    least, least_with_gradients = (65_536, 655_360) if others[4] is None else (2_048, 131_072)
    return why_small_is_slower((x, *others), x.numel(), least, least_with_gradients)


def _passes(*values: Any) -> list[int]:
    """Without the modulation, x's gradient is that of the sum."""
    return [0] if values[5] is None else []


register_op(
    "gate_residual",
    "(Tensor x, Tensor y, Tensor gate, Tensor? frame_mask, Tensor? gate0, Tensor? shift, Tensor? scale, "
    "Tensor? shift0, Tensor? scale0, float eps) -> Tensor[]",
    reference.gate_residual,
)
_triton.register("gate_residual", passes=_passes)
_extension.register("gate_residual", "cpu", why_not=why_not_these, why_slower=_why_cpu_is_slower, passes=_passes)

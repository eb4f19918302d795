"""Adaptive LayerNorm: normalise tokens, then scale and shift them by the timestep's parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels._cpu import why_not_these, why_small_is_slower
from opensora_kernels.checks import check_float, check_mask, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["modulate"]


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    frame_mask: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without affine weights; x itself instead of LayerNorm(x) if not normalize.

    Shapes: x (B, L, C), any strides, tokens time-major: L = T*S for T frames of S tokens. shift, scale (B, C).
    frame_mask (B, T) booleans: frames with True take (shift, scale), the others (shift0, scale0), both (B, C). Without
    a mask shift0 and scale0 are not allowed. Returns (B, L, C) in x's dtype, contiguous.
    Numbers: the LayerNorm takes its statistics in fp32 and is rounded to x's dtype; 1 + scale, the product and the sum
    are then each rounded to the promoted dtype of x and scale.
    Gradients: those of frames that took one pair of tables never reach the other pair, even where they are infinite.
    Errors: TypeError for dtypes that are not floating-point, or a mask that is not boolean; ValueError for shapes or
    devices that do not fit, L not a multiple of T, or a mask without shift0 and scale0 (or the reverse).
    Source: Open-Sora v1.2.0, opensora/models/stdit/stdit3.py, STDiT3Block (t2i_modulate and t_mask_select).
    """
    op = "modulate"
    check_float(op, "x", x)
    check_shape(op, "x", x, (None, None, None), "(B, L, C)")
    tables = {"shift": shift, "scale": scale} | ({} if shift0 is None else {"shift0": shift0})
    tables |= {} if scale0 is None else {"scale0": scale0}
    for name, table in tables.items():
        check_float(op, name, table)
        check_shape(op, name, table, (x.shape[0], x.shape[2]), "(B, C)")
    if frame_mask is not None:
        check_mask(op, "frame_mask", frame_mask)
        check_shape(op, "frame_mask", frame_mask, (x.shape[0], None), "(B, T)")
        if not frame_mask.shape[1] or x.shape[1] % frame_mask.shape[1]:
            raise ValueError(
                f"{op}: frame_mask must have as many frames T as divide L = {x.shape[1]}, got {frame_mask.shape[1]}"
            )
    if len(tables) != (2 if frame_mask is None else 4):
        raise ValueError(f"{op}: frame_mask, shift0 and scale0 must be given together, got only some")
    check_same_device(op, x=x, frame_mask=frame_mask, **tables)
    return call(op, x, shift, scale, normalize, eps, frame_mask, shift0, scale0)


def _why_cpu_is_slower(x: Tensor, *others: Any) -> str | None:
    # bf16 on one core, 2026-11-30: 2,048 elements 23 us against 21, with gradients 122,880 258 us against 248
    return why_small_is_slower((x, *others), x.numel(), 2_048, 131_072)


register_op(
    "modulate",
    "(Tensor x, Tensor shift, Tensor scale, bool normalize, float eps, Tensor? frame_mask, Tensor? shift0, "
    "Tensor? scale0) -> Tensor",
    reference.modulate,
)
_triton.register("modulate")
_extension.register("modulate", "cpu", why_not=why_not_these, why_slower=_why_cpu_is_slower)

"""RMSNorm over the last axis."""

from __future__ import annotations

from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels._cpu import why_not_these, why_small_is_slower
from opensora_kernels.checks import check_float, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["rms_norm"]

MOST_CPU_AXES = 8


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Shapes: x (*, C), weight (C,) or None; returns (*, C) in x's dtype. Any floating-point dtype.
    Numbers: the mean is taken in fp32; the normalised value is rounded to x's dtype before the weight multiplies it.
    Errors: TypeError for a dtype that is not floating-point, ValueError for a weight of another shape or device.
    Source: Llama's RMSNorm as Open-Sora v1.2.0 uses it (opensora/models/layers/blocks.py).
    """
    check_float("rms_norm", "x", x)
    if weight is not None:
        check_float("rms_norm", "weight", weight)
        check_shape("rms_norm", "weight", weight, (x.shape[-1],), "(C,)")
    check_same_device("rms_norm", x=x, weight=weight)
    return call("rms_norm", x, weight, eps)


def _why_no_cpu(x: Tensor, weight: Tensor | None, eps: float) -> str | None:
    if not 1 <= x.dim() <= MOST_CPU_AXES:
        return f"the compiled CPU library takes 1 to {MOST_CPU_AXES} axes, got {x.dim()}"
    return why_not_these(x, weight)


def _why_cpu_is_slower(x: Tensor, weight: Tensor | None, eps: float) -> str | None:
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    if strides != sorted(set(strides), reverse=True):
        # 128 channels first, 8 x 32 x 32, one core, 2026-11-30: 7.4 ms against 0.44 in fp32, 2.6 against 0.60 in bf16
        return f"it copies x, whose axes lie in another order than its rows: strides {strides}"
    # bf16 on one core, 2026-11-30: 24,576 elements 28 us against 27; with gradients 121 us against 159, 122,880 490
    # against 245
    return why_small_is_slower((x, weight), x.numel(), 24_576, 65_536)


register_op("rms_norm", "(Tensor x, Tensor? weight, float eps) -> Tensor", reference.rms_norm)
_triton.register("rms_norm")
_extension.register("rms_norm", "cpu", why_not=_why_no_cpu, why_slower=_why_cpu_is_slower)

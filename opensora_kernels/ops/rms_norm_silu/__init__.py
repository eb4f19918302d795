"""RMS over the channels at each position, then SiLU."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels._cpu import why_not_these
from opensora_kernels.checks import check_choice, check_float, check_same_device
from opensora_kernels.norms import Norm, check_norm
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["rms_norm_silu"]


def rms_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    activation: Literal["silu"] | None = "silu",
) -> Tensor:
    """silu(x / max(|x|, eps) * sqrt(C) * weight + bias), |x| the length of the channel vector at each position.

    Shapes: x (B, C, T, H, W) or (B, C, H, W), weight and bias (C,) or None; returns x's shape, dtype and memory format.
    Numbers: the length is taken in fp32; rounded to x's dtype after the division, after each factor, after bias and
    after SiLU, as the unfused chain does.
    Errors: TypeError for a dtype that is not floating-point; ValueError for another rank, shape, device or activation.
    Source: WanRMS_norm and QwenImageRMS_norm of diffusers 0.42 (models/autoencoders/autoencoder_kl_wan.py).
    """
    check_float("rms_norm_silu", "x", x)
    if x.dim() not in (4, 5):
        raise ValueError(f"rms_norm_silu: x must have shape (B, C, T, H, W) or (B, C, H, W), got {tuple(x.shape)}")
    if activation is not None:
        check_choice("rms_norm_silu", "activation", activation, ("silu",))
    x_BCTHW = x if x.dim() == 5 else x.unsqueeze(2)
    check_norm("rms_norm_silu", x_BCTHW, Norm("rms", weight, bias), prefix="")
    check_same_device("rms_norm_silu", x=x, weight=weight, bias=bias)
    out = call("rms_norm_silu", x_BCTHW, weight, bias, eps, activation or "")
    return out if x.dim() == 5 else out.squeeze(2)


register_op(
    "rms_norm_silu",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str activation) -> Tensor",
    reference.rms_norm_silu,
)


def _why_not_on_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: object) -> str | None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype is not x.dtype:
            return f"it rounds in x's dtype, but {name} has another one: {str(parameter.dtype).removeprefix('torch.')}"
    return why_not_these(x)


_triton.register("rms_norm_silu")
_extension.register("rms_norm_silu", "cpu", why_not=_why_not_on_cpu)

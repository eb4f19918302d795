"""GroupNorm over (C/G, T, H, W) or per frame, then SiLU."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels._cpu import why_not_these
from opensora_kernels.checks import check_choice, check_float, check_same_device
from opensora_kernels.norms import Norm, check_norm
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    per_frame: bool = False,
    activation: Literal["silu"] | None = "silu",
    statistics: Tensor | None = None,
) -> Tensor:
    """silu((x - mean) / sqrt(variance + eps) * weight + bias), mean and variance over each group of channels.

    Shapes: x (B, C, T, H, W) or (B, C, H, W), weight and bias (C,) or None; returns x's shape, dtype and memory format.
    `per_frame` takes mean and variance over (C/G, H, W) of each frame instead of over all frames.
    `statistics` (B, C, T, 2) in fp32 holds the mean and the sum of squared deviations over (H, W) of every frame, as
    `causal_conv3d(return_statistics=True)` returns them; x is then read once. Without `per_frame` they may cover more
    frames than x: the whole clip of which x is a chunk.
    Numbers: statistics in fp32; the normalised value is rounded to x's dtype before SiLU.
    Gradients: to x, weight, bias and, where given, statistics (then x's own gradient takes them as constants, and what
    they owe to x flows through them).
    Errors: TypeError for a dtype that is not floating-point; ValueError for another rank, shape, device or activation,
    or a number of groups that does not divide the channels.
    Source: GroupNorm (Wu and He, 2018) and SiLU as in Open-Sora v1.2.0, opensora/models/vae/vae_temporal.py; per frame
    as the 2-D blocks of Open-Sora-Plan v1.1.0.
    """
    check_float("group_norm_silu", "x", x)
    if x.dim() not in (4, 5):
        raise ValueError(f"group_norm_silu: x must have shape (B, C, T, H, W) or (B, C, H, W), got {tuple(x.shape)}")
    if activation is not None:
        check_choice("group_norm_silu", "activation", activation, ("silu",))
    check_same_device("group_norm_silu", x=x, weight=weight, bias=bias, statistics=statistics)
    x_BCTHW = x if x.dim() == 5 else x.unsqueeze(2)
    check_norm(
        "group_norm_silu", x_BCTHW, Norm("group", weight, bias, num_groups, eps, per_frame, statistics), prefix=""
    )
    out = call("group_norm_silu", x_BCTHW, num_groups, weight, bias, eps, per_frame, activation or "", statistics)
    return out if x.dim() == 5 else out.squeeze(2)


register_op(
    "group_norm_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool per_frame, str activation, "
    "Tensor? statistics) -> Tensor",
    reference.group_norm_silu,
    saves=True,
)


def _moments_like(
    x: Tensor, num_groups: int, weight: Any, bias: Any, eps: float, per_frame: bool, *others: Any
) -> list[Tensor]:
    """Mean and 1 / deviation of each group, of each frame if they are per frame."""
    num_frames = x.shape[2] if per_frame else 1
    return [torch.empty(x.shape[0], num_frames, num_groups, 2, dtype=torch.float32, device=x.device)]


def _why_not_on_cpu(x: Tensor, *others: Any) -> str | None:
    return why_not_these(x)


_triton.register("group_norm_silu", saved_like=_moments_like)
_extension.register("group_norm_silu", "cpu", why_not=_why_not_on_cpu, saved_like=_moments_like)

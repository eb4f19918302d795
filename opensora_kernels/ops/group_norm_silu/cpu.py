"""GroupNorm and SiLU by the compiled CPU library: statistics of every frame, then one pass that normalises.

Axes: B batch, C channels, T frames, H height, W width, G groups; F is T where statistics are per frame, else 1.
With n = (x - mean) rstd, g the gradient before SiLU and w the weight, mean() over the elements of a group:
grad_x = rstd (g w - mean(g w) - n mean(g w n)); under given statistics, which are constants to x, rstd g w.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opensora_kernels.cpu_norms import apply_group_norm, group_moments, in_rows, wide
from opensora_kernels.norms import memory_format


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    activation: str,
    statistics: Tensor | None,
) -> list[Tensor]:
    """The result, and the mean and 1 / deviation of each group: (B, F, G, 2) in fp32."""
    x = in_rows(x)
    moments = group_moments(x, num_groups, eps, per_frame, statistics)
    out = torch.empty_like(x, memory_format=memory_format(x))
    apply_group_norm(x, moments, weight, bias, activation == "silu", out)
    return [out, moments]


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    activation: str,
    statistics: Tensor | None,
) -> list[Tensor | None]:
    """One pass over x and its gradient for the sums, one for x's own."""
    wants_x, wants_weight, wants_bias, wants_statistics = wanted[0], wanted[2], wanted[3], wanted[7]
    x = in_rows(x)
    layout = memory_format(x)
    grad = grads[0].contiguous(memory_format=layout)
    given = (x, grad, saved[0], wide(weight), wide(bias))
    has_silu, rstd_BFG = activation == "silu", saved[0][..., 1]
    channels_per_group = x.shape[1] // num_groups
    rstd_BFC = rstd_BFG.repeat_interleave(channels_per_group, 2)

    sums_BFC2 = torch.ops.opensora_kernels.group_norm_silu_cpu_gradient_sums(*given, has_silu).transpose(1, 2)
    if not per_frame:
        sums_BFC2 = sums_BFC2.sum(1, keepdim=True)
    grad_weight = (sums_BFC2[..., 1] * rstd_BFC).sum((0, 1)).to(weight.dtype) if wants_weight else None
    grad_bias = sums_BFC2[..., 0].sum((0, 1)).to(bias.dtype) if wants_bias else None
    weighted = sums_BFC2 if weight is None else sums_BFC2 * wide(weight)[:, None]
    sums_BFG2 = weighted.unflatten(2, (num_groups, -1)).sum(3)

    grad_x = None
    if wants_x:
        grad_x = torch.empty_like(x, memory_format=layout)
        num_positions = channels_per_group * math.prod(x.shape[3 if per_frame else 2 :])
        slope, level = (
            -sums_BFG2[..., 1] * rstd_BFG.pow(3) / num_positions,
            -sums_BFG2[..., 0] * rstd_BFG / num_positions,
        )
        terms = torch.stack([slope, level], 2).repeat_interleave(channels_per_group, 3)
        terms = terms if statistics is None else torch.zeros_like(terms)
        torch.ops.opensora_kernels.group_norm_silu_cpu_input_gradient(*given, terms, has_silu, grad_x)
    grad_statistics = None
    if wants_statistics:
        grad_statistics = _statistics_gradient(statistics, saved[0], sums_BFG2, x.shape[3] * x.shape[4])
    return [grad_x, None, grad_weight, grad_bias, None, None, None, grad_statistics]


def _statistics_gradient(statistics: Tensor, moments_BFG2: Tensor, sums_BFG2: Tensor, frame_size: int) -> Tensor:
    """From sums of w g and w g (x - mean): the mean moves every value, the variance stretches it."""
    num_groups = moments_BFG2.shape[2]
    mean_BGcT = statistics.float()[..., 0].unflatten(1, (num_groups, -1))  # c of C / G channels
    group_mean, rstd = (value.transpose(1, 2)[:, :, None] for value in moments_BFG2.unbind(-1))  # (B, G, 1, F)
    of_mean, of_product = (value.transpose(1, 2)[:, :, None] for value in sums_BFG2.unbind(-1))
    num_merged = mean_BGcT.shape[2] * (1 if moments_BFG2.shape[1] > 1 else mean_BGcT.shape[3])
    of_squares = -0.5 * rstd.pow(3) * of_product / (num_merged * frame_size)
    grad_squares = of_squares.expand_as(mean_BGcT)
    grad_mean = -rstd * of_mean / num_merged + 2 * frame_size * of_squares * (mean_BGcT - group_mean)
    return torch.stack([grad_mean, grad_squares], -1).flatten(1, 2).to(statistics.dtype)

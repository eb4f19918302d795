"""Causal 3-D convolution in plain PyTorch: norm, SiLU, pad, convolve, add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels.causal_padding import pad_for_convolution, pad_time
from opensora_kernels.norms import frame_statistics, group_norm, like, rms_norm_channels


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    dilation: list[int],
    groups: int,
    time_padding: str,
    space_padding: str,
    time_pad: int,
    space_pad: list[int],
    state: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    per_frame: bool,
    statistics: Tensor | None,
    activation: str,
    residual: Tensor | None,
    return_state: bool,
    return_statistics: bool,
) -> list[Tensor]:
    hidden = prepare(x, norm, norm_weight, norm_bias, num_groups, eps, per_frame, statistics, activation)
    padded, padding = pad_for_convolution(hidden, time_pad, space_pad, time_padding, space_padding, state)
    states = []
    if return_state:
        num_results = (padded.shape[2] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
        states.append(frames_from(num_results * stride[0], x, hidden, time_pad, time_padding, state))
    del hidden  # not held while the convolution makes its own copies
    out = like(x, F.conv3d(padded, weight, bias, stride, padding, dilation, groups))
    if residual is not None:
        out.add_(residual)

    results = [out, *states]
    if return_statistics:
        results.append(frame_statistics(out))
    return results


def prepare(
    x: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    per_frame: bool,
    statistics: Tensor | None,
    activation: str,
) -> Tensor:
    """activation(norm(x)): x itself if there is neither."""
    hidden = x
    if norm == "group":
        hidden = group_norm(x, num_groups, norm_weight, norm_bias, eps, per_frame, statistics)
    elif norm == "rms":
        hidden = rms_norm_channels(x, norm_weight, norm_bias, eps)
    if activation == "silu":
        hidden = F.silu(hidden, inplace=hidden is not x and not torch.is_grad_enabled())
    return hidden


def frames_from(
    start: int, x: Tensor, hidden: Tensor, time_pad: int, time_padding: str, state: Tensor | None
) -> Tensor:
    """The frames that the next chunk still reads: those from `start` on, counted from the first padding frame.

    `hidden` is x after norm and activation; the frames are in x's order of axes.
    """
    num_front = time_pad if state is None else state.shape[2]
    if start >= num_front:
        return like(x, hidden[:, :, start - num_front :].clone())
    front = None if state is None else state[:, :, start:]
    return like(x, pad_time(hidden, num_front - start, time_padding, front))

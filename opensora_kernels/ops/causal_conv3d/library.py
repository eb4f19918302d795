"""Causal 3-D convolution on a CPU a few frames at a time, so that no copy of the whole clip is made.

PyTorch's convolution reorders its input and output for the CPU, and the clip is normalised and padded before it: five
clips of memory for one result. A convolution that carries its state needs none of them whole, and a norm across frames
only its statistics first.
Axes: B batch, C channels, T frames, H height, W width, O output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora_kernels.norms import group_statistics, memory_format

from . import reference

# Bytes of x that one step reads. Smaller steps convolve frames one by one, where a window of three is reordered three
# times; larger ones leave the cache.
STEP_BYTES = 8 << 20


def causal_conv3d(*values: Any) -> list[Tensor]:
    (x, weight, bias, stride, dilation, groups, time_padding, space_padding, time_pad, space_pad, state, norm,
     norm_weight, norm_bias, num_groups, eps, per_frame, statistics, activation, residual, return_state,
     return_statistics) = values  # fmt: skip
    steps = [] if _wants_gradients(values) else _steps(*values)
    if len(steps) < 2:
        return reference.causal_conv3d(*values)
    looks_across_frames = norm == "group" and not per_frame
    if looks_across_frames and statistics is None:
        statistics = group_statistics(x, num_groups)

    out, out_statistics, start, num_done = None, [], 0, 0
    for num_frames, num_results in steps:
        frames, results = slice(start, start + num_frames), slice(num_done, num_done + num_results)
        step, state, *others = reference.causal_conv3d(
            x[:, :, frames], weight, bias, stride, dilation, groups, time_padding, space_padding, time_pad, space_pad,
            state, norm, norm_weight, norm_bias, num_groups, eps, per_frame,
            statistics if statistics is None or looks_across_frames else statistics[:, :, frames], activation,
            None if residual is None else residual[:, :, results], True, return_statistics,
        )  # fmt: skip
        if out is None:
            shape = (*step.shape[:2], sum(count for _, count in steps), *step.shape[3:])
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
        out[:, :, results] = step
        out_statistics += others
        start, num_done = start + num_frames, num_done + num_results
    others = [torch.cat(out_statistics, 2)] if return_statistics else []
    return [out, state, *others] if return_state else [out, *others]


def why_not(x: Tensor, weight: Tensor, bias: Any, stride: list[int], dilation: list[int], *others: Any) -> str | None:
    if x.device.type not in ("cpu", "meta"):  # on meta tensors memory is planned
        return f"it is made for the CPU's convolution, got tensors on {x.device.type}"
    if stride[0] > dilation[0] * (weight.shape[2] - 1) + 1:
        return "a stride that skips frames leaves no state from step to step"
    return None


def why_slower(*values: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile plans the memory of the reference itself"
    if _wants_gradients(values):
        return "gradients keep what every step makes, so that steps save nothing"
    if len(_steps(*values)) < 2:
        return f"the clip is no larger than one step of {STEP_BYTES >> 20} MiB"
    return None


def _wants_gradients(values: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _num_frames(x: Tensor) -> int:
    """Frames of x that one step reads."""
    frame_bytes = x.element_size() * x.numel() // max(1, x.shape[2])
    return max(1, STEP_BYTES // max(1, frame_bytes))


def _steps(x: Tensor, weight: Tensor, *others: Any) -> list[tuple[int, int]]:
    """(frames of x, frames of the result) for each step; no step is without a result, the last takes what is left."""
    _, stride, dilation, _, _, _, time_pad, _, state, *_ = others
    num_front = time_pad if state is None else state.shape[2]
    span = dilation[0] * (weight.shape[2] - 1) + 1
    num_results = (x.shape[2] + num_front - span) // stride[0] + 1
    each = max(1, _num_frames(x) // stride[0])
    steps, num_read, num_done = [], 0, 0
    while num_done < num_results:
        count = min(each, num_results - num_done)
        num_done += count
        end = x.shape[2] if num_done == num_results else (num_done - 1) * stride[0] + span - num_front
        if end <= num_read:  # the frames in front make results by themselves
            continue
        made = num_done - sum(results for _, results in steps)
        steps.append((end - num_read, made))
        num_read = end
    return steps

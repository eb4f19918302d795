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

from opensora_kernels import _extension, cpu_convolution, cpu_steps
from opensora_kernels._cpu import why_not_these
from opensora_kernels.norms import like, memory_format

from . import reference
from .cpu_preparation import Preparation


def causal_conv3d(*values: Any, out: Tensor | None = None) -> list[Tensor]:
    """The result goes to `out` if there is one, which may be what `room_for_result` gives."""
    (x, weight, bias, stride, dilation, groups, time_padding, space_padding, time_pad, space_pad, state, norm,
     norm_weight, norm_bias, num_groups, eps, per_frame, statistics, activation, residual, return_state,
     return_statistics) = values  # fmt: skip
    steps = [] if _wants_gradients(values) else _steps(*values)
    if not steps:
        return reference.causal_conv3d(*values)
    if state is not None and not state.shape[2]:  # of a kernel of one tap
        state, time_pad = None, 0
    prepared = Preparation(
        x, norm, norm_weight, norm_bias, num_groups, eps, per_frame, statistics, activation, space_padding, space_pad,
        state, shows_x=out is None or weight.shape[2] == 1,
    )  # fmt: skip

    window, out_statistics, start, num_done, num_kept = None, [], 0, 0, 0
    for num_frames, num_results in steps:
        frames, results = slice(start, start + num_frames), slice(num_done, num_done + num_results)
        window = prepared.window(window, num_kept, frames, time_pad, time_padding)
        step = cpu_convolution.conv3d(window, weight, bias, stride, prepared.padding, dilation, groups)
        num_kept = window.shape[2] - num_results * stride[0]
        if return_state and frames.stop == x.shape[2]:
            kept = _without_border(window[:, :, window.shape[2] - num_kept :], prepared)
            kept = kept.clone(memory_format=memory_format(x))  # before the result takes the memory of x
        if out is None and len(steps) > 1:  # autocast chooses its dtype
            shape = (*step.shape[:2], sum(count for _, count in steps), *step.shape[3:])
            out = torch.empty(shape, dtype=step.dtype, device=x.device, memory_format=memory_format(x))
        made = _finish(step, None if residual is None else residual[:, :, results], out, results)
        if return_statistics:
            out_statistics.append(prepared.statistics_of(made))
        if out is None:
            out = like(x, made)
        del step, made
        start, num_done = start + num_frames, num_done + num_results
    others = [torch.cat(out_statistics, 2)] if return_statistics else []
    return [out, kept, *others] if return_state else [out, *others]


def _without_border(window: Tensor, prepared: Preparation) -> Tensor:
    left, _, top, _ = prepared.border
    height, width = prepared.x.shape[3:]
    return window[..., top : top + height, left : left + width]


def _finish(step: Tensor, residual: Tensor | None, out: Tensor | None, results: slice) -> Tensor:
    """The frames of a step with the residual, in `out` if there is one."""
    if out is None:
        return step if residual is None else step.add_(residual)
    place = out[:, :, results]
    if residual is None or residual.dtype is not step.dtype or place.dtype is not step.dtype:
        return place.copy_(step if residual is None else step.add_(residual))
    return torch.add(step, residual, out=place)


def room_for_result(*values: Any) -> Tensor | None:
    """The part of x whose memory the result may take: it fits, and what it takes has been read. None if there is none.

    Without padding in time it is the frames of x at the middle of each window.
    """
    x, weight, _, stride, dilation, *_, time_pad, space_pad, state = values[:11]
    if type(x) is not Tensor or not x.is_contiguous(memory_format=memory_format(x)):
        return None
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # the result has another dtype
        return None
    before, *spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    num_missing = before - (time_pad if state is None else state.shape[2])
    margins = [space_pad[2] + space_pad[3], space_pad[0] + space_pad[1]]
    if list(stride) != [1, 1, 1] or margins != spans or weight.shape[0] != x.shape[1] or num_missing < 0:
        return None
    start = num_missing // 2
    return x[:, :, start : start + x.shape[2] - num_missing]


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
    if len(_steps(*values)) < 2 and not cpu_convolution.is_for_onednn(*values[:3]) and not _is_prepared(*values):
        return f"the clip is no larger than one step of {cpu_steps.STEP_BYTES >> 20} MiB"
    return None


def _is_prepared(x: Tensor, *others: Any) -> bool:
    """Whether the compiled library has something to do before the convolution."""
    norm, activation = others[10], others[17]
    is_ready = why_not_these(x) is None and _extension.why_not_loaded("cpu") is None
    return bool(norm or activation) and is_ready and x.device.type in ("cpu", "meta")


def _wants_gradients(values: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _num_frames(x: Tensor) -> int:
    """Frames of x that one step reads."""
    frame_bytes = x.element_size() * x.numel() // max(1, x.shape[2])
    return cpu_steps.frames_at_once(frame_bytes)


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

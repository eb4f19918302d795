"""When a forward may write into what it made itself, and how many frames at a time it makes.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opensora_kernels.cpu_steps import counted, frames_at_once


def may_write(x: Tensor) -> bool:
    """Whoever records the forward, or differentiates it, wants a result of each step."""
    return type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def may_take_steps(x: Tensor) -> bool:
    """The same for a forward that only makes its results part by part."""
    return may_write(x) or (counted.is_on() and not torch.is_grad_enabled())


def is_on_cpu(x: Tensor) -> bool:
    """On meta tensors memory is planned."""
    return x.device.type in ("cpu", "meta")


def add(x: Tensor, *terms: Tensor) -> Tensor:
    """x plus each of `terms` in turn, in x's memory where nobody else wants it."""
    for term in terms:
        x = x.add_(term) if may_write(x) else x + term
    return x


def frame_steps(x: Tensor, num_least: int) -> list[slice]:
    """Slices of the frames of x_BCTHW, the first of at least `num_least`: steps on a CPU, elsewhere all of them."""
    return cpu_slices(x, num_least) if may_write(x) and is_on_cpu(x) else [slice(0, x.shape[2])]


def cpu_slices(x: Tensor, num_least: int) -> list[slice]:
    """Those of a CPU's steps, whoever takes them."""
    num_frames = x.shape[2]
    if not x.numel():
        return [slice(0, num_frames)]
    each = frames_at_once(x.nbytes // num_frames)
    stops = [*range(max(each, num_least), num_frames, each), num_frames]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def a_few_at_a_time(run: Callable[[Tensor], Tensor], frames_NCHW: Tensor) -> Tensor:
    """run(frames) for frames that it does not mix, on a CPU in steps."""
    steps = frame_steps(frames_NCHW.unsqueeze(0).transpose(1, 2), 1)
    if len(steps) == 1:
        return run(frames_NCHW)
    out = None
    for frames in steps:
        step = run(frames_NCHW[frames])
        if out is None:
            out = step.new_empty(frames_NCHW.shape[0], *step.shape[1:])
        out[frames] = step
    return out

"""Rules for operators that read neighbouring frames, or pad them: convolutions, pools, pads, resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import programs
from .graph import Node, TimeAxis
from .step import Step

aten = torch.ops.aten


def convolution(step: Step) -> Node | None:
    """convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    _, weight, bias, stride, padding, dilation, is_transposed, output_padding, groups = step.args
    node = step.inputs[0]
    if len(step.inputs) != 1 or step.call.slots != [0] or node.axis is None:
        return None
    if node.axis.dim == 0:
        return step.each_chunk(node.axis)
    if node.axis.dim != 2:
        return None
    if is_transposed:
        # every frame becomes frames of its own if their windows neither overlap nor leave gaps
        is_apart = stride[0] == weight.shape[2] and (padding[0], dilation[0], output_padding[0]) == (0, 1, 0)
        return step.each_chunk(TimeAxis(2, step.result.shape[2])) if is_apart and node.axis.outer == 1 else None
    num_axes = len(node.shape) - 2

    def run(chunk: Tensor, weight: Tensor, bias: Tensor | None, in_front: int, behind: int) -> Tensor:
        if in_front or behind:
            chunk = torch.constant_pad_nd(chunk, [0, 0] * (num_axes - 1) + [in_front, behind])
        inside = [0, *padding[1:]]
        return aten.convolution(chunk, weight, bias, stride, inside, dilation, False, output_padding, groups)

    span = dilation[0] * (weight.shape[2] - 1) + 1
    return _windows(step, run, [weight, bias], span, stride[0], padding[0])


def pool(step: Step) -> Node | None:
    """avg_pool3d(x, kernel_size, stride, ...) and max_pool3d_with_indices."""
    node = step.inputs[0]
    given = dict(zip((argument.name for argument in step.function._schema.arguments), step.args, strict=False))
    given |= step.kwargs
    kernel = _triple(given["kernel_size"])
    stride, padding = _triple(given.get("stride") or kernel), _triple(given.get("padding", 0))
    if len(node.shape) != 5 or node.axis.dim not in (0, 2):
        return None
    operator, others_given, options = step.function, step.args[1:], step.kwargs

    def run(chunk: Tensor, *others: Any) -> Tensor:
        results = operator(chunk, *others_given, **options)
        return results if isinstance(results, Tensor) else results[0]

    if node.axis.dim == 0:
        return step.each_chunk(node.axis, lambda *args, **kwargs: run(args[0]))
    if padding[0] or _triple(given.get("dilation", 1))[0] != 1 or given.get("ceil_mode"):
        return None
    return _windows(step, run, [], kernel[0], stride[0], 0)


def _triple(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 3 if len(values) == 1 else values


def _windows(
    step: Step, run: Callable[..., Tensor], weights: list[Any], span: int, stride: int, padding: int
) -> Node | None:
    """run(chunk, *weights, zeros in front, behind) on windows along axis 2."""
    if stride > span:
        return None
    program = programs.windows(run, weights, span, stride, padding, padding)
    return step.node(program, TimeAxis(2, step.result.shape[2]))


def constant_pad(step: Step) -> Node | None:
    """constant_pad_nd(x, pad, value): pads of the last axis first."""
    node, pad, value = step.inputs[0], step.args[1], (*step.args, 0)[2]
    front, back = _pad_of_time(node, pad)
    if min(front, back) < 0:
        return None

    def run(x: Tensor, front: int, back: int) -> Tensor:
        return torch.constant_pad_nd(x, _with_pad_of_time(node, pad, front, back), value)

    return _padded(step, run, front, back)


def replication_pad(step: Step) -> Node | None:
    """replication_pad2d and 3d."""
    node, pad, function = step.inputs[0], step.args[1], step.function
    front, back = _pad_of_time(node, pad)

    def run(x: Tensor, front: int, back: int) -> Tensor:
        return function(x, _with_pad_of_time(node, pad, front, back))

    return _padded(step, run, front, back)


def _padded(step: Step, run: Callable[[Tensor, int, int], Tensor], front: int, back: int) -> Node | None:
    axis = step.inputs[0].axis
    if axis.outer > 1 and (front or back):
        return None
    return step.node(programs.padded(run, front, back), TimeAxis(axis.dim, axis.frames + front + back, axis.outer))


def _pad_of_time(node: Node, pad: list[int]) -> tuple[int, int]:
    place = 2 * (len(node.shape) - 1 - node.axis.dim)
    return (pad[place], pad[place + 1]) if place < len(pad) else (0, 0)


def _with_pad_of_time(node: Node, pad: list[int], front: int, back: int) -> list[int]:
    place = 2 * (len(node.shape) - 1 - node.axis.dim)
    return pad if place >= len(pad) else [*pad[:place], front, back, *pad[place + 2 :]]


def reflection_pad(step: Step) -> Node | None:
    """reflection_pad3d, with frames reflected behind the last one alone."""
    node, pad, function = step.inputs[0], step.args[1], step.function
    front, back = _pad_of_time(node, pad)
    if front or (back and node.axis.outer > 1):
        return None
    if not back:
        return step.each_chunk(node.axis)

    def run(x: Tensor, back: int) -> Tensor:
        return function(x, _with_pad_of_time(node, pad, 0, back))

    axis = TimeAxis(node.axis.dim, node.axis.frames + back)
    return step.node(programs.reflected(run, axis, back), axis)


def resize(step: Step) -> Node | None:
    """upsample_*(x, output_size, ...): rows and columns; by "nearest" whole multiples of frames, or twice the frames
    linearly."""
    axis, size = step.inputs[0].axis, step.args[1]
    num_frames = step.result.shape[axis.dim] // axis.outer
    if axis.dim > 2 or size is None or num_frames % axis.frames:
        return None
    times = num_frames // axis.frames
    if axis.dim < 2:
        return step.each_chunk(axis)
    if axis.outer > 1:
        return None
    if times > 1 and "nearest" not in step.name:
        is_in_time = step.result.shape[3:] == step.inputs[0].shape[3:] and step.args[2] is False
        is_doubled = step.name == "upsample_trilinear3d" and times == 2 and is_in_time
        return step.node(programs.twice_the_frames(first_alone=False), TimeAxis(2, num_frames)) if is_doubled else None
    operator = step.function

    def function(x: Tensor, size: list[int], *others: Any, **kwargs: Any) -> Tensor:
        return operator(x, [x.shape[2] * times, *size[1:]], *others, **kwargs)

    return step.each_chunk(TimeAxis(2, num_frames), function)


RULES: dict[Any, Callable[[Step], Node | None]] = {
    aten.convolution: convolution,
    **dict.fromkeys((aten.avg_pool3d, aten.max_pool3d_with_indices), pool),
    aten.constant_pad_nd: constant_pad,
    **dict.fromkeys((aten.replication_pad2d, aten.replication_pad3d), replication_pad),
    aten.reflection_pad3d: reflection_pad,
    **dict.fromkeys(
        (
            aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact2d,
            aten._upsample_nearest_exact3d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
            aten.upsample_trilinear3d,
        ),
        resize,
    ),
}  # fmt: skip

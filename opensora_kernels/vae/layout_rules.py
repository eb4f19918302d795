"""Rules for operators that only move frames: views, permutations, slices, concatenation."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import programs
from .graph import Node, TimeAxis, call_of
from .step import Step, as_stream, constant_node, stream

aten = torch.ops.aten


def reshape(step: Step) -> Node | list[Node] | None:
    """Any change of shape that keeps the order in memory; the sizes are those of the chunk."""
    shape = tuple(step.result.shape)
    found = moved_axis(step.inputs[0].shape, step.inputs[0].axis, shape)
    if found is None:
        return None
    axis, multiple = found

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes = list(shape)
        sizes[axis.dim] = x.numel() // prod(sizes[: axis.dim] + sizes[axis.dim + 1 :])
        return x.reshape(sizes)

    return step.each_chunk(axis, function, multiple=multiple)


def moved_axis(before: tuple[int, ...], axis: TimeAxis, after: tuple[int, ...]) -> tuple[TimeAxis, int] | None:
    """Where the time axis of shape `before` is in shape `after`, and how many frames make one entry there.

    Time is the factor of size `frames` whose entries lie `inner` elements apart. Where an axis of the new shape holds
    time and smaller axes too, as (t h w) does, each of its entries counts as a frame.
    """
    inner = prod(before[axis.dim + 1 :])
    if 0 in after:
        return None
    for dim in range(len(after)):
        below = prod(after[dim + 1 :])  # elements between entries of this axis
        if below * after[dim] < inner * axis.frames or below >= inner * axis.frames:
            continue
        if below <= inner:
            entries = axis.frames * (inner // below)
            if inner % below or after[dim] % entries:
                return None
            return TimeAxis(dim, entries, after[dim] // entries), 1
        multiple = below // inner  # time is split, and this is its slowest part
        if below % inner or axis.frames % multiple or after[dim] % (axis.frames // multiple):
            return None
        frames = axis.frames // multiple
        return TimeAxis(dim, frames, after[dim] // frames), multiple
    return None


def permute(step: Step) -> Node | None:
    axis, num_axes = step.inputs[0].axis, len(step.inputs[0].shape)
    order = list(range(num_axes))
    name = step.name
    if name == "permute":
        order = [dim % num_axes for dim in step.args[1]]
    elif num_axes > 1:
        first, second = (0, 1) if name == "t" else (dim % num_axes for dim in step.args[1:3])
        order[first], order[second] = order[second], order[first]
    return step.each_chunk(TimeAxis(order.index(axis.dim), axis.frames, axis.outer))


def expand(step: Step) -> Node | None:
    axis = step.inputs[0].axis
    new_axes = step.result.dim() - len(step.inputs[0].shape)
    dim = axis.dim + new_axes

    def function(x: Tensor, sizes: list[int], *args: Any, **kwargs: Any) -> Tensor:
        return x.expand([x.shape[axis.dim] if index == dim else size for index, size in enumerate(sizes)])

    return step.each_chunk(TimeAxis(dim, axis.frames, axis.outer), function)


def repeat(step: Step) -> Node | None:
    axis, times = step.inputs[0].axis, step.args[1]
    dim = axis.dim + len(times) - len(step.inputs[0].shape)
    return step.each_chunk(TimeAxis(dim, axis.frames, axis.outer)) if times[dim] == 1 else None


def slice_(step: Step) -> Node | None:
    """x[start:end:step] along one axis."""
    _, dim, start, _, every = (*step.args, *(None,) * (5 - len(step.args)))
    dim, size = (dim or 0) % step.result.dim(), step.inputs[0].shape[dim or 0]
    if (every or 1) == 1 and step.result.shape[dim] == size:
        return step.inputs[0]
    if dim != step.inputs[0].axis.dim:
        return step.each_chunk(step.inputs[0].axis)
    start = 0 if start is None else max(0, start + size if start < 0 else start)
    return cut(step, start, step.result.shape[dim]) if (every or 1) == 1 else None


def cut(step: Step, start: int, length: int) -> Node | None:
    """Frames from `start` on, of a clip whose time has an axis of its own."""
    node = step.inputs[0]
    if node.axis.outer > 1 or length == 0:
        return None
    shape = list(node.shape)
    shape[node.axis.dim] = length
    axis = TimeAxis(node.axis.dim, length)
    part = stream(step.name, programs.sliced(start + length), (node,), tuple(shape), node.dtype, axis)
    part.skips = start
    return part


def select(step: Step) -> Node | None:
    """x[..., index, ...]"""
    node, (_, dim, index) = step.inputs[0], step.args
    dim = dim % len(node.shape)
    if dim != node.axis.dim:
        return step.each_chunk(TimeAxis(node.axis.dim - (dim < node.axis.dim), node.axis.frames, node.axis.outer))
    frame = cut(step, index % node.shape[dim], 1)
    return None if frame is None else _squeezed(frame, dim)


def split(step: Step) -> list[Node] | None:
    """split, split_with_sizes and unbind: a slice for every part."""
    node = step.inputs[0]
    dim = step.args[2] if len(step.args) > 2 else step.kwargs.get("dim", 0)
    if step.name == "unbind":
        dim = step.args[1] if len(step.args) > 1 else 0
    dim %= len(node.shape)
    removes = step.name == "unbind"
    sizes = [1 if removes else part.shape[dim] for part in step.results]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = []
    for start, size in zip(starts, sizes, strict=True):
        if dim == node.axis.dim:
            part = cut(step, start, size)
        else:
            shape = (*node.shape[:dim], size, *node.shape[dim + 1 :])
            part = _mapped(step, node, lambda x, s=start, n=size: x.narrow(dim, s, n), shape, node.axis)
        if part is None:
            return None
        parts.append(_squeezed(part, dim) if removes else part)
    return parts


def cat(step: Step) -> Node | None:
    """Tensors one after the other along one axis."""
    dim = (step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)) % step.result.dim()
    if len(step.inputs) != len(step.args[0]):
        return _cat_with_constants(step, dim)
    axes = [node.axis for node in step.inputs if node.axis is not None]
    if all(axis.dim != dim for axis in axes):
        axis = step.common_axis()
        if axis is None or len(axes) != len(step.inputs):
            return None
        return step.each_chunk(axis)
    return _cat_in_time(step, list(step.inputs), dim)


def _cat_with_constants(step: Step, dim: int) -> Node | None:
    nodes, parts = iter(step.inputs), []
    for index, leaf in enumerate(step.args[0]):
        is_clip = index in step.call.slots
        parts.append(next(nodes) if is_clip else constant_node(leaf, dim))
    axes = [node.axis for node in step.inputs if node.axis is not None]
    return _cat_in_time(step, parts, dim) if all(axis.dim == dim for axis in axes) else None


def _cat_in_time(step: Step, parts: list[Node], dim: int) -> Node | None:
    parts = [part if part.axis is not None else as_stream(part, dim) for part in parts if 0 not in part.shape]
    if any(part.axis is not None and part.axis != TimeAxis(dim, part.shape[dim]) for part in parts):
        return None
    node = step.node(programs.joined(), TimeAxis(dim, step.result.shape[dim]), inputs=tuple(parts))
    node.in_turn = True
    return node


def stack(step: Step) -> Node | None:
    """Tensors side by side along a new axis."""
    axis = step.common_axis()
    if axis is None or any(node.axis is None for node in step.inputs) or len(step.inputs) != len(step.args[0]):
        return None
    dim = (step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)) % step.result.dim()
    return step.each_chunk(TimeAxis(axis.dim + (dim <= axis.dim), axis.frames, axis.outer))


def _mapped(
    step: Step, node: Node, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], axis: TimeAxis
) -> Node:
    return stream(step.name, programs.each_chunk(call_of(function)), (node,), shape, node.dtype, axis)


def _squeezed(node: Node, dim: int) -> Node:
    """Without axis `dim` of size one; time, if that is it, has one frame and needs no axis."""
    shape = node.shape[:dim] + node.shape[dim + 1 :]
    call = call_of(lambda x: x.squeeze(dim))
    if node.axis is None:
        return stream("squeeze", programs.piece(call), (node,), shape, node.dtype, None)
    axis = TimeAxis(node.axis.dim - (dim < node.axis.dim), node.axis.frames, node.axis.outer)
    return stream("squeeze", programs.each_chunk(call), (node,), shape, node.dtype, axis)


RULES: dict[Any, Callable[[Step], Node | list[Node] | None]] = {
    **dict.fromkeys(
        (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.unsqueeze), reshape
    ),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), permute),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unbind), split),
    aten.expand: expand,
    aten.repeat: repeat,
    aten.slice: slice_,
    aten.select: select,
    aten.cat: cat,
    aten.stack: stack,
}

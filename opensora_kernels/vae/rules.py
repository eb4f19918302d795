"""What PyTorch's operators mean for the frames of a clip: which run chunk by chunk, and which need the whole clip.

A rule returns the node (or, for operators with several results, the list of nodes) of a step, or None: then the step
runs on the whole clip. Steps on pieces need no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_rules, layout_rules, programs, window_rules
from .graph import Node, TimeAxis
from .operators import group_norm_of_clip
from .step import Step, as_stream, constant_node

aten = torch.ops.aten
Rule = Callable[[Step], "Node | list[Node] | None"]


def nodes_for(step: Step) -> Node | list[Node]:
    """The nodes of a step."""
    if step.function is aten.native_group_norm.default:
        step = replace(step, call=replace(step.call, function=_dense_group_norm))
    elif step.function in _VIEWS:
        # a clip that is recorded lies densely in memory, the one that comes may not
        step = replace(step, call=replace(step.call, function=aten.reshape.default))
    if step.is_of_pieces:
        return step.whole()
    found = None
    if (rule := _RULES.get(getattr(step.function, "overloadpacket", step.function))) is not None:
        found = rule(step)
    elif torch.Tag.pointwise in getattr(step.function, "tags", ()):
        found = pointwise(step)
    return step.whole() if found is None else found


_VIEWS = (aten.view.default, aten._unsafe_view.default)


def pointwise(step: Step) -> Node | None:
    """Every entry by itself; axes are matched from the last one on."""
    num_axes = step.result.dim()
    streams = [node for node in step.inputs if node.axis is not None]
    found = {(node.axis.dim - len(node.shape), node.axis.frames, node.axis.outer) for node in streams}
    if len(found) != 1:
        return None
    ((from_end, frames, outer),) = found
    return aligned(step, TimeAxis(num_axes + from_end, frames, outer), from_end)


def aligned(step: Step, axis: TimeAxis, from_end: int) -> Node | None:
    """The step on each chunk, with pieces and tensors of the model cut into frames where they have as many."""
    size = axis.frames * axis.outer
    leaves, slots = list(step.call.leaves), []
    nodes, inputs = iter(step.inputs), []
    for index, leaf in enumerate(leaves):
        node = next(nodes) if index in step.call.slots else None
        shape = node.shape if node is not None else tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
        is_cut = (node is None or node.axis is None) and len(shape) >= -from_end and shape[from_end] == size
        if is_cut and axis.outer > 1:
            return None
        if is_cut:
            dim = len(shape) + from_end
            node = constant_node(leaf, dim) if node is None else as_stream(node, dim)
        if node is not None:
            slots.append(index)
            inputs.append(node)
    call = type(step.call)(step.function, leaves, step.call.structure, slots)
    return Step(step.name, step.function, step.args, step.kwargs, tuple(inputs), call, step.results).each_chunk(axis)


def filled(step: Step) -> Node:
    """new_zeros and its like: nothing of the clip is read but its device."""
    options = {name: value for name, value in step.kwargs.items() if name not in ("device", "layout", "pin_memory")}
    options["dtype"] = step.result.dtype
    program = programs.made(step.function, step.args[1:], options)
    return Node(step.name, program, (), tuple(step.result.shape), step.result.dtype)


def by_sample(step: Step) -> Node | None:
    """Samples of axis 0 by themselves; every stream the same."""
    axis = step.common_axis()
    # a tensor without the axis (weights) serves all chunks; one with it would have to be cut
    is_same = all(node.axis is not None for node in step.inputs)
    return step.each_chunk(axis) if axis is not None and axis.dim == 0 and is_same else None


def reduction(step: Step) -> Node | None:
    """Sums, means and norms over axes that are not time."""
    dims, keepdim = _reduced(step)
    axis = step.common_axis()
    if axis is None or dims is None or axis.dim in dims:
        return None
    shift = 0 if keepdim else sum(dim < axis.dim for dim in dims)
    return step.each_chunk(TimeAxis(axis.dim - shift, axis.frames, axis.outer))


def _reduced(step: Step) -> tuple[list[int] | None, bool]:
    schema = step.function._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, step.args, strict=False)} | step.kwargs
    dims = given.get("dim")
    if dims is None or dims == []:
        return None, False
    num_axes = len(step.inputs[0].shape)
    return [dim % num_axes for dim in ([dims] if isinstance(dims, int) else dims)], bool(given.get("keepdim", False))


def along_other_axis(step: Step) -> Node | None:
    """Softmax and its like: the second argument is the axis along which entries meet."""
    axis = step.common_axis()
    return None if axis is None or axis.dim == step.args[1] % len(step.inputs[0].shape) else step.each_chunk(axis)


def group_norm(step: Step) -> Node | None:
    """native_group_norm(x, weight, bias, N, C, HxW, groups, eps)."""
    axis = step.common_axis()
    if axis is None or len(step.inputs) > 1:
        return None
    if axis.dim == 0:

        def function(x: Tensor, weight: Any, bias: Any, samples: int, *others: Any) -> Tensor:
            *_, num_groups, eps = others
            # not native_group_norm, which wants dense memory: a chunk may be a view of some frames
            return torch.group_norm(x, num_groups, weight, bias, eps)

        return step.each_chunk(axis, function)
    if axis.dim == 2 and len(step.inputs[0].shape) == 5:
        _, weight, bias, _, _, _, num_groups, eps = step.args
        return group_norm_of_clip(step, num_groups, weight, bias, eps)
    return None


def _dense_group_norm(x: Tensor, *args: Any) -> Any:
    """PyTorch made x dense before it came here, but on a tensor without data; frames may lie apart in memory."""
    return aten.native_group_norm(x.contiguous(), *args)


def layer_norm(step: Step) -> Node | None:
    axis = step.common_axis()
    if axis is None or axis.dim >= len(step.inputs[0].shape) - len(step.args[1]):
        return None
    function = step.function
    return step.each_chunk(axis, lambda *args, **kwargs: _first(function(*args, **kwargs)))


def _first(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]


def linear(step: Step) -> Node | None:
    """F.linear(x, weight, bias): the last axis alone is mixed."""
    axis = step.common_axis()
    is_own = len(step.inputs) == 1 and step.call.slots[0] == 0
    return step.each_chunk(axis) if is_own and axis.dim != len(step.inputs[0].shape) - 1 else None


def matrix_product(step: Step) -> Node | None:
    """bmm and mm: batches by themselves, and rows of the first factor where the second is at hand."""
    axis = step.common_axis()
    if axis is None:
        return None
    first, second = step.inputs[0], step.inputs[-1]
    num_axes = step.result.dim()
    if len(step.inputs) == 2 and first.axis == second.axis and axis.dim == 0 and num_axes == 3:
        return step.each_chunk(axis)
    is_row = step.call.slots[0] == 0 and first.axis is not None and axis.dim == num_axes - 2
    is_alone = len(step.inputs) == 1 or second.axis is None
    return step.each_chunk(axis) if is_row and is_alone else None


# Functions that are recorded as they are called, since what they dispatch depends on the device, and as what.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: F.linear,
    F.scaled_dot_product_attention: attention_rules.scaled_dot_product_attention,
}

_RULES: dict[Any, Rule] = {
    F.linear: linear,
    attention_rules.scaled_dot_product_attention: attention_rules.attention,
    **dict.fromkeys(
        (aten.clone, aten._to_copy, aten.__and__, aten.__or__, aten.lift_fresh, aten.alias, aten.detach), pointwise
    ),
    **dict.fromkeys(
        (aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.linalg_vector_norm, aten.norm), reduction
    ),
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten._safe_softmax), along_other_axis),
    **dict.fromkeys((aten.mm, aten.bmm), matrix_product),
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), layer_norm),
    **dict.fromkeys(
        (aten.avg_pool2d, aten.max_pool2d_with_indices, aten._adaptive_avg_pool2d, aten.reflection_pad2d), by_sample
    ),
    **dict.fromkeys((aten.pixel_shuffle, aten.pixel_unshuffle), by_sample),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like), pointwise),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full), filled),
    aten.native_group_norm: group_norm,
    **layout_rules.RULES,
    **window_rules.RULES,
}

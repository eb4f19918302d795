"""What our own operators mean for the frames of a clip.

A causal convolution carries its state from chunk to chunk. GroupNorm over a clip becomes two steps: statistics of all
frames, which every later frame waits for, and a norm of each chunk with those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels.registration import call

from . import programs
from .graph import Call, Node, TimeAxis
from .step import Step, as_stream, constant_node, stream


def nodes_for(step: Step) -> Node | list[Node]:
    """The nodes of `registration.call(op, *arguments)`, several results as a list."""
    op = step.args[0]
    named = Step(op, step.function, step.args, step.kwargs, step.inputs, step.call, step.results)
    if named.is_of_pieces and not (op == "causal_conv3d" and _becomes_stream(step.args)):
        return named.whole()
    found = _RULES[op](named) if op in _RULES else None
    return named.whole() if found is None else found


def group_norm_of_clip(step: Step, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Node:
    """GroupNorm over all frames of the step's one input (B, C, T, H, W), as `group_norm_silu` without SiLU."""
    (x,) = step.inputs
    found = statistics(x)
    arguments = ["group_norm_silu", None, num_groups, weight, bias, eps, False, "", None]
    return _normalised(step, x, found, arguments)


def statistics(x: Node) -> Node:
    """Mean and squared deviations of every frame of x (B, C, T, H, W), which must all be there first."""
    shape = (*x.shape[:3], 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    remark = "a norm looks at all frames, which wait in the spill"
    return Node("statistics", programs.statistics(), (x,), shape, wide, None, (True,), remark)


def _group_norm_silu(step: Step) -> Node | None:
    x = step.inputs[0]
    _, _, num_groups, weight, bias, eps, per_frame, activation, given = step.args
    if not _has_frames(x):
        return _by_sample(step)
    arguments = ["group_norm_silu", None, num_groups, weight, bias, eps, per_frame, activation, None]
    if per_frame:  # statistics that the convolution before it returned are found again, chunk by chunk
        return _call_on_chunks(step, (x,), arguments, [1])
    return _normalised(step, x, statistics(x) if given is None else step.inputs[-1], arguments)


def _normalised(step: Step, x: Node, found: Node, arguments: list[Any]) -> Node:
    return _call_on_chunks(step, (x, found), arguments, [1, 8])


def _call_on_chunks(step: Step, inputs: tuple[Node, ...], arguments: list[Any], slots: list[int]) -> Node:
    return step.node(programs.each_chunk(_flat_call(call, arguments, slots)), inputs[0].axis, inputs=inputs)


def _flat_call(function: Callable[..., Any], arguments: list[Any], slots: list[int]) -> Call:
    """function(*arguments), with results of nodes at `slots`."""
    structure = pytree.tree_structure(((0,) * len(arguments), {}))
    return Call(function, arguments, structure, slots)


def _has_frames(node: Node) -> bool:
    """Whether the node is a stream (B, C, T, H, W) along T."""
    return node.axis is not None and node.axis.dim == 2 and len(node.shape) == 5


def _rms_norm_silu(step: Step) -> Node | None:
    axis = step.common_axis()
    return None if axis is None or axis.dim == 1 or len(step.inputs) > 1 else step.each_chunk(axis)


def _over_last_axis(step: Step) -> Node | None:
    axis = step.common_axis()
    is_apart = axis is not None and len(step.inputs) == 1 and axis.dim < len(step.inputs[0].shape) - 1
    return step.each_chunk(axis) if is_apart else None


def _by_sample(step: Step) -> Node | list[Node] | None:
    """Operators that never mix the samples of axis 0, where time has merged with the batch in all of their inputs."""
    axis = step.common_axis()
    if axis is None or axis.dim != 0 or any(node.axis is None for node in step.inputs):
        return None
    if isinstance(step.results, Tensor):
        return step.each_chunk(axis)
    return None if len(step.results) > 1 else [step.each_chunk(axis, lambda *args: call(*args)[0])]


# places in the arguments of a recorded causal_conv3d, behind its name
_X, _WEIGHT, _STRIDE, _DILATION, _TIME_PAD, _STATE, _NORM = 1, 2, 4, 5, 9, 11, 12
_PER_FRAME, _STATISTICS, _RESIDUAL, _RETURN_STATE, _RETURN_STATISTICS = 17, 18, 20, 21, 22


def _causal_conv3d(step: Step) -> Node | list[Node] | None:
    arguments = list(step.args)
    clips = {index: argument.node for index, argument in enumerate(arguments) if hasattr(argument, "node")}
    if _X not in clips or not (_has_frames(clips[_X]) or _becomes_stream(arguments)):
        return _by_sample(step)
    if clips.keys() - {_X, _RESIDUAL, _STATISTICS, _STATE}:
        return None
    inputs = {_X: as_stream(clips[_X], 2)}
    if arguments[_RESIDUAL] is not None:
        residual = clips.get(_RESIDUAL)
        inputs[_RESIDUAL] = constant_node(arguments[_RESIDUAL], 2) if residual is None else as_stream(residual, 2)
    needs_statistics = inputs[_X].num_frames > 1 or _STATISTICS in clips
    if arguments[_NORM] == "group" and not arguments[_PER_FRAME] and needs_statistics:
        inputs[_STATISTICS] = clips.get(_STATISTICS) or statistics(inputs[_X])
    if arguments[_STATE] is not None:
        inputs[_STATE] = clips.get(_STATE) or constant_node(arguments[_STATE], 2)
    returns_statistics = arguments[_RETURN_STATISTICS]
    out = _convolution(step.name, arguments, inputs, step.result)
    if out is None:
        return None
    # a module may keep its state for a next call, which does not come: the node runs only if somebody reads it
    states = [_state(step, out)] if arguments[_RETURN_STATE] else []
    return [out, *states, *([statistics(out)] if returns_statistics else [])]


def _becomes_stream(arguments: Sequence[Any]) -> bool:
    """Whether a causal convolution reads frames from a piece, or one frame between two states."""
    node = getattr(arguments[_X], "node", None)
    if node is None or node.axis is not None or len(node.shape) != 5:
        return False
    return node.shape[2] > 1 or arguments[_STATE] is not None or arguments[_RETURN_STATE]


def _state(step: Step, out: Node) -> Node:
    """The state that the convolution `out` ends with."""
    kept = step.results[1]
    if kept.shape[2] != _span(step.args) - step.args[_STRIDE][0]:  # the last frames filled no window
        return step.whole()[1]
    return Node("state", programs.pass_on(), (out,), tuple(kept.shape), kept.dtype, None, (True,), is_state=True)


def _span(arguments: Sequence[Any]) -> int:
    """How many frames each window of a convolution spans."""
    return arguments[_DILATION][0] * (arguments[_WEIGHT].shape[2] - 1) + 1


def _convolution(name: str, arguments: list[Any], inputs: dict[int, Node], result: Tensor) -> Node | None:
    """A causal convolution that carries its state; `inputs` by their places in `arguments`, x first, the state last."""
    span = _span(arguments)
    stride, num_front = arguments[_STRIDE][0], arguments[_TIME_PAD]
    if stride > span:
        return None
    is_pointwise = span == stride == 1 and num_front == 0 and not arguments[_RETURN_STATE] and _STATE not in inputs
    read = (_X, _STATE, _RESIDUAL, _STATISTICS)
    arguments = [None if place in read else value for place, value in enumerate(arguments)]
    arguments[_RETURN_STATE], arguments[_RETURN_STATISTICS] = not is_pointwise, False
    if is_pointwise:
        program = programs.each_chunk(_flat_call(lambda *args: call(*args)[0], arguments, [*inputs]))
    else:
        places = [_STATE, *(place for place in inputs if place != _STATE)]
        program = programs.convolved(_flat_call(call, arguments, places), span, stride, num_front, _STATE in inputs)
    axis = TimeAxis(2, result.shape[2])
    return stream(name, program, tuple(inputs.values()), tuple(result.shape), result.dtype, axis)


def _upsample_conv3d(step: Step) -> Node | None:
    name, _, weight, bias, mode, time_padding, space_padding, time_pad, space_pad, mix_factor = step.args
    (x,) = step.inputs
    if not _has_frames(x):
        return _by_sample(step)
    axis = TimeAxis(2, step.result.shape[2])
    if mode == "nearest_space":
        if mix_factor is not None and weight.shape[2] > 1:
            return None

        def run(chunk: Tensor, weight: Tensor, bias: Any, mix_factor: Any, in_front: int, behind: int) -> Tensor:
            padding = time_padding if in_front else "none"
            return call(name, chunk, weight, bias, mode, padding, space_padding, in_front, space_pad, mix_factor)

        program = programs.windows(run, [weight, bias, mix_factor], weight.shape[2], 1, time_pad, 0)
        return step.node(program, axis)

    shape = (*x.shape[:2], 2 * x.shape[2] - 1, *x.shape[3:])
    upsampled = stream(
        "upsample_time", programs.twice_the_frames(first_alone=True), (x,), shape, x.dtype, TimeAxis(2, shape[2])
    )
    arguments = [
        "causal_conv3d", None, weight, bias, [1, 1, 1], [1, 1, 1], 1, time_padding, space_padding, time_pad, space_pad,
        None, "", None, None, 1, 1e-6, False, None, "", None, False, False,
    ]  # fmt: skip
    out = _convolution(name, arguments, {_X: upsampled}, step.result)
    if mix_factor is None or out is None:
        return out

    def mix(upsampled: Tensor, out: Tensor, mix_factor: Tensor) -> Tensor:
        share = torch.sigmoid(mix_factor)
        return share * upsampled + (1 - share) * out

    mixed = programs.each_chunk(_flat_call(mix, [None, None, mix_factor], [0, 1]))
    return stream("mix", mixed, (upsampled, out), tuple(step.result.shape), step.result.dtype, axis)


_RULES: dict[str, Callable[[Step], Node | list[Node] | None]] = {
    "causal_conv3d": _causal_conv3d,
    "upsample_conv3d": _upsample_conv3d,
    "group_norm_silu": _group_norm_silu,
    "rms_norm_silu": _rms_norm_silu,
    "rms_norm": _over_last_axis,
    **dict.fromkeys(("attention", "qk_norm_attention", "qk_norm_rope", "modulate"), _by_sample),
}

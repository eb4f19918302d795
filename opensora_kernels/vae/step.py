"""One operator as it is recorded: what a rule turns into nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import programs
from .graph import Call, Node, TimeAxis, call_of


@dataclass(frozen=True)
class Step:
    """`function(*args, **kwargs)`, which reads `inputs`; `results` are what it returns, without data."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Node, ...]
    call: Call
    results: Any

    @property
    def result(self) -> Tensor:
        return self.results if isinstance(self.results, Tensor) else self.results[0]

    @property
    def is_of_pieces(self) -> bool:
        return all(node.axis is None for node in self.inputs)

    def common_axis(self) -> TimeAxis | None:
        """The axis of time that all streams among the inputs have, None if they differ."""
        axes = {node.axis for node in self.inputs if node.axis is not None}
        return axes.pop() if len(axes) == 1 else None

    def node(self, program: programs.Program, axis: TimeAxis | None, *, inputs: tuple[Node, ...] | None = None) -> Node:
        """A stream (or, where only one frame is left, a piece) of the step's first result."""
        inputs = self.inputs if inputs is None else inputs
        return stream(self.name, program, inputs, tuple(self.result.shape), self.result.dtype, axis)

    def each_chunk(
        self,
        axis: TimeAxis,
        function: Callable[..., Any] | None = None,
        *,
        multiple: int = 1,
        inputs: tuple[Node, ...] | None = None,
    ) -> Node:
        """The step on every chunk by itself, by `function` in place of its own."""
        call = self.call if function is None else Call(function, self.call.leaves, self.call.structure, self.call.slots)
        return self.node(programs.each_chunk(call, multiple), axis, inputs=inputs)

    def whole(self, remark: str = "") -> Node | list[Node]:
        """The step on whole clips; a remark if they had been streams until here."""
        if self.is_of_pieces:
            remark = ""
        elif not remark:
            remark = f"{self.name} {tuple(self.result.shape)} looks across frames: it runs on the whole clip"
        reads_all = (True,) * len(self.inputs)
        program = programs.piece(self.call)
        if isinstance(self.results, Tensor):
            # the result may go on in chunks where it has an axis like the clip's
            axis = self.common_axis()
            shape = tuple(self.results.shape)
            is_like = axis is not None and len(shape) == len(self.inputs[0].shape)
            kept = axis if is_like and shape[axis.dim] == axis.frames * axis.outer and axis.outer == 1 else None
            return Node(self.name, program, self.inputs, shape, self.results.dtype, kept, reads_all, remark)
        all_results = Node(self.name, program, self.inputs, (), self.result.dtype, None, reads_all, remark)
        return [_pick(all_results, index, meta) for index, meta in enumerate(self.results)]


def stream(
    name: str,
    program: programs.Program,
    inputs: tuple[Node, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axis: TimeAxis | None,
) -> Node:
    """A node whose pieces are read first; one frame, or none, is a piece."""
    if axis is not None and axis.frames <= 1:
        axis = None
    reads_all = tuple(node.axis is None for node in inputs)
    return Node(name, program, inputs, shape, dtype, axis, reads_all)


def as_stream(node: Node, dim: int) -> Node:
    """A piece, or a stream along another axis, read along axis `dim`."""
    axis = TimeAxis(dim, node.shape[dim])
    if node.axis == axis:
        return node
    return Node(
        node.name, programs.pass_on(), (node,), node.shape, node.dtype, axis if axis.frames > 1 else None, (True,)
    )


def constant_node(tensor: Tensor, dim: int) -> Node:
    """A tensor of the model, read along axis `dim` with the frames of a stream."""
    node = Node("constant", programs.constant(tensor), (), tuple(tensor.shape), tensor.dtype)
    return as_stream(node, dim)


def _pick(results: Node, index: int, meta: Any) -> Node:
    call = call_of(lambda values: values[index])
    shape = tuple(meta.shape) if isinstance(meta, Tensor) else ()
    return Node(f"{results.name}[{index}]", programs.piece(call), (results,), shape, results.dtype, None, (True,))

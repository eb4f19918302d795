"""What a recorded model is made of: nodes that turn streams of frames into streams of frames.

A *stream* is a tensor that arrives in chunks along its time axis; a *piece* is a tensor that arrives at once, because
it has one frame or none of its axes is time. A node's program is a generator: it asks for frames, and yields chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class TimeAxis:
    """Axis `dim` of a tensor holds `outer` times `frames` entries: outer > 1 in "(b t) c h w", t within b."""

    dim: int
    frames: int
    outer: int = 1


@dataclass(eq=False)
class Node:
    """One step of the model: its program, what it reads, and what it makes of the whole clip.

    program(readers, run) yields chunks of the result; a result without `axis` is one piece. `reads_all[i]`: nothing
    comes out before all of inputs[i] went in. `remark`: why frames must wait for each other here, for the plan.
    `skips`: frames of its one input that it never reads, from the first on. `in_turn`: its inputs are read one after
    the other. `is_state`: it takes the state that the program of its one input ends with, in place of its frames.
    """

    name: str
    program: Callable[..., Iterator[Any]]
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: TimeAxis | None = None
    reads_all: tuple[bool, ...] = ()
    remark: str = ""
    skips: int = 0
    in_turn: bool = False
    is_state: bool = False

    @property
    def num_frames(self) -> int:
        return 1 if self.axis is None else self.axis.frames


@dataclass(frozen=True, eq=False)
class Call:
    """A function and its arguments, in which `slots` are the places of the results of a node's inputs, in order."""

    function: Callable[..., Any]
    leaves: list[Any]
    structure: pytree.TreeSpec
    slots: list[int] = field(default_factory=list)

    def __call__(self, values: Sequence[Any], constant: Callable[[Tensor], Tensor]) -> Any:
        leaves = [constant(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for slot, value in zip(self.slots, values, strict=True):
            leaves[slot] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)


def call_of(function: Callable[[Any], Any]) -> Call:
    """A function of one result."""
    leaves, structure = pytree.tree_flatten(((None,), {}))
    return Call(function, leaves, structure, [0])


def nodes_of(output: Node) -> list[Node]:
    """`output` and all that it is made from, inputs before their readers."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output, False)]
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((read, False) for read in reversed(node.inputs))
    return order


def is_barrier(node: Node, index: int) -> bool:
    """Whether `node` holds back until the many frames of its input number `index` are there."""
    return node.reads_all[index] and node.inputs[index].num_frames > 1


def late_reads(nodes: Sequence[Node]) -> set[tuple[Node, int]]:
    """(reader, index of its input) for every read that comes a whole clip after another read of the same stream.

    The level of a node is the number of barriers before it. A node is run as late as its readers allow; a barrier reads
    its input one level before its own. Before levels count turns: those of the parts of which the result is joined.
    """
    level: dict[Node, int] = {}
    for node in nodes:
        below = [level[read] + is_barrier(node, index) for index, read in enumerate(node.inputs)]
        level[node] = max(below, default=0)
    joins = set(joins_of(nodes[-1]))
    needed: dict[Node, tuple[tuple[int, ...], int]] = {nodes[-1]: ((), level[nodes[-1]])}
    reads: dict[Node, list[tuple[tuple[tuple[int, ...], int], Node, int]]] = {}
    for node in reversed(nodes):
        if node in reads:
            needed[node] = min(when for when, _, _ in reads[node])
        turn, needed_level = needed[node]
        for index, read in enumerate(node.inputs):
            when = (*turn, index) if node in joins else turn
            at = level[node] - 1 if is_barrier(node, index) else needed_level
            reads.setdefault(read, []).append(((when, at), node, index))
    return {(node, index) for read, found in reads.items() for when, node, index in found if when > needed[read]}


def joins_of(output: Node) -> list[Node]:
    """The nodes that join the result of parts, as a model does that steps through its clip by itself."""
    node = output
    while not node.in_turn and len(node.inputs) == 1:
        node = node.inputs[0]
    found, stack = [], [node]
    while stack:
        node = stack.pop()
        if node.in_turn:
            found.append(node)
            stack.extend(node.inputs)
    return found


def longest_part(output: Node) -> Fraction:
    """The share of all frames that the longest of the parts has of which the result is joined; 1 if it is not."""
    joins = joins_of(output)
    if not joins:
        return Fraction(1)
    parts = [read.num_frames for node in joins for read in node.inputs if read not in joins]
    return Fraction(max(parts), sum(parts))


def num_frames_in(chunk: Any, axis: TimeAxis | None) -> int:
    return 1 if axis is None else chunk.shape[axis.dim] // axis.outer


def narrow(chunk: Tensor, axis: TimeAxis, start: int, length: int) -> Tensor:
    """`length` frames of a chunk from `start` on."""
    if axis.outer == 1:
        return chunk.narrow(axis.dim, start, length)
    split = chunk.unflatten(axis.dim, (axis.outer, -1)).narrow(axis.dim + 1, start, length)
    return split.flatten(axis.dim, axis.dim + 1)


def join(chunks: list[Tensor], axis: TimeAxis) -> Tensor:
    """Chunks one after the other, the list emptied."""
    if len(chunks) == 1:
        return chunks.pop()
    if axis.outer == 1:
        joined = torch.cat(chunks, axis.dim)
    else:
        split = [chunk.unflatten(axis.dim, (axis.outer, -1)) for chunk in chunks]
        joined = torch.cat(split, axis.dim + 1).flatten(axis.dim, axis.dim + 1)
    chunks.clear()
    return joined

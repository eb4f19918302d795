"""Recording a model: its forward runs once on a `Clip`, a tensor that has a shape but no data.

What the model does to it becomes a graph of nodes. PyTorch's operators are recorded where they are dispatched, so that
every spelling of an operator arrives as one of a few; ours are recorded whole, in `registration.call`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels.registration import call

from . import operators, programs, rules
from .graph import Call, Node, TimeAxis
from .inference import on_paper
from .modules import is_on_meta
from .step import Step


class CannotRecord(Exception):
    """What `record` raises as TypeError: PyTorch takes one out of `a * b` for types that do not multiply."""


@dataclass
class Memory:
    """What the views of one clip share: its size, and the number of times that it was changed in place."""

    num_bytes: int
    version: int = 0


class Clip(Tensor):
    """The result of a node, as the model sees it: shape, dtype, strides and device, but no data."""

    node: Node
    meta: Tensor
    memory: Memory
    version: int  # of `memory` when the node was recorded

    @staticmethod
    def __new__(cls: type[Clip], node: Node, meta: Tensor, device: torch.device, memory: Memory) -> Clip:
        clip = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, requires_grad=False
        )
        clip.node, clip.meta, clip.memory, clip.version = node, meta, memory, memory.version
        return clip

    def __repr__(self) -> str:
        return f"Clip({self.node.name}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is call or func in rules.FUNCTIONS:
                return _record(rules.FUNCTIONS.get(func, func), args, kwargs or {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _record(func, args, kwargs or {})


def record(
    model: Callable[[Tensor], Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Node:
    """The node that makes model(x) for a clip x (B, C, T, H, W); raises what the model raises for such a clip.

    TypeError if it does not return one tensor (B, C, T, H, W) made from x, looks at values, or writes into parts of a
    tensor.
    """
    place = torch.device("meta" if is_on_meta(model) else device)
    try:
        with on_paper(torch.device(device)):
            result = model(clip_of(shape, dtype, place))
    except CannotRecord as error:
        raise TypeError(str(error)) from error
    result = getattr(result, "sample", result)  # diffusers wraps what a decoder returns
    if isinstance(result, tuple) and len(result) == 1:
        (result,) = result
    if not isinstance(result, Clip):
        raise TypeError(f"the model must return one tensor made from its argument, got {type(result).__name__}")
    node = result.node
    if len(node.shape) != 5 or (node.axis is not None and (node.axis.dim, node.axis.outer) != (2, 1)):
        raise TypeError(f"the model must return frames along axis 2 of (B, C, T, H, W), got shape {node.shape}")
    return node


def clip_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Clip:
    """The clip that a model is given."""
    axis = TimeAxis(2, shape[2]) if shape[2] > 1 else None
    node = Node("clip", programs.source(axis), (), tuple(shape), dtype, axis)
    return Clip(node, torch.empty(shape, dtype=dtype, device="meta"), device, Memory(math.prod(shape) * dtype.itemsize))


def _record(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Clip)]
    clips = [leaves[index] for index in slots]
    if any(clip.version != clip.memory.version for clip in clips):
        raise CannotRecord(
            f"{_name_of(func)} reads a view of a clip that was changed in place, which cannot be recorded"
        )
    meta_args, meta_kwargs = pytree.tree_unflatten([_meta_of(leaf) for leaf in leaves], structure)
    if func in _READING:
        raise CannotRecord(f"the model looks at the values of frames ({_name_of(func)}), which cannot be recorded")
    if func in _OF_ONE_DTYPE and len({each.dtype for each in meta_args[:2]}) > 1:  # not checked without data
        raise RuntimeError(f"{_name_of(func)} takes frames and weights of one dtype, got {_dtypes(meta_args[:2])}")
    try:
        results = func(*meta_args, **meta_kwargs)
    except NotImplementedError as error:
        raise CannotRecord(f"{_name_of(func)} on frames cannot be recorded: {error}") from error
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(results)):
        raise CannotRecord(f"{_name_of(func)} on frames cannot be recorded: its result is no tensor")

    target = _written(func, args)
    memory_of = {clip.meta.untyped_storage()._cdata: clip.memory for clip in clips}
    if func is call:  # a result in the memory of a clip is alone there, and chunks have memory of their own
        kwargs, memory_of = {}, {}
        leaves, structure = pytree.tree_flatten((args, kwargs))
    function = _functional(func) if target is not None else func
    nodes = tuple(clip.node for clip in clips)
    leaves = [None if isinstance(leaf, Clip) else leaf for leaf in leaves]  # the graph keeps no clip alive
    step = Step(_name_of(func), function, args, kwargs, nodes, Call(function, leaves, structure, slots), results)
    made = operators.nodes_for(step) if func is call else rules.nodes_for(step)
    if target is not None:
        target.memory.version += 1
        target.node, target.version = made, target.memory.version
        return target
    device = clips[0].device
    if isinstance(results, Tensor):
        return _shown(results, made, device, memory_of)
    nodes_made = iter(made if isinstance(made, list) else [made])
    # results that a rule made no node for are spare ones, like the statistics of native_group_norm
    shown = [_shown(meta, next(nodes_made, None), device, memory_of) for meta in results]
    return type(results)(shown) if isinstance(results, (list, tuple)) else shown


def _shown(meta: Any, node: Node | None, device: torch.device, memory_of: dict[int, Memory]) -> Any:
    if node is None:
        return meta
    storage = meta.untyped_storage()
    return Clip(node, meta, device, memory_of.get(storage._cdata) or Memory(min(meta.nbytes, storage.nbytes())))


_OF_ONE_DTYPE = (torch.ops.aten.convolution.default, F.linear)
_READING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


def _meta_of(leaf: Any) -> Any:
    if isinstance(leaf, Clip):
        return leaf.meta
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return on_meta(leaf) if isinstance(leaf, Tensor) else leaf


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return " and ".join(str(tensor.dtype) for tensor in tensors)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor like `tensor` without data."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _written(func: Any, args: tuple[Any, ...]) -> Clip | None:
    """The clip that an in-place operator changes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    if not isinstance(args[0], Clip) or schema.name[-1] != "_":
        raise CannotRecord(f"{_name_of(func)} writes into a tensor that is there already, which cannot be recorded")
    target = args[0]
    if target.meta.nbytes < target.memory.num_bytes:
        raise CannotRecord(
            f"{_name_of(func)} writes into part of a clip, of shape {tuple(target.shape)}, which cannot be recorded: "
            "use torch.cat or an out-of-place form"
        )
    return target


def _functional(func: Any) -> Any:
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::")[:-1], None)
    overload = func._overloadname
    if packet is None or overload not in packet.overloads():
        raise CannotRecord(f"{_name_of(func)} writes into a clip and cannot be recorded: use its out-of-place form")
    return getattr(packet, overload)


def _name_of(func: Any) -> str:
    if hasattr(func, "_schema"):
        return func._schema.name.split("::")[-1]
    return getattr(func, "__name__", str(func))

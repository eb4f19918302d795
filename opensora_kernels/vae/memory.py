"""Memory on paper: a run on meta tensors, with the bytes that would be alive at each moment, and its cost.

Every operator that PyTorch dispatches is seen, with what our operators' plain PyTorch allocates inside. What a library
allocates out of sight is added from measurements, see `_hidden_bytes`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_kernels.cpu_convolution import unfolds

from .clip import Clip, on_meta
from .streams import Run

aten = torch.ops.aten

# For comparing plans with each other, not for seconds: a byte moved is the unit.
_FLOP_PER_BYTE = {torch.float32: 20, torch.float64: 10}  # what a machine computes while it moves a byte
_FLOP_PER_BYTE_OF_HALF = 100
_BYTES_PER_OPERATOR = 200_000  # 20 us of Python and dispatch at 10 GB/s


@dataclass(frozen=True)
class Prediction:
    """Most bytes alive at once beyond weights and clip, bytes written to the spill, and cost in bytes moved."""

    peak_bytes: int
    spill_bytes: int
    cost: float


class Ledger(TorchDispatchMode):
    """Counts what operators on meta tensors would allocate. Tensors from before it was entered are not counted.

    A host gives a page when it is first written to: what `empty` makes there counts as far as it was filled.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.cost = 0.0
        self._device = device
        self._counted: dict[int, int] = {}  # bytes of each storage
        self._unfilled: dict[int, int] = {}  # and what of it will count when it is written to
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self._is_paused:
            return func(*args, **(kwargs or {}))
        if any(issubclass(kind, Clip) for kind in types):
            return NotImplemented
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._meet(tensor, is_new=False)
        results = func(*args, **(kwargs or {}))
        outputs = _tensors(results)
        is_filled = self._device.type != "cpu" or func._overloadpacket not in _EMPTY
        is_view = all(not self._meet(tensor, is_new=True, is_filled=is_filled) for tensor in outputs)
        for tensor in _written_by(func, args, kwargs or {}):
            self._fill(tensor)
        self.peak = max(self.peak, self.live + _hidden_bytes(func, args, outputs, self._device))
        if not is_view or func._schema.is_mutable:
            moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
            self.cost += max(moved, _flop(func, args, outputs)) + _BYTES_PER_OPERATOR
        return results

    def constant(self, tensor: Tensor) -> Tensor:
        """A weight on meta, which is not counted."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._constants:
            with self.paused():
                self._constants[id(tensor)] = (tensor, on_meta(tensor))
        return self._constants[id(tensor)][1]

    def watch(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, int, float]:
        """function(*arguments), the most memory that it took beyond what was in use, and its cost."""
        before, peak, cost = self.live, self.peak, self.cost
        self.peak = before
        result = function(*arguments)
        extra, self.peak = self.peak - before, max(peak, self.peak)
        return result, extra, self.cost - cost

    def repeat(self, extra: int, cost: float, descriptions: Any) -> Any:
        """The result of something watched before."""
        self.peak, self.cost = max(self.peak, self.live + extra), self.cost + cost
        with self.paused():
            result = pytree.tree_map_only(_Description, _Description.empty, descriptions)
        for tensor in _tensors(result):
            self._meet(tensor, is_new=True)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _meet(self, tensor: Tensor, is_new: bool, is_filled: bool = True) -> bool:
        """Whether memory of the tensor is seen for the first time; it counts from now on if it `is_new`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._counted:
            return False
        self._counted[key] = storage.nbytes() if is_new and is_filled else 0
        self._unfilled[key] = storage.nbytes() if is_new and not is_filled else 0
        self.live += self._counted[key]
        weakref.finalize(storage, self._forget, key)
        return True

    def _fill(self, tensor: Tensor) -> None:
        """Count what of an `empty` tensor is written to. A place that is written twice counts twice, up to the size."""
        key = tensor.untyped_storage()._cdata
        num_bytes = min(tensor.nbytes, self._unfilled[key])
        self._unfilled[key] -= num_bytes
        self._counted[key] += num_bytes
        self.live += num_bytes

    def _forget(self, key: int) -> None:
        del self._unfilled[key]
        self.live -= self._counted.pop(key)


@dataclass(frozen=True)
class RunOnPaper(Run):
    """A run on meta tensors that remembers what each step allocates for chunks of one shape: a clip has many."""

    ledger: Ledger
    seen: dict[Any, tuple[int, float, Any]]

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        key = (function, structure, tuple(_description(leaf) for leaf in leaves))
        if key in self.seen:
            return self.ledger.repeat(*self.seen[key])
        result, extra, cost = self.ledger.watch(function, arguments)
        made = _tensors(result)
        owners = {tensor.untyped_storage()._cdata for tensor in _tensors(leaves)}
        if not any(tensor.untyped_storage()._cdata in owners for tensor in made):  # a view is made again each time
            self.seen[key] = (extra, cost, pytree.tree_map_only(Tensor, _description, result))
        return result


def _description(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return _Description(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.untyped_storage().nbytes())


@dataclass(frozen=True)
class _Description:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int

    def empty(self) -> Tensor:
        storage = torch.UntypedStorage(self.num_bytes, device="meta")
        return torch.empty(0, dtype=self.dtype, device="meta").set_(storage, 0, self.shape, self.stride)


_EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def _written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator writes to."""
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[position] if position < len(args) else kwargs.get(argument.name))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _flop(func: Any, args: tuple[Any, ...], outputs: list[Tensor]) -> float:
    """Floating-point operations of convolutions and matrix products in units of bytes moved in the same time."""
    packet = func._overloadpacket
    if packet is aten.convolution:
        num_products = args[1].numel() // args[1].shape[0]
    elif packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        num_products = args[-2].shape[-1]
    else:
        return 0.0
    per_byte = _FLOP_PER_BYTE.get(outputs[0].dtype, _FLOP_PER_BYTE_OF_HALF)
    return 2 * outputs[0].numel() * num_products / per_byte


def _hidden_bytes(func: Any, args: tuple[Any, ...], outputs: list[Tensor], device: torch.device) -> int:
    """What a library allocates while it computes, beyond its results."""
    if device.type != "cpu":
        return 0
    if func is aten.convolution.default:
        return _of_convolution(args[0], args[1], outputs[0])
    packet = func._overloadpacket
    if packet in _COPIES_OF_STRIDED and not args[0].is_contiguous():
        return args[0].nbytes
    if torch.Tag.pointwise in func.tags and packet not in _CONVERSIONS:
        return _of_mixed_dtypes([x for x in _tensors(args) if x.dim()], outputs[0])
    if packet in _COPIES_OF_HALF and args[0].itemsize < 4:
        return args[0].numel() * 4
    if packet is aten.linalg_vector_norm and args[0].dtype != outputs[0].dtype:
        return args[0].numel() * outputs[0].itemsize
    return 0


_COPIES_OF_STRIDED = {aten.native_group_norm, aten.native_layer_norm, aten.upsample_nearest2d, aten.upsample_nearest3d}
_COPIES_OF_HALF = {aten.mean}  # summed as a copy in fp32
_CONVERSIONS = {aten._to_copy, aten.copy_, aten.clone}


def _of_mixed_dtypes(operands: list[Tensor], out: Tensor) -> int:
    """Operands, and a result given as `out=` or changed in place, are converted to and from the widest dtype whole."""
    common = out.dtype
    for x in operands:
        common = torch.promote_types(common, x.dtype)
    converted = [x for x in (*operands, out) if x.dtype not in (common, torch.bool)]
    return sum(x.numel() for x in converted) * common.itemsize


def _of_convolution(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Workspaces of PyTorch's and oneDNN's kernels, as measured by peak RSS (torch 2.13, a Xeon with AMX, 2026-11-21).

    oneDNN in fp32: x and the result in blocks of 16 channels, then the result reordered while its blocks live; plainly
    for 1x1x1. In bf16: three times the result. PyTorch itself gives small fp32 clips to a kernel of its own, which
    unfolds every window. An x that is not contiguous is copied first.
    """
    copy = 0 if x.is_contiguous() else x.nbytes
    kernel = weight.shape[2:]
    if x.dtype is not torch.float32:
        return copy + max(x.nbytes + 2 * weight.nbytes, 2 * out.nbytes)
    if unfolds(x, weight):
        return copy + x.shape[1] * prod(kernel) * (out.numel() // prod(out.shape[:2])) * x.itemsize
    if max(kernel) == 1:
        return copy
    blocked_x, blocked_out = _blocked(x), _blocked(out)
    return copy + max(blocked_x + 2 * weight.nbytes + blocked_out, blocked_out + out.nbytes) - out.nbytes


def _blocked(tensor: Tensor) -> int:
    channels = tensor.shape[1]
    return tensor.nbytes // channels * (-(-channels // 16) * 16)

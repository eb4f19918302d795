"""Launches of a computation and the bytes they move, counted on meta tensors: no device is needed.

A launch reads every tensor that it is given once and writes every tensor that it makes once, which is the least it can
do. What PyTorch dispatches is one launch for each operator; an operator of ours is the launches of its Triton kernels
and whatever else its host code does. Views, allocations and questions about shapes are free, as are axes of stride 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import tensors
from opensora_kernels import _triton, backends

_ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_FREE = {*_ALLOCATIONS, "_unsafe_view"}
# Products with a weight. Batched ones are of two activations: attention that was written out.
_GEMMS = {"mm", "addmm", "_addmm_activation", "convolution"}
_GEMM_KERNELS = {"convolution"}
_BLIND_WRITES = {"copy_", "fill_", "zero_"}  # into a tensor whose old values nobody reads


@dataclass(frozen=True)
class Launch:
    name: str
    num_bytes: int
    is_gemm: bool = False


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """The launches of what runs meanwhile, without gradients; the list is complete at the end."""
    launches: list[Launch] = []
    with torch.no_grad(), _Operators(launches.append), _LibraryAttention(launches.append):
        yield launches


class _Operators(TorchDispatchMode):
    """Notes every operator that reaches a device, and in place of ours their kernels."""

    def __init__(self, note: Callable[[Launch], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, operator: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operator._schema.name.split("::")[1]
        if operator.namespace == "opensora_kernels":
            return self._run_kernels(name, args)
        if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
            with self:  # contiguous, reshape, to: a view or a copy, which only their parts tell
                return operator.decompose(*args, **(kwargs or {}))
        result = operator(*args, **(kwargs or {}))
        if not (name in _FREE or _is_view(operator)) and tensors(result):
            is_blind = name in _BLIND_WRITES
            num_bytes = bytes_of(tensors(args[is_blind:], kwargs)) + bytes_of(tensors(result))
            self.note(Launch(name, num_bytes, is_gemm=name in _GEMMS))
        return result

    def _run_kernels(self, op: str, inputs: tuple[Any, ...]) -> Any:
        """Meta tensors: `launch` tells of a kernel and starts nothing."""
        *values, backend = inputs
        with self, _triton.recorded_launches(self._note_kernel):
            return backends.implementation(op, backend).forward(*values)

    def _note_kernel(self, kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel").removesuffix("_forward")
        self.note(Launch(name, bytes_of(tensors(arguments, options)), is_gemm=name in _GEMM_KERNELS))


class _LibraryAttention(TorchFunctionMode):
    """PyTorch's fused attention is one launch, whatever it would be made of where there is no device."""

    def __init__(self, note: Callable[[Launch], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q_BNLD = args[0]
        out_BNLD = torch.empty_like(q_BNLD.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        self.note(Launch("scaled_dot_product_attention", bytes_of(tensors(args, kwargs)) + bytes_of([out_BNLD])))
        return out_BNLD


def bytes_of(given: Iterable[Tensor]) -> int:
    """Each tensor once, however often it is given."""
    sizes = {}
    for tensor in given:
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        held = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        sizes[key] = prod(held) * tensor.element_size()
    return sum(sizes.values())


def _is_view(operator: OpOverload) -> bool:
    aliases = [result.alias_info for result in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)

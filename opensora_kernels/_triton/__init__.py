"""The one door to Triton: whether its kernels can run, an operator's kernels as a backend, and launching a kernel.

Importing the package never imports Triton; `ops/<op>/triton_kernel.py`, which does, is imported at the first call.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from opensora_kernels import backends

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_installed() -> str | None:
    """None where Triton can be imported, else a sentence."""
    return None if _is_installed else "triton is not installed"


def is_interpreted() -> bool:
    """True where TRITON_INTERPRET=1 makes Triton run kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """None where Triton kernels can run on tensors of `device`, else a sentence."""
    if device.type == "meta" and backends.is_cuda(device):
        return None  # on paper
    if (reason := why_not_installed()) is not None:
        return reason
    if device.type == "cuda" or is_interpreted():
        return None
    return f"Triton needs a CUDA tensor, got one on {device.type} (TRITON_INTERPRET=1 runs kernels on the CPU)"


def register(op: str, **options: Any) -> None:
    """Make `opensora_kernels.ops.<op>.triton_kernel` the Triton backend of `op`: see `backends.register_module`."""
    backends.register_module(op, "triton", "triton_kernel", _why_not_these, **options)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on `grid` programs; constants and num_warps, num_stages are `options`. Does nothing for no programs.

    Traced tensors get a node that torch.compile's code generator can see into; meta tensors get nothing.
    """
    if 0 in grid:
        return
    if _on_launch is not None:
        _on_launch(kernel, grid, arguments, options)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if any(isinstance(tensor, FunctionalTensor) for tensor in tensors):
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
    elif tensors[0].is_meta:
        return
    elif tensors[0].is_cuda:
        with torch.cuda.device(tensors[0].device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def recorded_launches(on_launch: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]) -> Iterator:
    """Tell `on_launch` of every launch meanwhile: kernel, grid, arguments, options."""
    global _on_launch
    previous, _on_launch = _on_launch, on_launch
    try:
        yield
    finally:
        _on_launch = previous


def rows(x: Tensor) -> Tensor:
    """x (*, C) as (R, C): a view where the leading axes allow one, else a contiguous copy."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


def planes(x: Tensor, memory_format: torch.memory_format, *, per_frame: bool = False) -> Tensor:
    """x (B, C, T, H, W) as (B, C, T, P), P positions of a frame, or, unless `per_frame`, (B, C, 1, T * H * W).

    A view where the positions lie evenly spaced and, in `memory_format`, either they or the channels side by side, as
    in a run of frames of a longer clip; else of a copy in that format.
    """
    first = 3 if per_frame else 2
    inner = [axis for axis in range(first, 5) if x.shape[axis] != 1]
    is_even = all(x.stride(left) == x.stride(right) * x.shape[right] for left, right in pairwise(inner))
    last = 1 if memory_format is torch.channels_last_3d else inner[-1] if inner else None
    if not is_even or (last is not None and x.stride(last) != 1):
        x = x.contiguous(memory_format=memory_format)
    return x.view(*x.shape[:2], x.shape[2] if per_frame else 1, math.prod(x.shape[first:]))


def power_of_two(number: int, most: int) -> int:
    """The first one not below `number`, or `most`. By comparisons: they bound a traced size, and do not fix it."""
    power = 1
    while power < number and power < most:
        power *= 2
    return power


def dense(x: Tensor | None) -> Tensor | None:
    """x with its elements side by side, for small tensors that a kernel reads without strides."""
    return None if x is None else x.contiguous()


def _why_not_these(values: tuple[Any, ...]) -> str | None:
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    if (reason := why_not(tensors[0].device)) is not None:
        return reason
    is_wrong_in_bf16 = not interpreter_knows_bf16 and is_interpreted()  # the environment is read once a call
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"Triton kernels compute in fp32, got a tensor of {tensor.dtype}"
        if tensor.is_complex():
            return f"Triton has no complex numbers, got a tensor of {tensor.dtype}"
        if tensor.dtype is torch.bfloat16 and is_wrong_in_bf16:
            return "Triton's interpreter is wrong in bf16: it rounds towards zero and multiplies bits as whole numbers"
    return None


_is_installed = importlib.util.find_spec("triton") is not None
interpreter_knows_bf16 = False  # for who has repaired it, as our tests do
_on_launch: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None

"""What the contract tests iterate over: operators, their cases and backends, and tensors drawn for them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import opensora_kernels
from opensora_kernels import backends
from opensora_kernels import ops as ops_package
from opensora_kernels.cases import BadCall, Case, Maker

OPS = sorted(module.name for module in pkgutil.iter_modules(ops_package.__path__) if module.ispkg)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def public(op: str) -> Callable[..., Any]:
    return getattr(opensora_kernels, op)


def cases_of(op: str) -> list[Case]:
    return importlib.import_module(f"opensora_kernels.ops.{op}.cases").CASES


def errors_of(op: str) -> list[BadCall]:
    return importlib.import_module(f"opensora_kernels.ops.{op}.cases").ERRORS


def small_cases() -> list[Any]:
    return [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPS for case in cases_of(op) if not case.is_large]


def backend_cases() -> list[Any]:
    return [
        pytest.param(op, backend, case, id=f"{op}-{backend}-{case.name}")
        for op in OPS
        for backend in backends.backends_of(op)
        for case in cases_of(op)
        if not case.is_large
    ]


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    return case.make(Maker(dtype=dtype, device=device))


def leaves_with_grad(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments with every floating-point tensor replaced by a leaf that wants a gradient, and those leaves."""
    leaves: list[Tensor] = []

    def as_leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().clone(memory_format=torch.preserve_format).requires_grad_())
            return leaves[-1]
        return value

    return pytree.tree_map(as_leaf, arguments), leaves


def gradients(op: str, arguments: dict[str, Any], seed: int = 1) -> list[Tensor | None]:
    """Gradients of a fixed random projection of the outputs with respect to every floating-point input."""
    arguments, leaves = leaves_with_grad(arguments)
    outputs = [
        out for out in pytree.tree_leaves(public(op)(**arguments)) if isinstance(out, Tensor) and out.requires_grad
    ]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.device, out.dtype) for out in outputs
    ]
    return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))


def strided_copy(tensor: Tensor) -> Tensor:
    """The same values in memory with gaps and with the last two axes swapped."""
    if tensor.dim() < 2:
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    swapped = tensor.transpose(-1, -2).contiguous()
    return torch.stack([swapped, torch.zeros_like(swapped)], -1)[..., 0].transpose(-1, -2)


def far_apart(tensor: Tensor, axis: int, folder: Path) -> Tensor:
    """The same values with `axis`, and all before it, so wide in memory that the last lies beyond 2^31 elements.

    In a file with holes: only the pages that hold values take memory.
    """
    inner = tensor.shape[axis:][1:].numel()
    num_steps = tensor.numel() // inner if inner else 0
    if tensor.dim() < 2 or num_steps < 2 or not tensor.is_floating_point():
        return tensor
    wide = 2**31 // (num_steps - 1) + 64
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    storage = torch.from_file(str(path), shared=True, size=wide * num_steps, dtype=tensor.dtype)
    far = storage.view(num_steps, wide)[:, :inner].unflatten(0, tensor.shape[:axis] + tensor.shape[axis:][:1])
    return far.unflatten(-1, tensor.shape[axis:][1:]).copy_(tensor)

"""One way to register an operator with torch.library: schema, shape rule, gradients, and a call that picks the backend.

A registered operator `opensora_kernels::<op>` takes the public function's arguments, flattened to what a schema can
hold, and the backend's name last, so that forward and backward agree, also under torch.compile and in autograd's
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import backends
from .backends import Implementation

_NAMESPACE = "opensora_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")


def register_op(op: str, schema: str, reference: Callable[..., Any]) -> None:
    """Define `opensora_kernels::<op>` and make `reference` its plain implementation.

    `schema` is the argument list and result without the trailing `str backend`, e.g. "(Tensor x, float eps) -> Tensor".
    `reference` takes the same arguments in the same order. It also serves as the shape rule: every other
    implementation returns tensors of the reference's shapes, dtypes and strides, aliasing none of the inputs.
    """
    arguments, result = schema.rsplit(" -> ", 1)
    _library.define(f"{op}{arguments[:-1]}, str backend) -> {result}")
    backends.register(op, "reference", Implementation(reference, is_plain=True))

    def run(*inputs: Any) -> Any:
        *values, backend = inputs
        return backends.implementation(op, backend).forward(*values)

    def shape_rule(*inputs: Any) -> Any:
        return reference(*inputs[:-1])

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.structure = pytree.tree_flatten(inputs)
        ctx.tensor_positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        leaves = list(ctx.others)
        for position, tensor in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
            leaves[position] = tensor
        *values, backend = pytree.tree_unflatten(leaves, ctx.structure)
        differentiate = backends.implementation(op, backend).backward
        if differentiate is None:
            return (*_recompute(reference, values, grads), None)
        return (*differentiate(grads, *values), None)

    torch.library.impl(f"{_NAMESPACE}::{op}", "CompositeExplicitAutograd", run, lib=_library)
    torch.library.register_fake(f"{_NAMESPACE}::{op}", shape_rule, lib=_library)
    torch.library.register_autograd(f"{_NAMESPACE}::{op}", backward, setup_context=save_inputs, lib=_library)


def call(op: str, *arguments: Any) -> Any:
    """Run `op` on the backend chosen for these arguments; plain implementations are called directly."""
    backend = backends.choose(op, *arguments)
    chosen = backends.implementation(op, backend)
    if chosen.is_plain:
        return chosen.forward(*arguments)
    return getattr(torch.ops.opensora_kernels, op)(*arguments, backend)


def _recompute(reference: Callable[..., Any], values: list[Any], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients of `reference` with respect to every floating-point tensor among `values`, None elsewhere."""
    leaves, structure = pytree.tree_flatten(values)
    with torch.enable_grad():
        leaves = [
            leaf.detach().requires_grad_(leaf.is_floating_point()) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        outputs = pytree.tree_leaves(reference(*pytree.tree_unflatten(leaves, structure)))
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, pytree.tree_leaves(grads), strict=True)
        if grad is not None and output.requires_grad
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    found = iter(
        torch.autograd.grad([output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        if pairs
        else [None] * len(wanted)
    )
    filled = [next(found) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves]
    gradients = pytree.tree_unflatten(filled, structure)
    # torch.library wants one None for an `int[]`, not a list of them
    return tuple(
        gradient if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) else None
        for value, gradient in zip(values, gradients, strict=True)
    )

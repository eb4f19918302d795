"""One way to register an operator with torch.library: schema, shape rule, gradients, and a call that picks the backend.

A registered operator `opensora_kernels::<op>` takes the public function's arguments, flattened to what a schema can
hold, and the backend's name last, so that forward and backward agree, also under torch.compile and in autograd's
threads. A backend's own backward pass is an operator too, `opensora_kernels::<op>_backward`. torch.compile sees the
Triton kernels inside either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.overrides import _get_overloaded_args, handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from . import backends
from ._triton import is_interpreted
from .backends import Implementation

_NAMESPACE = "opensora_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")
_saving: set[str] = set()
_keeping: dict[str, Callable[..., bool]] = {}
_casting: dict[str, list[int]] = {}


def register_op(
    op: str,
    schema: str,
    reference: Callable[..., Any],
    *,
    saves: bool = False,
    keeps: Callable[..., bool] | None = None,
    casts: tuple[str, ...] = (),
) -> None:
    """Define `opensora_kernels::<op>` and make `reference` its plain implementation.

    `schema` is the argument list and result without the trailing `str backend`, e.g. "(Tensor x, float eps) -> Tensor".
    `reference` takes the same arguments in the same order. It also serves as the shape rule: every other
    implementation returns tensors of the reference's shapes, dtypes and strides, aliasing none of the inputs.
    `saves`: the registered operator returns a list, the one result and what a backend keeps for its backward pass.
    `keeps`: whether the results of a call are themselves kept for a backend's backward pass, which gets them at the
    head of `saved`.
    `casts`: arguments that autocast brings to its dtype, as it does for PyTorch's own convolutions and matrix products.
    """
    arguments, result = schema.rsplit(" -> ", 1)
    _library.define(f"{op}{arguments[:-1]}, str backend) -> {'Tensor[]' if saves else result}")
    _library.define(
        f"{op}_backward(Tensor?[] grads, bool[] wanted, Tensor[] saved, {arguments[1:-1]}, str backend) -> Tensor[]"
    )
    backends.register(op, "reference", Implementation(reference, is_plain=True))
    if saves:
        _saving.add(op)
    if keeps is not None:
        _keeping[op] = keeps
    names = [argument.split()[1] for argument in arguments[1:-1].split(", ")]
    _casting[op] = [names.index(name) for name in casts]

    def run(*inputs: Any) -> Any:
        *values, backend = inputs
        chosen = backends.implementation(op, backend)
        result = chosen.forward(*values)
        return [result] if saves and chosen.saved_like is None else result

    def shape_rule(*inputs: Any) -> Any:
        *values, backend = inputs
        result = reference(*values)
        saved_like = backends.implementation(op, backend).saved_like
        return [result, *(saved_like(*values) if saved_like else ())] if saves else result

    def run_backward(grads: list[Tensor | None], wanted: list[bool], saved: list[Tensor], *inputs: Any) -> list[Tensor]:
        *values, backend = inputs
        found = backends.implementation(op, backend).backward(grads, wanted, saved, *values)
        return [_like(gradient, value) for gradient, value in _wanted_pairs(found, values, wanted)]

    def shape_rule_backward(grads: Any, wanted: list[bool], saved: Any, *inputs: Any) -> list[Tensor]:
        needed = [value for value, is_wanted in zip(inputs[:-1], wanted, strict=True) if is_wanted]
        return [torch.empty_like(value) for value in pytree.tree_leaves(needed)]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # a result that nothing used has no gradient, not one of zeros
        _keep(ctx, inputs, saved_of(op, inputs[:-1], output))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved, (*values, backend) = _kept(ctx)
        # torch.library hands the gradients of a list of outputs in one list
        flat_grads = list(grads[0]) if len(grads) == 1 and isinstance(grads[0], (list, tuple)) else list(grads)
        chosen = backends.implementation(op, backend)
        if chosen.backward is None:
            return (*_recompute(reference, values, flat_grads[:1] if saves else flat_grads), None)
        wanted = [any(pytree.tree_leaves(needed)) for needed in ctx.needs_input_grad[:-1]]
        passed = [index for index in (chosen.passes(*values) if chosen.passes else ()) if wanted[index]]
        for index in passed:
            wanted[index] = False
        run_op = getattr(torch.ops.opensora_kernels, f"{op}_backward")
        given = flat_grads[:1] if saves else flat_grads
        found = iter(run_op(given, wanted, saved, *values, backend) if any(wanted) else [])
        gradients = [
            pytree.tree_map(lambda _: next(found), value) if is_wanted else None
            for value, is_wanted in zip(values, wanted, strict=True)
        ]
        for index in passed:
            gradients[index] = flat_grads[0]
        return (*gradients, None)

    def save_inputs_of_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grads, ctx.wanted, saved, *values = inputs[:-1]
        ctx.num_saved = len(saved)
        _keep(ctx, (list(grads), *values), [])

    def double_backward(ctx: Any, grads_of_gradients: list[Tensor | None]) -> tuple[Any, ...]:
        """Gradients of gradients are those of the reference, whichever backend computed the first ones."""
        _, (grads, *values) = _kept(ctx)

        def gradients(given: list[Tensor | None], *inputs: Any) -> list[Tensor]:
            found = _recompute(reference, list(inputs), tuple(given), create_graph=True)
            pairs = _wanted_pairs(found, inputs, ctx.wanted)
            return [x.new_zeros(x.shape) if gradient is None else gradient for gradient, x in pairs]

        of_grads, *of_values = _recompute(gradients, [grads, *values], tuple(grads_of_gradients))
        return (of_grads, None, [None] * ctx.num_saved, *of_values, None)

    _implement(op, run, shape_rule)
    _implement(f"{op}_backward", run_backward, shape_rule_backward)
    torch.library.register_autograd(f"{_NAMESPACE}::{op}", backward, setup_context=save_inputs, lib=_library)
    torch.library.register_autograd(
        f"{_NAMESPACE}::{op}_backward", double_backward, setup_context=save_inputs_of_backward, lib=_library
    )


def call(op: str, *arguments: Any, instead: Callable[..., list[Tensor] | None] | None = None) -> Any:
    """Run `op` on the backend chosen for these arguments; plain implementations are called directly.

    instead: asked first for results of these arguments, such as one in the memory of an argument; may return None.
    Tensor subclasses with `__torch_function__` of their own see the call as they see PyTorch's functions.
    """
    # has_torch_function alone is true of every tensor inside a mode, which is to see what we call, not this
    if has_torch_function(arguments) and any(type(each) is not Tensor for each in _get_overloaded_args(arguments)):
        return handle_torch_function(call, arguments, op, *arguments, instead=instead)
    if instead is not None and (results := instead(*arguments)) is not None:
        return results
    cast = _cast_for_autocast(op, arguments) if _casting[op] else arguments
    backend = backends.choose(op, *cast)
    chosen = backends.implementation(op, backend)
    if chosen.is_plain:
        return chosen.forward(*arguments)  # autocast sees into it
    result = getattr(torch.ops.opensora_kernels, op)(*cast, backend)
    return result[0] if op in _saving else result


def saved_of(op: str, values: tuple[Any, ...], results: Any) -> list[Tensor]:
    """Which of the results of the registered operator, called with `values`, its backward pass gets as `saved`."""
    if op in _keeping and _keeping[op](*values):
        return list(results)
    return list(results[1:]) if op in _saving else []


def _keep(ctx: Any, tree: Any, others: list[Tensor]) -> None:
    """For the backward pass: `others`, and `tree` with its tensors apart, as autograd wants them."""
    leaves, ctx.structure = pytree.tree_flatten(tree)
    ctx.positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    ctx.num_others = len(others)
    ctx.save_for_backward(*others, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))


def _kept(ctx: Any) -> tuple[list[Tensor], Any]:
    tensors, leaves = list(ctx.saved_tensors), list(ctx.leaves)
    for position, tensor in zip(ctx.positions, tensors[ctx.num_others :], strict=True):
        leaves[position] = tensor
    return tensors[: ctx.num_others], pytree.tree_unflatten(leaves, ctx.structure)


def _wanted_pairs(gradients: Any, values: Any, wanted: list[bool]) -> Iterator[tuple[Any, Tensor]]:
    """Each tensor of a wanted value with its gradient."""
    for gradient, value, is_wanted in zip(gradients, values, wanted, strict=True):
        if is_wanted:
            yield from zip(pytree.tree_leaves(gradient), pytree.tree_leaves(value), strict=True)


def _implement(name: str, run: Callable[..., Any], shape_rule: Callable[..., Any]) -> None:
    qualified = f"{_NAMESPACE}::{name}"

    def decompose(mode: FunctionalTensorMode, operator: Any, types: Any, inputs: Any, options: Any) -> Any:
        """What `torch.library.triton_op` does: a tracer gets the kernels instead of the operator around them."""
        if inputs[-1] != "triton" or is_interpreted():
            return mode.__torch_dispatch__(operator, types, inputs, options)
        with mode:
            return run(*inputs)

    torch.library.impl(qualified, "CompositeExplicitAutograd", run, lib=_library)
    torch.library.register_fake(qualified, shape_rule, lib=_library)
    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, decompose, lib=_library)


def _like(gradient: Tensor, value: Tensor) -> Tensor:
    """`gradient` with the strides that `torch.empty_like(value)` has, as the shape rule promises."""
    if gradient.is_contiguous() and value.is_contiguous():
        return gradient
    if gradient.stride() == torch.empty_like(value, device="meta").stride():
        return gradient
    return torch.empty_like(value).copy_(gradient)


def _cast_for_autocast(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    values = list(arguments)
    for index in _casting[op]:
        if isinstance(values[index], Tensor) and values[index].dtype is not torch.float64:  # as PyTorch's own casts
            device_type = values[index].device.type
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                values[index] = values[index].to(torch.get_autocast_dtype(device_type))
    return tuple(values)


def _recompute(
    reference: Callable[..., Any], values: list[Any], grads: tuple[Any, ...], *, create_graph: bool = False
) -> tuple[Any, ...]:
    """Gradients of `reference` with respect to every floating-point tensor among `values`, None elsewhere.

    With `create_graph` they can be differentiated again, with respect to `values` that want it and to `grads`.
    """
    leaves, structure = pytree.tree_flatten(values)
    with torch.enable_grad():
        if not create_graph:
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        leaves = [
            leaf.requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves
        ]
        outputs = pytree.tree_leaves(reference(*pytree.tree_unflatten(leaves, structure)))
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, pytree.tree_leaves(grads), strict=True)
        if grad is not None and output.requires_grad
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
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

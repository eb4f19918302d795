"""Floating-point operations of a model, counted operator by operator; nothing is computed for tensors on meta.

PyTorch's counter knows its own matrix products, convolutions and attention; here are those of `opensora_kernels`. An
operation is a multiplication or an addition of a product, two for each pair of factors; elementwise work is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from opensora_kernels import attention  # noqa: F401  with it, all operators are registered

FORWARD_AND_BACKWARD = 3
"""Operations of a training step over those of its forward pass: each product has two gradients as large as itself."""

Shape = Sequence[int]


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of call(), with what it calls in the backward pass if it runs one."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


def _attention(q: Shape, k: Shape, *others: Any, **options: Any) -> int:
    """q (*, L, N, D), k (*, K, N, D) or packed (sum of K, N, D): scores, and their product with v."""
    is_packed = len(q) == 4 and len(k) == 3
    return 4 * prod(q) * k[-3] // (q[0] if is_packed else 1)


def _convolution(x: Shape, weight: Shape, *others: Any, out_shape: Any, **options: Any) -> int:
    """Result (B, O, T, H, W), the first of several, weight (O, C / groups, kt, kh, kw)."""
    result = (
        out_shape[0] if isinstance(out_shape, (list, tuple)) and not isinstance(out_shape, torch.Size) else out_shape
    )
    return 2 * prod(result) * prod(weight[1:])


def _gradients_of(forward: Callable[..., int]) -> Callable[..., int]:
    """Of (grads, wanted, saved, *the operator's arguments)."""

    def count(grads: Sequence[Shape], wanted: Any, saved: Any, *arguments: Any, **options: Any) -> int:
        return 2 * forward(*arguments, out_shape=torch.Size(grads[0]))

    return count


_FORWARD = {
    "attention": _attention,
    "qk_norm_attention": _attention,
    "causal_conv3d": _convolution,
    "upsample_conv3d": _convolution,
}
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(torch.ops.opensora_kernels, name): formula for name, formula in _FORWARD.items()
} | {
    getattr(torch.ops.opensora_kernels, f"{name}_backward"): _gradients_of(formula)
    for name, formula in _FORWARD.items()
}

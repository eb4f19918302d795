"""No tokens, frames or pixels, such as a rank's share of a short sequence: results and gradients of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import Norm, use
from tests.ops.contract import leaves_with_grad, public
from tests.ops.properties import interpreted


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "modulate": ("modulate", {"x": numbers(2, 0, 8), "shift": numbers(2, 8), "scale": numbers(2, 8)}),
    "gate_residual": ("gate_residual", {"x": numbers(2, 0, 8), "y": numbers(2, 0, 8), "gate": numbers(2, 8)}),
    "rms_norm": ("rms_norm", {"x": numbers(2, 0, 8), "weight": numbers(8)}),
    "attention": ("attention", {"q": numbers(2, 0, 2, 8), "k": numbers(2, 5, 2, 8), "v": numbers(2, 5, 2, 8)}),
    "qk_norm_rope": (
        "qk_norm_rope",
        {"q": numbers(2, 0, 2, 8), "k": numbers(2, 0, 2, 8), "q_weight": numbers(8), "k_weight": numbers(8)},
    ),
    "qk_norm_attention": (
        "qk_norm_attention",
        {name: numbers(2, 0, 2, 8) for name in "qkv"} | {"q_weight": numbers(8), "k_weight": numbers(8)},
    ),
    "group_norm_silu without frames": ("group_norm_silu", {"x": numbers(2, 6, 0, 4, 5), "num_groups": 3}),
    "group_norm_silu without pixels": ("group_norm_silu", {"x": numbers(2, 6, 3, 0, 5), "num_groups": 3}),
    "causal_conv3d on its state alone": (
        "causal_conv3d",
        {
            "x": numbers(1, 6, 0, 4, 5),
            "weight": numbers(4, 6, 3, 1, 1),
            "state": numbers(1, 6, 3, 4, 5),
            "norm": Norm("group", numbers(6), numbers(6), num_groups=3),
        },
    ),
}


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_triton_gives_what_the_reference_gives(name: str):
    op, call = CALLS[name]

    def run(backend: str) -> list[Tensor]:
        arguments, leaves = leaves_with_grad(call)
        with use(**{op: backend}):
            outputs = [leaf for leaf in pytree.tree_leaves(public(op)(**arguments)) if isinstance(leaf, Tensor)]
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True)
        return [
            *outputs,
            *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)),
        ]

    for have, want in zip(run("triton"), run("reference"), strict=True):
        # torch.group_norm (2.13, CPU) gives its weight NaN, where a sum over nothing is 0
        torch.testing.assert_close(have, want.nan_to_num())


@interpreted
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_statistics_of_no_frame_are_refused(backend: str):
    norm = Norm("group", num_groups=3, statistics=numbers(2, 6, 0, 2))
    with use(causal_conv3d=backend), pytest.raises(ValueError, match="statistics must hold at least one frame"):
        public("causal_conv3d")(numbers(2, 6, 3, 4, 5), numbers(4, 6, 1, 1, 1), norm=norm)

"""Gradients of gradients, as gradient penalties take them, on every backend that has a backward pass of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import use
from tests.ops.contract import OPS, cases_of, draw, leaves_with_grad, public
from tests.ops.properties import interpreted


def second_gradients(op: str, backend: str) -> list[Tensor | None]:
    arguments, leaves = leaves_with_grad(draw(cases_of(op)[0], torch.float32))
    with use(**{op: backend}):
        outputs = [leaf for leaf in pytree.tree_leaves(public(op)(**arguments)) if isinstance(leaf, Tensor)]
        total = sum(out.square().sum() for out in outputs if out.requires_grad)
        first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        penalty = sum(grad.square().sum() for grad in first if grad is not None)
        return list(torch.autograd.grad(penalty, leaves, allow_unused=True))


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_triton_gives_those_of_the_reference(op: str):
    found, expected = second_gradients(op, "triton"), second_gradients(op, "reference")
    for have, want in zip(found, expected, strict=True):
        want = torch.zeros_like(have) if want is None and have is not None else want
        have = torch.zeros_like(want) if have is None and want is not None else have
        # first gradients differ by fp32 roundings, which the second derivative magnifies
        torch.testing.assert_close(
            have, want, rtol=1e-3, atol=None if want is None else 1e-4 * float(want.abs().max()) + 1e-6
        )

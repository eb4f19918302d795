"""torch.func and forward-mode derivatives, of which our own operators know nothing: PyTorch's serve instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import backends, group_norm_silu, use
from opensora_kernels._extension import why_not_loaded
from tests.ops.contract import cases_of, draw, public

pytestmark = pytest.mark.skipif(why_not_loaded("cpu") is not None, reason=str(why_not_loaded("cpu")))
OPS = ("gate_residual", "group_norm_silu", "modulate", "qk_norm_rope", "rms_norm", "rms_norm_silu")


def drawn(op: str) -> tuple[list[Tensor], Callable[..., Any]]:
    """The floating-point tensors of a call, and the call as a function of them."""
    leaves, structure = pytree.tree_flatten(draw(cases_of(op)[0], torch.float32))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        return public(op)(**pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], structure))

    return [leaves[index] for index in places], run


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_derivatives_are_those_of_the_reference(op: str):
    tensors, run = drawn(op)
    changes = [torch.randn(tensor.shape) for tensor in tensors]
    with use("reference"):
        _, expected = torch.func.jvp(run, tuple(tensors), tuple(changes))
    with use("cpu"), fwAD.dual_level():
        results = run(*(fwAD.make_dual(*pair) for pair in zip(tensors, changes, strict=True)))
        found = pytree.tree_map(lambda result: fwAD.unpack_dual(result).tangent, results)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_functions_are_those_of_the_reference(op: str):
    tensors, run = drawn(op)

    def total(*tensors: Tensor) -> Tensor:
        return sum(result.square().sum() for result in pytree.tree_leaves(run(*tensors)))

    found = {}
    for backend in ("cpu", "reference"):
        with use(backend):
            found[backend] = torch.func.grad(total, tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(found["cpu"], found["reference"])


def test_clips_can_be_mapped():
    x = torch.randn(3, 1, 4, 2, 3, 5)
    found = torch.vmap(lambda clip: group_norm_silu(clip, 2))(x)
    torch.testing.assert_close(found, torch.stack([group_norm_silu(clip, 2) for clip in x]))


def test_an_order_for_our_own_says_why_it_is_refused():
    with pytest.raises(backends.BackendError, match="see through plain PyTorch alone"), use(group_norm_silu="cpu"):
        torch.func.grad(lambda clip: group_norm_silu(clip, 2).sum())(torch.randn(1, 4, 2, 3, 5))

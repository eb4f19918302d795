"""Python's calls of the CUDA library fit its operators' schemas, on a machine without CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import _extension, _triton, backends, registration
from opensora_kernels.backends import Implementation
from opensora_kernels.cases import Case, Maker
from tests.cuda_calls import reached_operators
from tests.ops.contract import OPS, cases_of

pytestmark = pytest.mark.skipif(
    _extension.why_not_loaded("cpu") is not None, reason="the CPU library, which defines the schemas, is not loaded"
)


class MetaMaker(Maker):
    """Draws nothing: shapes on the meta device."""

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def mask(self, *shape: int, probability: float = 0.5) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, but for the kernels themselves: tensors are on the meta device."""
    monkeypatch.setattr(_extension, "_why_not_here", lambda library, values: None)
    monkeypatch.setattr(_triton, "why_not", lambda device: None)


@pytest.mark.parametrize("op", [op for op in OPS if "cuda" in backends.backends_of(op)])
def test_calls_of_the_cuda_library_fit_its_schemas(op: str, on_paper: None):
    implementation = backends.implementation(op, "cuda")
    reached: list[str] = []
    for case in cases_of(op):
        flat = _on_meta(op, case)
        if implementation.why_not(*flat) is None:
            reached += reached_operators(lambda flat=flat: implementation.forward(*flat))
            reached += reached_operators(lambda flat=flat: _backward(op, implementation, flat))
    assert reached, f"the cuda backend of {op} refuses every case, or calls no operator of the library"


def _on_meta(op: str, case: Case) -> tuple[Any, ...]:
    arguments = case.make(MetaMaker(dtype=torch.bfloat16))
    arguments = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, arguments)
    return backends.flat_arguments(op, **arguments)


def _backward(op: str, implementation: Implementation, flat: tuple[Any, ...]) -> None:
    """Of gradients and saved tensors like those that the forward pass gives."""
    result = backends.implementation(op, "reference").forward(*flat)
    saved = implementation.saved_like(*flat) if implementation.saved_like else []
    saved = registration.saved_of(op, flat, [*pytree.tree_leaves(result), *saved])
    grads = [torch.empty_like(leaf) for leaf in pytree.tree_leaves(result)]
    wanted = [
        any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(value))
        for value in flat
    ]
    implementation.backward(grads, wanted, saved, *flat)


def test_a_call_that_does_not_fit_is_found():
    library = torch.library.Library("opensora_kernels", "FRAGMENT")
    library.define("fits_cuda_into(Tensor x, int[] kernel, Tensor(a!) out) -> ()")
    library.define("fits_cuda_result(Tensor x) -> Tensor")
    x = torch.empty(2, device="meta")

    def call(kernel: Any) -> Tensor:
        torch.ops.opensora_kernels.fits_cuda_into(x, kernel, torch.empty_like(x))
        return torch.ops.opensora_kernels.fits_cuda_result(x) + 1

    assert reached_operators(lambda: call([3, 3, 3])) == ["fits_cuda_into", "fits_cuda_result"]
    with pytest.raises(RuntimeError, match="Expected a value of type 'List\\[int\\]' for argument 'kernel'"):
        reached_operators(lambda: call(1.5))

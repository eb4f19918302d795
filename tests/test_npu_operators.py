"""The reference path is also the Ascend path: it dispatches only operators that torch_npu has, forward and backward.

There is no Ascend machine here. The operators that reach a device are recorded on the CPU, below autograd, and looked
up in the list of those that torch_npu registers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_kernels import backends, use
from opensora_kernels.cases import Case
from tests.ops.contract import cases_of, draw, gradients, small_cases

REGISTERED = set(json.loads((Path(__file__).parent / "data/torch_npu_ops.json").read_text())["supported"])
# What PyTorch's kernels for all devices call in the end: the views, the factories, the gradients of views.
FOUNDATION = {"as_strided", "empty.memory_format", "empty_strided", "fill_.Scalar", "zero_", "copy_", "view"}
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
# Ascend has no complex numbers and no fast fp64.
USUAL_DTYPES = {torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32}


class Recorder(TorchDispatchMode):
    """Notes which operators run and which dtypes they give; an operator that Ascend lacks and PyTorch can spell out
    in others (promote_types, matmul) is replaced by those."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not is_registered(operator.name()) and has_kernel(operator.name(), "CompositeImplicitAutograd"):
            with self:
                return operator.decompose(*args, **(kwargs or {}))
        result = operator(*args, **(kwargs or {}))
        self.operators.add(operator.name())
        self.dtypes.update(leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def faults(function: Callable[[], Any]) -> list[str]:
    """The operators and dtypes that `function` uses and Ascend lacks."""
    with Recorder() as recorder:
        function()
    assert recorder.operators
    lacking = [name for name in recorder.operators if not (is_registered(name) or is_for_every_device(name))]
    return sorted([*lacking, *map(str, recorder.dtypes - USUAL_DTYPES)])


def is_registered(name: str) -> bool:
    return name.removeprefix("aten::") in REGISTERED


def is_for_every_device(name: str) -> bool:
    """Whether PyTorch has one kernel of it for all devices, made of FOUNDATION and other operators."""
    return has_kernel(name, "CompositeExplicitAutograd")


@pytest.mark.parametrize(("op", "case"), small_cases())
def test_reference_uses_only_operators_of_ascend(op: str, case: Case):
    with use(**dict.fromkeys(backends.ops(), "reference")):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = draw(case, dtype)
            assert not faults(lambda arguments=arguments: gradients(op, arguments)), dtype


def test_kernels_for_every_device_rest_on_operators_of_ascend():
    assert not FOUNDATION - REGISTERED


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (torch.special.bessel_j0, "aten::special_bessel_j0"),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward(), "aten::_scaled_dot"),
        (torch.view_as_complex, "torch.complex64"),
        (lambda x: x.double() + 1, "torch.float64"),
    ],
)
def test_what_ascend_lacks_is_found(function: Callable[[torch.Tensor], Any], fault: str):
    x = torch.ones(1, 1, 3, 2, requires_grad=True)
    found = faults(lambda: function(x))
    assert any(entry.startswith(fault) for entry in found), found


def test_an_operator_of_the_backward_alone_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "REGISTERED", REGISTERED - {"_softmax_backward_data"})
    arguments = draw(cases_of("attention")[0], torch.float32)
    with use(attention="reference"):
        assert faults(lambda: gradients("attention", arguments)) == ["aten::_softmax_backward_data"]

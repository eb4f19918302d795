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
# Kernels that PyTorch writes once for all devices: views, factories and compositions of other operators.
FOR_EVERY_DEVICE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
# What those kernels call in the end.
FOUNDATION = {"as_strided", "empty.memory_format", "empty_strided", "fill_.Scalar", "zero_", "copy_", "view"}
# Ascend has no complex numbers and no fast fp64.
USUAL_DTYPES = {torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32}


class Recorder(TorchDispatchMode):
    """Notes which operators run and which dtypes they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[OpOverload] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.operators.add(operator)
        self.dtypes.update(leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def faults(function: Callable[[], Any]) -> list[str]:
    """The operators and dtypes that `function` uses and Ascend lacks."""
    with Recorder() as recorder:
        function()
    assert recorder.operators
    lacking = [operator.name() for operator in recorder.operators if not is_served(operator.name())]
    return sorted([*lacking, *map(str, recorder.dtypes - USUAL_DTYPES)])


def is_served(name: str) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return name.removeprefix("aten::") in REGISTERED or any(has_kernel(name, key) for key in FOR_EVERY_DEVICE)


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
    monkeypatch.setitem(globals(), "REGISTERED", REGISTERED - {"silu_backward"})
    arguments = draw(cases_of("rms_norm_silu")[0], torch.float32)
    assert faults(lambda: gradients("rms_norm_silu", arguments)) == ["aten::silu_backward"]

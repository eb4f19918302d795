"""Laws that every operator obeys on every backend. A new operator passes these without new test code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import backends, use
from opensora_kernels.cases import Case
from tests.ops.accuracy import assert_accurate, assert_near_truth
from tests.ops.contract import (
    DEVICES,
    OPS,
    backend_cases,
    cases_of,
    draw,
    errors_of,
    far_apart,
    gradients,
    leaves_with_grad,
    public,
    strided_copy,
)

# opcheck's tracing with symbolic shapes takes a second or two per case, its other checks 20 ms
TRACED_CASES = ("small", "odd", "empty_batch")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN, so that an output left unwritten can't pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def ordered(op: str, backend: str, arguments: dict[str, Any]) -> use:
    """Order `backend` for `op`, or skip with its reason."""
    reason = backends.why_not(op, backend, *backends.flat_arguments(op, **arguments))
    if reason is not None:
        pytest.skip(reason)
    return use(**{op: backend})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend", "case"), backend_cases())
def test_output_is_as_accurate_as_pytorch(op: str, backend: str, case: Case, dtype: torch.dtype, device: str):
    arguments = draw(case, dtype, device)
    with use(**{op: "reference"}):
        truth = public(op)(**draw(case, torch.float64))
        at_same_dtype = public(op)(**draw(case, dtype))
    with ordered(op, backend, arguments):
        actual = pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, public(op)(**arguments))
    if backend == "reference" and device == "cpu":
        assert_near_truth(actual, truth, dtype, op)
    else:
        assert_accurate(actual, at_same_dtype, truth, op)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend", "case"), backend_cases())
def test_gradients_are_as_accurate_as_pytorch(op: str, backend: str, case: Case, device: str):
    dtype = torch.float32 if backend != "cuda" else torch.bfloat16  # compiled for GPUs: products of 16-bit numbers
    arguments = draw(case, dtype, device)
    with use(**{op: "reference"}):
        truth = gradients(op, draw(case, torch.float64))
        at_same_dtype = gradients(op, draw(case, dtype))
    with ordered(op, backend, arguments):
        actual = gradients(op, arguments)
    assert [grad is None for grad in actual] == [grad is None for grad in truth]
    actual, at_same_dtype, truth = (
        [grad.cpu() for grad in grads if grad is not None] for grads in (actual, at_same_dtype, truth)
    )
    if backend == "reference" and device == "cpu":
        assert_near_truth(actual, truth, torch.float32, f"gradients of {op}")
    else:
        assert_accurate(actual, at_same_dtype, truth, f"gradients of {op}")


@pytest.mark.parametrize("op", OPS)
def test_reference_gradients_match_finite_differences(op: str):
    arguments, leaves = leaves_with_grad(draw(cases_of(op)[0], torch.float64))
    leaf_ids = {id(leaf): index for index, leaf in enumerate(leaves)}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        swapped = pytree.tree_map(lambda leaf: values[leaf_ids[id(leaf)]] if id(leaf) in leaf_ids else leaf, arguments)
        with use(**{op: "reference"}):
            outputs = pytree.tree_leaves(public(op)(**swapped))
        return tuple(out for out in outputs if out.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(leaves), fast_mode=True)


@pytest.mark.parametrize(("op", "backend", "case"), backend_cases())
def test_registered_operator_passes_opcheck(op: str, backend: str, case: Case):
    if backend != "reference" and backends.implementation(op, backend).is_plain:
        pytest.skip("a plain implementation never runs inside the registered operator")
    arguments, _ = leaves_with_grad(draw(case, torch.float32))
    with ordered(op, backend, arguments):
        flat = backends.flat_arguments(op, **arguments)
    operator = getattr(torch.ops.opensora_kernels, op).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if case.name in TRACED_CASES:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (*flat, backend), test_utils=checks)


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in OPS for backend in backends.backends_of(op)])
def test_compiles_to_one_graph_once(op: str, backend: str):
    torch._dynamo.reset()
    case = cases_of(op)[0]
    compiled = torch.compile(public(op), fullgraph=True, backend="aot_eager")
    arguments = draw(case, torch.float32)
    with ordered(op, backend, arguments):
        expected = public(op)(**arguments)
        compiled(**arguments)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = compiled(**draw(case, torch.float32))
    for have, want in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize(("op", "backend", "case"), backend_cases())
def test_strides_do_not_change_the_result_nor_a_call_its_inputs(op: str, backend: str, case: Case):
    arguments, before = draw(case, torch.float32), draw(case, torch.float32)
    strided = pytree.tree_map(lambda leaf: strided_copy(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
    with ordered(op, backend, arguments):
        expected, actual = public(op)(**arguments), public(op)(**strided)
    with use(**{op: "reference"}):
        truth = public(op)(**draw(case, torch.float64))
    assert_accurate(actual, expected, truth, f"strided {op}")
    for after in (arguments, strided):
        for now, then in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True):
            assert torch.equal(now, then) if isinstance(now, Tensor) else now == then


@pytest.mark.parametrize("axis", [0, -2])
@pytest.mark.parametrize("op", [op for op in OPS if "triton" in backends.backends_of(op)])
def test_offsets_beyond_two_billion_elements_are_reached(op: str, axis: int, tmp_path: Path):
    arguments = draw(cases_of(op)[0], torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # nobody fills these 4 GB
    far = pytree.tree_map(lambda leaf: far_apart(leaf, axis, tmp_path) if isinstance(leaf, Tensor) else leaf, arguments)
    with ordered(op, "triton", arguments):
        expected, actual = public(op)(**arguments), public(op)(**far)
    for have, want in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "backend", "case"), [case for case in backend_cases() if case.values[2].name == "small"]
)
def test_autocast_gives_the_dtypes_of_the_reference(op: str, backend: str, case: Case, dtype: torch.dtype):
    def dtypes(backend: str) -> list[torch.dtype]:
        arguments = draw(case, dtype)
        with ordered(op, backend, arguments), torch.autocast("cpu", torch.bfloat16):
            return [x.dtype for x in pytree.tree_leaves(public(op)(**arguments))]

    assert dtypes(backend) == dtypes("reference")


@pytest.mark.parametrize("op", OPS)
def test_has_a_small_an_odd_a_size_one_an_empty_and_a_release_case(op: str):
    names = {case.name for case in cases_of(op)}
    assert {"small", "odd", "size_one", "empty_batch"} <= names
    assert any(case.is_large and case.source for case in cases_of(op)), "no case with the real shape of a release"


@pytest.mark.parametrize("op", OPS)
def test_documented_errors_are_raised(op: str):
    assert errors_of(op), f"{op} documents no error"
    for bad in errors_of(op):
        with pytest.raises(bad.error, match=bad.match):
            public(op)(**bad.change(draw(cases_of(op)[0], torch.float32)))

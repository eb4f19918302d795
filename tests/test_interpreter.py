"""The interpreter that stands in for a GPU in all other tests computes in bf16 as GPUs do; its shortcuts lead there."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from opensora_kernels import _triton

if not _triton.is_interpreted() or _triton.why_not_installed() is not None:
    pytest.skip("Triton kernels are not interpreted here (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

from tests import interpreter_speed


@triton.jit
def _round_kernel(x_ptr, out_ptr):
    offs = tl.arange(0, 64)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(a, b, input_precision="ieee"))


def test_rounds_to_nearest():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([torch.inf, -torch.inf, -1e-40, 0.0])
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out)
    assert torch.equal(out, x.bfloat16())


def test_nan_stays_nan():
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](torch.full((64,), torch.nan), out)
    assert out.isnan().all()


def test_multiplies_matrices_of_bf16():
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out)
    # sums of 16 products in fp32, in any order: 16 * 2^-24 * (16 products of at most 4 * 4)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=0, atol=2.5e-4)


DTYPES = [tl.int1, tl.int8, tl.int32, tl.int64, tl.uint8, tl.uint32, tl.float16, tl.bfloat16, tl.float32, tl.float64]
SHAPES = [(), (1,), (4,), (1, 4), (4, 1), (2, 4), (8, 1)]
NUMBERS = [True, 0, 1, -7, 300, 2**31, -(2**40), 2**70, 0.0, -2.5, float("inf"), 1e300]


def _operands() -> list[Any]:
    drawn = np.random.default_rng(0)
    operands: list[Any] = [*NUMBERS]
    for dtype, shape in product([*DTYPES, tl.pointer_type(tl.float32)], SHAPES):
        data = drawn.integers(0, 2, shape or (1,)).astype(_get_np_dtype(dtype))
        operands.append(tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype))
    return operands


def _described(run: Any, *arguments: Any) -> Any:
    """Types, shapes and bits of what `run` returns, or its error."""
    try:
        results = run(TritonSemantic(InterpreterBuilder()), *arguments)
    except Exception as error:  # whatever the original raises is what the shortcut has to raise
        return type(error), str(error)
    return [_content(x) for x in results]


def _content(x: tl.tensor) -> tuple[Any, ...]:
    data = x.handle.data
    return str(x.type), [size.value for size in x.shape.values], x.numel.value, data.dtype, data.tolist()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("flags", list(product([False, True], repeat=3)), ids=str)
def test_operands_take_the_types_that_triton_gives_them(flags: tuple[bool, ...]):
    """Flags: a pointer may come first, and second; half precision divides in fp32."""
    allows_first, allows_second, divides = flags
    for lhs, rhs in product(_operands(), repeat=2):
        arguments = lhs, rhs, allows_first, allows_second, True, divides
        assert _described(interpreter_speed._promoted, *arguments) == _described(interpreter_speed._promote, *arguments)


def test_operands_take_the_shapes_that_triton_gives_them():
    tensors = [operand for operand in _operands() if isinstance(operand, tl.tensor)]
    for pair in product(tensors, repeat=2):
        assert _described(interpreter_speed._broadcasted, *pair) == _described(interpreter_speed._broadcast, *pair)


def test_every_dtype_keeps_its_numpy_dtype():
    for dtype in (*DTYPES, tl.pointer_type(tl.bfloat16), tl.float8e5):
        for described in (dtype, tl.block_type(dtype, [4])):
            assert _get_np_dtype(described) == interpreter_speed._numpy_dtype(described)
            assert _get_np_dtype(described) == interpreter_speed._numpy_dtype(described)  # from memory

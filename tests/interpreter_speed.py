"""The same answers of Triton 3.6's interpreter sooner: it spends most of its time on describing types again and again.

Nothing here changes a number: tests/test_interpreter.py holds the shortcuts to what they cut short.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder

_describe_block = core.block_type.__init__
_numpy_dtype = interpreter._get_np_dtype
_same_dtype = core.dtype.__eq__
_unwrap = core._unwrap_if_constexpr
_promote = TritonSemantic.binary_op_type_checking_impl
_broadcast = TritonSemantic.broadcast_impl_value

_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_numpy_dtypes: dict[str, np.dtype] = {}


def quicken() -> None:
    """For the rest of this process, with the version that this was written for."""
    if not triton.__version__.startswith("3.6."):
        return
    # It computes every sum and product of integers again, in 64 bits, for an assertion that only a debug build makes.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _patch_language_for_good()
    core.tensor.__init__ = _init_tensor
    core.block_type.__init__ = _init_block_type
    core.dtype.__eq__ = lambda self, other: self is other or _same_dtype(self, other)
    core._unwrap_if_constexpr = _unwrapped
    interpreter._get_np_dtype = _numpy_dtype_of
    core.dtype.sizes = ()  # of a type that is no block
    TritonSemantic.binary_op_type_checking_impl = _promoted
    TritonSemantic.broadcast_impl_value = _broadcasted


def _patch_language_for_good() -> None:
    """Once, not at each launch and at each call of a function by a kernel, which takes a millisecond each."""
    interpreter._patch_attr = _give_semantic
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": triton.language, "core": core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing to restore


def _give_semantic(owner: Any, name: str, member: Callable[..., Any], builder: Builder, scope: Any) -> None:
    # what `builtin` wraps, without its check that `_semantic` is there
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def given(*args: Any, _semantic: Any = None, **options: Any) -> Any:
        return function(*args, **options, _semantic=semantic)

    scope.set_attr(owner, name, given)


def _init_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape_and_numel(type.sizes)


def _init_block_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
    sizes = builtins.tuple([_unwrapped(size) for size in (shape.values if type(shape) is core.tuple else shape)])
    key = element_ty.name, getattr(element_ty, "address_space", None), sizes
    if (known := _block_types.get(key)) is None:
        _describe_block(self, element_ty, shape)
        self.sizes = sizes
        known = _block_types[key] = dict(self.__dict__)
    self.__dict__.update(known)


@cache
def _shape_and_numel(sizes: builtins.tuple[int, ...]) -> builtins.tuple[core.tuple, core.constexpr]:
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


def _unwrapped(value: Any) -> Any:
    if type(value) is core.constexpr:
        return value.value
    return _unwrap(value) if isinstance(value, (list, builtins.tuple, core.tuple, core.constexpr)) else value


def _numpy_dtype_of(dtype: core.dtype) -> np.dtype:
    name = dtype.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _numpy_dtype(dtype)
    return _numpy_dtypes[name]


def _promoted(
    self: TritonSemantic, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True, div_or_mod: bool = False,
) -> builtins.tuple[Any, Any]:  # fmt: skip
    """Operands of one type, and numbers that take the type of a tensor, need none of the rules of promotion."""
    is_plain = arithmetic_check and type(lhs) is core.tensor and not lhs.dtype.is_ptr()
    if is_plain and not (div_or_mod and lhs.dtype.is_floating()):
        if type(rhs) is core.tensor and lhs.dtype is rhs.dtype:
            return _broadcasted(self, lhs, rhs)
        if type(rhs) is int and lhs.dtype.name in ("int32", "int64") and -(2**31) <= rhs < 2**31:
            return _broadcasted(self, lhs, self.scalar_constant(rhs, lhs.dtype))
        if type(rhs) is float and lhs.dtype.name == "fp32":
            return _broadcasted(self, lhs, self.scalar_constant(rhs, lhs.dtype))
    return _promote(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


def _broadcasted(self: TritonSemantic, lhs: Any, rhs: Any) -> builtins.tuple[Any, Any]:
    left, right = lhs.type.sizes, rhs.type.sizes
    if left == right:
        return lhs, rhs
    if left and right and len(left) != len(right):
        return _broadcast(self, lhs, rhs)
    if left and right:
        if any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
            return _broadcast(self, lhs, rhs)  # for its error
        sizes = builtins.tuple([b if a == 1 else a for a, b in zip(left, right, strict=True)])
    else:
        sizes = left or right
    return _of_sizes(lhs, sizes), _of_sizes(rhs, sizes)


def _of_sizes(x: core.tensor, sizes: builtins.tuple[int, ...]) -> core.tensor:
    if x.type.sizes == sizes:
        return x
    if x.type.sizes:
        data = np.broadcast_to(x.handle.data, sizes)
    else:
        data = np.full(sizes, x.handle.data, dtype=_numpy_dtype_of(x.dtype))
    return core.tensor(interpreter.TensorHandle(data, x.dtype), core.block_type(x.dtype, list(sizes)))

"""Two repairs of Triton 3.6's interpreter, without which a kernel that is right in bf16 fails its tests.

It rounds fp32 to bf16 towards zero, where every GPU rounds to nearest, and multiplies matrices of bf16 as if their bits
were whole numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from opensora_kernels import _triton

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def repair() -> None:
    """For the rest of this process."""
    _triton.interpreter_knows_bf16 = True
    interpreter._convert_float = _convert_to_nearest
    interpreter.InterpreterBuilder.create_dot = _dot_of_numbers


def _convert_to_nearest(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    if source == tl.bfloat16 and target == tl.float32:
        return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert_float(values, source, target, rounding_mode)


def _dot_of_numbers(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    wide = [
        builder.cast_impl(factor, tl.float32) if factor.dtype.scalar == tl.bfloat16 else factor for factor in (a, b)
    ]
    return _create_dot(builder, *wide, *others)

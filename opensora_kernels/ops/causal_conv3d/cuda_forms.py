"""Which calls of causal_conv3d the compiled CUDA kernels serve. Imports neither them nor Triton."""

from __future__ import annotations

from typing import Any

import torch

from opensora_kernels import _extension, backends

_DTYPES = (torch.bfloat16, torch.float16)
_MOST_TAPS = 15  # kMostTaps of csrc/causal_conv3d_sm80_geometry.h


def why_not(*values: Any) -> str | None:
    x, weight, groups = values[0], values[1], values[5]
    if (reason := backends.why_not("causal_conv3d", "triton", *values)) is not None:
        return f"norm, layout and small sums around the compiled convolution are Triton's kernels, and {reason}"
    if x.dtype not in _DTYPES:
        return f"tensor cores multiply bfloat16 or float16, got {x.dtype}"
    if groups != 1:
        return f"the kernels know one group, got {groups}"
    if x.shape[1] % 8 or weight.shape[0] % 8:
        return (
            "the copy engine reads 16 bytes at once: channels must be multiples of 8, "
            f"got {x.shape[1]} and {weight.shape[0]}"
        )
    if max(weight.shape[2:]) > _MOST_TAPS:
        return f"the kernels count at most {_MOST_TAPS} taps along an axis, got {tuple(weight.shape[2:])}"
    if not x.numel():
        return f"the copy engine describes no empty tensor, got x of shape {tuple(x.shape)}"
    return None


def why_slower(*values: Any) -> str:
    return _extension.NOT_MEASURED

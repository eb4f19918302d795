"""What operators' CPU backends share: the tensors that the compiled CPU library takes, and why it refuses others.

`cpu_norms` holds its norms of clips, `cpu_convolution` and `cpu_steps` what surrounds PyTorch's own convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_MOST_AXES = 9  # tokens, heads, a head's elements, and Heads::most_axes of csrc/heads.h in front
# Forward and backward of 2048 tokens in bf16, 8 heads of 72, on one core, 2026-11-30: PyTorch's fused attention 460 ms,
# the compiled library 234 ms; of 64 tokens, 256 heads, 22.6 ms and 9.9 ms.
_MOST_KEYS = 2048


def why_not_these(*values: Any) -> str | None:
    """None if all tensors among the arguments of a call have a dtype that the CPU library computes in, else a sentence.

    Flags and whole numbers, such as masks and lengths, are not asked."""
    for value in values:
        if isinstance(value, Tensor) and value.dtype not in _DTYPES and value.is_floating_point():
            return f"the compiled CPU library takes float32 and bfloat16, got a tensor of {value.dtype}"
    return None


def why_not_heads(q: Tensor, *others: Any) -> str | None:
    """The same for q (*, L, N, D) and what comes with it, whose axes are counted."""
    if q.dim() > _MOST_AXES:
        return f"the compiled CPU library takes at most {_MOST_AXES} axes, got {q.dim()}"
    return why_not_these(q, *others)


def why_attention_is_slower(q: Tensor, num_keys: int) -> str | None:
    """None where the library attends to `num_keys` faster than PyTorch, else a sentence."""
    if q.numel() == 0:
        return "PyTorch's own operators take less time to call, and there is nothing to compute"
    if num_keys > _MOST_KEYS:
        return f"all keys of a head are held in cache, measured for up to {_MOST_KEYS}, got {num_keys}"
    return None


def dense_rows(*values: Tensor | None) -> list[Tensor | None]:
    """The same tensors, those whose last axis has gaps as copies without."""
    return [
        value if value is None or value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()
        for value in values
    ]


def dense(*values: Tensor | None) -> list[Tensor | None]:
    """The same tensors without gaps: for small ones, which the library reads without strides."""
    return [value if value is None else value.contiguous() for value in values]


def norm_rope_options(
    q_weight: Tensor | None, eps: float, order: str, rope_layout: str, norm_scope: str
) -> tuple[bool, float, bool, bool, bool]:
    """As the library's operators take them."""
    has_norm = q_weight is not None
    is_token = norm_scope == "token" and has_norm
    return has_norm, eps, order == "rope_norm", rope_layout == "interleaved", is_token


def parameter_gradients(
    of_weights: Tensor, of_angles: Tensor, parameters: tuple[Tensor | None, ...], wanted: list[bool]
) -> list[Tensor | None]:
    """Of both weights, cos and sin, each in its own dtype; None where it is not wanted."""
    found = [*(of_weights if any(wanted[:2]) else (None, None)), *(of_angles if any(wanted[2:]) else (None, None))]
    return in_their_dtypes(found, parameters, wanted)


def in_their_dtypes(
    grads: Sequence[Tensor | None], values: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Each gradient in the dtype of what it is of; None where it is not wanted."""
    return [
        grad.to(value.dtype) if is_wanted else None
        for grad, value, is_wanted in zip(grads, values, wanted, strict=True)
    ]


def why_small_is_slower(
    values: tuple[Any, ...], num_elements: int, least: int, least_with_gradients: int
) -> str | None:
    """None from `least` elements on, or `least_with_gradients` where autograd records the call, else a sentence.

    Under autograd a call of a registered operator costs 150 microseconds more than one of PyTorch's own."""
    has_gradients = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)
    fewest = max(1, least_with_gradients if has_gradients else least)
    if num_elements >= fewest:
        return None
    return (
        f"PyTorch's own operators take less time to call, which decides below {fewest} elements"
        f"{' with gradients' if has_gradients else ''}, got {num_elements}"
    )

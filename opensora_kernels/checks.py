"""Argument checks with one wording: `op: argument rule, got value`. Called once, at the public boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")


def check_callable(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a module, a function or anything else that can be called."""
    if not callable(value):
        raise TypeError(f"{op}: {name} must be callable, got {value!r}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | None], meaning: str) -> None:
    """Raise ValueError unless `tensor` has `shape` (None: any size); `meaning` names the axes, as in "(B, C)"."""
    sizes_agree = all(want is None or want == have for want, have in zip(shape, tensor.shape, strict=False))
    if tensor.dim() != len(shape) or not sizes_agree:
        wanted = f"({', '.join('*' if size is None else str(size) for size in shape)})"
        raise ValueError(f"{op}: {name} must have shape {meaning} = {wanted}, got {tuple(tensor.shape)}")


def check_choice(op: str, name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices` (a sequence or a Literal type)."""
    allowed = get_args(choices) or tuple(choices)
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {where}")


def check_mask(op: str, name: str, mask: Tensor) -> None:
    """Raise TypeError unless `mask` is a boolean tensor."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be boolean, got {mask.dtype}")

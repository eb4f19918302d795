"""Normalisation over channels: the `Norm` that a convolution applies to its input, and its plain PyTorch.

Axes: B batch, C channels, T frames, H height, W width, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .checks import check_choice, check_float, check_shape

NormKind = Literal["group", "rms"]

_PIECE_BYTES = 2 << 20  # in fp32, of what a CPU normalises at once


@dataclass(frozen=True)
class Norm:
    """A normalisation of x (B, C, T, H, W): GroupNorm over (C/G, T, H, W) or RMS over C at each position.

    weight, bias: (C,) or None. eps: added to the variance (group), or least length of the channel vector (rms).
    per_frame: group statistics over (C/G, H, W) of each frame. statistics: (B, C, T, 2) fp32, for "group" alone, as
    `causal_conv3d(return_statistics=True)` returns them; mean and variance are merged from them, not read from x.
    """

    kind: NormKind
    weight: Tensor | None = None
    bias: Tensor | None = None
    num_groups: int = 32
    eps: float = 1e-6
    per_frame: bool = False
    statistics: Tensor | None = None


# Tools that map over the tensors of a call (gradients, torch.export, tests) see those inside a Norm too.
pytree.register_dataclass(Norm)


def check_norm(op: str, x: Tensor, norm: Norm, prefix: str = "norm.") -> None:
    """Raise ValueError or TypeError unless `norm`, whose fields the caller calls by `prefix`, fits x_BCTHW."""
    check_choice(op, f"{prefix}kind", norm.kind, NormKind)
    for name, tensor in ((f"{prefix}weight", norm.weight), (f"{prefix}bias", norm.bias)):
        if tensor is not None:
            check_float(op, name, tensor)
            check_shape(op, name, tensor, (x.shape[1],), "(C,)")
    if norm.kind == "group" and (norm.num_groups < 1 or x.shape[1] % norm.num_groups):
        raise ValueError(f"{op}: {prefix}num_groups must divide the {x.shape[1]} channels, got {norm.num_groups}")
    if norm.statistics is not None:
        if norm.kind != "group":
            raise ValueError(f"{op}: {prefix}statistics must be None unless {prefix}kind is 'group', got a tensor")
        check_float(op, f"{prefix}statistics", norm.statistics)
        num_frames = x.shape[2] if norm.per_frame else None  # whole-clip statistics serve any chunk of the clip
        check_shape(op, f"{prefix}statistics", norm.statistics, (*x.shape[:2], num_frames, 2), "(B, C, T, 2)")
        if norm.statistics.shape[2] == 0 and x.shape[2] > 0:
            raise ValueError(f"{op}: {prefix}statistics must hold at least one frame, got none")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    statistics: Tensor | None,
) -> Tensor:
    """GroupNorm of x (B, C, T, H, W), statistics in fp32, rounded once."""
    if statistics is not None:
        return _group_norm_from(statistics, x, num_groups, weight, bias, eps, per_frame)
    if torch.is_grad_enabled() and x.device.type == "cpu":
        x, weight = _clear_of_faults(x, weight, bias)
    if not per_frame:
        # torch.group_norm, not F.group_norm: the latter refuses groups of one element
        return torch.group_norm(x, num_groups, weight, bias, eps)
    num_samples, _, num_frames = x.shape[:3]
    x_BTCHW = x.transpose(1, 2)
    folded = torch.group_norm(x_BTCHW.flatten(0, 1), num_groups, weight, bias, eps)
    return like(x, folded.unflatten(0, (num_samples, num_frames)).transpose(1, 2))


def rms_norm_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x / max(|x|, eps) * sqrt(C) * weight + bias over axis 1; the unit vector is rounded to x's dtype, as is each
    product after it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = _length(x, wide).clamp_min(eps)
    shape = (-1, *(1,) * (x.dim() - 2))
    weight, bias = (value if value is None else value.view(shape) for value in (weight, bias))
    dtypes = {value.dtype for value in (weight, bias) if value is not None}
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or dtypes - {x.dtype}:
        out = (x / length).to(x.dtype) * x.shape[1] ** 0.5
        out = out if weight is None else out * weight
        return out if bias is None else out + bias
    out = torch.empty_like(x)  # the same roundings in one clip
    num_rows = max(1, x.shape[-2]) if wide == x.dtype else _rows_at_once(x, wide)
    for pieces in zip(*(tensor.split(num_rows, -2) for tensor in (x, length, out)), strict=True):
        torch.div(*pieces[:2], out=pieces[2])
    out.mul_(x.shape[1] ** 0.5)
    out = out if weight is None else out.mul_(weight)
    return out if bias is None else out.add_(bias)


def _length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm over axis 1 in `dtype`."""
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not is_plain or not _is_on_cpu(x) or not x.numel():
        return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    pieces = x.split(_rows_at_once(x, dtype), -2)
    if x.is_meta:  # the first piece stands for all: planning takes less time
        _length_by_halves(pieces[0], dtype)
        return x.new_empty((x.shape[0], 1, *x.shape[2:]), dtype=dtype)
    return torch.cat([_length_by_halves(piece, dtype) for piece in pieces], -2)


def _length_by_halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half of the channels' squares added to the other half until one is left.

    On a CPU in a half to a twentieth of vector_norm's time, and every position rounds alike, so that chunks have the
    bits of the whole clip; torch.sum adds in an order that depends on where in memory the position lies.
    """
    wide = x.to(dtype)
    squares = wide.square() if wide is x else wide.square_()
    num_left = x.shape[1]
    while num_left > 1:
        half = num_left // 2
        squares[:, :half].add_(squares[:, num_left - half : num_left])
        num_left -= half
    return squares[:, :1].sqrt()


def _rows_at_once(x: Tensor, dtype: torch.dtype) -> int:
    """On a CPU those of a piece, of which copies in `dtype` may be made; elsewhere all."""
    if not _is_on_cpu(x) or x.dim() < 4:
        return max(1, x.shape[-2])
    return max(1, x.shape[-2] * _PIECE_BYTES // max(1, x.numel() * dtype.itemsize))


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type in ("cpu", "meta")


def frame_statistics(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations over (H, W) of each frame and channel: (B, C, T, 2), fp32.

    Sums of squared deviations merge exactly (Chan's formula); sums of squares would cancel: at mean 30, deviation 0.1,
    fp32 keeps no digit of their difference.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean((3, 4))
    return torch.stack([mean, (wide - mean[..., None, None]).square().sum((3, 4))], -1)


def group_statistics(x: Tensor, num_groups: int) -> Tensor:
    """`frame_statistics` for a GroupNorm alone: each channel has the mean and the deviations of all of its group.

    PyTorch's GroupNorm of single frames finds them, which takes a CPU a third of the time of `frame_statistics`.
    """
    num_samples, num_channels, _, height, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(num_channels, dtype=wide, device=x.device)  # its statistics have the dtype of the weight
    found = []
    for frame in x.unbind(2):
        sizes = (num_samples, num_channels, height * width, num_groups)
        _, mean, rstd = torch.native_group_norm(frame.contiguous(), ones, None, *sizes, 0.0)
        found.append(torch.stack([mean, rstd.pow(-2) * (height * width)], -1))
    return torch.stack(found, 2).repeat_interleave(num_channels // num_groups, 1)


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last if x (B, C, T, H, W) has its channels side by side, else contiguous."""
    has_channels_last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    return torch.channels_last_3d if has_channels_last else torch.contiguous_format


def like(x: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` dense in memory in x's order of axes: channels last if x's channels are, else contiguous."""
    return tensor.contiguous(memory_format=memory_format(x))


def _clear_of_faults(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same numbers in a form whose gradients torch.group_norm (2.13, CPU) finds: it crashes for the parameters of a
    channels-last x that wants no gradient itself, and raises RuntimeError for a bias without a weight."""
    if weight is None and bias is not None and bias.requires_grad:
        weight = torch.ones_like(bias)
    has_gradient = any(parameter is not None and parameter.requires_grad for parameter in (weight, bias))
    return x.contiguous() if has_gradient and not x.requires_grad else x, weight


def _is_one_pass(x: Tensor, per_frame: bool) -> bool:
    """Whether PyTorch's BatchNorm can apply statistics that it did not gather, and nobody wants gradients of them."""
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_plain and x.device.type in ("cpu", "meta") and x.shape[0] == 1 and not per_frame and x.numel() > 0


def _group_norm_from(
    statistics: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    frame_size = x.shape[3] * x.shape[4]
    mean, squares = statistics.to(wide).unflatten(1, (num_groups, -1)).unbind(-1)  # (B, G, C/G, T) each
    axes = (2,) if per_frame else (2, 3)
    num_frames_merged = mean.shape[2] * (1 if per_frame else mean.shape[3])
    group_mean = mean.mean(axes, keepdim=True)
    deviations = squares.sum(axes, keepdim=True) + frame_size * (mean - group_mean).square().sum(axes, keepdim=True)
    variance = deviations / (frame_size * num_frames_merged)
    if _is_one_pass(x, per_frame):
        mean, variance = (
            value.expand(-1, -1, x.shape[1] // num_groups, -1).flatten() for value in (group_mean, variance)
        )
        weight, bias = (value if value is None else value.to(wide) for value in (weight, bias))
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
    rstd = torch.rsqrt(variance + eps)

    channels_per_group = x.shape[1] // num_groups
    scale = rstd.expand(-1, -1, channels_per_group, -1).flatten(1, 2)  # (B, C, T or 1)
    group_mean = group_mean.expand(-1, -1, channels_per_group, -1).flatten(1, 2)
    if weight is not None:
        scale = scale * weight.to(wide)[:, None]
    shift = -group_mean * scale
    if bias is not None:
        shift = shift + bias.to(wide)[:, None]
    return (x * scale[..., None, None] + shift[..., None, None]).to(x.dtype)

"""Causal 3-D convolution with the norm and activation before it and the residual after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opensora_kernels import _extension, _triton, backends
from opensora_kernels.backends import Implementation
from opensora_kernels.causal_padding import (
    SpacePadding,
    TimePadding,
    as_triple,
    resolve_space_pad,
    resolve_time_pad,
)
from opensora_kernels.checks import check_choice, check_float, check_same_device, check_shape
from opensora_kernels.norms import Norm, check_norm
from opensora_kernels.registration import call, register_op

from . import cuda_forms, library, reference, triton_forms

__all__ = ["causal_conv3d"]

_NO_NORM = Norm("group", num_groups=1)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    time_padding: TimePadding = "zeros",
    space_padding: SpacePadding = "zeros",
    time_pad: int | None = None,
    space_pad: Sequence[int] | None = None,
    state: Tensor | None = None,
    norm: Norm | None = None,
    activation: Literal["silu"] | None = None,
    residual: Tensor | None = None,
    return_state: bool = False,
    return_statistics: bool = False,
    may_overwrite: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """conv3d(pad(silu(norm(x)))) + bias + residual, where no output frame reads an input frame after it.

    Shapes: x (B, C, T, H, W), weight (O, C / groups, kt, kh, kw), bias (O,), residual and result (B, O, T', H', W').
    Padding, in frames and pixels: `time_pad` frames in front (None: dilation * (kt - 1) + 1 - stride, so that T frames
    become T / stride), zeros or copies of the first frame; `space_pad` (left, right, top, bottom) (None:
    dilation * (k - 1) // 2 on each side) with zeros, the border or its reflection. time_padding="none" pads no frame.
    `norm` and `activation` act on x before the padding; zeros padded are zeros that the convolution reads.
    `state` (B, C, any, H, W) holds the frames before x as the convolution reads them, after norm and activation, and
    takes the place of the frames padded in front. With `return_state` the second result is the state for the frames
    that follow: running a clip in chunks of any length, each with the state of the one before, gives the frames of one
    run over the whole clip, provided that the norm does not look across frames (rms, per_frame, or given statistics).
    With `return_statistics` the last result is (B, O, T', 2) in fp32: mean and sum of squared deviations over (H', W')
    of each frame of the result, for `group_norm_silu(statistics=...)` or `Norm(statistics=...)` of the next layer.
    `may_overwrite`: nobody reads x again, and the result may take its memory, as it does on a CPU without gradients;
    without padding in time, that of the frames at the middle of each window.
    Returns the result alone, or a tuple (result[, state][, statistics]). channels_last_3d is kept.
    Numbers: accumulated in fp32; rounded to x's dtype after norm, after SiLU, after bias and after residual.
    Gradients: to every tensor, also through the returned state and statistics. The Triton and CUDA backends compute
    what the convolution read again from x, and keep the result if its statistics are returned.
    Errors: TypeError for dtypes that are not floating-point or differ; ValueError for shapes, devices, choices and
    sizes that break the rules above, fewer frames than one window, or a stride that skips frames with `return_state`.
    Source: CausalConv3d of Open-Sora v1.2.0 (opensora/models/vae/vae_temporal.py): the defaults; of Open-Sora-Plan
    v1.1.0 (opensora/models/ae/videobase/modules/conv.py): time_padding="replicate", time_pad=kt - 1.
    """
    op = "causal_conv3d"
    _check_tensors(x, weight, bias, groups, state, residual)
    strides, dilations = as_triple(op, "stride", stride), as_triple(op, "dilation", dilation)
    check_choice(op, "time_padding", time_padding, TimePadding)
    check_choice(op, "space_padding", space_padding, SpacePadding)
    if activation is not None:
        check_choice(op, "activation", activation, ("silu",))
    if norm is not None:
        check_norm(op, x, norm)
        check_same_device(op, x=x, norm_weight=norm.weight, norm_bias=norm.bias, statistics=norm.statistics)

    span = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    num_front = resolve_time_pad(op, time_pad, time_padding, span[0], strides[0])
    margins = resolve_space_pad(op, space_pad, space_padding, x.shape[3:], span[1:])
    padded_size = [
        x.shape[2] + (num_front if state is None else state.shape[2]),
        x.shape[3] + margins[2] + margins[3],
        x.shape[4] + margins[0] + margins[1],
    ]
    if any(have < need for have, need in zip(padded_size, span, strict=True)):
        raise ValueError(
            f"{op}: x must hold at least one window of T x H x W = {' x '.join(map(str, span))} once padded, "
            f"got {' x '.join(map(str, padded_size))}"
        )
    if return_state and strides[0] > span[0]:
        raise ValueError(
            f"{op}: stride must not skip frames with return_state: at most {span[0]} in time, got {strides[0]}"
        )
    if residual is not None:
        sizes = [(have - need) // step + 1 for have, need, step in zip(padded_size, span, strides, strict=True)]
        check_shape(op, "residual", residual, (x.shape[0], weight.shape[0], *sizes), "(B, O, T', H', W')")

    shown = norm or _NO_NORM
    values = (
        x, weight, bias, strides, dilations, groups, time_padding, space_padding, num_front, margins, state,
        "" if norm is None else norm.kind, shown.weight, shown.bias, shown.num_groups, shown.eps, shown.per_frame,
        shown.statistics, activation or "", residual, return_state, return_statistics,
    )  # fmt: skip
    out, *others = call(op, *values, instead=_in_memory_of_x if may_overwrite else None)
    if return_state:  # autocast may have narrowed it, but the next chunk's x is like this one's
        others = [others[0].to(x.dtype), *others[1:]]
    return (out, *others) if others else out


def _in_memory_of_x(*values: Any) -> list[Tensor] | None:
    room = library.room_for_result(*values)
    is_library = room is not None and backends.choose("causal_conv3d", *values) == "library"
    return library.causal_conv3d(*values, out=room) if is_library else None


def _check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, state: Tensor | None, residual: Tensor | None
) -> None:
    op = "causal_conv3d"
    check_float(op, "x", x)
    check_shape(op, "x", x, (None,) * 5, "(B, C, T, H, W)")
    check_float(op, "weight", weight)
    check_shape(op, "weight", weight, (None,) * 5, "(O, C / groups, kt, kh, kw)")
    if groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups must divide the {x.shape[1]} input and {weight.shape[0]} output channels, got {groups}"
        )
    check_shape(op, "weight", weight, (None, x.shape[1] // groups, None, None, None), "(O, C / groups, kt, kh, kw)")
    if min(weight.shape[0], *weight.shape[2:]) < 1:
        raise ValueError(f"{op}: weight must have outputs and taps, at least 1 of each, got {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        # under autocast PyTorch brings the convolution's inputs to one dtype itself
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "(O,)")
    if state is not None:
        check_shape(op, "state", state, (*x.shape[:2], None, *x.shape[3:]), "(B, C, any, H, W)")
        if state.dtype != x.dtype:
            raise TypeError(f"{op}: state must have x's dtype {x.dtype}, got {state.dtype}")
    check_same_device(op, x=x, weight=weight, bias=bias, state=state, residual=residual)


register_op(
    "causal_conv3d",
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] dilation, int groups, str time_padding, "
    "str space_padding, int time_pad, int[] space_pad, Tensor? state, str norm, Tensor? norm_weight, "
    "Tensor? norm_bias, int num_groups, float eps, bool per_frame, Tensor? statistics, str activation, "
    "Tensor? residual, bool return_state, bool return_statistics) -> Tensor[]",
    reference.causal_conv3d,
    keeps=lambda *values: values[-1],  # the gradient of its statistics needs the result
    casts=("x", "weight", "bias", "state", "residual"),
)
backends.register(
    "causal_conv3d",
    "library",
    Implementation(library.causal_conv3d, why_not=library.why_not, is_plain=True, why_slower=library.why_slower),
)
_triton.register("causal_conv3d", why_slower=triton_forms.why_slower)
_extension.register("causal_conv3d", "cuda", why_not=cuda_forms.why_not, why_slower=cuda_forms.why_slower)

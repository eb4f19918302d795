"""The forward pass of causal_conv3d, in one of two forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels._triton.convolution import convolve

from . import reference
from .triton_call import Call
from .triton_forms import LIBRARY, form_of
from .triton_prepare import prepared, source_of
from .triton_statistics import frame_statistics, moments

_OP = "causal_conv3d"


def forward(*values: Any) -> list[Tensor]:
    call = Call(*values)
    moments_BTG2 = moments(call) if call.norm == "group" else None
    if form_of(*values) == LIBRARY:
        out, hidden_BCTHW = _library_forward(call, moments_BTG2)
        statistics = reference.frame_statistics(out) if call.return_statistics else None
    else:
        out, statistics, hidden_BCTHW = _gemm_forward(call, moments_BTG2)
    return results_of(call, out, hidden_BCTHW, statistics)


def results_of(call: Call, out: Tensor, hidden_BCTHW: Tensor, statistics: Tensor | None) -> list[Tensor]:
    """What the operator returns; `hidden_BCTHW` is x after norm and activation."""
    results = [out]
    if call.return_state:
        num_frames_read = out.shape[2] * call.stride[0]
        results.append(
            reference.frames_from(num_frames_read, call.x, hidden_BCTHW, call.time_pad, call.time_padding, call.state)
        )
    return results if statistics is None else [*results, statistics]


def _gemm_forward(call: Call, moments_BTG2: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The result, its statistics, and x after norm and activation."""
    source = source_of(call, moments_BTG2)
    out = call.empty(call.out_shape)
    tiles = convolve(
        _OP, source, kernel_weight(call.weight), call.taps, out, groups=call.groups, bias=call.bias,
        residual=call.residual, wants_statistics=call.return_statistics,
    )  # fmt: skip
    statistics = None if tiles is None else frame_statistics(*tiles, num_positions=out.shape[3] * out.shape[4])
    return out, statistics, call.x if call.reads_x_itself else source.x_BTHWC.permute(0, 4, 1, 2, 3)


def kernel_weight(weight: Tensor) -> Tensor:
    """(O, taps, C / groups). Kernels that want it dense take it in place where the weight is channels last, else a copy
    (at 512 channels of 14 MB, a hundredth of such a layer's time)."""
    return weight.permute(0, 2, 3, 4, 1).flatten(1, 3)


def _library_forward(call: Call, moments_BTG2: Tensor | None) -> tuple[Tensor, Tensor]:
    padded_BCTHW = prepared(call, moments_BTG2, padded=True).permute(0, 4, 1, 2, 3)
    weight = call.weight.contiguous(memory_format=torch.channels_last_3d)
    out = F.conv3d(padded_BCTHW, weight, call.bias, call.stride, call.library_padding, call.dilation, call.groups)
    out = out.contiguous(memory_format=call.layout)
    if call.residual is not None:
        out.add_(call.residual)
    return out, without_padding(call, padded_BCTHW)


def without_padding(call: Call, padded_BCTHW: Tensor) -> Tensor:
    """x after norm and activation, inside what `prepared` padded."""
    left, _, top, _ = call.written_space_pad
    height, width = call.x.shape[3:]
    return padded_BCTHW[:, :, call.num_front :, top : top + height, left : left + width]

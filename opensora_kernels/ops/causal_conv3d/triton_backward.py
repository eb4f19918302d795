"""The backward pass of causal_conv3d: of statistics and residual, of the convolution, of the padding, of the norm.

What the convolution read is computed again from x. Axes as in triton_kernel; O output channels of all groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import launch, planes
from opensora_kernels._triton.convolution import Source, channels_last, convolve
from opensora_kernels._triton.convolution_gradients import fold_space, fold_time, input_gradient, weight_gradient
from opensora_kernels.norms import memory_format

from .triton_call import Call
from .triton_forms import LIBRARY, form_of
from .triton_forward import forward
from .triton_prepare import prepared, source_of
from .triton_prepare_backward import prepare_gradients
from .triton_statistics import moments, tile_of

_OP = "causal_conv3d"


def backward(grads: list[Tensor | None], wanted: list[bool], saved: list[Tensor], *values: Any) -> list[Tensor | None]:
    convolution_gradients = _library_gradients if form_of(*values) == LIBRARY else _gemm_gradients
    return gradients(forward, convolution_gradients, grads, wanted, saved, *values)


def gradients(
    forward: Callable[..., list[Tensor]],
    convolution_gradients: Callable[..., tuple[Tensor | None, int, Tensor | None, Tensor | None]],
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    *values: Any,
    gives_bias: bool = False,
) -> list[Tensor | None]:
    """The backward pass of a backend that computes `forward` and, by `convolution_gradients`, from (call, wanted,
    gradient of the result (B, T', H', W', O), moments of x's groups): the gradient of what the convolution read without
    its padding in space, the first frame of that (see `padded_gradient`), and the gradients of the weight and, with
    `gives_bias`, where the weight's is wanted, of the bias."""
    call, wanted = Call(*values), Call(*wanted)
    grad_out, *others = grads
    grad_state_out = others.pop(0) if call.return_state else None
    grad_statistics = others.pop(0) if call.return_statistics else None
    moments_BTG2 = moments(call) if call.norm == "group" else None
    found: dict[str, Tensor] = {}
    if grad_out is not None or grad_statistics is not None:
        results = saved or (forward(*values) if grad_statistics is not None else [])
        # with statistics the sums come before the gradient is rounded: what these owe to the bias nearly cancels
        gives_bias = gives_bias and wanted.weight and grad_statistics is None
        here = wanted._replace(bias=wanted.bias and not gives_bias)
        grad_BTHWO, found["bias"] = _result_gradient(call, here, grad_out, grad_statistics, results)
        there = wanted._replace(bias=wanted.bias and gives_bias)
        if wanted.residual:
            found["residual"] = grad_BTHWO.permute(0, 4, 1, 2, 3).to(call.residual.dtype, copy=True)
        grad_padded, first_frame, found["weight"], grad_bias = convolution_gradients(
            call, there, grad_BTHWO, moments_BTG2
        )
        if there.bias:
            found["bias"] = grad_bias
    elif wants_hidden(wanted):
        grad_padded, first_frame = padded_gradient(call, wanted, None)
    if wants_hidden(wanted):
        grad_hidden, found["state"] = _without_front(call, grad_padded, first_frame, grad_state_out)
        found |= prepare_gradients(call, wanted, grad_hidden, moments_BTG2)
    return [
        _given(found.get(name), value) if is_wanted else None
        for name, value, is_wanted in zip(Call._fields, values, wanted, strict=True)
    ]


def _given(grad: Tensor | None, value: Any) -> Tensor:
    """No output reached this value: its gradient is zero."""
    return torch.zeros_like(value) if grad is None else grad.to(value.dtype)


def _result_gradient(
    call: Call, wanted: Call, grad_out: Tensor | None, grad_statistics: Tensor | None, results: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Of the result, with what it owes to its statistics, as (B, T', H', W', O) dense; and that of the bias."""
    if grad_out is None:
        grad_out = torch.zeros(call.out_shape, dtype=call.x.dtype, device=call.x.device)
    grad_BOTP = planes(grad_out, memory_format(grad_out), per_frame=True)
    num_samples, num_out, num_frames, num_positions = grad_BOTP.shape
    out_BOTP, statistics, has_statistics = grad_BOTP, None, grad_statistics is not None
    if has_statistics:
        out_BOTP, statistics = planes(results[0], call.layout, per_frame=True), results[-1].contiguous()
        grad_statistics = grad_statistics.contiguous()
    is_dense = memory_format(grad_out) is torch.channels_last_3d and not has_statistics
    full_BTHWO = channels_last(grad_out) if is_dense else grad_out.new_empty(_moved(grad_out.shape))
    tile = tile_of("result gradient", num_positions, num_out, grad_out.dtype, grad_out.device)
    num_tiles = triton.cdiv(num_positions, tile["BLOCK_P"])
    sums_KO = torch.empty(
        num_samples * num_frames * num_tiles if wanted.bias else 0, num_out, dtype=torch.float32, device=grad_out.device
    )
    if wanted.bias or not is_dense:
        launch(
            _result_gradient_kernel,
            (num_samples * num_frames * num_tiles, triton.cdiv(num_out, tile["BLOCK_C"])),
            grad_BOTP, out_BOTP, statistics, grad_statistics, full_BTHWO, sums_KO,
            num_frames, num_positions, num_out, num_tiles, *grad_BOTP.stride(), *out_BOTP.stride(),
            HAS_STATISTICS=has_statistics, WANTS_FULL=not is_dense, WANTS_SUMS=wanted.bias, **tile,
        )  # fmt: skip
    return full_BTHWO, sums_KO.sum(0) if wanted.bias else None


def _moved(shape: torch.Size) -> list[int]:
    return [shape[0], *shape[2:], shape[1]]


def _gemm_gradients(
    call: Call, wanted: Call, grad_BTHWO: Tensor, moments_BTG2: Tensor | None
) -> tuple[Tensor | None, int, Tensor | None, None]:
    grad_weight = None
    if wanted.weight:
        source = source_of(call, moments_BTG2)
        grad_weight = weight_gradient(_OP, source, grad_BTHWO, call.taps, call.groups, call.weight.dtype)
    if not wants_hidden(wanted):
        return None, 0, grad_weight, None
    return *padded_gradient(call, wanted, grad_BTHWO), grad_weight, None


def _library_gradients(
    call: Call, wanted: Call, grad_BTHWO: Tensor, moments_BTG2: Tensor | None
) -> tuple[Tensor | None, int, Tensor | None, None]:
    """By PyTorch's convolution."""
    padded_BCTHW = prepared(call, moments_BTG2, padded=True).permute(0, 4, 1, 2, 3)
    weight = call.weight.contiguous(memory_format=torch.channels_last_3d)
    grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_BTHWO.permute(0, 4, 1, 2, 3), padded_BCTHW, weight, None, call.stride, call.library_padding,
        call.dilation, False, [0] * 3, call.groups, [wants_hidden(wanted), wanted.weight, False],
    )  # fmt: skip
    if grad_padded is not None:
        grad_padded = fold_space(grad_padded, call.written_space_pad, call.space_padding)
    return grad_padded, 0, grad_weight, None


def wants_hidden(wanted: Call) -> bool:
    return any((wanted.x, wanted.state, wanted.norm_weight, wanted.norm_bias, wanted.statistics))


def padded_gradient(
    call: Call, wanted: Call, grad_BTHWO: Tensor | None, convolve: Callable[..., Any] = convolve
) -> tuple[Tensor, int]:
    """Of what the convolution read, without the padding in space, from some frame on; and that frame, counted from
    the first in front of x. Frames of zeros in front, and a state that wants no gradient, are left out."""
    num_samples, num_channels = call.x.shape[:2]
    left, right, top, bottom = call.space_pad if call.space_padding != "zeros" else (0,) * 4
    has_copies = call.state is None and call.time_padding == "replicate"
    first_frame = 0 if has_copies or wanted.state else call.num_front
    height, width = call.x.shape[3:]
    shape = [num_samples, num_channels, call.padded_size[0] - first_frame, height + top + bottom, width + left + right]
    layout = call.layout if call.reads_x_itself else torch.channels_last_3d  # as its reader likes it
    grad = torch.empty(shape, dtype=call.x.dtype, device=call.x.device, memory_format=layout)
    if grad_BTHWO is None:
        grad.zero_()
    else:
        origin = [first_frame - (0 if call.state is not None else call.time_pad), -top, -left]
        input_gradient(_OP, Source(grad_BTHWO), call.weight, call.taps, grad, origin, call.groups, convolve)
    return fold_space(grad, [left, right, top, bottom], call.space_padding), first_frame


def _without_front(
    call: Call, grad: Tensor, first_frame: int, grad_state_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x after norm and activation, and of the state, with what both owe to the returned state."""
    if grad_state_out is not None:
        start = call.out_shape[2] * call.stride[0] - first_frame
        grad[:, :, max(start, 0) :].add_(grad_state_out[:, :, max(-start, 0) :])
    if call.state is None:
        return fold_time(grad, call.num_front - first_frame, call.time_padding), None
    num_state = call.num_front - first_frame
    return grad[:, :, num_state:], grad[:, :, :num_state]


@triton.jit
def _result_gradient_kernel(
    grad_ptr, out_ptr, statistics_ptr, grad_statistics_ptr, full_ptr, sums_ptr,
    num_frames, num_positions, num_out, num_tiles,
    stride_gb, stride_go, stride_gt, stride_gp, stride_ob, stride_oo, stride_ot, stride_op,
    HAS_STATISTICS: tl.constexpr, WANTS_FULL: tl.constexpr, WANTS_SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Memory bound. d mean / d out = 1 / P, d squares / d out = 2 (out - mean)."""
    plane_tile = tl.program_id(0).to(tl.int64)
    plane, tile = plane_tile // num_tiles, plane_tile % num_tiles
    sample, frame = plane // num_frames, plane % num_frames
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_o = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_p, mask_o = offs_p < num_positions, offs_o < num_out
    mask = mask_p[:, None] & mask_o[None, :]
    grad_ptr += sample * stride_gb + frame * stride_gt
    grad = tl.load(grad_ptr + offs_p[:, None] * stride_gp + offs_o[None, :] * stride_go, mask=mask, other=0.0)
    wide = grad.to(tl.float32)
    total_O = tl.sum(wide, 0)
    if HAS_STATISTICS:
        out_ptr += sample * stride_ob + frame * stride_ot
        out = tl.load(out_ptr + offs_p[:, None] * stride_op + offs_o[None, :] * stride_oo, mask=mask, other=0.0)
        offs_s = ((sample * num_out + offs_o) * num_frames + frame) * 2
        mean_O = tl.load(statistics_ptr + offs_s, mask=mask_o, other=0.0)
        grad_mean_O = tl.load(grad_statistics_ptr + offs_s, mask=mask_o, other=0.0) / num_positions
        grad_squares_O = tl.load(grad_statistics_ptr + offs_s + 1, mask=mask_o, other=0.0)
        wide += grad_mean_O[None, :] + 2.0 * (out.to(tl.float32) - mean_O[None, :]) * grad_squares_O[None, :]
        # of the deviations nothing: they add up to zero, but computed to the rounding of their mean
        total_O += grad_mean_O * tl.minimum(num_positions - tile * BLOCK_P, BLOCK_P).to(tl.float32)
    if WANTS_FULL:
        full_ptrs = full_ptr + (plane * num_positions + offs_p)[:, None] * num_out + offs_o[None, :]
        tl.store(full_ptrs, wide.to(grad.dtype), mask=mask)
    if WANTS_SUMS:
        tl.store(sums_ptr + plane_tile * num_out + offs_o, total_O, mask=mask_o)

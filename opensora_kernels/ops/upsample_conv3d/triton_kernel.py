"""upsample_conv3d in Triton.

In space the upsampled clip is never written: the rows and columns of the result with one remainder modulo 2 are a
convolution of the small clip, whose taps are sums of the original ones. In time that would save no multiplication (a
frame of the result reads as many frames of the small clip as of the large one), and it would not round where the
reference does: the large clip is written once, channels last. Axes: B, C, T, H, W; O output channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora_kernels._triton.convolution import Source, channels_last, convolve
from opensora_kernels._triton.convolution_gradients import fold_space, fold_time, input_gradient, weight_gradient
from opensora_kernels.norms import memory_format

from .triton_call import Call
from .triton_space import space_forward, space_input_gradient, space_weight_gradient
from .triton_time import upsample_time, upsample_time_gradient

_OP = "upsample_conv3d"


def forward(*values: Any) -> Tensor:
    call = Call(*values)
    return _convolved(call, _shares(call))


def backward(grads: list[Tensor | None], wanted: list[bool], saved: list[Tensor], *values: Any) -> list[Tensor | None]:
    call, wanted = Call(*values), Call(*wanted)
    grad, grad_upsampled, found = grads[0], None, {}
    shares = _shares(call)
    if shares is not None:
        if wanted.mix_factor:
            found["mix_factor"] = _mix_gradient(call, grad)
        grad_upsampled, grad = ((grad * share).to(grad.dtype) for share in shares.split(1))
    if wanted.bias:
        found["bias"] = grad.sum((0, 2, 3, 4), dtype=torch.float32)
    grad_BTHWO = channels_last(grad)
    if wanted.weight and call.has_phases:
        found["weight"] = space_weight_gradient(call, grad_BTHWO)
    elif wanted.weight:
        found["weight"] = weight_gradient(_OP, _source(call), grad_BTHWO, call.taps, 1, torch.float32)
    if wanted.x:
        found["x"] = _input_gradient(call, grad_BTHWO, grad_upsampled)
    return [
        found[name].reshape(value.shape).to(value.dtype) if is_wanted else None
        for name, value, is_wanted in zip(Call._fields, values, wanted, strict=True)
    ]


def _shares(call: Call) -> Tensor | None:
    """(2,): of the upsampled clip and of its convolution, rounded as PyTorch rounds them."""
    if call.mix_factor is None:
        return None
    share = torch.sigmoid(call.mix_factor.reshape(1))
    return torch.cat([share, 1 - share])


def _convolved(call: Call, shares: Tensor | None) -> Tensor:
    """The convolution, mixed with the upsampled clip if there are `shares`."""
    out = torch.empty(call.out_shape, dtype=call.x.dtype, device=call.x.device, memory_format=memory_format(call.x))
    if call.has_phases:
        space_forward(call, shares, out)
        return out
    source = _source(call)
    upsampled = None if shares is None else source.x_BTHWC.permute(0, 4, 1, 2, 3)
    weight_OKC = call.weight.permute(0, 2, 3, 4, 1).flatten(1, 3).contiguous()
    convolve(_OP, source, weight_OKC, call.taps, out, bias=call.bias, residual=upsampled, shares=shares)
    return out


def _source(call: Call) -> Source:
    return Source(_upsampled(call), None, call.time_padding, call.space_padding)


def _upsampled(call: Call) -> Tensor:
    """(B, T', H', W', C), contiguous."""
    if call.mode == "linear_time":
        return upsample_time(call.x)
    return channels_last(call.x).repeat_interleave(2, 2).repeat_interleave(2, 3)


def _mix_gradient(call: Call, grad: Tensor) -> Tensor:
    """The convolution is computed again: kept, it would take as much memory as the result."""
    difference = _upsampled(call).permute(0, 4, 1, 2, 3).to(torch.float32) - _convolved(call, None)
    share = torch.sigmoid(call.mix_factor.to(torch.float32))
    return (difference * grad).sum() * share * (1 - share)


def _input_gradient(call: Call, grad_BTHWO: Tensor, grad_upsampled: Tensor | None) -> Tensor:
    if call.has_phases:
        grad = space_input_gradient(call, grad_BTHWO)
        return grad if grad_upsampled is None else grad + _sum_of_four(grad_upsampled)
    left, right, top, bottom = call.space_pad if call.space_padding != "zeros" else (0,) * 4
    front = call.time_pad if call.time_padding == "replicate" else 0
    num_frames, height, width = call.upsampled_size
    sizes = [num_frames + front, height + top + bottom, width + left + right]
    padded = torch.empty(call.x.shape[0], *sizes, call.x.shape[1], dtype=call.x.dtype, device=call.x.device)
    padded = padded.permute(0, 4, 1, 2, 3)
    input_gradient(_OP, Source(grad_BTHWO), call.weight, call.taps, padded, [-front, -top, -left], 1)
    grad = fold_time(fold_space(padded, [left, right, top, bottom], call.space_padding), front, call.time_padding)
    if grad_upsampled is not None:
        grad = grad + grad_upsampled
    return upsample_time_gradient(grad, call.x) if call.mode == "linear_time" else _sum_of_four(grad)


def _sum_of_four(grad: Tensor) -> Tensor:
    """Of each pixel, from the square of four that it became."""
    return grad.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).sum((4, 6))

"""causal_conv3d by the compiled kernels of csrc/causal_conv3d*: the convolution and both of its gradients.

What lies around a convolution (norm, SiLU, layout, the gradients of statistics, bias and norm) is Triton's, as are the
forms of the gradients. Axes: B batch, C channels, T frames, H height, W width; O output channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora_kernels import _extension
from opensora_kernels._triton.convolution import Source, Taps, channels_last
from opensora_kernels.norms import like

from .triton_backward import gradients, padded_gradient, wants_hidden
from .triton_call import Call
from .triton_forward import kernel_weight, results_of, without_padding
from .triton_prepare import prepared, source_of
from .triton_statistics import moments

_SPACE_PADDINGS = ["zeros", "replicate", "reflect"]  # as csrc/causal_conv3d_shape.h counts them


def forward(*values: Any) -> list[Tensor]:
    call = Call(*values)
    source, taps, hidden_BCTHW = _source(call, moments(call) if call.norm == "group" else None)
    num_samples, num_out, *sizes = call.out_shape
    out = call.x.new_empty(num_samples, *sizes, num_out).permute(0, 4, 1, 2, 3)
    statistics = convolve(
        "causal_conv3d", source, kernel_weight(call.weight), taps, out, bias=call.bias, residual=call.residual,
        wants_statistics=call.return_statistics,
    )  # fmt: skip
    return results_of(call, like(call.x, out), hidden_BCTHW, statistics)


def backward(grads: list[Tensor | None], wanted: list[bool], saved: list[Tensor], *values: Any) -> list[Tensor | None]:
    return gradients(forward, _convolution_gradients, grads, wanted, saved, *values, gives_bias=True)


def convolve(
    op: str,
    source: Source,
    weight_OKC: Tensor,
    taps: tuple[Taps, Taps, Taps],
    out: Tensor,
    *,
    groups: int = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    wants_statistics: bool = False,
) -> Tensor | None:
    """As Triton's `convolve`, but for one group and without shares; returns the statistics (B, O, T', 2) of frames."""
    out_BTHWO = out.permute(0, 2, 3, 4, 1)
    dense_BTHWO = out_BTHWO if _is_dense(out_BTHWO) else torch.empty_like(out_BTHWO, memory_format=_DENSE)
    statistics = None
    if wants_statistics:
        statistics = out.new_empty(*out.shape[:2], out.shape[2], 2, dtype=torch.float32)
    torch.ops.opensora_kernels.causal_conv3d_cuda_forward(
        *_frames(source), _dense(weight_OKC.transpose(0, 1)), None if bias is None else _dense(bias),
        None if residual is None else _dense(residual.permute(0, 2, 3, 4, 1)), *_window(source, taps), dense_BTHWO,
        statistics,
    )  # fmt: skip
    if dense_BTHWO is not out_BTHWO:
        out_BTHWO.copy_(dense_BTHWO)
    return statistics


def _convolution_gradients(
    call: Call, wanted: Call, grad_BTHWO: Tensor, moments_BTG2: Tensor | None
) -> tuple[Tensor | None, int, Tensor | None, Tensor | None]:
    grad_weight, grad_bias = None, None
    if wanted.weight:
        source, taps, _ = _source(call, moments_BTG2)
        grad_weight, grad_bias = _weight_gradients(call, source, taps, grad_BTHWO, wanted.bias)
    if not wants_hidden(wanted):
        return None, 0, grad_weight, grad_bias
    return *padded_gradient(call, wanted, grad_BTHWO, convolve), grad_weight, grad_bias


def _weight_gradients(
    call: Call, source: Source, taps: tuple[Taps, Taps, Taps], grad_BTHWO: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Of the weight and of the bias, which is one more column of the same product."""
    num_out, num_channels, *kernel = call.weight.shape
    num_taps = kernel[0] * kernel[1] * kernel[2]
    grad_KOC = torch.empty(num_taps, num_out, num_channels, dtype=torch.float32, device=call.x.device)
    grad_bias = grad_KOC.new_empty(num_out) if wants_bias else None
    torch.ops.opensora_kernels.causal_conv3d_cuda_weight_gradient(
        *_frames(source), _dense(grad_BTHWO), *_window(source, taps), grad_KOC, grad_bias
    )
    return grad_KOC.unflatten(0, kernel).permute(3, 4, 0, 1, 2).to(call.weight.dtype), grad_bias


def _source(call: Call, moments_BTG2: Tensor | None) -> tuple[Source, tuple[Taps, Taps, Taps], Tensor]:
    """What the convolution reads, by which taps, and in it x after norm and activation.

    The copy engine of an H100 fills borders with zeros alone; others are written by the pass that writes x after its
    norm. The kernel for other GPUs computes where a border comes from.
    """
    if not (_has_copy_engine(call.x.device) and call.space_padding != "zeros" and any(call.space_pad)):
        source = source_of(call, moments_BTG2)
        hidden_BCTHW = call.x if call.reads_x_itself else source.x_BTHWC.permute(0, 4, 1, 2, 3)
        if not any(call.space_pad):  # nothing outside a frame is read: any border will do, so the fastest one
            source = source._replace(space_padding="zeros")
        return source, call.taps, hidden_BCTHW
    padded_BTHWC = prepared(call, moments_BTG2, padded=True)
    taps = tuple(axis._replace(start=0) for axis in call.taps)
    return Source(padded_BTHWC), taps, without_padding(call, padded_BTHWC.permute(0, 4, 1, 2, 3))


def _has_copy_engine(device: torch.device) -> bool:
    return device.type == "cuda" and _extension.compute_capability(device.index) == (9, 0)


def _frames(source: Source) -> tuple[Tensor, Tensor | None]:
    """x and the state with strides of which the copy engine can be told: multiples of 16 bytes, never 0."""
    clips = []
    for clip_BTHWC in (source.x_BTHWC, source.state_BTHWC):
        if clip_BTHWC is not None:
            clip_BTHWC = channels_last(clip_BTHWC.permute(0, 4, 1, 2, 3))
            steps = [clip_BTHWC.stride(axis) for axis in (0, 1) if clip_BTHWC.shape[axis] > 1]
            if any(step <= 0 or step % 8 for step in steps) or clip_BTHWC.data_ptr() % 16:
                clip_BTHWC = clip_BTHWC.clone(memory_format=_DENSE)
        clips.append(clip_BTHWC)
    return clips[0], clips[1]


def _window(source: Source, taps: tuple[Taps, Taps, Taps]) -> tuple[Any, ...]:
    replicates_front = source.time_padding == "replicate" and source.state_BTHWC is None
    by_name = zip(*taps, strict=True)  # counts, steps, starts, dilations
    counts, steps, starts, dilations = (list(numbers) for numbers in by_name)
    return counts, steps, dilations, starts, replicates_front, _SPACE_PADDINGS.index(source.space_padding)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _dense(tensor: Tensor) -> Tensor:
    return tensor if _is_dense(tensor) else tensor.clone(memory_format=_DENSE)


_DENSE = torch.contiguous_format

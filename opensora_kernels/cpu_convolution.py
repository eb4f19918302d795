"""3-D convolution on a CPU by oneDNN, for clips of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from opensora_kernels.flags import Flag
from opensora_kernels.norms import memory_format

NUM_ROWS = 20480
"""PyTorch itself gives an fp32 convolution of one clip to oneDNN if B*C*T*H is larger (ConvParams::use_mkldnn)."""

LARGE_WEIGHTS = 48 << 20
"""Bytes that oneDNN reorders at each call for longer than it then computes with them, if they serve few positions."""

_foreseen = Flag("foreseen")


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """F.conv3d of tensors that want no gradient, in fp32 by oneDNN.

    PyTorch gives small clips to a kernel that copies every window: 27 clips of memory, and 1.2 to 15 times the time
    (torch 2.13, a Xeon, 2026-11-22: 3 frames of 26 x 26 with 128 channels, 5 of 98 x 98 with 16). It keeps those whose
    windows are less than a copy of the weights: 0.4 to 0.7 of oneDNN's time (2026-11-30: 68 to 288 positions with 768
    and 1024 channels; with 512, 28 MiB of weights, neither is faster).
    """
    if not is_for_onednn(x, weight, bias):
        if not _is_of_frames(x, weight, stride, padding):
            return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
        return clip_of(
            F.conv2d(pictures_of(x), weight[:, :, 0], bias, stride[1:], padding[1:], dilation[1:], groups), x
        )
    x, weight = (each.contiguous(memory_format=memory_format(x)) for each in (x, weight))  # it does not look at strides
    bias = bias if bias is None else bias.contiguous()
    if weight.shape[2] > 1 or stride[0] > 1 or padding[0] > 0:
        return _convolve(x, weight, bias, padding, stride, dilation, groups)
    # of 3-D kernels of one tap in time it chooses by the number of frames, and chunks would differ from the whole
    out = _convolve(pictures_of(x), weight[:, :, 0], bias, padding[1:], stride[1:], dilation[1:], groups)
    return clip_of(out, x)


def pictures_of(x: Tensor) -> Tensor:
    """The frames of x (B, C, T, H, W), sample after sample. Strides stay those of channels last, which flattening of
    single samples loses: PyTorch then copies the picture to convolve it."""
    if x.shape[0] == 1:
        return x[0].transpose(0, 1)
    return x[:, :, 0] if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def clip_of(pictures: Tensor, x: Tensor) -> Tensor:
    """The other way round, with the stride between samples that PyTorch knows channels last by, of a single one too."""
    return pictures.unsqueeze(2) if x.shape[2] == 1 else pictures.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _is_of_frames(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether each frame is convolved by itself and, as pictures, none is copied first."""
    if weight.shape[2] > 1 or stride[0] > 1 or padding[0] > 0 or not x.numel():
        return False
    return x.shape[2] == 1 or memory_format(x) is torch.channels_last_3d


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """By oneDNN, of images or clips; on paper PyTorch's convolution stands for it."""
    if not x.is_meta:
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    with _foreseen():
        run = F.conv2d if x.dim() == 4 else F.conv3d
        return run(x, weight, bias, stride, padding, dilation, groups)


def unfolds(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolution of x on a CPU, or on meta tensors for one, copies every window."""
    is_small = x.shape[0] == 1 and x.shape[:4].numel() <= NUM_ROWS
    is_simple = x.shape[1] == weight.shape[1] and min(weight.shape[-2:]) <= 3 and max(weight.shape[2:]) > 1
    return x.dtype is torch.float32 and is_small and is_simple and not _foreseen.is_on()


def is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `conv3d` goes past PyTorch's choice."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    if any(type(each) not in (Tensor, nn.Parameter) or each.dtype is not torch.float32 for each in tensors):
        return False
    if max(weight.shape[2:]) == 1:  # a matrix product, of which nothing is copied
        return False
    if weight.nbytes > LARGE_WEIGHTS and x.numel() // x.shape[1] < weight.shape[0]:
        return False
    if any(unpack_dual(each).tangent is not None for each in tensors):  # it has no forward-mode derivative
        return False
    mkldnn = torch.backends.mkldnn
    return x.device.type in ("cpu", "meta") and mkldnn.is_available() and mkldnn.enabled

"""Rivals of causal_conv3d and upsample_conv3d: chains of library calls, and diffusers' modules.

A chain returns the convolution's result alone, without state and statistics, which spares it a pass over the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norms import wan_rms_norm
from .registry import Arguments, first_reason, holding, is_given, peer, refuses

Layer = Callable[[Tensor], Tensor]


def _norm_and_activation(arguments: Arguments) -> Layer:
    norm, x = arguments.get("norm"), arguments["x"]
    layers: list[Layer] = []
    if norm is not None and norm.kind == "rms":
        layers.append(wan_rms_norm(x, norm.weight, norm.bias))
    elif norm is not None:
        layers.append(lambda x: F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    if arguments.get("activation") is not None:
        layers.append(F.silu)
    return partial(_chained, layers)


def _chained(layers: Iterable[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _with_residual(out: Tensor, arguments: Arguments) -> Tensor:
    return out if arguments.get("residual") is None else out + arguments["residual"]


def _not_a_plain_norm(arguments: Arguments) -> str | None:
    norm = arguments.get("norm")
    if norm is None:
        return None
    if norm.per_frame or norm.statistics is not None:
        return "its GroupNorm takes statistics of the whole clip, of this layer"
    if norm.kind == "rms" and (norm.weight is None or norm.eps > 1e-6):
        return "its RMS norm has a gamma and an eps of 1e-12"
    return "GroupNorm refuses an empty batch" if norm.kind == "group" and not arguments["x"].numel() else None


def _not_own_padding(arguments: Arguments) -> str | None:
    sizes = arguments["weight"].shape[2:]
    if is_given(arguments, "time_pad", "space_pad") or any(size % 2 == 0 for size in sizes):
        return "it pads k - 1 frames in front and k // 2 pixels on each side"
    return None


def _not_stride_one(arguments: Arguments) -> str | None:
    values = [arguments.get(name, 1) for name in ("stride", "dilation", "groups")]
    return None if values == [1, 1, 1] else "this adapter is made for stride, dilation and groups of one"


def _paddings(time: str, space: str) -> Callable[[Arguments], str | None]:
    def why_not(arguments: Arguments) -> str | None:
        asked = arguments.get("time_padding", "zeros"), arguments.get("space_padding", "zeros")
        return None if asked == (time, space) else f"it pads time by {time} and space by {space}"

    return why_not


_SAME_SHAPE = (_not_own_padding, _not_stride_one, _not_a_plain_norm)


def _pad_and_convolve(arguments: Arguments, *, channels_last: bool) -> Callable[[], Any]:
    x, weight, state = arguments["x"], arguments["weight"], arguments.get("state")
    before = _norm_and_activation(arguments)
    if channels_last:
        x, weight = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (x, weight))
    frames, height, width = (size - 1 for size in weight.shape[2:])
    mode = {"zeros": "constant", "replicate": "replicate"}[arguments.get("time_padding", "zeros")]

    def run() -> Tensor:
        padded = before(x)
        if state is not None:
            padded = torch.cat([state, padded], 2)
        elif mode == "constant":
            padded = F.pad(padded, (0, 0, 0, 0, frames, 0))
        else:
            padded = F.pad(padded, (width // 2, width // 2, height // 2, height // 2, frames, 0), mode=mode)
        left = 0 if mode == "replicate" and state is None else (0, height // 2, width // 2)
        return _with_residual(F.conv3d(padded, weight, arguments.get("bias"), padding=left), arguments)

    return run


def _not_a_torch_chain(arguments: Arguments) -> str | None:
    time, space = arguments.get("time_padding", "zeros"), arguments.get("space_padding", "zeros")
    is_continued = arguments.get("state") is not None
    if space == "zeros" and (time == "zeros" or is_continued):
        return None
    if (time, space) == ("replicate", "replicate") and not is_continued:
        return None
    return f"F.pad and F.conv3d do not pad time by {time} and space by {space} in one step"


_CHAIN = first_reason(*_SAME_SHAPE, _not_a_torch_chain)
peer("causal_conv3d", "torch", "F.pad, F.conv3d", _CHAIN)(partial(_pad_and_convolve, channels_last=False))
peer("causal_conv3d", "torch", "F.conv3d channels last", _CHAIN)(partial(_pad_and_convolve, channels_last=True))


def _with_convolution(
    arguments: Arguments, convolution: nn.Module, call: Callable[[Tensor], Tensor]
) -> Callable[[], Any]:
    """norm, SiLU and `call`, whose weights are those of `convolution`, then the residual."""
    before, x = _norm_and_activation(arguments), arguments["x"]
    holding(convolution, weight=arguments["weight"], bias=arguments.get("bias"))
    return lambda: _with_residual(call(before(x)), arguments)


@peer("causal_conv3d", "diffusers", "WanCausalConv3d", first_reason(*_SAME_SHAPE, _paddings("zeros", "zeros")))
def _wan(arguments: Arguments) -> Callable[[], Any]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    module = WanCausalConv3d(1, 1, arguments["weight"].shape[2:], padding=_halves(arguments))
    return _with_convolution(arguments, module, partial(module, cache_x=arguments.get("state")))


_FIRST_FRAME = first_reason(
    *_SAME_SHAPE, _paddings("replicate", "zeros"), refuses("state", "this adapter does not continue a clip")
)


@peer("causal_conv3d", "diffusers", "CogVideoXCausalConv3d", _FIRST_FRAME)
def _cogvideox(arguments: Arguments) -> Callable[[], Any]:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    module = CogVideoXCausalConv3d(1, 1, tuple(arguments["weight"].shape[2:]))
    return _with_convolution(arguments, module.conv, lambda x: module(x)[0])


_REPLICATED = first_reason(
    *_SAME_SHAPE, _paddings("replicate", "replicate"), refuses("state", "this module does not continue a clip")
)


@peer("causal_conv3d", "diffusers", "HunyuanVideoCausalConv3d", _REPLICATED)
def _hunyuan(arguments: Arguments) -> Callable[[], Any]:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d

    module = HunyuanVideoCausalConv3d(1, 1, tuple(arguments["weight"].shape[2:]))
    return _with_convolution(arguments, module.conv, module)


def _halves(arguments: Arguments) -> tuple[int, ...]:
    return tuple(size // 2 for size in arguments["weight"].shape[2:])


def _not_a_wan_upsampler(arguments: Arguments) -> str | None:
    if arguments.get("mode", "nearest_space") != "nearest_space" or arguments["weight"].shape[2:] != (1, 3, 3):
        return "it doubles height and width, then convolves frames by 3 x 3"
    if arguments.get("space_padding", "zeros") != "zeros" or is_given(arguments, "time_pad", "space_pad"):
        return "it pads one pixel of zeros on each side"
    return None if arguments["x"].numel() else "nn.Upsample refuses an empty batch"


@peer("upsample_conv3d", "diffusers", "diffusers WanUpsample", _not_a_wan_upsampler)
def _wan_upsample(arguments: Arguments) -> Callable[[], Any]:
    """As in WanResample: frames are folded into the batch, upsampled and convolved as images."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

    x, weight, bias = arguments["x"], arguments["weight"][:, :, 0], arguments.get("bias")
    upsample = WanUpsample(scale_factor=(2.0, 2.0), mode="nearest-exact")

    def run() -> Tensor:
        images = upsample(x.transpose(1, 2).flatten(0, 1))
        out = F.conv2d(images, weight, bias, padding=1)
        return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    return run

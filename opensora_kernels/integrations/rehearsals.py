"""How the owner of a module calls it: on a small input, and from one chunk to the next where there is a cache.

Each calls a forward of the module on x (B, C, T, H, W) and returns every result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .decoders import takes_first_chunk

Forward = Callable[..., Any]
Rehearsal = Callable[[nn.Module, Forward, Tensor], list[Tensor]]


def once(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x)]


def twice(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    """Modules that keep frames themselves."""
    first = forward(x)
    for part in module.modules():
        if hasattr(part, "is_first_chunk"):
            part.is_first_chunk = False
    return [first, forward(x.flip(2))]


def with_cache_argument(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x), forward(x, x[:, :, :1]), forward(x, x[:, :, -2:])]


def with_returned_cache(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    out, cache = forward(x)
    return [out, forward(x.flip(2), conv_cache=cache)[0]]


def with_changed_dict(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    cache = {"padding": None}
    return [forward(x, cache), forward(x.flip(2)[:, :, :2], cache)]


def with_either(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x, causal=True), forward(x, causal=False)]


def with_feature_list(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    cache: list[Any] = [None] * 3
    return [forward(x), forward(x[:, :, :1], cache, [0]), forward(x, cache, [0]), forward(x, cache, [0])]


def with_feature_list_of_decoder(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    cache: list[Any] = [None] * sum(1 for _ in module.modules())
    options = {"first_chunk": True} if takes_first_chunk(module) else {}
    chunks = [forward(x[:, :, :1], cache, [0], **options), *(forward(x[:, :, 1:], cache, [0]) for _ in range(2))]
    return [*chunks, *(place for place in cache if isinstance(place, Tensor))]


def with_latent_and_returned_cache(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    options = {}
    if hasattr(module.norm1, "conv_y"):
        options["zq"] = x[:, :1].expand(-1, module.norm1.conv_y.conv.in_channels, -1, -1, -1)
    out, cache = forward(x, None, **options)
    return [out, forward(x.flip(2), None, **options, conv_cache=cache)[0]]


def with_latent(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    latent = x.flip(2)
    clip = x[:, :1].expand(-1, module.norm_layer.num_channels, -1, -1, -1) * torch.linspace(
        0.5, 2, module.norm_layer.num_channels, dtype=x.dtype, device=x.device
    ).view(-1, 1, 1, 1)
    small = latent[:, :, :2, ::2, ::2]
    return [forward(clip, small)[0], forward(clip[:, :, :2], small[:, :, :1])[0], forward(clip[..., 1:], small)[0]]


def with_layer_cache(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    def norm_cache() -> dict[str, Any]:
        return {"mean": None, "var": None, "norm": {}, "add_conv": {"padding": None}}

    options = {}
    if hasattr(module.norm1, "conv_y"):
        options["zq"] = x[:, :1].expand(-1, module.norm1.conv_y.in_channels, -1, -1, -1)
    cache = {name: {"padding": None} for name in ("conv1", "conv2", "conv_shortcut")}
    cache |= {"norm1": norm_cache(), "norm2": norm_cache()}
    return [forward(x, None, cache, **options), forward(x.flip(2), None, cache, **options)]


def with_own_cache(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    options, cache = {}, module.make_cache()
    if hasattr(module.norm1, "conv_y"):
        options["zq"] = x[:, :1].expand(-1, module.norm1.conv_y.in_channels, -1, -1, -1)
    return [forward(x, cache, **options), forward(x.flip(2), cache, **options)]


def with_embedding(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    def options() -> dict[str, Any]:
        found: dict[str, Any] = {"generator": torch.Generator(x.device).manual_seed(0)}
        if module.scale_shift_table is not None:
            found["temb"] = x[:, :1, :1, :1, :1].expand(-1, module.scale_shift_table.numel(), -1, -1, -1)
        return found

    if hasattr(module.conv1, "is_causal"):
        return [forward(x, **options())]
    return [forward(x, **options(), causal=True), forward(x, **options(), causal=False)]


def with_embedding_of_none(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return twice(module, lambda x: forward(x, None), x)


def of_frames(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x[0].transpose(0, 1))]


def of_frames_alone(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x[0].transpose(0, 1), None)]


def of_odd_and_even(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x[:, :, :num_frames]) for num_frames in (1, 2, 3)]


def of_one_video(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    return [forward(x[0].transpose(0, 1), batch_size=1)]

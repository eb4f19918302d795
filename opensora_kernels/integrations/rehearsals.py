"""How the owner of a module calls it: on a small input, and from one chunk to the next where there is a cache.

Each calls a forward of the module on x (B, C, T, H, W) and returns every result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_kernels.cpu_steps import frame_by_frame

from .decoders import num_levels_in_time

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
    """Frame by frame, as large clips go. What the second chunk leaves in the caches speaks for those that follow.

    The levels that are called once for a chunk, as the decoder itself does, are stood in for: at released widths their
    weights would take 18 seconds (Wan 2.2 in bf16, one thread of a Xeon, 2026-11-30).
    """
    num_once = num_levels_in_time(module)
    for place, part in enumerate((module.mid_block, *module.up_blocks[:num_once])):
        following = [*module.up_blocks, module.conv_out][num_once] if place == num_once else None
        part.__dict__["forward"] = partial(_stand_in, part, place + 2, following)
    cache: list[Any] = [None] * sum(1 for _ in module.modules())
    options = {"first_chunk": True} if _takes_first_chunk(module) else {}
    with frame_by_frame():
        chunks = [forward(x[:, :, :1], cache, [0], **options), forward(x[:, :, 1:], cache, [0])]
    return [*chunks, *(place for place in cache if isinstance(place, Tensor))]


def _takes_first_chunk(decoder: nn.Module) -> bool:
    """Wan's do, Qwen-Image's do not. One that takes any argument is told, and left alone if it then fails."""
    taken = inspect.signature(type(decoder).forward).parameters.values()
    return any(parameter.name == "first_chunk" or parameter.kind is parameter.VAR_KEYWORD for parameter in taken)


def _stand_in(
    part: nn.Module,
    factor: int,
    following: nn.Module | None,
    x: Tensor,
    feat_cache: list[Any] | None = None,
    feat_idx: list[int] | None = None,
    first_chunk: bool | None = False,
) -> Tensor:
    """A level without weights whose result tells which one it is and how it was called. Later chunks get twice the
    frames, no two alike, and `following` as many channels as it reads."""
    out = factor * x + (1 if first_chunk else 2)
    if feat_cache is not None:
        place, feat_idx[0] = feat_idx[0], feat_idx[0] + 1
        earlier, feat_cache[place] = feat_cache[place], x.clone()
        out = out if earlier is None else torch.cat([out + earlier, earlier - out], 2)
    if following is None:
        return out
    num_channels = next(conv for conv in following.modules() if isinstance(conv, nn.Conv3d)).in_channels
    return torch.cat([out] * -(-num_channels // x.shape[1]), 1)[:, :num_channels]


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

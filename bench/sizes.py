"""Cases of growing size, one family for each operator: what `--quick` times, and the curves of cost against size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from opensora_kernels.cases import Case, Maker
from opensora_kernels.norms import Norm


@dataclass(frozen=True)
class Family:
    """Calls of one operator that differ in one size: `make(draw, size)`. On a GPU sizes are `factor` times larger."""

    axis: str
    sizes: tuple[int, ...]
    make: Callable[[Maker, int], dict[str, Any]]
    factor: int = 16


def cases_of_sizes(op: str, device: str) -> list[Case]:
    """Smallest first; each is named like `tokens=1024`."""
    family, flops = FAMILIES[op], import_module(f"opensora_kernels.ops.{op}.cases").CASES[0].flops
    sizes = [size * (family.factor if device == "cuda" else 1) for size in family.sizes]
    return [Case(f"{family.axis}={size}", _of_size(family, size), device == "cuda", flops) for size in sizes]


def _of_size(family: Family, size: int) -> Callable[[Maker], dict[str, Any]]:
    return lambda draw: family.make(draw, size)


def _attention(draw: Maker, tokens: int) -> dict[str, Any]:
    return {name: draw.normal(2, tokens, 8, 72) for name in "qkv"}


def _blend_tiles(draw: Maker, frames: int) -> dict[str, Any]:
    tiles = [[draw.normal(1, 3, frames, 64, 64) for _ in range(3)] for _ in range(2)]
    return {"tiles": tiles, "overlap": (16, 16)}


def _causal_conv3d(draw: Maker, frames: int) -> dict[str, Any]:
    arguments = {"x": draw.normal(1, 32, frames, 32, 32), "weight": draw.normal(32, 32, 3, 3, 3, std=1 / 30)}
    scale, shift = draw.normal(32, mean=1.0, std=0.1), draw.normal(32, std=0.1)
    arguments |= {"bias": draw.normal(32), "norm": Norm("group", scale, shift, 32), "activation": "silu"}
    return arguments | {"residual": draw.normal(1, 32, frames, 32, 32)}


def _gate_residual(draw: Maker, tokens: int) -> dict[str, Any]:
    arguments = {name: draw.normal(2, tokens, 576) for name in "xy"}
    return arguments | {"gate": draw.normal(2, 576, std=0.5)}


def _group_norm_silu(draw: Maker, frames: int) -> dict[str, Any]:
    weight, bias = draw.normal(64, mean=1.0, std=0.1), draw.normal(64, std=0.1)
    return {"x": draw.normal(1, 64, frames, 48, 48, mean=0.5), "num_groups": 32, "weight": weight, "bias": bias}


def _guided_euler_step(draw: Maker, frames: int) -> dict[str, Any]:
    z, velocity = draw.normal(1, 4, frames, 90, 160), draw.normal(2, 4, frames, 90, 160)
    return {"z": z, "velocity": velocity, "dt": draw.normal(1, mean=0.03, std=0.01), "guidance_scale": 7.0}


def _modulate(draw: Maker, tokens: int) -> dict[str, Any]:
    x = draw.normal(2, tokens, 576)
    return {"x": x, "shift": draw.normal(2, 576, std=0.5), "scale": draw.normal(2, 576, std=0.5)}


def _pack_shards(draw: Maker, tokens: int) -> dict[str, Any]:
    return {"tensors": list(draw.normal(2, tokens, 3, 8, 72).unbind(-3)), "num_shards": 8, "dim": -2}


def _qk_norm(draw: Maker, tokens: int) -> dict[str, Any]:
    q, k, _ = draw.normal(2, tokens, 3, 8, 72).unbind(-3)
    angles = torch.outer(torch.arange(tokens).float(), 10000 ** (-torch.arange(0, 72, 2) / 72))
    cos, sin = (table.bfloat16().to(draw.device, draw.dtype) for table in (angles.cos(), angles.sin()))
    weights = {f"{name}_weight": draw.normal(72, mean=1.0, std=0.1) for name in "qk"}
    return {"q": q, "k": k, "cos": cos, "sin": sin, **weights}


def _qk_norm_attention(draw: Maker, tokens: int) -> dict[str, Any]:
    return _qk_norm(draw, tokens) | {"v": draw.normal(2, tokens, 8, 72)}


def _rms_norm(draw: Maker, tokens: int) -> dict[str, Any]:
    return {"x": draw.normal(2, tokens, 1152), "weight": draw.normal(1152, mean=1.0, std=0.1)}


def _rms_norm_silu(draw: Maker, pixels: int) -> dict[str, Any]:
    return {"x": draw.normal(1, 96, 2, 32, pixels // 64), "weight": draw.normal(96, mean=1.0, std=0.1)}


def _unpack_shards(draw: Maker, tokens: int) -> dict[str, Any]:
    shape = (2, tokens, 2, 72)
    return {"packed": draw.normal(3 * tokens * 288), "shape": shape, "num_shards": 8, "dim": -3, "num_tensors": 3}


def _upsample_conv3d(draw: Maker, frames: int) -> dict[str, Any]:
    weight = draw.normal(32, 32, 1, 3, 3, std=1 / 17)
    return {"x": draw.normal(1, 32, frames, 24, 24), "weight": weight, "bias": draw.normal(32)}


_TOKENS, _FRAMES = (256, 1024, 4096), (2, 5, 13)
FAMILIES = {
    "attention": Family("tokens", (64, 256, 768), _attention, factor=8),
    "blend_tiles": Family("frames", _FRAMES, _blend_tiles),
    "causal_conv3d": Family("frames", _FRAMES, _causal_conv3d),
    "gate_residual": Family("tokens", _TOKENS, _gate_residual),
    "group_norm_silu": Family("frames", _FRAMES, _group_norm_silu),
    "guided_euler_step": Family("frames", _FRAMES, _guided_euler_step),
    "modulate": Family("tokens", _TOKENS, _modulate),
    "pack_shards": Family("tokens", _TOKENS, _pack_shards),
    "qk_norm_attention": Family("tokens", (64, 256, 768), _qk_norm_attention, factor=8),
    "qk_norm_rope": Family("tokens", (256, 1024, 2048), _qk_norm),
    "rms_norm": Family("tokens", _TOKENS, _rms_norm),
    "rms_norm_silu": Family("pixels", (2048, 8192, 32768), _rms_norm_silu),
    "unpack_shards": Family("tokens", _TOKENS, _unpack_shards),
    "upsample_conv3d": Family("frames", _FRAMES, _upsample_conv3d),
}

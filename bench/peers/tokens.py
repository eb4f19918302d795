"""Rivals of modulate, gate_residual, guided_euler_step and blend_tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import Arguments, first_reason, holding, peer, refuses

_NO_MASK = refuses("frame_mask", "it has one shift and scale for all frames of a sample")


def _is_wide(arguments: Arguments) -> str | None:
    is_wide = arguments["shift"].dtype != arguments["x"].dtype
    return "its result would have the dtype of shift and scale" if is_wide else None


@peer("modulate", "torch", "F.layer_norm, addcmul", first_reason(_NO_MASK, _is_wide))
def _torch_modulate(arguments: Arguments) -> Callable[[], Any]:
    x, shift, scale = (arguments[name] for name in ("x", "shift", "scale"))

    def run() -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=_eps(arguments)) if arguments.get("normalize", True) else x
        return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])

    return run


def _normalizes(arguments: Arguments) -> str | None:
    return None if arguments.get("normalize", True) else "it always normalizes"


@peer("modulate", "diffusers", "diffusers AdaLayerNorm", first_reason(_NO_MASK, _is_wide, _normalizes))
def _diffusers_modulate(arguments: Arguments) -> Callable[[], Any]:
    """Without its SiLU and projection of the time embedding, which modulate is not asked for."""
    from diffusers.models.normalization import AdaLayerNorm

    x, shift, scale = (arguments[name] for name in ("x", "shift", "scale"))
    module = AdaLayerNorm(1, output_dim=2 * x.shape[-1], norm_eps=_eps(arguments), chunk_dim=1)
    module.silu, module.linear = nn.Identity(), nn.Identity()
    table = torch.cat([shift, scale], 1)
    return lambda: module(x, temb=table)


@peer("modulate", "apex", "apex FusedLayerNorm", first_reason(_NO_MASK, _is_wide, _normalizes))
def _apex_modulate(arguments: Arguments) -> Callable[[], Any]:
    from apex.normalization.fused_layer_norm import fused_layer_norm

    x, shift, scale = (arguments[name] for name in ("x", "shift", "scale"))
    return lambda: torch.addcmul(shift[:, None], fused_layer_norm(x, x.shape[-1:], _eps(arguments)), 1 + scale[:, None])


@peer("modulate", "liger", "LigerLayerNorm", first_reason(_NO_MASK, _is_wide, _normalizes))
def _liger_modulate(arguments: Arguments) -> Callable[[], Any]:
    from liger_kernel.transformers import LigerLayerNorm

    x, shift, scale = (arguments[name] for name in ("x", "shift", "scale"))
    ones, zeros = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    module = holding(LigerLayerNorm(x.shape[-1], eps=_eps(arguments), bias=True), weight=ones, bias=zeros)
    return lambda: torch.addcmul(shift[:, None], module(x), 1 + scale[:, None])


_GATE_ALONE = first_reason(_NO_MASK, refuses("shift", "addcmul is the gated sum alone"))


@peer("gate_residual", "torch", "torch.addcmul", _GATE_ALONE)
def _torch_gate_residual(arguments: Arguments) -> Callable[[], Any]:
    x, y, gate = (arguments[name] for name in ("x", "y", "gate"))
    return lambda: torch.addcmul(x, gate[:, None], y)


def _not_lerp(arguments: Arguments) -> str | None:
    if arguments["guidance_scale"] is None:
        return "there is nothing to guide"
    z, velocity = arguments["z"], arguments["velocity"]
    return None if z.dtype == velocity.dtype else "torch.lerp and addcmul take tensors of one dtype"


_MOVES_ALL = refuses("frame_mask", "it moves all frames")


@peer("guided_euler_step", "torch", "torch.lerp, addcmul", first_reason(_MOVES_ALL, _not_lerp))
def _torch_guided_euler_step(arguments: Arguments) -> Callable[[], Any]:
    z, velocity, dt = (arguments[name] for name in ("z", "velocity", "dt"))

    def run() -> Tensor:
        conditional, null = velocity[:, : z.shape[1]].chunk(2)
        guided = torch.lerp(null, conditional, arguments["guidance_scale"])
        return torch.addcmul(z, dt[:, None, None, None, None], guided)

    return run


def _not_wan_blend(arguments: Arguments) -> str | None:
    if arguments["tiles"][0][0].dim() != 5:
        return "it takes tiles (B, C, T, H, W)"
    return "it writes into a tensor of its own" if arguments.get("out") is not None else None


@peer("blend_tiles", "diffusers", "diffusers Wan blend_v, _h", _not_wan_blend, has_gradient=False)
def _diffusers_blend_tiles(arguments: Arguments) -> Callable[[], Any]:
    """Its loops write into the tiles, so the call begins with a copy of them."""
    from diffusers import AutoencoderKLWan

    overlap, first = arguments["overlap"], arguments["tiles"][0][0]
    stride = arguments.get("stride") or (first.shape[-2] - overlap[0], first.shape[-1] - overlap[1])

    def run() -> Tensor:
        rows = [[tile.clone() for tile in row] for row in arguments["tiles"]]
        joined = []
        for i, row in enumerate(rows):
            kept = []
            for j, tile in enumerate(row):
                if i > 0:
                    tile = AutoencoderKLWan.blend_v(None, rows[i - 1][j], tile, overlap[0])
                if j > 0:
                    tile = AutoencoderKLWan.blend_h(None, row[j - 1], tile, overlap[1])
                kept.append(tile[..., : stride[0], : stride[1]])
            joined.append(torch.cat(kept, -1))
        return torch.cat(joined, -2)

    return run


def _eps(arguments: Arguments) -> float:
    return arguments.get("eps", 1e-6)

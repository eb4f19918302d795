"""Inputs of qk_norm_attention: views of packed qkv as the transformers make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    *leading: int,
    num_heads: int,
    head_size: int,
    is_temporal: bool = False,
    has_norm: bool = True,
    has_rope: bool = True,
    **options: Any,
) -> Callable[[Maker], dict[str, Any]]:
    """q, k, v as views of qkv (*leading, 3, N, D); `leading` ends in L, or in L and sites if `is_temporal`."""
    num_weights = num_heads * head_size if options.get("norm_scope") == "token" else head_size

    def make(draw: Maker) -> dict[str, Any]:
        views = draw.normal(*leading, 3, num_heads, head_size).unbind(-3)
        if 0 in leading:
            views = [view.new_empty(view.shape) for view in views]  # torch.library.opcheck can't copy an empty view
        arguments = dict(zip("qkv", (x.transpose(-4, -3) if is_temporal else x for x in views), strict=True)) | options
        if has_norm:
            arguments["q_weight"] = draw.normal(num_weights, mean=1.0, std=0.1)
            arguments["k_weight"] = draw.normal(num_weights, mean=1.0, std=0.1)
        if has_rope:
            positions = torch.arange(arguments["q"].shape[-3]).float()
            angles = torch.outer(positions, 10000 ** (-torch.arange(0, head_size, 2) / head_size))
            arguments["cos"] = angles.cos().bfloat16().to(draw.device, draw.dtype)
            arguments["sin"] = angles.sin().bfloat16().to(draw.device, draw.dtype)
        return arguments

    return make


def _flops(arguments: dict[str, Any]) -> int:
    return 4 * arguments["q"].numel() * arguments["q"].shape[-3]


CASES = [
    Case("small", _make(2, 6, num_heads=2, head_size=8), flops=_flops),
    Case("temporal", _make(2, 5, 3, num_heads=2, head_size=8, is_temporal=True), flops=_flops),
    Case("rope_norm", _make(2, 5, 3, num_heads=2, head_size=8, is_temporal=True, order="rope_norm"), flops=_flops),
    Case("half_token", _make(2, 6, num_heads=3, head_size=4, rope_layout="half", norm_scope="token"), flops=_flops),
    Case("only_norm", _make(2, 6, num_heads=2, head_size=8, has_rope=False, scale=0.2), flops=_flops),
    Case("plain", _make(2, 6, num_heads=2, head_size=8, has_norm=False, has_rope=False), flops=_flops),
    Case("odd", _make(3, 7, num_heads=5, head_size=18), flops=_flops),
    Case("size_one", _make(1, 1, num_heads=1, head_size=1, has_rope=False), flops=_flops),
    Case("empty_batch", _make(0, 6, num_heads=2, head_size=8), flops=_flops),
    Case(
        "stdit3_720p_4s_spatial",
        _make(60, 3600, num_heads=16, head_size=72, has_rope=False),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 spatial attention at 720p, 4 s, guided",
    ),
    Case(
        "stdit3_720p_2s_temporal",
        _make(2, 15, 3600, num_heads=16, head_size=72, is_temporal=True),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 temporal attention at 720p, 2 s, guided",
    ),
    Case(
        "stdit3_720p_4s_temporal",
        _make(2, 30, 3600, num_heads=16, head_size=72, is_temporal=True),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 temporal attention at 720p, 4 s, guided",
    ),
    Case(
        "stdit3_720p_16s_temporal",
        _make(2, 120, 3600, num_heads=16, head_size=72, is_temporal=True),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 temporal attention at 720p, 16 s, guided",
    ),
    Case(
        "stdit3_240p_2s_spatial",
        _make(30, 405, num_heads=16, head_size=72, has_rope=False),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 spatial attention at 240x426, 2 s, guided",
    ),
]

ERRORS = [
    BadCall("integer_v", lambda a: a | {"v": a["v"].int()}, TypeError, "qk_norm_attention: v must have a floating-poi"),
    BadCall("half_v", lambda a: a | {"v": a["v"].half()}, TypeError, "qk_norm_attention: v must have q's dtype"),
    BadCall(
        "short_v", lambda a: a | {"v": a["v"][:, 1:]}, ValueError, "qk_norm_attention: v must have shape that of q"
    ),
    BadCall("other_heads", lambda a: a | {"k": a["k"][..., :1, :]}, ValueError, "qk_norm_attention: k must have shape"),
    BadCall(
        "one_weight",
        lambda a: a | {"k_weight": None},
        ValueError,
        "qk_norm_attention: q_weight and k_weight must be given together",
    ),
    BadCall("empty_heads", lambda a: a | {"q": a["q"][..., :0]}, ValueError, r"D of at least 1, got \(2, 6, 2, 0\)"),
    BadCall("unknown_order", lambda a: a | {"order": "rope"}, ValueError, "qk_norm_attention: order must be one of"),
]

"""Inputs of qk_norm_rope: views of packed qkv as the transformers make them. Axes: L tokens, N heads, D head size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    *leading: int, num_heads: int, head_size: int, is_temporal: bool = False, **options: Any
) -> Callable[[Maker], dict[str, Any]]:
    """q, k as views of qkv (*leading, 3, N, D); `leading` ends in L, or in L and sites if `is_temporal`.

    `has_norm`, `has_rope` and `has_wide_angles` (cos and sin in at least fp32) shape the inputs; all other `options`
    are the operator's.
    """
    has_norm, has_rope = options.pop("has_norm", True), options.pop("has_rope", True)
    has_wide_angles = options.pop("has_wide_angles", False)
    num_weights = num_heads * head_size if options.get("norm_scope") == "token" else head_size

    def make(draw: Maker) -> dict[str, Any]:
        q, k, _ = draw.normal(*leading, 3, num_heads, head_size).unbind(-3)
        if 0 in leading:
            q, k = q.new_empty(q.shape), k.new_empty(k.shape)  # torch.library.opcheck can't copy an empty view
        if is_temporal:
            q, k = q.transpose(-4, -3), k.transpose(-4, -3)
        arguments = {"q": q, "k": k, **options}
        if has_norm:
            arguments["q_weight"] = draw.normal(num_weights, mean=1.0, std=0.1)
            arguments["k_weight"] = draw.normal(num_weights, mean=1.0, std=0.1)
        if has_rope:
            dtype = torch.promote_types(draw.dtype, torch.float32) if has_wide_angles else draw.dtype
            angles = _angles(q.shape[-3], head_size)
            arguments["cos"] = angles.cos().bfloat16().to(draw.device, dtype)
            arguments["sin"] = angles.sin().bfloat16().to(draw.device, dtype)
        return arguments

    return make


def _angles(num_tokens: int, head_size: int) -> Tensor:
    return torch.outer(torch.arange(num_tokens).float(), 10000 ** (-torch.arange(0, head_size, 2) / head_size))


def _flops(arguments: dict[str, Any]) -> int:
    return 10 * (arguments["q"].numel() + arguments["k"].numel())  # norm: 4 per element, rotation: 6


_SMALL = _make(2, 6, num_heads=2, head_size=8)

CASES = [
    Case("small", _SMALL, flops=_flops),
    Case("temporal", _make(2, 5, 3, num_heads=2, head_size=8, is_temporal=True), flops=_flops),
    Case("rope_norm", _make(2, 5, 3, num_heads=2, head_size=8, is_temporal=True, order="rope_norm"), flops=_flops),
    Case("half", _make(2, 6, num_heads=2, head_size=8, rope_layout="half"), flops=_flops),
    Case("half_rope_norm", _make(2, 6, num_heads=2, head_size=8, rope_layout="half", order="rope_norm"), flops=_flops),
    Case("token", _make(2, 6, num_heads=3, head_size=4, norm_scope="token"), flops=_flops),
    Case("token_rope_norm", _make(6, num_heads=3, head_size=4, norm_scope="token", order="rope_norm"), flops=_flops),
    Case("only_norm", _make(2, 6, num_heads=2, head_size=7, has_rope=False), flops=_flops),
    Case("only_rope", _make(2, 6, num_heads=2, head_size=8, has_norm=False), flops=_flops),
    Case("wide_angles", _make(2, 6, num_heads=2, head_size=8, has_wide_angles=True), flops=_flops),
    Case("odd", _make(3, 7, num_heads=5, head_size=18), flops=_flops),
    # eps 0.1: with so few elements the norm is nearly a sign, and a smaller eps leaves no gradient above rounding.
    Case("size_one", _make(1, 1, num_heads=1, head_size=2, eps=0.1), flops=_flops),
    Case("empty_batch", _make(0, 6, num_heads=2, head_size=8), flops=_flops),
    Case(
        "stdit3_720p_4s_spatial",
        _make(60, 3600, num_heads=16, head_size=72, has_rope=False),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 spatial attention at 720p, 4 s, guided",
    ),
    Case(
        "stdit3_720p_4s_temporal",
        _make(2, 30, 3600, num_heads=16, head_size=72, is_temporal=True),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 temporal attention at 720p, 4 s, guided",
    ),
    Case(
        "stdit2_240p_16f_temporal",
        _make(2, 16, 405, num_heads=16, head_size=72, is_temporal=True, order="rope_norm"),
        is_large=True,
        flops=_flops,
        source="STDiT2-XL/2 (v1.1 checkpoints) temporal attention at 240x426, 16 frames, guided",
    ),
    Case(
        "wan_2_1_1_3b",
        _make(1, 8190, num_heads=12, head_size=128, norm_scope="token"),
        is_large=True,
        flops=_flops,
        source="Wan 2.1 1.3B, a quarter of the tokens of 81 frames at 480x832",
    ),
    Case(
        "hunyuan_video",
        _make(1, 8100, num_heads=24, head_size=128),
        is_large=True,
        flops=_flops,
        source="HunyuanVideo, 17 frames at 544x960",
    ),
    Case(
        "ltx_video",
        _make(1, 4992, num_heads=32, head_size=64, norm_scope="token"),
        is_large=True,
        flops=_flops,
        source="LTX-Video, 161 frames at 512x768, rotation per head",
    ),
]

ERRORS = [
    BadCall("integer_q", lambda a: a | {"q": a["q"].int()}, TypeError, "qk_norm_rope: q must have a floating-point"),
    BadCall("two_axes", lambda a: a | {"q": a["q"][0, 0]}, ValueError, r"qk_norm_rope: q must have shape \(\*, L, N"),
    BadCall("fewer_keys_to_rotate", lambda a: a | {"k": a["k"][:, 1:]}, ValueError, "qk_norm_rope: k must have shape"),
    BadCall("other_heads", lambda a: a | {"k": a["k"][..., :1, :]}, ValueError, "qk_norm_rope: k must have shape"),
    BadCall(
        "one_weight",
        lambda a: a | {"k_weight": None},
        ValueError,
        "qk_norm_rope: q_weight and k_weight must be given together",
    ),
    BadCall("only_cos", lambda a: a | {"sin": None}, ValueError, "qk_norm_rope: cos and sin must be given together"),
    BadCall(
        "head_weight_for_token_scope",
        lambda a: a | {"norm_scope": "token"},
        ValueError,
        r"qk_norm_rope: q_weight must have shape \(N\*D,\) = \(16\), got \(8,\)",
    ),
    BadCall(
        "short_cos", lambda a: a | {"cos": a["cos"][1:]}, ValueError, r"qk_norm_rope: cos must have shape \(L, D/2"
    ),
    BadCall(
        "odd_head_size",
        lambda a: a | {"q": a["q"][..., :7], "k": a["k"][..., :7], "q_weight": None, "k_weight": None},
        ValueError,
        "qk_norm_rope: q must have an even head size D to be rotated, got 7",
    ),
    BadCall("unknown_order", lambda a: a | {"order": "rope"}, ValueError, "qk_norm_rope: order must be one of"),
    BadCall("unknown_layout", lambda a: a | {"rope_layout": "x"}, ValueError, "qk_norm_rope: rope_layout must be one"),
    BadCall("unknown_scope", lambda a: a | {"norm_scope": "x"}, ValueError, "qk_norm_rope: norm_scope must be one of"),
]

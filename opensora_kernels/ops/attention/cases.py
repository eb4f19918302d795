"""Inputs of attention: self-attention, and cross-attention to padded and packed text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    *leading: int,
    num_keys: int,
    num_heads: int,
    head_size: int,
    key_lengths: list[int] | None = None,
    is_packed: bool = False,
    scale: float | None = None,
) -> Callable[[Maker], dict[str, Any]]:
    """q (*leading, N, D) with `leading` ending in L; k, v with `num_keys` per sample, or altogether if packed."""

    def make(draw: Maker) -> dict[str, Any]:
        key_shape = (*(() if is_packed else leading[:-1]), num_keys, num_heads, head_size)
        arguments: dict[str, Any] = {"q": draw.normal(*leading, num_heads, head_size)}
        arguments |= {"k": draw.normal(*key_shape), "v": draw.normal(*key_shape), "scale": scale}
        if key_lengths is not None:
            arguments["key_lengths"] = torch.tensor(key_lengths, dtype=torch.int64, device=draw.device)
        return arguments

    return make


def _make_temporal(draw: Maker) -> dict[str, Any]:
    return dict(zip("qkv", (x.transpose(1, 2) for x in draw.normal(2, 5, 3, 3, 2, 8).unbind(3)), strict=True))


def _flops(arguments: dict[str, Any]) -> int:
    q, k, lengths = arguments["q"], arguments["k"], arguments.get("key_lengths")
    if lengths is None:
        return 4 * q.numel() * k.shape[-3]
    return 4 * q.shape[-3:].numel() * int(lengths.sum())


CASES = [
    Case("small", _make(2, 6, num_keys=5, num_heads=2, head_size=8), flops=_flops),
    Case("temporal_views", _make_temporal, flops=_flops),
    Case("no_batch", _make(6, num_keys=5, num_heads=2, head_size=8, scale=0.5), flops=_flops),
    Case("padded", _make(3, 6, num_keys=5, num_heads=2, head_size=8, key_lengths=[5, 1, 3]), flops=_flops),
    Case(
        "padded_with_an_empty_text", _make(2, 6, num_keys=5, num_heads=2, head_size=8, key_lengths=[0, 3]), flops=_flops
    ),
    Case(
        "packed",
        _make(3, 6, num_keys=9, num_heads=2, head_size=8, key_lengths=[4, 0, 3], is_packed=True),
        flops=_flops,
    ),
    Case("odd", _make(3, 7, num_keys=11, num_heads=5, head_size=9), flops=_flops),
    Case("size_one", _make(1, 1, num_keys=1, num_heads=1, head_size=1), flops=_flops),
    Case("no_keys", _make(2, 3, num_keys=0, num_heads=2, head_size=8), flops=_flops),
    Case("empty_batch", _make(0, 6, num_keys=5, num_heads=2, head_size=8), flops=_flops),
    Case(
        "empty_packed_batch",
        _make(0, 6, num_keys=0, num_heads=2, head_size=8, key_lengths=[], is_packed=True),
        flops=_flops,
    ),
    Case(
        "stdit3_720p_4s_spatial",
        _make(60, 3600, num_keys=3600, num_heads=16, head_size=72),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 spatial attention at 720p, 4 s, guided",
    ),
    Case(
        "stdit3_720p_4s_temporal",
        _make(7200, 30, num_keys=30, num_heads=16, head_size=72),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 temporal attention at 720p, 4 s, guided",
    ),
    Case(
        "stdit3_720p_4s_text",
        _make(2, 108000, num_keys=260, num_heads=16, head_size=72, key_lengths=[130, 130], is_packed=True),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 cross-attention at 720p, 4 s, guided, a text of 130 tokens",
    ),
    Case(
        "stdit3_240p_2s_text_padded",
        _make(2, 6075, num_keys=300, num_heads=16, head_size=72, key_lengths=[130, 130]),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 cross-attention at 240x426, 2 s, guided, a text of 130 in 300 tokens",
    ),
    Case(
        "cogvideox_2b",
        _make(2, 4444, num_keys=4444, num_heads=30, head_size=64),
        is_large=True,
        flops=_flops,
        source="CogVideoX-2B, a quarter of the tokens of 6 s at 480x720",
    ),
    Case(
        "open_sora_plan_1_2",
        _make(2, 6800, num_keys=6800, num_heads=24, head_size=96),
        is_large=True,
        flops=_flops,
        source="Open-Sora-Plan 1.2, 29 frames at 480p",
    ),
    Case(
        "wan_2_1_1_3b",
        _make(1, 8190, num_keys=8190, num_heads=12, head_size=128),
        is_large=True,
        flops=_flops,
        source="Wan 2.1 1.3B, a quarter of the tokens of 81 frames at 480x832",
    ),
]


def _packed(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"k": arguments["k"].flatten(0, 1), "v": arguments["v"].flatten(0, 1)}


ERRORS = [
    BadCall("integer_q", lambda a: a | {"q": a["q"].int()}, TypeError, "attention: q must have a floating-point dtype"),
    BadCall("half_v", lambda a: a | {"v": a["v"].half()}, TypeError, "attention: v must have q's dtype"),
    BadCall("two_axes", lambda a: a | {"q": a["q"][0, 0]}, ValueError, r"attention: q must have shape \(\*, L, N, D\)"),
    BadCall("empty_heads", lambda a: a | {"q": a["q"][..., :0]}, ValueError, r"D of at least 1, got \(2, 6, 2, 0\)"),
    BadCall("other_heads", lambda a: a | {"k": a["k"][..., :1, :]}, ValueError, "attention: k must have shape"),
    BadCall("short_v", lambda a: a | {"v": a["v"][:, 1:]}, ValueError, "attention: v must have shape that of k"),
    BadCall("packed_without_lengths", _packed, ValueError, "attention: key_lengths must be given for packed k"),
    BadCall(
        "packed_with_other_heads",
        lambda a: _packed(a) | {"k": a["k"].flatten(0, 1)[:, :1], "key_lengths": torch.tensor([5, 5])},
        ValueError,
        r"attention: k must have shape \(sum Lk, N, D\)",
    ),
    BadCall(
        "float_lengths",
        lambda a: a | {"key_lengths": torch.ones(2)},
        TypeError,
        "attention: key_lengths must be int32 or int64",
    ),
    BadCall(
        "lengths_of_another_batch",
        lambda a: a | {"key_lengths": torch.tensor([1, 2, 3])},
        ValueError,
        "attention: key_lengths must have shape",
    ),
]

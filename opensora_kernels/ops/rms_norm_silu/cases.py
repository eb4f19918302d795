"""Inputs of rms_norm_silu: small ones for tests, VAE layers of the releases for benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    *shape: int, has_weight: bool = True, has_bias: bool = False, channels_last: bool = False, **options: Any
) -> Callable[[Maker], dict[str, Any]]:
    def make(draw: Maker) -> dict[str, Any]:
        arguments = {"x": draw.normal(*shape)}
        if channels_last:
            arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last_3d)
        if has_weight:
            arguments["weight"] = draw.normal(shape[1], mean=1.0, std=0.1)
        if has_bias:
            arguments["bias"] = draw.normal(shape[1], std=0.1)
        return arguments | options

    return make


def _flops(arguments: Mapping[str, Any]) -> int:
    return 8 * arguments["x"].numel()


CASES = [
    Case("small", _make(2, 6, 3, 4, 5, has_bias=True), flops=_flops),
    Case("odd", _make(3, 37, 5, 7, 3), flops=_flops),
    Case("size_one", _make(1, 1, 1, 1, 1), flops=_flops),
    Case("empty_batch", _make(0, 4, 3, 4, 5), flops=_flops),
    Case("image", _make(2, 8, 5, 7), flops=_flops),
    Case("no_weight", _make(2, 4, 3, 4, 5, has_weight=False, activation=None), flops=_flops),
    Case("channels_last", _make(2, 4, 3, 4, 5, channels_last=True), flops=_flops),
    Case("channels_last_odd", _make(2, 37, 2, 3, 5, has_bias=True, channels_last=True), flops=_flops),
    Case("wan_2_1_96", _make(1, 96, 4, 480, 832), is_large=True, flops=_flops, source="Wan 2.1 decoder, 480 x 832"),
    Case(
        "wan_2_1_384", _make(1, 384, 2, 120, 208, channels_last=True), is_large=True, flops=_flops,
        source="Wan 2.1 decoder, 480 x 832",
    ),
    Case(
        "wan_2_2_1024", _make(1, 1024, 2, 88, 160), is_large=True, flops=_flops, source="Wan 2.2 decoder, 704 x 1280"
    ),
    Case("qwen_image_96", _make(1, 96, 1, 1328, 1328), is_large=True, flops=_flops, source="Qwen-Image decoder"),
]  # fmt: skip

ERRORS = [
    BadCall("integer_x", lambda a: a | {"x": a["x"].int()}, TypeError, "rms_norm_silu: x must have a floating-point"),
    BadCall("sequence", lambda a: a | {"x": a["x"][0, 0]}, ValueError, r"x must have shape \(B, C, T, H, W\) or"),
    BadCall("long_weight", lambda a: a | {"weight": a["weight"].repeat(2)}, ValueError, "weight must have shape"),
    BadCall("long_bias", lambda a: a | {"bias": a["bias"].repeat(2)}, ValueError, r"bias must have shape \(C,\)"),
    BadCall("unknown_activation", lambda a: a | {"activation": "relu"}, ValueError, "activation must be one of"),
]

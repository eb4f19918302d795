"""Inputs of group_norm_silu: small ones for tests, VAE layers of the releases for benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker
from opensora_kernels.norms import frame_statistics


def _make(
    shape: tuple[int, ...],
    num_groups: int,
    *,
    has_weight: bool = True,
    channels_last: bool = False,
    has_statistics: bool = False,
    **options: Any,
) -> Callable[[Maker], dict[str, Any]]:
    def make(draw: Maker) -> dict[str, Any]:
        arguments = {"x": draw.normal(*shape, mean=0.5), "num_groups": num_groups}
        if channels_last:
            arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last_3d)
        if has_weight:
            arguments["weight"] = draw.normal(shape[1], mean=1.0, std=0.1)
            arguments["bias"] = draw.normal(shape[1], std=0.1)
        if has_statistics:
            arguments["statistics"] = frame_statistics(arguments["x"])
        return arguments | options

    return make


def _flops(arguments: Mapping[str, Any]) -> int:
    return 10 * arguments["x"].numel()


def _layer(name: str, source: str, *args: Any, **options: Any) -> Case:
    return Case(name, _make(*args, **options), is_large=True, flops=_flops, source=source)


CASES = [
    Case("small", _make((2, 4, 3, 4, 5), 2), flops=_flops),
    Case("odd", _make((3, 6, 5, 7, 3), 3), flops=_flops),
    Case("size_one", _make((1, 4, 1, 1, 1), 1), flops=_flops),  # a single element would have no gradient to compare
    Case("empty_batch", _make((0, 4, 3, 4, 5), 2), flops=_flops),
    Case("image", _make((2, 8, 5, 7), 4), flops=_flops),
    Case("no_weight", _make((2, 4, 3, 4, 5), 2, has_weight=False, activation=None), flops=_flops),
    Case("per_frame", _make((2, 4, 3, 4, 5), 2, per_frame=True), flops=_flops),
    Case("per_frame_empty", _make((0, 4, 3, 4, 5), 2, per_frame=True), flops=_flops),
    Case("channels_last", _make((2, 4, 3, 4, 5), 2, channels_last=True), flops=_flops),
    Case("channels_last_per_frame", _make((2, 4, 3, 4, 5), 2, channels_last=True, per_frame=True), flops=_flops),
    Case("statistics", _make((2, 4, 3, 4, 5), 2, has_statistics=True), flops=_flops),
    Case("statistics_per_frame", _make((2, 4, 3, 4, 5), 2, has_statistics=True, per_frame=True), flops=_flops),
    Case("channels_last_statistics", _make((2, 4, 3, 4, 5), 2, channels_last=True, has_statistics=True), flops=_flops),
    _layer("open_sora_1_2_128", "Open-Sora 1.2 temporal VAE, 2048^2", (1, 128, 20, 256, 256), 32),
    _layer("open_sora_1_2_statistics", "Open-Sora 1.2 temporal VAE, 2048^2", (1, 128, 20, 256, 256), 32,
           has_statistics=True),
    _layer("plan_1_1_128", "Open-Sora-Plan 1.1 decoder, 65 x 256^2 window", (1, 128, 65, 256, 256), 32),
    _layer("plan_1_1_per_frame", "Open-Sora-Plan 1.1 encoder, 65 x 256^2 window", (1, 128, 65, 256, 256), 32,
           per_frame=True),
    _layer("hunyuan_256", "HunyuanVideo decoder, 256^2 tile", (1, 256, 31, 128, 128), 32, channels_last=True),
    _layer("hunyuan_512_statistics", "HunyuanVideo decoder, 256^2 tile", (1, 512, 16, 64, 64), 32, channels_last=True,
           has_statistics=True),
]  # fmt: skip

ERRORS = [
    BadCall("integer_x", lambda a: a | {"x": a["x"].int()}, TypeError, "group_norm_silu: x must have a floating-point"),
    BadCall("sequence", lambda a: a | {"x": a["x"][0, 0]}, ValueError, r"x must have shape \(B, C, T, H, W\) or"),
    BadCall("odd_groups", lambda a: a | {"num_groups": 3}, ValueError, "num_groups must divide the 4 channels, got 3"),
    BadCall("long_weight", lambda a: a | {"weight": a["weight"].repeat(2)}, ValueError, "weight must have shape"),
    BadCall("long_bias", lambda a: a | {"bias": a["bias"].repeat(2)}, ValueError, r"bias must have shape \(C,\)"),
    BadCall("unknown_activation", lambda a: a | {"activation": "relu"}, ValueError, "activation must be one of"),
    BadCall(
        "flat_statistics", lambda a: a | {"statistics": a["x"][..., 0, 0]}, ValueError,
        r"statistics must have shape \(B, C, T, 2\)",
    ),
]  # fmt: skip

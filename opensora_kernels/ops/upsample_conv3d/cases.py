"""Inputs of upsample_conv3d: small ones for tests, VAE layers of the releases for benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker

_PLAN = {"mode": "linear_time", "time_padding": "replicate"}


def _make(
    shape: tuple[int, int, int, int, int],
    num_out: int,
    kernel: tuple[int, int, int] = (1, 3, 3),
    *,
    mix: bool = False,
    channels_last: bool = False,
    **options: Any,
) -> Callable[[Maker], dict[str, Any]]:
    def make(draw: Maker) -> dict[str, Any]:
        fan_in = shape[1] * kernel[0] * kernel[1] * kernel[2]
        x = draw.normal(*shape)
        weight, bias = draw.normal(num_out, shape[1], *kernel, std=fan_in**-0.5), draw.normal(num_out)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        mixture = {"mix_factor": draw.normal(1, mean=2.0, std=0.1)} if mix else {}
        return {"x": x, "weight": weight, "bias": bias} | mixture | options

    return make


def _flops(arguments: Mapping[str, Any]) -> int:
    """Two per tap and channel pair. In space a pixel reads 2 x 2 different ones instead of 3 x 3."""
    x, weight = arguments["x"], arguments["weight"]
    num_samples, num_frames, pixels = x.shape[0], x.shape[2], x.shape[3] * x.shape[4]
    if arguments.get("mode", "nearest_space") == "linear_time":
        return 2 * weight.numel() * num_samples * (2 * num_frames - 1) * pixels
    taps = weight.shape[2] * (weight.shape[3] // 2 + 1) * (weight.shape[4] // 2 + 1)
    return 2 * weight.shape[0] * weight.shape[1] * taps * num_samples * num_frames * 4 * pixels


def _layer(name: str, source: str, *args: Any, **options: Any) -> Case:
    return Case(name, _make(*args, **options), is_large=True, flops=_flops, source=source)


CASES = [
    Case("small", _make((2, 3, 2, 4, 3), 4), flops=_flops),
    Case("odd", _make((1, 5, 3, 5, 7), 3, (3, 3, 3)), flops=_flops),
    Case("size_one", _make((1, 1, 1, 1, 1), 1), flops=_flops),
    Case("empty_batch", _make((0, 3, 2, 4, 3), 4), flops=_flops),
    Case("channels_last", _make((2, 4, 2, 4, 3), 6, channels_last=True, space_padding="replicate"), flops=_flops),
    Case("reflected", _make((1, 3, 2, 4, 3), 4, space_padding="reflect"), flops=_flops),
    Case("time", _make((2, 3, 4, 5, 3), 4, (3, 3, 3), **_PLAN), flops=_flops),
    Case("time_mixed", _make((2, 3, 5, 4, 3), 3, (3, 3, 3), mix=True, **_PLAN), flops=_flops),
    Case("time_mixed_one_frame", _make((1, 3, 1, 4, 3), 3, (3, 3, 3), mix=True, **_PLAN), flops=_flops),
    Case("time_empty_batch", _make((0, 3, 4, 4, 3), 3, (3, 3, 3), mix=True, **_PLAN), flops=_flops),
    _layer("plan_1_1_space_256", "Open-Sora-Plan 1.1 decoder, 65 x 256^2 window", (1, 256, 65, 128, 128), 256),
    _layer("plan_1_1_space_512", "Open-Sora-Plan 1.1 decoder, 65 x 256^2 window", (1, 512, 17, 32, 32), 512),
    _layer(
        "plan_1_1_time_512", "Open-Sora-Plan 1.1 decoder, 65 x 256^2 window", (1, 512, 33, 128, 128), 512, (3, 3, 3),
        mix=True, **_PLAN,
    ),
    _layer("wan_2_1_space_192", "Wan 2.1 decoder, 480 x 832", (1, 192, 4, 240, 416), 96),
]  # fmt: skip

ERRORS = [
    BadCall("integer_x", lambda a: a | {"x": a["x"].int()}, TypeError, "upsample_conv3d: x must have a floating-point"),
    BadCall("image", lambda a: a | {"x": a["x"][:, :, 0]}, ValueError, r"x must have shape \(B, C, T, H, W\)"),
    BadCall("narrow_weight", lambda a: a | {"weight": a["weight"][:, :2]}, ValueError, "weight must have shape"),
    BadCall("other_dtype", lambda a: a | {"weight": a["weight"].half()}, TypeError, "weight must have x's dtype"),
    BadCall("long_bias", lambda a: a | {"bias": a["bias"].repeat(2)}, ValueError, r"bias must have shape \(O,\)"),
    BadCall("unknown_mode", lambda a: a | {"mode": "cubic"}, ValueError, "mode must be one of"),
    BadCall("unknown_padding", lambda a: a | {"time_padding": "wrap"}, ValueError, "time_padding must be one of"),
    BadCall("unknown_border", lambda a: a | {"space_padding": "wrap"}, ValueError, "space_padding must be one of"),
    BadCall(
        "no_window", lambda a: a | {"weight": a["weight"].repeat(1, 1, 3, 1, 1), "time_padding": "none"}, ValueError,
        "at least one window",
    ),
    BadCall("mixed_shapes", lambda a: a | {"mix_factor": a["bias"][:1]}, ValueError, "mix_factor must be one number"),
]  # fmt: skip

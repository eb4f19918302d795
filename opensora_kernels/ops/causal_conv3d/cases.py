"""Inputs of causal_conv3d: small ones for tests, VAE layers of the releases for benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker
from opensora_kernels.norms import Norm

Shape = tuple[int, int, int, int, int]
_REPLICATE = {"time_padding": "replicate", "space_padding": "replicate"}


def _make(
    shape: Shape,
    num_out: int,
    kernel: tuple[int, int, int] = (3, 3, 3),
    *,
    groups: int = 1,
    norm: str = "",
    has_bias: bool = True,
    num_state: int | None = None,
    has_residual: bool = False,
    channels_last: bool = False,
    **options: Any,
) -> Callable[[Maker], dict[str, Any]]:
    def make(draw: Maker) -> dict[str, Any]:
        channels, fan_in = shape[1], shape[1] // groups * kernel[0] * kernel[1] * kernel[2]
        arguments = {"x": draw.normal(*shape), "weight": draw.normal(num_out, shape[1] // groups, *kernel)}
        arguments["weight"] = draw.normal(num_out, shape[1] // groups, *kernel, std=fan_in**-0.5)
        if channels_last:
            arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last_3d)
        if has_bias:
            arguments["bias"] = draw.normal(num_out)
        if norm:
            scale, shift = draw.normal(channels, mean=1.0, std=0.1), draw.normal(channels, std=0.1)
            num_groups = 32 if channels % 32 == 0 else 2
            arguments |= {"norm": Norm(norm, scale, shift, num_groups), "activation": "silu"}
        if num_state is not None:
            arguments["state"] = draw.normal(shape[0], channels, num_state, *shape[3:])
        if has_residual:  # of the usual case: kernel 3, stride 1, as many frames and pixels out as in
            arguments["residual"] = draw.normal(shape[0], num_out, *shape[2:])
        return arguments | ({"groups": groups} if groups > 1 else {}) | options

    return make


def _flops(arguments: Mapping[str, Any]) -> int:
    """Two per tap, channel pair and output position, as if the convolution kept T / stride frames and pixels."""
    weight, stride = arguments["weight"], arguments.get("stride", 1)
    steps = [stride] * 3 if isinstance(stride, int) else stride
    positions = arguments["x"].shape[0]
    for size, step in zip(arguments["x"].shape[2:], steps, strict=True):
        positions *= -(-size // step)
    return 2 * weight.numel() * positions


def _layer(name: str, source: str, shape: Shape, num_out: int, *args: Any, **options: Any) -> Case:
    return Case(name, _make(shape, num_out, *args, **options), is_large=True, flops=_flops, source=source)


_BLOCK: dict[str, Any] = {"norm": "group", "has_residual": True, "return_statistics": True}

CASES = [
    Case("small", _make((2, 4, 3, 5, 6), 4, norm="group", has_residual=True, return_state=True), flops=_flops),
    Case("plain", _make((2, 3, 4, 5, 6), 5), flops=_flops),
    Case("odd", _make((1, 5, 7, 9, 11), 3, (3, 3, 5), return_state=True), flops=_flops),
    Case("size_one", _make((1, 1, 1, 1, 1), 1), flops=_flops),
    Case("empty_batch", _make((0, 4, 3, 5, 6), 6, norm="group", return_state=True), flops=_flops),
    Case("statistics", _make((2, 4, 3, 5, 6), 4, norm="rms", return_statistics=True), flops=_flops),
    Case("channels_last", _make((2, 4, 3, 5, 6), 6, channels_last=True, **_REPLICATE), flops=_flops),
    Case("strided", _make((1, 4, 6, 7, 8), 4, stride=2, time_padding="replicate", time_pad=2), flops=_flops),
    Case("strided_in_time", _make((1, 4, 8, 5, 5), 4, stride=(2, 1, 1), return_state=True), flops=_flops),
    Case("dilated", _make((1, 2, 6, 8, 9), 3, dilation=(2, 1, 2), return_state=True), flops=_flops),
    Case("grouped", _make((2, 4, 3, 5, 6), 6, groups=2, has_bias=False), flops=_flops),
    Case("even_kernel", _make((1, 3, 5, 6, 7), 4, (2, 4, 2), space_pad=(0, 1, 1, 2), **_REPLICATE), flops=_flops),
    Case("right_and_bottom", _make((1, 3, 2, 6, 8), 4, (1, 3, 3), stride=(1, 2, 2), space_pad=(0, 1, 0, 1))),
    Case("reflected", _make((1, 3, 4, 5, 6), 4, space_padding="reflect", time_padding="replicate"), flops=_flops),
    Case("continued", _make((1, 3, 4, 5, 6), 4, num_state=2, return_state=True, space_padding="replicate")),
    Case("one_frame_continued", _make((1, 3, 1, 5, 6), 4, num_state=2, return_state=True), flops=_flops),
    Case("no_time_padding", _make((1, 3, 4, 5, 6), 4, time_padding="none"), flops=_flops),
    Case("pointwise", _make((2, 4, 3, 5, 6), 6, (1, 1, 1)), flops=_flops),
    # compiled kernels refuse channels that are not multiples of 8; tests/csrc has larger ones
    Case("eights", _make((1, 8, 2, 3, 4), 8, (3, 3, 1), norm="group", channels_last=True, **_REPLICATE)),
    _layer("open_sora_1_2_128", "Open-Sora 1.2 temporal VAE, 720p", (1, 128, 20, 90, 160), 128, **_BLOCK),
    _layer("open_sora_1_2_512", "Open-Sora 1.2 temporal VAE, 720p", (1, 512, 5, 90, 160), 512, **_BLOCK),
    _layer(
        "plan_1_1_128", "Open-Sora-Plan 1.1 decoder, 65 x 256^2 window", (1, 128, 65, 256, 256), 128,
        time_padding="replicate", **_BLOCK,
    ),
    _layer(
        "plan_1_1_256", "Open-Sora-Plan 1.1 decoder, 65 x 256^2 window", (1, 256, 65, 128, 128), 256,
        time_padding="replicate", **_BLOCK,
    ),
    _layer(
        "plan_1_1_time_down", "Open-Sora-Plan 1.1 encoder, 65 x 256^2 window", (1, 256, 65, 64, 64), 256,
        stride=(2, 1, 1), time_padding="replicate", time_pad=2,
    ),
    _layer(
        "wan_2_1_96", "Wan 2.1 decoder, 480 x 832", (1, 96, 4, 480, 832), 96,
        norm="rms", has_residual=True, num_state=2, return_state=True,
    ),
    _layer(
        "wan_2_1_384", "Wan 2.1 decoder, 480 x 832", (1, 384, 2, 120, 208), 384,
        norm="rms", has_residual=True, num_state=2, return_state=True,
    ),
    _layer("hunyuan_128", "HunyuanVideo decoder, 256^2 tile", (1, 128, 61, 256, 256), 128, **_REPLICATE, **_BLOCK),
    _layer("hunyuan_512", "HunyuanVideo decoder, 256^2 tile", (1, 512, 16, 32, 32), 512, **_REPLICATE, **_BLOCK),
]  # fmt: skip

ERRORS = [
    BadCall("integer_x", lambda a: a | {"x": a["x"].int()}, TypeError, "causal_conv3d: x must have a floating-point"),
    BadCall("image", lambda a: a | {"x": a["x"][:, :, 0]}, ValueError, r"x must have shape \(B, C, T, H, W\)"),
    BadCall(
        "flat_weight", lambda a: a | {"weight": a["weight"][..., 0]}, ValueError,
        r"causal_conv3d: weight must have shape \(O, C / groups, kt, kh, kw\)",
    ),
    BadCall("narrow_weight", lambda a: a | {"weight": a["weight"][:, :2]}, ValueError, "weight must have shape"),
    BadCall("no_outputs", lambda a: a | {"weight": a["weight"][:0]}, ValueError, "weight must have outputs and taps"),
    BadCall("no_taps", lambda a: a | {"weight": a["weight"][..., :0]}, ValueError, r"1 of each, got \(4, 4, 3, 3, 0\)"),
    BadCall("other_dtype", lambda a: a | {"weight": a["weight"].half()}, TypeError, "weight must have x's dtype"),
    BadCall("half_bias", lambda a: a | {"bias": a["bias"].half()}, TypeError, "bias must have x's dtype"),
    BadCall("half_residual", lambda a: a | {"residual": a["residual"].half()}, TypeError, "residual must have x's"),
    BadCall("long_bias", lambda a: a | {"bias": a["bias"].repeat(2)}, ValueError, r"bias must have shape \(O,\)"),
    BadCall("odd_groups", lambda a: a | {"groups": 3}, ValueError, "groups must divide the 4 input and 4 output"),
    BadCall("two_strides", lambda a: a | {"stride": (1, 2)}, ValueError, "stride must be a positive integer or three"),
    BadCall("no_dilation", lambda a: a | {"dilation": 0}, ValueError, "dilation must be a positive integer"),
    BadCall("unknown_padding", lambda a: a | {"time_padding": "reflect"}, ValueError, "time_padding must be one of"),
    BadCall("unknown_border", lambda a: a | {"space_padding": "wrap"}, ValueError, "space_padding must be one of"),
    BadCall("unknown_activation", lambda a: a | {"activation": "gelu"}, ValueError, "activation must be one of"),
    BadCall("padding_unasked", lambda a: a | {"time_padding": "none", "time_pad": 2}, ValueError, "time_pad must be"),
    BadCall("negative_padding", lambda a: a | {"time_pad": -1}, ValueError, "time_pad must be at least 0, got -1"),
    BadCall("two_margins", lambda a: a | {"space_pad": (1, 1)}, ValueError, "space_pad must be four sizes"),
    BadCall(
        "wide_reflection", lambda a: a | {"space_padding": "reflect", "space_pad": (9, 0, 0, 0)}, ValueError,
        "space_pad must be smaller than the frame",
    ),
    BadCall("no_window", lambda a: a | {"space_pad": (0, 0, 0, 0), "dilation": 4}, ValueError, "at least one window"),
    BadCall("skipping", lambda a: a | {"stride": (4, 1, 1), "residual": None}, ValueError, "must not skip frames"),
    BadCall("small_state", lambda a: a | {"state": a["x"][..., 1:]}, ValueError, "state must have shape"),
    BadCall("half_state", lambda a: a | {"state": a["x"].half()}, TypeError, "state must have x's dtype"),
    BadCall("short_residual", lambda a: a | {"residual": a["x"][:, :, 1:]}, ValueError, "residual must have shape"),
    BadCall(
        "residual_elsewhere", lambda a: a | {"residual": a["residual"].to("meta")}, ValueError,
        "all tensors must be on one device, got .*, residual on meta",
    ),
    BadCall(
        "odd_norm_groups", lambda a: a | {"norm": Norm("group", num_groups=3)}, ValueError,
        "num_groups must divide the 4 channels, got 3",
    ),
    BadCall("unknown_norm", lambda a: a | {"norm": Norm("layer")}, ValueError, "norm.kind must be one of"),
    BadCall(
        "long_norm_weight", lambda a: a | {"norm": Norm("rms", a["bias"].repeat(2))}, ValueError,
        r"norm.weight must have shape \(C,\)",
    ),
]  # fmt: skip

"""Inputs of rms_norm: small ones for tests, token norms of the releases for benches."""

from __future__ import annotations

from opensora_kernels.cases import BadCall, Case, Maker


def _make(*shape: int, has_weight: bool = True):  # noqa: ANN202
    def make(draw: Maker) -> dict:
        return {"x": draw.normal(*shape), "weight": draw.normal(shape[-1], mean=1.0, std=0.1) if has_weight else None}

    return make


def _flops(arguments: dict) -> int:
    return 4 * arguments["x"].numel()


CASES = [
    Case("small", _make(2, 6, 32), flops=_flops),
    Case("odd", _make(3, 5, 37), flops=_flops),
    Case("no_weight", _make(2, 3, 16, has_weight=False), flops=_flops),
    # eps of one half: with the usual eps the gradient of a single channel is a difference that cancels to nothing
    Case("size_one", lambda draw: {"x": draw.normal(1, 1, 1), "weight": draw.normal(1), "eps": 0.5}, flops=_flops),
    Case("empty_batch", _make(0, 4, 8), flops=_flops),
    Case("strided", lambda draw: {"x": draw.normal(3, 4, 16, 2)[..., 0], "weight": draw.normal(16)}, flops=_flops),
    Case("plan_caption_4096", _make(4, 300, 4096), is_large=True, flops=_flops, source="T5-XXL hidden states"),
    Case(
        "stdit3_720p_4s", _make(2, 108000, 1152), is_large=True, flops=_flops, source="STDiT3-XL/2 tokens at 720p, 4 s"
    ),
]

ERRORS = [
    BadCall("integer_x", lambda a: a | {"x": a["x"].int()}, TypeError, "rms_norm: x must have a floating-point dtype"),
    BadCall(
        "long_weight",
        lambda a: a | {"weight": a["weight"].repeat(2)},
        ValueError,
        r"rms_norm: weight must have shape \(C,\)",
    ),
]

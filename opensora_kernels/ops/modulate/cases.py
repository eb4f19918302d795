"""Inputs of modulate: tokens of STDiT blocks, with and without conditioning frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    batch: int,
    num_frames: int,
    num_sites: int,
    num_channels: int,
    *,
    has_mask: bool = True,
    has_wide_tables: bool = False,
    **options: Any,
) -> Callable[[Maker], dict[str, Any]]:
    """x of `num_frames` x `num_sites` tokens; `has_wide_tables`: shift and scale in at least fp32."""

    def make(draw: Maker) -> dict[str, Any]:
        dtype = torch.promote_types(draw.dtype, torch.float32) if has_wide_tables else draw.dtype
        arguments = {"x": draw.normal(batch, num_frames * num_sites, num_channels), **options}
        for name in ("shift", "scale", *(("shift0", "scale0") if has_mask else ())):
            arguments[name] = draw.normal(batch, num_channels, std=0.5, dtype=dtype)
        if has_mask:
            arguments["frame_mask"] = draw.mask(batch, num_frames)
        return arguments

    return make


def _make_strided(draw: Maker) -> dict[str, Any]:
    """x with gaps in memory; shift and scale as rows of one (B, 6, C) table."""
    table = draw.normal(2, 6, 8, std=0.5)
    x_BLC = draw.normal(2, 12, 8, 2)[..., 0]
    return {"x": x_BLC, "shift": table[:, 0], "scale": table[:, 1]}


def _flops(arguments: dict[str, Any]) -> int:
    return (8 if arguments.get("normalize", True) else 2) * arguments["x"].numel()


CASES = [
    Case("small", _make(2, 3, 4, 16), flops=_flops),
    Case("no_mask", _make(2, 3, 4, 16, has_mask=False), flops=_flops),
    Case("no_norm", _make(2, 3, 4, 16, normalize=False), flops=_flops),
    Case("no_norm_no_mask", _make(2, 3, 4, 16, has_mask=False, normalize=False), flops=_flops),
    Case("wide_tables", _make(2, 3, 4, 16, has_wide_tables=True), flops=_flops),
    Case("strided", _make_strided, flops=_flops),
    Case("odd", _make(3, 5, 7, 37), flops=_flops),
    # One channel: its LayerNorm is 0 and has no gradient, so the identity is what can be tested.
    Case("size_one", _make(1, 1, 1, 1, normalize=False), flops=_flops),
    Case("empty_batch", _make(0, 3, 4, 16), flops=_flops),
    Case(
        "stdit3_720p_4s",
        _make(2, 30, 3600, 1152),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 block at 720p, 4 s, guided, with frame mask",
    ),
    Case(
        "stdit3_720p_4s_no_mask",
        _make(2, 30, 3600, 1152, has_mask=False),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 block at 720p, 4 s, guided",
    ),
    Case(
        "stdit3_240p_2s",
        _make(2, 15, 405, 1152),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 block at 240x426, 2 s, guided, with frame mask",
    ),
]

ERRORS = [
    BadCall("integer_x", lambda a: a | {"x": a["x"].int()}, TypeError, "modulate: x must have a floating-point dtype"),
    BadCall(
        "flat_x", lambda a: a | {"x": a["x"].flatten(0, 1)}, ValueError, r"modulate: x must have shape \(B, L, C\)"
    ),
    BadCall(
        "short_shift", lambda a: a | {"shift": a["shift"][:1]}, ValueError, r"modulate: shift must have shape \(B, C"
    ),
    BadCall(
        "float_mask",
        lambda a: a | {"frame_mask": a["frame_mask"].float()},
        TypeError,
        "modulate: frame_mask must be boolean",
    ),
    BadCall(
        "frames_that_do_not_divide",
        lambda a: a | {"frame_mask": a["frame_mask"].repeat(1, 3)[:, :7]},
        ValueError,
        "modulate: frame_mask must have as many frames T as divide L = 12, got 7",
    ),
    BadCall(
        "no_scale0",
        lambda a: a | {"scale0": None},
        ValueError,
        "modulate: frame_mask, shift0 and scale0 must be given together",
    ),
    BadCall(
        "no_mask",
        lambda a: a | {"frame_mask": None},
        ValueError,
        "modulate: frame_mask, shift0 and scale0 must be given together",
    ),
]

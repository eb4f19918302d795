"""Inputs of guided_euler_step: latents of the releases and what their transformers predict for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    *shape: int,
    guidance_scale: float | None = 7.0,
    has_mask: bool = True,
    num_extra_channels: int = 0,
    has_wide_velocity: bool = False,
) -> Callable[[Maker], dict[str, Any]]:
    """z of `shape` (B, C, T, H, W); `has_wide_velocity`: velocity and dt in at least fp32, as models return them."""

    def make(draw: Maker) -> dict[str, Any]:
        batch, num_channels, num_frames, *size = shape
        dtype = torch.promote_types(draw.dtype, torch.float32) if has_wide_velocity else draw.dtype
        rows = batch if guidance_scale is None else 2 * batch
        arguments = {
            "z": draw.normal(*shape),
            "velocity": draw.normal(rows, num_channels + num_extra_channels, num_frames, *size, dtype=dtype),
            "dt": draw.normal(batch, mean=0.03, std=0.01, dtype=dtype),
            "guidance_scale": guidance_scale,
        }
        return arguments | ({"frame_mask": draw.mask(batch, num_frames)} if has_mask else {})

    return make


def _flops(arguments: dict[str, Any]) -> int:
    return (5 if arguments["guidance_scale"] is not None else 2) * arguments["z"].numel()


CASES = [
    Case("small", _make(2, 4, 3, 4, 4), flops=_flops),
    Case("no_mask", _make(2, 4, 3, 4, 4, has_mask=False), flops=_flops),
    Case("no_guidance", _make(2, 4, 3, 4, 4, guidance_scale=None), flops=_flops),
    Case("learned_variance", _make(2, 4, 3, 4, 4, num_extra_channels=4), flops=_flops),
    Case("wide_velocity", _make(2, 4, 3, 4, 4, has_wide_velocity=True), flops=_flops),
    Case("odd", _make(3, 5, 7, 3, 5), flops=_flops),
    Case("size_one", _make(1, 1, 1, 1, 1), flops=_flops),
    Case("empty_batch", _make(0, 4, 3, 4, 4), flops=_flops),
    Case(
        "stdit3_720p_4s",
        _make(1, 4, 30, 90, 160, num_extra_channels=4, has_wide_velocity=True),
        is_large=True,
        flops=_flops,
        source="Open-Sora 1.2 latents at 720p, 4 s",
    ),
    Case(
        "stdit3_720p_16s",
        _make(1, 4, 120, 90, 160, num_extra_channels=4, has_wide_velocity=True),
        is_large=True,
        flops=_flops,
        source="Open-Sora 1.2 latents at 720p, 16 s",
    ),
]

ERRORS = [
    BadCall(
        "integer_z", lambda a: a | {"z": a["z"].int()}, TypeError, "guided_euler_step: z must have a floating-point"
    ),
    BadCall("flat_z", lambda a: a | {"z": a["z"][0]}, ValueError, r"guided_euler_step: z must have shape \(B, C, T, H"),
    BadCall(
        "velocity_not_doubled",
        lambda a: a | {"velocity": a["velocity"][:2]},
        ValueError,
        r"guided_euler_step: velocity must have shape \(2B, >=C, T, H, W\)",
    ),
    BadCall(
        "velocity_doubled_without_guidance",
        lambda a: a | {"guidance_scale": None},
        ValueError,
        r"guided_euler_step: velocity must have shape \(B, >=C, T, H, W\)",
    ),
    BadCall(
        "few_channels",
        lambda a: a | {"velocity": a["velocity"][:, :3]},
        ValueError,
        "guided_euler_step: velocity must have at least z's 4 channels, got 3",
    ),
    BadCall("scalar_dt", lambda a: a | {"dt": a["dt"][0]}, ValueError, r"guided_euler_step: dt must have shape \(B,\)"),
    BadCall(
        "float_mask",
        lambda a: a | {"frame_mask": a["frame_mask"].float()},
        TypeError,
        "guided_euler_step: frame_mask must be boolean",
    ),
    BadCall(
        "mask_of_pixel_frames",
        lambda a: a | {"frame_mask": a["frame_mask"].repeat(1, 2)},
        ValueError,
        r"guided_euler_step: frame_mask must have shape \(B, T\)",
    ),
]

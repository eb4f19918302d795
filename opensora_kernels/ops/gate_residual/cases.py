"""Inputs of gate_residual: branches of STDiT blocks, with and without conditioning frames and the next modulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    batch: int, num_frames: int, num_sites: int, num_channels: int, *, has_mask: bool = True, has_shift: bool = False
) -> Callable[[Maker], dict[str, Any]]:
    """x and y of `num_frames` x `num_sites` tokens; `has_shift`: the next modulation as well."""

    def make(draw: Maker) -> dict[str, Any]:
        shape = (batch, num_frames * num_sites, num_channels)
        arguments = {"x": draw.normal(*shape), "y": draw.normal(*shape)}
        names = ("gate", "shift", "scale") if has_shift else ("gate",)
        for name in (*names, *(f"{name}0" for name in names if has_mask)):
            arguments[name] = draw.normal(batch, num_channels, std=0.5)
        if has_mask:
            arguments["frame_mask"] = draw.mask(batch, num_frames)
        return arguments

    return make


def _make_strided(draw: Maker) -> dict[str, Any]:
    """y with tokens before samples in memory; the gate as a row of a (B, 6, C) table."""
    return {
        "x": draw.normal(2, 12, 8),
        "y": draw.normal(12, 2, 8).transpose(0, 1),
        "gate": draw.normal(2, 6, 8, std=0.5)[:, 2],
    }


def _flops(arguments: dict[str, Any]) -> int:
    return (10 if arguments.get("shift") is not None else 2) * arguments["x"].numel()


CASES = [
    Case("small", _make(2, 3, 4, 16), flops=_flops),
    Case("no_mask", _make(2, 3, 4, 16, has_mask=False), flops=_flops),
    Case("with_modulate", _make(2, 3, 4, 16, has_shift=True), flops=_flops),
    Case("with_modulate_no_mask", _make(2, 3, 4, 16, has_mask=False, has_shift=True), flops=_flops),
    Case("strided", _make_strided, flops=_flops),
    Case("odd", _make(3, 5, 7, 37), flops=_flops),
    Case("size_one", _make(1, 1, 1, 1), flops=_flops),
    Case("empty_batch", _make(0, 3, 4, 16), flops=_flops),
    Case(
        "stdit3_720p_4s",
        _make(2, 30, 3600, 1152),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 block at 720p, 4 s, guided, with frame mask",
    ),
    Case(
        "stdit3_720p_4s_with_modulate",
        _make(2, 30, 3600, 1152, has_shift=True),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 block at 720p, 4 s, guided, with frame mask and the next modulation",
    ),
    Case(
        "stdit3_240p_2s_no_mask",
        _make(2, 15, 405, 1152, has_mask=False),
        is_large=True,
        flops=_flops,
        source="STDiT3-XL/2 block at 240x426, 2 s, guided",
    ),
]

ERRORS = [
    BadCall("integer_y", lambda a: a | {"y": a["y"].int()}, TypeError, "gate_residual: y must have a floating-point"),
    BadCall("short_y", lambda a: a | {"y": a["y"][:, 1:]}, ValueError, "gate_residual: y must have shape that of x"),
    BadCall(
        "wide_gate", lambda a: a | {"gate": a["gate"].repeat(1, 2)}, ValueError, "gate_residual: gate must have sha"
    ),
    BadCall(
        "float_mask",
        lambda a: a | {"frame_mask": a["frame_mask"].float()},
        TypeError,
        "gate_residual: frame_mask must be boolean",
    ),
    BadCall(
        "frames_that_do_not_divide",
        lambda a: a | {"frame_mask": a["frame_mask"].repeat(1, 3)[:, :7]},
        ValueError,
        "gate_residual: frame_mask must have as many frames T as divide L = 12, got 7",
    ),
    BadCall("no_gate0", lambda a: a | {"gate0": None}, ValueError, "gate_residual: frame_mask and gate0 must be given"),
    BadCall(
        "shift_alone", lambda a: a | {"shift": a["gate"]}, ValueError, "gate_residual: shift and scale must be given"
    ),
    BadCall(
        "no_shift0",
        lambda a: a | {"shift": a["gate"], "scale": a["gate"], "scale0": a["gate"]},
        ValueError,
        "gate_residual: shift0 and scale0 must be given if both a frame_mask and shift are",
    ),
]

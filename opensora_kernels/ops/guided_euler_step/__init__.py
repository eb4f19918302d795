"""Classifier-free guidance and one Euler step of a flow."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels import _triton
from opensora_kernels.checks import check_float, check_mask, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["guided_euler_step"]


def guided_euler_step(
    z: Tensor, velocity: Tensor, dt: Tensor, *, guidance_scale: float | None, frame_mask: Tensor | None = None
) -> Tensor:
    """z + dt * (v_null + guidance_scale * (v_conditional - v_null)); frames with frame_mask False keep z.

    Shapes: z (B, C, T, H, W) latents. velocity (2B, C', T, H, W) with C' >= C, the first C channels used, conditional
    rows before null rows; (B, C', T, H, W), used as it is, when guidance_scale is None. dt (B,): the step per sample,
    in the unit of time of the velocity (t / 1000 in Open-Sora). frame_mask (B, T) booleans. Any strides. Returns
    (B, C, T, H, W) in the promoted dtype of z and velocity, channels_last_3d if z is, else contiguous.
    Numbers: guidance is rounded in velocity's dtype after each of its three operations, the product and the sum in the
    promoted dtype of their operands.
    Errors: TypeError for dtypes that are not floating-point, or a mask that is not boolean; ValueError for shapes or
    devices that do not fit.
    Source: Open-Sora v1.2.0, opensora/schedulers/rf/__init__.py, RFLOW.sample.
    """
    op = "guided_euler_step"
    for name, tensor in (("z", z), ("velocity", velocity), ("dt", dt)):
        check_float(op, name, tensor)
    check_shape(op, "z", z, (None,) * 5, "(B, C, T, H, W)")
    num_samples, num_channels, num_frames = z.shape[:3]
    num_rows, meaning = (num_samples, "(B, >=C, T, H, W)")
    if guidance_scale is not None:
        num_rows, meaning = (2 * num_samples, "(2B, >=C, T, H, W)")
    check_shape(op, "velocity", velocity, (num_rows, None, *z.shape[2:]), meaning)
    if velocity.shape[1] < num_channels:
        raise ValueError(f"{op}: velocity must have at least z's {num_channels} channels, got {velocity.shape[1]}")
    check_shape(op, "dt", dt, (num_samples,), "(B,)")
    if frame_mask is not None:
        check_mask(op, "frame_mask", frame_mask)
        check_shape(op, "frame_mask", frame_mask, (num_samples, num_frames), "(B, T)")
    check_same_device(op, z=z, velocity=velocity, dt=dt, frame_mask=frame_mask)
    return call(op, z, velocity, dt, guidance_scale, frame_mask)


def _passes(z: Tensor, velocity: Tensor, *others: object) -> list[int]:
    """z's gradient is that of the result, unless the result is wider."""
    return [0] if torch.promote_types(z.dtype, velocity.dtype) == z.dtype else []


register_op(
    "guided_euler_step",
    "(Tensor z, Tensor velocity, Tensor dt, float? guidance_scale, Tensor? frame_mask) -> Tensor",
    reference.guided_euler_step,
)
_triton.register("guided_euler_step", passes=_passes)

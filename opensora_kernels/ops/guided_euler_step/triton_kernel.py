"""Guidance and one Euler step in Triton: one read of the latents and of both velocities, one write.

Axes: B batch, C channels, T frames, P the H * W positions of a frame.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, planes
from opensora_kernels.norms import memory_format
from opensora_kernels.tuning import configuration


def forward(z: Tensor, velocity: Tensor, dt: Tensor, guidance_scale: float | None, frame_mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(z.dtype, velocity.dtype)
    out = torch.empty(z.shape, dtype=dtype, device=z.device, memory_format=memory_format(z))
    z_BCTP, v_BCTP, out_BCTP = map(_positions, (z, velocity, out))
    tile = _tile("forward", z_BCTP)
    launch(
        _guided_euler_step_forward_kernel,
        (_num_programs(z_BCTP, tile),),
        z_BCTP, v_BCTP, dense(dt), dense(frame_mask), out_BCTP, 0.0 if guidance_scale is None else guidance_scale,
        *z_BCTP.shape, *z_BCTP.stride(), *v_BCTP.stride(), *out_BCTP.stride(),
        HAS_GUIDANCE=guidance_scale is not None, HAS_MASK=frame_mask is not None, **tile,
    )  # fmt: skip
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    z: Tensor,
    velocity: Tensor,
    dt: Tensor,
    guidance_scale: float | None,
    frame_mask: Tensor | None,
) -> list[Tensor | None]:
    grad_z, grad_velocity = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)) for x in (z, velocity)
    )
    grad_BCTP, v_BCTP, gz_BCTP, gv_BCTP = map(_positions, (grads[0], velocity, grad_z, grad_velocity))
    tile = _tile("backward", v_BCTP)
    num_programs = _num_programs(gv_BCTP[: z.shape[0]], tile)
    partial = torch.empty(num_programs if wanted[2] else 0, dtype=torch.float32, device=z.device)
    launch(
        _guided_euler_step_backward_kernel,
        (num_programs,),
        grad_BCTP, v_BCTP, dense(dt), dense(frame_mask), gz_BCTP, gv_BCTP, partial,
        0.0 if guidance_scale is None else guidance_scale, *grad_BCTP.shape, v_BCTP.shape[1],
        *grad_BCTP.stride(), *v_BCTP.stride(), *gz_BCTP.stride(), *gv_BCTP.stride(),
        HAS_GUIDANCE=guidance_scale is not None, HAS_MASK=frame_mask is not None,
        WANTS_Z=wanted[0], WANTS_VELOCITY=wanted[1], WANTS_DT=wanted[2], **tile,
    )  # fmt: skip
    grad_dt = partial.view(z.shape[0], num_programs // max(1, z.shape[0])).sum(1).to(dt.dtype) if wanted[2] else None
    return [grad_z, grad_velocity, grad_dt, None, None]


def _positions(x: Tensor) -> Tensor:
    return planes(x, memory_format(x), per_frame=True)


def _tile(direction: str, x_BCTP: Tensor) -> dict[str, Any]:
    block_c = min(triton.next_power_of_2(int(x_BCTP.shape[1])), 16)
    default = {"BLOCK_C": block_c, "BLOCK_P": 1024 // block_c, "num_warps": 4}
    return configuration("guided_euler_step", f"{direction} C={x_BCTP.shape[1]}", default, x_BCTP.device)


def _num_programs(x_BCTP: Tensor, tile: dict[str, Any]) -> int:
    batch, num_channels, num_frames, num_positions = x_BCTP.shape
    num_tiles = triton.cdiv(num_channels, tile["BLOCK_C"]) * triton.cdiv(num_positions, tile["BLOCK_P"])
    return batch * num_frames * num_tiles


@triton.jit
def _guided_euler_step_forward_kernel(
    z_ptr, v_ptr, dt_ptr, frame_mask_ptr, out_ptr, guidance_scale,
    batch, num_channels, num_frames, num_positions,
    stride_zb, stride_zc, stride_zt, stride_zp, stride_vb, stride_vc, stride_vt, stride_vp,
    stride_ob, stride_oc, stride_ot, stride_op,
    HAS_GUIDANCE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, frame, offs_c, offs_p = _locate(num_channels, num_frames, num_positions, BLOCK_C, BLOCK_P)
    mask = (offs_c < num_channels)[:, None] & (offs_p < num_positions)[None, :]
    z_ptr += sample * stride_zb + frame * stride_zt
    z = tl.load(z_ptr + offs_c[:, None] * stride_zc + offs_p[None, :] * stride_zp, mask=mask, other=0.0)
    moves = True
    mask_v = mask
    if HAS_MASK:
        moves = tl.load(frame_mask_ptr + sample * num_frames + frame) != 0
        mask_v = mask & moves  # frames that stay need no velocity
    v_ptr += sample * stride_vb + frame * stride_vt + offs_c[:, None] * stride_vc + offs_p[None, :] * stride_vp
    v = _guided(v_ptr, batch * tl.cast(stride_vb, tl.int64), mask_v, guidance_scale, HAS_GUIDANCE)
    dt = tl.load(dt_ptr + sample)
    product = v.to(tl.float32) * dt.to(tl.float32)
    if v.dtype == dt.dtype:
        product = product.to(v.dtype).to(tl.float32)
    out = z.to(tl.float32) + product
    if HAS_MASK:
        out = tl.where(moves, out, z.to(tl.float32))
    out_ptr += sample * stride_ob + frame * stride_ot
    out_ptrs = out_ptr + offs_c[:, None] * stride_oc + offs_p[None, :] * stride_op
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _guided_euler_step_backward_kernel(
    grad_ptr, v_ptr, dt_ptr, frame_mask_ptr, grad_z_ptr, grad_v_ptr, partial_ptr, guidance_scale,
    batch, num_channels, num_frames, num_positions, num_channels_v,
    stride_gb, stride_gc, stride_gt, stride_gp, stride_vb, stride_vc, stride_vt, stride_vp,
    stride_zb, stride_zc, stride_zt, stride_zp, stride_ob, stride_oc, stride_ot, stride_op,
    HAS_GUIDANCE: tl.constexpr, HAS_MASK: tl.constexpr,
    WANTS_Z: tl.constexpr, WANTS_VELOCITY: tl.constexpr, WANTS_DT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of z is that of the result. Velocity's has num_channels_v channels, of which num_channels were used;
    in frames that stay it is 0. Per program the sum of grad * v, for dt."""
    sample, frame, offs_c, offs_p = _locate(num_channels_v, num_frames, num_positions, BLOCK_C, BLOCK_P)
    mask_v = (offs_c < num_channels_v)[:, None] & (offs_p < num_positions)[None, :]
    mask = mask_v & (offs_c < num_channels)[:, None]
    grad_ptr += sample * stride_gb + frame * stride_gt
    grad_ptrs = grad_ptr + offs_c[:, None] * stride_gc + offs_p[None, :] * stride_gp
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    if WANTS_Z:
        grad_z_ptr += sample * stride_zb + frame * stride_zt
        grad_z_ptrs = grad_z_ptr + offs_c[:, None] * stride_zc + offs_p[None, :] * stride_zp
        tl.store(grad_z_ptrs, grad.to(grad_z_ptr.dtype.element_ty), mask=mask)
    if HAS_MASK:
        moves = tl.load(frame_mask_ptr + sample * num_frames + frame) != 0
        grad = tl.where(moves, grad, 0.0)
        mask = mask & moves
    if WANTS_VELOCITY:
        grad_v = grad * tl.load(dt_ptr + sample).to(tl.float32)
        grad_v_ptr += sample * stride_ob + frame * stride_ot
        grad_v_ptrs = grad_v_ptr + offs_c[:, None] * stride_oc + offs_p[None, :] * stride_op
        if HAS_GUIDANCE:
            null_ptrs = grad_v_ptrs + batch * tl.cast(stride_ob, tl.int64)
            tl.store(null_ptrs, (grad_v - guidance_scale * grad_v).to(grad_v_ptr.dtype.element_ty), mask=mask_v)
            grad_v = guidance_scale * grad_v
        tl.store(grad_v_ptrs, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask_v)
    if WANTS_DT:
        v_ptr += sample * stride_vb + frame * stride_vt + offs_c[:, None] * stride_vc + offs_p[None, :] * stride_vp
        v = _guided(v_ptr, batch * tl.cast(stride_vb, tl.int64), mask, guidance_scale, HAS_GUIDANCE)
        tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(grad * v.to(tl.float32), 1), 0))


@triton.jit
def _locate(num_channels, num_frames, num_positions, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's sample and frame, and offsets of its channels and positions, which may overrun."""
    num_blocks_c, num_blocks_p = tl.cdiv(num_channels, BLOCK_C), tl.cdiv(num_positions, BLOCK_P)
    frame = tl.program_id(0) // (num_blocks_c * num_blocks_p)
    block = tl.program_id(0) % (num_blocks_c * num_blocks_p)
    offs_c = (block // num_blocks_p * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    offs_p = (block % num_blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    return (frame // num_frames).to(tl.int64), (frame % num_frames).to(tl.int64), offs_c, offs_p


@triton.jit
def _guided(v_ptrs, stride_null, mask, guidance_scale, HAS_GUIDANCE: tl.constexpr):
    """null + guidance_scale * (conditional - null), rounded after each operation as the reference is."""
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    if HAS_GUIDANCE:
        null = tl.load(v_ptrs + stride_null, mask=mask, other=0.0)
        difference = (v.to(tl.float32) - null.to(tl.float32)).to(v.dtype)
        scaled = (guidance_scale * difference.to(tl.float32)).to(v.dtype)
        v = (null.to(tl.float32) + scaled.to(tl.float32)).to(v.dtype)
    return v

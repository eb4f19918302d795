"""Twice the frames in Triton: the first stays, the others are interpolated linearly among themselves; and its adjoint.

Axes: B batch, C channels, T frames, H height, W width, P positions of a frame.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import launch, planes, power_of_two
from opensora_kernels.norms import memory_format
from opensora_kernels.tuning import configuration


def upsample_time(x: Tensor) -> Tensor:
    """(B, 2 T - 1, H, W, C), contiguous, from x (B, C, T, H, W)."""
    num_samples, num_channels, num_frames, height, width = x.shape
    out = torch.empty(num_samples, 2 * num_frames - 1, height, width, num_channels, dtype=x.dtype, device=x.device)
    _run("forward", x, out.permute(0, 4, 1, 2, 3), num_frames - 1)
    return out


def upsample_time_gradient(grad: Tensor, like_x: Tensor) -> Tensor:
    """Of x, in its order of axes, from grad (B, C, 2 T - 1, H, W)."""
    out = torch.empty(like_x.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(like_x))
    _run("backward", grad, out, like_x.shape[2] - 1)
    return out


def _run(direction: str, x: Tensor, out: Tensor, num_interpolated: int) -> None:
    x_BCTP, out_BCTP = planes(x, memory_format(x), per_frame=True), planes(out, memory_format(out), per_frame=True)
    num_samples, num_channels, num_frames, num_positions = out_BCTP.shape
    block_c = power_of_two(num_channels, 64)
    default = {"BLOCK_P": power_of_two(num_positions, 4096 // block_c), "BLOCK_C": block_c}
    key = f"time {direction} C={num_channels} {x.dtype}"
    tile = configuration("upsample_conv3d", key, default | {"num_warps": 4}, x.device)
    num_tiles = triton.cdiv(num_positions, tile["BLOCK_P"])
    launch(
        _upsample_time_kernel if direction == "forward" else _upsample_time_backward_kernel,
        (num_samples * num_frames * num_tiles, triton.cdiv(num_channels, tile["BLOCK_C"])),
        x_BCTP, out_BCTP, num_frames, num_channels, num_positions, num_interpolated, num_tiles,
        *x_BCTP.stride(), *out_BCTP.stride(), **tile,
    )  # fmt: skip


@triton.jit
def _upsample_time_kernel(
    x_ptr, out_ptr, num_frames, num_channels, num_positions, num_interpolated, num_tiles,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_ob, stride_oc, stride_ot, stride_op,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of the interpolated n frames, results 2 i and 2 i + 1 are 3/4 of frame i and 1/4 of the one before or after."""
    sample, frame, offs_p, offs_c, mask = _place(num_frames, num_channels, num_positions, num_tiles, BLOCK_P, BLOCK_C)
    index = tl.maximum(frame - 1, 0)
    near = index // 2
    far = tl.minimum(tl.maximum(near + index % 2 * 2 - 1, 0), num_interpolated - 1)
    near, far = tl.where(frame == 0, 0, near + 1), tl.where(frame == 0, 0, far + 1)
    x_ptrs = x_ptr + sample * stride_xb + offs_p[:, None] * stride_xp + offs_c[None, :] * stride_xc
    x = 0.75 * tl.load(x_ptrs + near * stride_xt, mask=mask, other=0.0).to(tl.float32)
    x += 0.25 * tl.load(x_ptrs + far * stride_xt, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + sample * stride_ob + frame * stride_ot + offs_p[:, None] * stride_op
    tl.store(out_ptrs + offs_c[None, :] * stride_oc, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _upsample_time_backward_kernel(
    grad_ptr, out_ptr, num_frames, num_channels, num_positions, num_interpolated, num_tiles,
    stride_gb, stride_gc, stride_gt, stride_gp, stride_ob, stride_oc, stride_ot, stride_op,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Frame i takes part in results 2 i - 1 to 2 i + 2; at either end the missing one is the outermost once more."""
    sample, frame, offs_p, offs_c, mask = _place(num_frames, num_channels, num_positions, num_tiles, BLOCK_P, BLOCK_C)
    grad_ptrs = grad_ptr + sample * stride_gb + offs_p[:, None] * stride_gp + offs_c[None, :] * stride_gc
    index = tl.maximum(frame - 1, 0)
    near = tl.where(frame == 0, 0, 2 * index + 1)
    after = tl.where(frame == 0, 0, near + 1)
    before = tl.where(frame == 0, 0, tl.maximum(near - 1, 1))
    last = tl.where(frame == 0, 0, tl.minimum(near + 2, 2 * num_interpolated))
    total = tl.load(grad_ptrs + near * stride_gt, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(grad_ptrs + after * stride_gt, mask=mask, other=0.0).to(tl.float32)
    quarter = tl.load(grad_ptrs + before * stride_gt, mask=mask, other=0.0).to(tl.float32)
    quarter += tl.load(grad_ptrs + last * stride_gt, mask=mask, other=0.0).to(tl.float32)
    # the first frame: 3/4 (g + g) + 1/4 (g + g) = 2 g
    total = (0.75 * total + 0.25 * quarter) * tl.where(frame == 0, 0.5, 1.0)
    out_ptrs = out_ptr + sample * stride_ob + frame * stride_ot + offs_p[:, None] * stride_op
    tl.store(out_ptrs + offs_c[None, :] * stride_oc, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place(num_frames, num_channels, num_positions, num_tiles, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sample, frame, positions and channels of a program, and which of these there are."""
    plane_tile = tl.program_id(0).to(tl.int64)
    plane = plane_tile // num_tiles
    offs_p = plane_tile % num_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (offs_p < num_positions)[:, None] & (offs_c < num_channels)[None, :]
    return plane // num_frames, plane % num_frames, offs_p, offs_c, mask

"""RMSNorm over the last axis in Triton. Axes: R rows, C channels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, rows
from opensora_kernels.tuning import configuration, num_row_programs


def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_RC = rows(x)
    num_rows, num_channels = x_RC.shape
    tile = _tile("forward", x_RC)
    launch(
        _rms_norm_forward_kernel,
        (triton.cdiv(num_rows, tile["BLOCK_R"]),),
        x_RC, dense(weight), out, num_rows, num_channels, x_RC.stride(0), x_RC.stride(1), eps,
        HAS_WEIGHT=weight is not None, **tile,
    )  # fmt: skip
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    eps: float,
) -> list[Tensor | None]:
    x_RC, grad_RC = rows(x), rows(grads[0])
    num_rows, num_channels = x_RC.shape
    tile = _tile("backward", x_RC)
    num_programs = num_row_programs(num_rows, tile["BLOCK_R"])
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # One fp32 row of each program's own sum: atomics would add them up in another order every time.
    partial_PC = torch.empty(num_programs if wanted[1] else 0, num_channels, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel,
        (num_programs,),
        x_RC, dense(weight), grad_RC, grad_x, partial_PC, num_rows, num_channels,
        x_RC.stride(0), x_RC.stride(1), grad_RC.stride(0), grad_RC.stride(1), eps,
        HAS_WEIGHT=weight is not None, WANTS_WEIGHT=wanted[1], **tile,
    )  # fmt: skip
    return [grad_x, partial_PC.sum(0).to(weight.dtype) if wanted[1] else None, None]


def _tile(direction: str, x_RC: Tensor) -> dict[str, Any]:
    """Whole rows, several to a program while they are short."""
    block_c = triton.next_power_of_2(x_RC.shape[1])
    elements = 4096 if direction == "forward" else 2048  # the backward pass holds x, its gradient and two sums
    default = {
        "BLOCK_R": max(1, elements // block_c),
        "num_warps": 4 if block_c <= 2048 else 8 if block_c <= 8192 else 16,
    }
    key = f"{direction} C={x_RC.shape[1]} {x_RC.dtype}"
    return {"BLOCK_C": block_c, **configuration("rms_norm", key, default, x_RC.device)}


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, num_channels, stride_xr, stride_xc, eps,
    HAS_WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    mask_c = offs_c < num_channels
    mask = (offs_r < num_rows)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_r[:, None] * stride_xr + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / num_channels + eps)
    out = (wide * rstd[:, None]).to(x.dtype)  # the reference rounds here
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(x.dtype)
        out = (out.to(tl.float32) * weight.to(tl.float32)[None, :]).to(x.dtype)
    tl.store(out_ptr + offs_r[:, None] * num_channels + offs_c[None, :], out, mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, grad_ptr, grad_x_ptr, partial_ptr, num_rows, num_channels,
    stride_xr, stride_xc, stride_gr, stride_gc, eps,
    HAS_WEIGHT: tl.constexpr, WANTS_WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program p takes row blocks p, p + P, p + 2P...: n = x rstd, grad_x = rstd (g w - n mean(g w n)), and sums g n."""
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    mask_c = offs_c < num_channels
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    total_C = tl.zeros([BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        offs_r = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (offs_r < num_rows)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_r[:, None] * stride_xr + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + offs_r[:, None] * stride_gr + offs_c[None, :] * stride_gc, mask=mask, other=0.0)
        wide, grad = x.to(tl.float32), grad.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / num_channels + eps)
        normed = wide * rstd[:, None]
        grad_normed = grad * weight[None, :]
        mean = tl.sum(grad_normed * normed, 1) / num_channels
        grad_x = rstd[:, None] * (grad_normed - normed * mean[:, None])
        offs_out = offs_r[:, None] * num_channels + offs_c[None, :]
        tl.store(grad_x_ptr + offs_out, grad_x.to(x.dtype), mask=mask)
        if WANTS_WEIGHT:
            total_C += tl.sum(grad * normed.to(x.dtype).to(tl.float32), 0)
    if WANTS_WEIGHT:
        offs_p = tl.program_id(0).to(tl.int64) * num_channels
        tl.store(partial_ptr + offs_p + offs_c, total_C, mask=mask_c)

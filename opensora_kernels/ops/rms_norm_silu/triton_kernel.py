"""RMS over channels and SiLU in Triton. Axes: B batch, C channels, P positions.

A program takes some positions of a sample and goes over all their channels once for their lengths and once more, or
twice, for what it writes: in tiles [BLOCK_C, BLOCK_P], for both memory formats. So few positions stay in the
multiprocessor's cache, so that memory is read once. Holding all channels in registers instead takes a power of two of
them: 96 would cost as many instructions as 128, which are what limits this kernel next to memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, planes, power_of_two
from opensora_kernels._triton.silu import silu, silu_backward
from opensora_kernels.norms import memory_format
from opensora_kernels.tuning import configuration


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    layout = memory_format(x)
    x_BCTP = planes(x, layout)
    out = torch.empty(x.shape, dtype=_out_dtype(x, weight, bias), device=x.device, memory_format=layout)
    num_samples, num_channels, _, num_positions = x_BCTP.shape
    tile = _tile("forward", x_BCTP, layout)
    num_blocks = triton.cdiv(num_positions, tile["BLOCK_P"])
    launch(
        _rms_norm_silu_forward_kernel, (num_samples * num_blocks,),
        x_BCTP, dense(weight), dense(bias), out, num_channels, num_positions, num_blocks, eps, num_channels**0.5,
        *_strides(x_BCTP), *_strides(planes(out, layout)),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SILU=activation == "silu", **tile,
    )  # fmt: skip
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> list[Tensor | None]:
    wants_x, wants_weight, wants_bias = wanted[:3]
    layout = memory_format(x)
    x_BCTP, grad_BCTP = planes(x, layout), planes(grads[0], layout)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if wants_x else None
    num_samples, num_channels, _, num_positions = x_BCTP.shape
    tile = _tile("backward", x_BCTP, layout)
    num_blocks = triton.cdiv(num_positions, tile["BLOCK_P"])
    # Each program's own sums S, for the weight and for the bias: atomics would add up in another order every time.
    num_programs, num_sums = num_samples * num_blocks, wants_weight + wants_bias
    partial_NSC = torch.empty(num_programs, num_sums, num_channels, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_silu_backward_kernel, (num_programs,),
        x_BCTP, grad_BCTP, dense(weight), dense(bias), grad_x, partial_NSC,
        num_channels, num_positions, num_blocks, eps, num_channels**0.5,
        *_strides(x_BCTP), *_strides(grad_BCTP), *(_strides(planes(grad_x, layout)) if wants_x else (0, 0, 0)),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SILU=activation == "silu",
        WANTS_X=wants_x, WANTS_WEIGHT=wants_weight, WANTS_BIAS=wants_bias, **tile,
    )  # fmt: skip
    sums_SC = partial_NSC.sum(0)
    grad_weight = sums_SC[0].to(weight.dtype) if wants_weight else None
    grad_bias = sums_SC[-1].to(bias.dtype) if wants_bias else None
    return [grad_x, grad_weight, grad_bias, None, None]


def _out_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The reference multiplies and adds whole tensors, so that parameters of a wider dtype widen its result."""
    dtype = x.dtype
    for parameter in (weight, bias):
        dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
    return dtype


def _strides(x_BCTP: Tensor) -> tuple[int, ...]:
    return x_BCTP.stride(0), x_BCTP.stride(1), x_BCTP.stride(3)


def _tile(direction: str, x_BCTP: Tensor, layout: torch.memory_format) -> dict[str, Any]:
    """32 elements to a thread, and about 12288 with all their channels: 24 KB in bf16, for eight programs at a time."""
    num_channels, num_positions = x_BCTP.shape[1], x_BCTP.shape[3]
    if layout is torch.channels_last_3d:
        name = "channels_last"
        # a thread's 8 channels each need a weight and sums in registers: half as many elements on the way back
        block_c = _block_of_channels(num_channels, most=256)
        block_p = power_of_two(num_positions, most=(4096 if direction == "forward" else 2048) // block_c)
    else:
        name = "contiguous"
        # 32 positions at least: two of the memory's sectors
        block_p = power_of_two(num_positions, most=power_of_two(max(32, 12288 // num_channels), most=256))
        block_c = _block_of_channels(num_channels, most=4096 // block_p)
    default = {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": 4}
    key = f"{direction} {name} C={num_channels} {x_BCTP.dtype}"
    return configuration("rms_norm_silu", key, default, x_BCTP.device)


def _block_of_channels(num_channels: int, most: int) -> int:
    """The largest that divides the channels, or, where only tiny ones do, one that leaves part of the last idle."""
    block = power_of_two(num_channels, most)
    while block > 16 and num_channels % block:
        block //= 2
    return power_of_two(num_channels, most) if num_channels % block else block


@triton.jit
def _lengths(x_ptrs, mask_p, num_channels, stride_xc, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """|x| of each position, whose first channel `x_ptrs` point to."""
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, num_channels, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (offs_c < num_channels)[:, None] & mask_p[None, :]
        x = tl.load(x_ptrs[None, :] + offs_c[:, None] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit
def _before_silu(
    unit, x, weight_ptr, bias_ptr, offs_c, mask_c, root, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """What goes into SiLU, rounded where the reference's tensors are."""
    value = (unit.to(x.dtype).to(tl.float32) * root).to(x.dtype)
    if HAS_WEIGHT:
        weight_C = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
        value = _rounded(value.to(tl.float32) * weight_C.to(tl.float32)[:, None], value, weight_C)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
        value = _rounded(value.to(tl.float32) + bias_C.to(tl.float32)[:, None], value, bias_C)
    return value


@triton.jit
def _rounded(result, left, right):
    """`result` in the dtype that PyTorch gives it: that of both its operands, or fp32 where they differ."""
    if left.dtype == right.dtype:
        result = result.to(left.dtype)
    return result


@triton.jit
def _rms_norm_silu_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_channels, num_positions, num_blocks, eps, root,
    stride_xb, stride_xc, stride_xp, stride_ob, stride_oc, stride_op,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // num_blocks).to(tl.int64)
    offs_p = (program % num_blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_positions
    x_ptrs = x_ptr + sample * stride_xb + offs_p * stride_xp
    out_ptrs = out_ptr + sample * stride_ob + offs_p * stride_op
    length_P = _lengths(x_ptrs, mask_p, num_channels, stride_xc, BLOCK_C, BLOCK_P)
    scale_P = 1.0 / tl.maximum(length_P, eps)  # a division for each element would be the dearest of its instructions
    num_tiles = tl.cdiv(num_channels, BLOCK_C)
    for tile in range(num_tiles):
        # from the last channels, which the cache has seen last
        offs_c = (num_tiles - 1 - tile) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        mask_c = offs_c < num_channels
        mask = mask_c[:, None] & mask_p[None, :]
        x = tl.load(x_ptrs[None, :] + offs_c[:, None] * stride_xc, mask=mask, other=0.0)
        unit = x.to(tl.float32) * scale_P[None, :]
        out = _before_silu(unit, x, weight_ptr, bias_ptr, offs_c, mask_c, root, HAS_WEIGHT, HAS_BIAS)
        if HAS_SILU:
            out = silu(out.to(tl.float32))
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs[None, :] + offs_c[:, None] * stride_oc, out, mask=mask)


@triton.jit
def _rms_norm_silu_backward_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, grad_x_ptr, partial_ptr,
    num_channels, num_positions, num_blocks, eps, root,
    stride_xb, stride_xc, stride_xp, stride_gb, stride_gc, stride_gp, stride_ob, stride_oc, stride_op,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    WANTS_X: tl.constexpr, WANTS_WEIGHT: tl.constexpr, WANTS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """With u = x / max(|x|, eps) and g its gradient: grad_x = (g - u sum(g u)) / |x|, or g / eps where |x| < eps."""
    program = tl.program_id(0)
    sample = (program // num_blocks).to(tl.int64)
    offs_p = (program % num_blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_positions
    x_ptrs = x_ptr + sample * stride_xb + offs_p * stride_xp
    grad_ptrs = grad_ptr + sample * stride_gb + offs_p * stride_gp
    partial_ptr += program.to(tl.int64) * (WANTS_WEIGHT + WANTS_BIAS) * num_channels
    length_P = _lengths(x_ptrs, mask_p, num_channels, stride_xc, BLOCK_C, BLOCK_P)
    scale_P = 1.0 / tl.maximum(length_P, eps)
    along = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    num_tiles = tl.cdiv(num_channels, BLOCK_C)
    for tile in range(num_tiles):
        offs_c = (num_tiles - 1 - tile) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        mask_c = offs_c < num_channels
        unit, grad, factor_C = _unit_and_gradient(
            x_ptrs, grad_ptrs, weight_ptr, bias_ptr, scale_P, offs_c, mask_c, mask_p, stride_xc, stride_gc, root,
            HAS_WEIGHT, HAS_BIAS, HAS_SILU,
        )  # fmt: skip
        product = grad * unit
        along += product * factor_C[:, None]
        if WANTS_WEIGHT:
            tl.store(partial_ptr + offs_c, tl.sum(product, 1) * root, mask=mask_c)
        if WANTS_BIAS:
            tl.store(partial_ptr + WANTS_WEIGHT * num_channels + offs_c, tl.sum(grad, 1), mask=mask_c)
    if WANTS_X:
        along_P = tl.where(length_P < eps, 0.0, tl.sum(along, 0))
        out_ptrs = grad_x_ptr + sample * stride_ob + offs_p * stride_op
        for tile in range(num_tiles):
            offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
            mask_c = offs_c < num_channels
            unit, grad, factor_C = _unit_and_gradient(
                x_ptrs, grad_ptrs, weight_ptr, bias_ptr, scale_P, offs_c, mask_c, mask_p, stride_xc, stride_gc, root,
                HAS_WEIGHT, HAS_BIAS, HAS_SILU,
            )  # fmt: skip
            grad_x = (grad * factor_C[:, None] - unit * along_P[None, :]) * scale_P[None, :]
            mask = mask_c[:, None] & mask_p[None, :]
            tl.store(out_ptrs[None, :] + offs_c[:, None] * stride_oc, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unit_and_gradient(
    x_ptrs, grad_ptrs, weight_ptr, bias_ptr, scale_P, offs_c, mask_c, mask_p, stride_xc, stride_gc, root,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """The unit vector, the gradient before SiLU, and what the vector was multiplied by, all in fp32: the reference's
    roundings on the way would only add its errors."""
    mask = mask_c[:, None] & mask_p[None, :]
    x = tl.load(x_ptrs[None, :] + offs_c[:, None] * stride_xc, mask=mask, other=0.0)
    grad = tl.load(grad_ptrs[None, :] + offs_c[:, None] * stride_gc, mask=mask, other=0.0).to(tl.float32)
    unit = x.to(tl.float32) * scale_P[None, :]
    factor_C = tl.full([mask_c.shape[0]], 1.0, tl.float32) * root
    if HAS_WEIGHT:
        factor_C *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if HAS_SILU:
        value = unit * factor_C[:, None]
        if HAS_BIAS:
            value += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        grad = silu_backward(value, grad)
    return unit, grad, factor_C

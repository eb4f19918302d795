"""Gradients of norm and SiLU, given that of what the convolution read.

The normalised value is computed again from x. Axes: B batch, C channels, T frames, H height, W width, P positions of a
frame, K tiles, G groups; the last axis of sums: over positions, gradient and gradient * normalised value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, planes, power_of_two
from opensora_kernels._triton.silu import silu_backward
from opensora_kernels.tuning import configuration, num_row_programs

from .triton_call import Call
from .triton_prepare import channel_weights, group_affine, norm_constants, rms_affine, unit_rms
from .triton_statistics import tile_of


def prepare_gradients(call: Call, wanted: Call, grad: Tensor, moments_BTG2: Tensor | None) -> dict[str, Tensor]:
    """Of x, norm_weight, norm_bias and statistics, as far as they are wanted, for grad (B, C, T, H, W), any strides."""
    if call.reads_x_itself:
        return {"x": grad}
    if call.norm == "rms":
        return _rms_gradients(call, wanted, grad)
    means_BTG2, found = None, {}
    if call.norm == "group" and (
        call.statistics is None or wanted.norm_weight or wanted.norm_bias or wanted.statistics
    ):
        sums_BTC2 = _group_sums(call, grad, moments_BTG2)
        means_BTG2, found = _group_gradients(call, sums_BTC2, moments_BTG2)
    if wanted.x:
        found["x"] = _input_gradient(call, grad, moments_BTG2, means_BTG2)
    return found


def _group_sums(call: Call, grad: Tensor, moments_BTG2: Tensor) -> Tensor:
    x_BCTP = planes(call.x, call.layout, per_frame=True)
    num_samples, num_channels, num_frames, num_positions = x_BCTP.shape
    tile = tile_of("group sums", num_positions, num_channels, x_BCTP.dtype, x_BCTP.device)
    num_tiles = triton.cdiv(num_positions, tile["BLOCK_P"])
    sums_BTKC2 = torch.empty(
        num_samples, num_frames, num_tiles, num_channels, 2, dtype=torch.float32, device=x_BCTP.device
    )
    launch(
        _prepare_backward_kernel,
        (num_samples * num_frames * num_tiles, triton.cdiv(num_channels, tile["BLOCK_C"])),
        x_BCTP, grad, moments_BTG2, dense(call.norm_weight), dense(call.norm_bias), None, None, sums_BTKC2,
        num_channels, call.num_groups, num_frames, num_positions, call.x.shape[4], num_tiles,
        *x_BCTP.stride(), *grad.stride(), *(0,) * 4,
        **norm_constants(call, moments_BTG2), HAS_MEANS=False, WANTS_SUMS=True, **tile,
    )  # fmt: skip
    return sums_BTKC2.sum(2)


def _group_gradients(call: Call, sums_BTC2: Tensor, moments_BTG2: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What x's own gradient takes from its group, unless the statistics were given; and the small gradients."""
    found = {"norm_bias": sums_BTC2[..., 0].sum((0, 1)), "norm_weight": sums_BTC2[..., 1].sum((0, 1))}
    weighted = sums_BTC2 if call.norm_weight is None else sums_BTC2 * call.norm_weight.to(torch.float32)[:, None]
    totals_BTG2 = weighted.unflatten(2, (call.num_groups, -1)).sum(3)
    if not call.per_frame:
        totals_BTG2 = totals_BTG2.sum(1, keepdim=True)
    frame_size, channels_per_group = call.x.shape[3] * call.x.shape[4], call.x.shape[1] // call.num_groups
    if call.statistics is None:
        num_frames = 1 if call.per_frame else call.x.shape[2]
        return (totals_BTG2 / (frame_size * channels_per_group * num_frames)).contiguous(), found

    num_merged = channels_per_group * (1 if call.per_frame else call.statistics.shape[2])
    group_mean, rstd = moments_BTG2.unbind(-1)
    grad_mean = -rstd * totals_BTG2[..., 0] / num_merged
    grad_squares = -0.5 * rstd.square() * totals_BTG2[..., 1] / (frame_size * num_merged)
    group_mean, grad_mean, grad_squares = (
        of_group.transpose(1, 2).repeat_interleave(channels_per_group, 1)  # (B, C, T or 1)
        for of_group in (group_mean, grad_mean, grad_squares)
    )
    deviation = call.statistics[..., 0].to(torch.float32) - group_mean
    found["statistics"] = torch.stack(
        [grad_mean + 2 * frame_size * grad_squares * deviation, grad_squares.expand_as(deviation)], -1
    )
    return None, found


def _input_gradient(call: Call, grad: Tensor, moments_BTG2: Tensor | None, means_BTG2: Tensor | None) -> Tensor:
    x_BCTP, out = planes(call.x, call.layout, per_frame=True), call.empty(call.x.shape)
    num_samples, num_channels, num_frames, num_positions = x_BCTP.shape
    tile = tile_of("prepare backward", num_positions, num_channels, x_BCTP.dtype, x_BCTP.device)
    num_tiles = triton.cdiv(num_positions, tile["BLOCK_P"])
    launch(
        _prepare_backward_kernel,
        (num_samples * num_frames * num_tiles, triton.cdiv(num_channels, tile["BLOCK_C"])),
        x_BCTP, grad, moments_BTG2, dense(call.norm_weight), dense(call.norm_bias), means_BTG2, out, None,
        num_channels, call.num_groups, num_frames, num_positions, call.x.shape[4], num_tiles,
        *x_BCTP.stride(), *grad.stride(), *planes(out, call.layout, per_frame=True).stride(),
        **norm_constants(call, moments_BTG2), HAS_MEANS=means_BTG2 is not None, WANTS_SUMS=False, **tile,
    )  # fmt: skip
    return out


def _rms_gradients(call: Call, wanted: Call, grad: Tensor) -> dict[str, Tensor]:
    x_BCTP, out = planes(call.x, call.layout, per_frame=True), call.empty(call.x.shape)
    num_samples, num_channels, num_frames, num_positions = x_BCTP.shape
    block_c = triton.next_power_of_2(num_channels)
    block_p = power_of_two(num_positions, max(4096 // block_c, 8))
    default = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8}
    tile = configuration("causal_conv3d", f"rms backward C={num_channels} {x_BCTP.dtype}", default, x_BCTP.device)
    wants_sums = wanted.norm_weight or wanted.norm_bias
    num_tiles = num_samples * num_frames * triton.cdiv(num_positions, tile["BLOCK_P"])
    num_programs = num_row_programs(num_tiles, 1)
    sums_KC2 = torch.empty(num_programs if wants_sums else 0, num_channels, 2, dtype=torch.float32, device=out.device)
    launch(
        _rms_backward_kernel,
        (num_programs,),
        x_BCTP, grad, dense(call.norm_weight), dense(call.norm_bias), out, sums_KC2,
        num_channels, num_frames, num_positions, call.x.shape[4], num_tiles,
        *x_BCTP.stride(), *grad.stride(), *planes(out, call.layout, per_frame=True).stride(),
        call.eps, num_channels**0.5,
        HAS_WEIGHT=call.norm_weight is not None, HAS_BIAS=call.norm_bias is not None,
        HAS_SILU=call.activation == "silu", WANTS_SUMS=wants_sums, **tile,
    )  # fmt: skip
    sums_C2 = sums_KC2.sum(0)
    return {"x": out, "norm_bias": sums_C2[:, 0], "norm_weight": sums_C2[:, 1]}


@triton.jit
def _prepare_backward_kernel(
    x_ptr, grad_ptr, moments_ptr, weight_ptr, bias_ptr, means_ptr, out_ptr, sums_ptr,
    num_channels, num_groups, num_frames, num_positions, width, num_tiles,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_gb, stride_gc, stride_gt, stride_gh, stride_gw,
    stride_ob, stride_oc, stride_ot, stride_op,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    PER_FRAME: tl.constexpr, HAS_MEANS: tl.constexpr, WANTS_SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With WANTS_SUMS the sums of a tile, else the gradient of x; two passes, since the second needs all sums.

    GroupNorm: grad_x = rstd (w g - mean(w g) - n mean(w g n)), n the normalised value, g the gradient after it.
    """
    plane_tile = tl.program_id(0).to(tl.int64)
    plane, tile = plane_tile // num_tiles, plane_tile % num_tiles
    sample, frame = plane // num_frames, plane % num_frames
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_p, mask_c = offs_p < num_positions, offs_c < num_channels
    mask = mask_p[:, None] & mask_c[None, :]
    x_ptr += sample * stride_xb + frame * stride_xt
    grad_ptr += sample * stride_gb + frame * stride_gt
    offs_g = offs_p // width * stride_gh + offs_p % width * stride_gw
    x = tl.load(x_ptr + offs_p[:, None] * stride_xp + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offs_g[:, None] + offs_c[None, :] * stride_gc, mask=mask, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    if NORM == "group":
        mean_C, rstd_C, weight_C, bias_C = group_affine(
            moments_ptr, weight_ptr, bias_ptr, sample, frame, num_frames, offs_c, mask_c, num_channels, num_groups,
            HAS_WEIGHT, HAS_BIAS, PER_FRAME,
        )  # fmt: skip
        unit = (wide - mean_C[None, :]) * rstd_C[None, :]
        if HAS_SILU:
            normed = (wide - mean_C[None, :]) * (rstd_C * weight_C)[None, :] + bias_C[None, :]
            grad = silu_backward(normed.to(x.dtype).to(tl.float32), grad)
        if WANTS_SUMS:
            sums_ptrs = sums_ptr + (plane_tile * num_channels + offs_c) * 2
            tl.store(sums_ptrs, tl.sum(grad, 0), mask=mask_c)
            tl.store(sums_ptrs + 1, tl.sum(grad * unit, 0), mask=mask_c)
        grad *= weight_C[None, :]
        if HAS_MEANS:
            means_plane = plane if PER_FRAME else sample
            ptrs = means_ptr + (means_plane * num_groups + offs_c // (num_channels // num_groups)) * 2
            grad -= tl.load(ptrs, mask=mask_c, other=0.0)[None, :]
            grad -= unit * tl.load(ptrs + 1, mask=mask_c, other=0.0)[None, :]
        grad *= rstd_C[None, :]
    elif HAS_SILU:
        grad = silu_backward(wide, grad)
    if not WANTS_SUMS:
        out_ptr += sample * stride_ob + frame * stride_ot
        out_ptrs = out_ptr + offs_p[:, None] * stride_op + offs_c[None, :] * stride_oc
        tl.store(out_ptrs, grad.to(x.dtype), mask=mask)


@triton.jit
def _rms_backward_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, out_ptr, sums_ptr,
    num_channels, num_frames, num_positions, width, num_tiles,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_gb, stride_gc, stride_gt, stride_gh, stride_gw,
    stride_ob, stride_oc, stride_ot, stride_op, eps, root,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr, WANTS_SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program p takes tiles p, p + P, p + 2 P...: with u = x / |x|, grad_x = (g - u (g . u)) / |x|, and sums."""
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    mask_c = offs_c < num_channels
    weight_C, bias_C = channel_weights(weight_ptr, bias_ptr, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS)
    total_C, total_scaled_C = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    tiles_per_frame = tl.cdiv(num_positions, BLOCK_P)
    for index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        plane = tl.cast(index, tl.int64) // tiles_per_frame
        sample, frame = plane // num_frames, plane % num_frames
        offs_p = tl.cast(index, tl.int64) % tiles_per_frame * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_positions)[:, None] & mask_c[None, :]
        offs_x = sample * stride_xb + frame * stride_xt + offs_p * stride_xp
        offs_g = sample * stride_gb + frame * stride_gt + offs_p // width * stride_gh + offs_p % width * stride_gw
        x = tl.load(x_ptr + offs_x[:, None] + offs_c[None, :] * stride_xc, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + offs_g[:, None] + offs_c[None, :] * stride_gc, mask=mask, other=0.0).to(tl.float32)
        unit, scaled, length_P = unit_rms(x, eps, root)
        if HAS_SILU:
            normed = rms_affine(scaled, weight_C, bias_C, HAS_WEIGHT, HAS_BIAS)
            grad = silu_backward(normed.to(tl.float32), grad)
        if WANTS_SUMS:
            total_C += tl.sum(grad, 0)
            total_scaled_C += tl.sum(grad * scaled.to(tl.float32), 0)
        grad *= weight_C[None, :] * root
        unit = unit.to(tl.float32)
        along_P = tl.where(length_P > eps, tl.sum(grad * unit, 1), 0.0)  # a length held at eps is a constant
        grad_x = (grad - unit * along_P[:, None]) / length_P[:, None]
        offs_out = sample * stride_ob + frame * stride_ot + offs_p * stride_op
        tl.store(out_ptr + offs_out[:, None] + offs_c[None, :] * stride_oc, grad_x.to(x.dtype), mask=mask)
    if WANTS_SUMS:
        sums_ptrs = sums_ptr + (tl.program_id(0).to(tl.int64) * num_channels + offs_c) * 2
        tl.store(sums_ptrs, total_C, mask=mask_c)
        tl.store(sums_ptrs + 1, total_scaled_C, mask=mask_c)
